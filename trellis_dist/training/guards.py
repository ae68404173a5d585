"""What watches the numbers of a run: skipped updates, losses that leap, replicas that differ, slow ranks.

Every decision rests on numbers that are equal on all ranks, so that all ranks decide alike.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trellis_dist.parallel import env
from trellis_dist.parallel.mesh import Mesh
from trellis_dist.training.collectives import gather_objects, on_main, together
from trellis_dist.training.config import TrainingConfig
from trellis_dist.training.engines.base import Engine, StepResult
from trellis_dist.training.metrics import MetricsWriter
from trellis_dist.training.watch.diagnostics import dump, finite_rows, summary
from trellis_dist.training.watch.replicas import check_replicas, why_no_copies
from trellis_dist.training.watch.spikes import Spike, SpikeDetector
from trellis_dist.training.watch.stragglers import StragglerDetector

if TYPE_CHECKING:
    from checkpoints.logical import LogicalTensor
    from data_pipeline.loader import Batch

__all__ = ["DivergedError", "Guards", "SkipBudget"]

HISTORY = 100  # steps that a diagnostic dump shows


class DivergedError(ValueError):
    """Too many consecutive steps had a non-finite loss or gradient, or the loss leapt again and again."""


class SkipBudget:
    """Counts consecutive skipped updates; every rank sees the same results and stops at the same step."""

    def __init__(self, allowed: int) -> None:
        """Allow ``allowed`` consecutive skips."""
        self._allowed = allowed
        self.consecutive = 0

    @property
    def used_up(self) -> bool:
        """Whether the next skip stops the run."""
        return self.consecutive >= self._allowed

    def note(self, step: int, result: StepResult) -> None:
        """Count ``result``; raises ``DivergedError`` when the budget is exceeded."""
        if result.applied:
            self.consecutive = 0
            return
        self.consecutive += 1
        if self.consecutive > self._allowed:
            raise DivergedError(
                f"training diverged: {self.consecutive} updates in a row had a non-finite loss or gradient "
                f"(step {step}: loss {result.loss}, gradient norm {result.grad_norm}), more than "
                f"training.max_skipped_steps = {self._allowed}: start again in another --run-dir with a "
                "lower optimizer.lr or a longer schedule.warmup_steps"
            )


class Guards:
    """The watchers of one start of a run; every rank has its own and calls it at the same steps."""

    def __init__(
        self, training: TrainingConfig, *, engine: Engine, mesh: Mesh, metrics: MetricsWriter, run_dir: Path
    ) -> None:
        """Watch what ``training`` asks for; every rank calls this."""
        self._training, self._engine, self._mesh = training, engine, mesh
        self._metrics, self._folder = metrics, run_dir / "diagnostics"
        self._skips = SkipBudget(training.max_skipped_steps)
        self._spikes = SpikeDetector(
            window=training.spike_window,
            deviations=training.spike_deviations,
            patience=training.spike_patience,
        )
        self._stragglers = self._watch_ranks()
        self._compares = self._look_for_replicas()
        self._history: deque[dict[str, float]] = deque(maxlen=HISTORY)
        self._gradients: list[dict[str, Any]] = []

    def _watch_ranks(self) -> StragglerDetector | None:
        ratio, ranks = self._training.straggler_ratio, self._mesh.world_size
        if not ratio or ranks == 1:
            return None
        return StragglerDetector(ranks, ratio=ratio, hosts=gather_objects(socket.gethostname()))

    def _look_for_replicas(self) -> bool:
        if not self._training.replica_check_interval or self._mesh.world_size == 1:
            return False
        reason = why_no_copies(self._engine.model, self._mesh)
        if reason:
            self._metrics.say(f"replica checksums: {reason}")
        return reason is None

    def before_step(self) -> None:
        """Have the gradients looked at in a step whose failure would end the run."""
        last_chance = self._skips.used_up and self._skips.consecutive > 0
        self._engine.inspector = self._inspect if last_chance else None

    def _inspect(self, gradients: list[LogicalTensor]) -> None:
        named = [(item.name.removeprefix("gradient/"), item.local) for item in gradients]
        self._gradients = finite_rows(named, names=self._names())

    def _names(self) -> list[str]:
        return [name for name, p in self._engine.model.named_parameters() if p.requires_grad]

    def note_busy(self, step: int, seconds: Sequence[float]) -> None:
        """Take every rank's computing time of ``step``, and say which ranks have become slow."""
        if self._stragglers is None or not any(seconds):
            return
        for slow in self._stragglers.note(step, seconds):
            self._metrics.say(f"alert: {slow}")

    @property
    def slow_ranks(self) -> int:
        """Ranks that are slow now."""
        return len(self._stragglers.report()) if self._stragglers else 0

    def note_result(
        self, step: int, result: StepResult, batches: Sequence[Batch], *, samples: int
    ) -> Spike | None:
        """Take the result of ``step``; returns a loss spike when it has lasted long enough.

        Raises:
            DivergedError: the budget of skipped updates is used up; ``RUN/diagnostics`` says where the
                numbers stop being finite.
        """
        self._history.append({"step": step, "loss": result.loss, "gradient_norm": result.grad_norm})
        if not result.applied:
            self._metrics.say(
                f"alert: step {step} skipped: loss {result.loss}, gradient norm {result.grad_norm}"
            )
        try:
            self._skips.note(step, result)
        except DivergedError as error:
            raise DivergedError(f"{error}; {self._dump(step, batches, samples)}") from None
        if self._training.spike_action == "off" or not result.applied:
            return None
        return self._spikes.note(step, result.loss)

    def _dump(self, step: int, batches: Sequence[Batch], samples: int) -> str:
        """Leave on every rank what a person needs to find the cause; returns a line."""
        folder = self._folder / f"step-{step:08d}"
        named = [(name, _local(p)) for name, p in self._engine.model.named_parameters() if p.requires_grad]
        weights = finite_rows(named)
        together(
            lambda: dump(
                folder,
                rank=env.rank(),
                step=step,
                weights=weights,
                gradients=self._gradients,
                history=list(self._history),
                tokens=[batch.tokens for batch in batches],
                samples=samples,
            ),
            what="writing the diagnostics",
        )
        return on_main(lambda: f"{summary(folder)}; more in {folder}")

    def check_replicas(self, step: int, *, saving: bool = False) -> None:
        """Compare replicas where that is due after ``step``, and before every save.

        Raises:
            ReplicaError: copies of a weight differ; on every rank.
        """
        if self._compares and (saving or step % self._training.replica_check_interval == 0):
            check_replicas(self._engine.model, self._mesh, step=step)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a resumed run decides the same."""
        return {"spikes": self._spikes.state(), "skips": self._skips.consecutive}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``; an empty one changes nothing."""
        if state:
            self._spikes.load(state["spikes"])
            self._skips.consecutive = int(state["skips"])

    def forget_losses(self) -> None:
        """After a rollback: the losses to come are compared with themselves."""
        self._spikes.forget()


def _local(parameter: Any) -> Any:
    """What this rank holds of a parameter that its engine may have divided."""
    if hasattr(parameter, "ds_tensor"):
        return parameter.ds_tensor
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter
