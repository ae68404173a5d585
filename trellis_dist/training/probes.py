"""Looks at what only this model has, every ``logging.probe_interval`` steps; see docs/monitoring.md.

A look costs one forward pass of a micro-batch a little: taps in the trellis layers copy a few numbers
(``probes_sample``), what they say is computed when the step is over (``probes_measure``), and rank 0 gathers
the heads of all ranks. Nothing that trains changes by a bit, and what goes wrong is a line on the console.

With torch.compile the operation is inside a graph, which a tap would change. There the micro-batch is
evaluated once more, without the graphs: a forward pass, which can only fail as one of a step does, and ends
the run as that would.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trellis_dist.models.mixers.trellis import TrellisMixer
from trellis_dist.parallel import env
from trellis_dist.training.collectives import gather_objects
from trellis_dist.training.engines.base import Engine
from trellis_dist.training.probes_measure import measure
from trellis_dist.training.probes_sample import LayerSample, Tap, looks
from trellis_dist.training.writers import Histogram

if TYPE_CHECKING:
    from data_pipeline.loader import Batch
    from trellis_dist.training.setup import Session

__all__ = ["LayerLook", "Probes", "Report", "UpdateRatio", "merge"]

WEIGHTS = 1 << 20  # of this rank's weights whose change is looked at
_RATIO, _MEMORIES = "ratio of update to weights", "look into the memories"
_HEADS = ("norm_key", "norm_value", "rank_key", "rank_value")  # a histogram over the heads of a layer


@dataclass(frozen=True)
class LayerLook:
    """What one rank says of its heads of one layer.

    Attributes:
        layer, first_head: which.
        numbers: by name, fp64 [H].
        means: of the gates by name, [H].
        gates: their histograms by name, one per head; None where no value is finite.
    """

    layer: int
    first_head: int
    numbers: dict[str, NDArray[np.float64]]
    means: dict[str, NDArray[np.float64]]
    gates: dict[str, list[Histogram | None]]


class UpdateRatio:
    """Norm of one update over the norm of the weights: this rank's part of it.

    Of a rank with more than WEIGHTS weights a sample is looked at, so that the copy stays small: of every
    tensor one weight in each n, drawn by a generator of its own. (Every n-th would be the same few columns of
    a matrix whose width shares a factor with n.)
    """

    def __init__(self, engine: Engine) -> None:
        """Copy the weights that this rank counts."""
        self._engine = engine
        every = max(1, -(-sum(weights.numel() for weights in engine.own_weights()) // WEIGHTS))
        self._before = []
        for place, weights in enumerate(engine.own_weights()):
            index = None if every == 1 else _one_of_each(every, weights, seed=place)
            self._before.append((index, (weights if index is None else weights[index]).clone()))

    def squares(self) -> tuple[float, float]:
        """After the update: squared norms of it and of the weights before it, of this rank's share."""
        parts = [torch.zeros(2, dtype=torch.float64)]
        for (index, before), now in zip(self._before, self._engine.own_weights(), strict=True):
            old, new = before.double(), (now if index is None else now[index]).double()
            share = torch.stack([(new - old).square().sum(), old.square().sum()])
            # Each tensor's sample stands for the whole of it.
            parts.append(share * (now.numel() / max(1, len(before))))
        update, weight = torch.stack([part.to(parts[-1].device) for part in parts]).sum(0).tolist()
        return update, weight


def _one_of_each(every: int, weights: Tensor, *, seed: int) -> Tensor:
    """Indices into ``weights`` [n]: one at a random place of each of ceil(n / every) equal parts."""
    count = -(-weights.numel() // every)
    draw = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    index = ((torch.arange(count) + draw) * (weights.numel() / max(1, count))).long()
    return index.clamp_max(weights.numel() - 1).to(weights.device)


@dataclass(frozen=True)
class Report:
    """What one rank says of a look.

    Attributes:
        looks: of its heads.
        squares: those of ``UpdateRatio``.
        failures: what went wrong, by what it was to be.
    """

    looks: list[LayerLook]
    squares: tuple[float, float]
    failures: dict[str, str]


class Probes:
    """The looks of one start of a run; every rank calls them at the same steps."""

    def __init__(self, session: Session) -> None:
        """Find the layers to look at."""
        self._session, self._interval = session, session.job.logging.probe_interval
        self._compiled = session.job.training.compile != "none"
        modules = session.engine.model.modules()
        self._mixers = [module for module in modules if isinstance(module, TrellisMixer)]
        self._looks = looks(session.mesh)
        self._ratio: UpdateRatio | None = None
        self._taps: list[Tap] = []
        self._failures: dict[str, str] = {}

    def due(self, step: int) -> bool:
        """Whether ``step`` is looked at."""
        return bool(self._interval) and step % self._interval == 0

    def before_step(self, step: int, batches: Sequence[Batch]) -> None:
        """Get ready for a look at ``step``, if one is due."""
        self._remove()  # of a look that a rollback broke off
        self._taps, self._ratio, self._failures = [], None, {}
        if not self.due(step):
            return
        with self._survived(_RATIO):
            self._ratio = UpdateRatio(self._session.engine)
        if self._looks:
            self._taps = [Tap(mixer, self._session.mesh) for mixer in self._mixers]
        if self._compiled and self._mixers:
            self._evaluate(batches[:1])

    def _evaluate(self, batches: Sequence[Batch]) -> None:
        """Pass the taps without the graphs; every rank does, for what the layers exchange."""
        try:
            with torch.compiler.set_stance("force_eager"):
                self._session.engine.evaluate(batches)
        finally:
            self._remove()

    @contextlib.contextmanager
    def _survived(self, what: str) -> Iterator[None]:
        """Note an error: a look ends no run, and no rank may miss the exchange that comes after it."""
        try:
            yield
        except Exception as error:
            self._failures[what] = f"{type(error).__name__}: {error}"

    def _remove(self) -> None:
        for tap in self._taps:
            tap.remove()

    def after_step(self, step: int) -> dict[str, float]:
        """The scalars of a look at ``step``; the histograms are written. Empty where none is due."""
        if not self.due(step):
            return {}
        self._remove()
        looks, squares = [], (0.0, 0.0)
        with self._survived(_RATIO):
            if self._ratio is not None:
                squares = self._ratio.squares()
        with self._survived(_MEMORIES):
            looks = self._measured()
        reports = gather_objects(Report(looks, squares, self._failures))
        self._taps, self._ratio, self._failures = [], None, {}
        return self._written(step, reports) if env.is_main() else {}

    def _measured(self) -> list[LayerLook]:
        """What this rank's taps say."""
        failures = [tap.failure for tap in self._taps if tap.failure is not None]
        if failures:
            raise failures[0]
        samples = [tap.taken for tap in self._taps if tap.taken is not None]
        numbers = measure(samples) if samples else []
        return [_look(*both) for both in zip(samples, numbers, strict=True)]

    def _written(self, step: int, reports: Sequence[Report]) -> dict[str, float]:
        """Rank 0: histograms to the sinks, scalars for the row; what failed on any rank is left out."""
        failures = {what: text for report in reports for what, text in report.failures.items()}
        row: dict[str, float] = {}
        if _RATIO not in failures:
            update, weight = np.sum([report.squares for report in reports], axis=0).tolist()
            row["optim/update_to_weight"] = (update / weight) ** 0.5 if weight > 0 else 0.0
        if _MEMORIES not in failures:
            with self._survived(_MEMORIES):
                scalars, histograms = merge([look for report in reports for look in report.looks])
                row |= scalars
                if histograms:
                    self._session.metrics.histograms(step, histograms)
        failures, self._failures = failures | self._failures, {}
        for what, text in failures.items():
            self._session.metrics.say(f"alert: no {what} at step {step}: {text}")
        return row


def _look(sample: LayerSample, numbers: dict[str, Tensor]) -> LayerLook:
    gates = {name: np.asarray(values) for name, values in sample.gates.items()}
    return LayerLook(
        layer=sample.layer,
        first_head=sample.first_head,
        numbers={name: x.double().numpy() for name, x in numbers.items()},
        means={name: values.mean(0, dtype=np.float64) for name, values in gates.items()},
        gates={name: [Histogram.of(one) for one in values.T] for name, values in gates.items()},
    )


def merge(looks: Sequence[LayerLook]) -> tuple[dict[str, float], dict[str, Histogram]]:
    """Scalars (means over the heads of a layer) and histograms by tag, from every rank's heads."""
    scalars: dict[str, float] = {}
    histograms: dict[str, Histogram | None] = {}
    for layer in sorted({look.layer for look in looks}):
        parts = sorted((look for look in looks if look.layer == layer), key=lambda look: look.first_head)
        prefix = f"trellis/layer_{layer:02d}"
        for kind in ("means", "numbers"):
            for name in getattr(parts[0], kind):
                heads = np.concatenate([getattr(part, kind)[name] for part in parts])
                scalars[f"{prefix}/{name}"] = float(heads.mean())
                if name in _HEADS:
                    histograms[f"{prefix}/{name}/heads"] = Histogram.of(heads)
        for part in parts:
            for name, heads_of in part.gates.items():
                for place, one in enumerate(heads_of):
                    histograms[f"{prefix}/{name}/head_{part.first_head + place:02d}"] = one
    return scalars, {tag: one for tag, one in histograms.items() if one is not None}
