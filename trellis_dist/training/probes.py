"""Looks at what only this model has, every ``logging.probe_interval`` steps; see docs/monitoring.md.

A look costs one forward pass of a micro-batch a little: taps in the trellis layers copy a few numbers
(``probes_sample``), what they say is computed when the step is over (``probes_measure``), and rank 0 gathers
the heads of all ranks. Nothing that trains changes by a bit, and what goes wrong is a line on the console.

With torch.compile the operation is inside a graph, which a tap would change. There the micro-batch is
evaluated once more, without the graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trellis_dist.models.mixers.trellis import TrellisMixer
from trellis_dist.parallel import env
from trellis_dist.training.collectives import gather_objects, sum_scalars
from trellis_dist.training.engines.base import Engine
from trellis_dist.training.probes_measure import measure
from trellis_dist.training.probes_sample import LayerSample, Tap, looks
from trellis_dist.training.writers import Histogram

if TYPE_CHECKING:
    from data_pipeline.loader import Batch
    from trellis_dist.training.setup import Session

__all__ = ["LayerLook", "Probes", "UpdateRatio", "merge"]

WEIGHTS = 1 << 20  # of this rank's weights whose change is looked at
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
    """Norm of one update over the norm of the weights, of the whole model on any mesh.

    Of a rank with more than WEIGHTS weights every n-th is looked at, so that the copy stays small.
    """

    def __init__(self, engine: Engine) -> None:
        """Copy the weights that this rank counts."""
        self._engine = engine
        total = sum(weights.numel() for weights in engine.own_weights())
        self._stride = max(1, -(-total // WEIGHTS))
        self._before = [weights[:: self._stride].clone() for weights in engine.own_weights()]

    def measure(self) -> float:
        """After the update; every rank calls it. 0 where there was none."""
        update = weight = 0.0
        for before, now in zip(self._before, self._engine.own_weights(), strict=True):
            update += float((now[:: self._stride].double() - before.double()).square().sum())
            weight += float(before.double().square().sum())
        # Ranks take different shares of their weights, where they have more or fewer: scaled to all of them.
        update, weight = sum_scalars([update * self._stride, weight * self._stride])
        return (update / weight) ** 0.5 if weight > 0 else 0.0


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

    def due(self, step: int) -> bool:
        """Whether ``step`` is looked at."""
        return bool(self._interval) and step % self._interval == 0

    def before_step(self, step: int, batches: Sequence[Batch]) -> None:
        """Get ready for a look at ``step``, if one is due."""
        self._remove()  # of a look that a rollback broke off
        self._taps = []
        if not self.due(step):
            return
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

    def _remove(self) -> None:
        for tap in self._taps:
            tap.remove()

    def after_step(self, step: int) -> dict[str, float]:
        """The scalars of a look at ``step``; the histograms are written. Empty where none is due."""
        if not self.due(step):
            return {}
        assert self._ratio is not None, "before_step comes before after_step"
        self._remove()
        row = {"optim/update_to_weight": self._ratio.measure()}
        found, failure = self._measured()
        self._taps, self._ratio = [], None
        gathered = gather_objects((found, failure)) if self._mixers else []
        if env.is_main():
            row |= self._write(step, gathered)
        return row

    def _measured(self) -> tuple[list[LayerLook], str]:
        """What this rank's taps say, and what went wrong with them."""
        try:
            failures = [tap.failure for tap in self._taps if tap.failure is not None]
            if failures:
                raise failures[0]
            samples = [tap.taken for tap in self._taps if tap.taken is not None]
            numbers = measure(samples) if samples else []
            return [_look(*both) for both in zip(samples, numbers, strict=True)], ""
        except Exception as error:  # a look never ends a run
            return [], f"{type(error).__name__}: {error}"

    def _write(self, step: int, gathered: Sequence[tuple[list[LayerLook], str]]) -> dict[str, float]:
        """Rank 0: histograms to the sinks, scalars to the row."""
        failure = next((text for _, text in gathered if text), "")
        if failure:
            self._session.metrics.say(f"alert: no look into the memories at step {step}: {failure}")
            return {}
        scalars, histograms = merge([look for found, _ in gathered for look in found])
        self._session.metrics.histograms(step, histograms)
        return scalars


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
