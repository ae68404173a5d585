"""After a loss spike: back to the checkpoint before it, and on with the rows after it.

The rows between the checkpoint and the end of the spike are not read again (as in PaLM, arXiv 2204.02311,
section 5.1, where restarting a hundred steps before a spike and skipping its batches cured it). The learning
rate follows the step, so the run has as many steps as before and reads that many rows more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from checkpoints.commit import list_steps, remove_checkpoint
from checkpoints.config import CheckpointConfig
from checkpoints.state import CheckpointReader, load_run_state, verify_checkpoint
from trellis_dist.files import REAL
from trellis_dist.training.collectives import on_main, together
from trellis_dist.training.config import TrainingConfig
from trellis_dist.training.guards import DivergedError
from trellis_dist.training.rng import restore_random_states
from trellis_dist.training.watch.spikes import Spike

if TYPE_CHECKING:
    from pathlib import Path

    from trellis_dist.training.setup import Session

__all__ = ["check_rollback", "roll_back"]


def check_rollback(training: TrainingConfig, checkpoint: CheckpointConfig) -> None:
    """Refuse a retention that keeps nothing from before a spike. Raises ``ValueError``."""
    if training.spike_action != "rollback" or checkpoint.keep == 0:
        return
    needed = 1 + -(-training.spike_patience // checkpoint.interval)
    if checkpoint.keep < needed:
        raise ValueError(
            f"checkpoint.keep = {checkpoint.keep} with checkpoint.interval = {checkpoint.interval} may keep "
            f"nothing from before a spike of training.spike_patience = {training.spike_patience} steps: set "
            f"checkpoint.keep to {needed} or more"
        )


def roll_back(session: Session, spike: Spike) -> bool:
    """Restore the newest sound checkpoint before ``spike`` in place; False where there is none.

    Every rank calls it, after the same step. Checkpoints that the spike is in are removed, so that a run
    killed now resumes before it too: there it meets the same spike and decides the same.

    Raises:
        DivergedError: ``training.max_rollbacks`` are used up.
    """
    progress, allowed = session.progress, session.job.training.max_rollbacks
    if progress.rollbacks >= allowed:
        raise DivergedError(
            f"{spike}; the run was rolled back training.max_rollbacks = {allowed} times before: allow more, "
            "or start again in another --run-dir with a lower optimizer.lr"
        )
    session.saver.rest()  # nothing else removes checkpoints from here on
    found = on_main(lambda: _before(session.saver.root, spike.began))
    if found is None:
        return False
    together(lambda: _restore(session, found), what="restoring the checkpoint before a loss spike")
    return True


def _before(root: Path, began: int) -> Path | None:
    """The newest sound checkpoint of a step before ``began``; later ones are removed once it is found."""
    steps = list_steps(root)
    found = next((path for step, path in steps.items() if step < began and not verify_checkpoint(path)), None)
    if found is not None:
        for step, path in steps.items():
            if step >= began:
                remove_checkpoint(path, file_system=REAL)
    return found


def _restore(session: Session, checkpoint: Path) -> None:
    reader, state = CheckpointReader(checkpoint), load_run_state(checkpoint)
    session.engine.load(reader, optimizer_steps=int(state["optimizer_steps"]))
    restore_random_states(reader)
    if session.states is not None:
        session.states.forget()  # the rows to come are not those after the checkpoint's
    progress = session.progress
    # The data counter stays where the spike ended.
    progress.step, progress.tokens, progress.skipped = (
        int(state[key]) for key in ("step", "tokens", "skipped")
    )
    progress.rollbacks += 1
    session.saver.saved_step = progress.step
    session.guards.forget_losses()
    session.metrics.rewind(progress.step)
