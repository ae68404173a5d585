"""The training loop: from a job to a trained, saved, measured model.

    agree on valid tokens and on ending | update | measure, validate, save where due

Everything that decides what happens next (valid tokens, losses, a request to end, a failed save) is agreed
between the ranks before it is acted on, so that no rank waits in a collective another never enters.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
from pathlib import Path

from trellis_dist.parallel import env
from trellis_dist.training.closing import Closing, close_run
from trellis_dist.training.collectives import gather_scalars
from trellis_dist.training.combination import check_combination
from trellis_dist.training.engines.base import StepResult
from trellis_dist.training.guards import DivergedError
from trellis_dist.training.job import EXIT_TERMINATED, Job, Outcome, Resume, TrainResult
from trellis_dist.training.metrics import read_rows
from trellis_dist.training.metrics_row import RowMeter
from trellis_dist.training.probes import Probes
from trellis_dist.training.rollback import check_rollback, roll_back
from trellis_dist.training.run_lock import RunLock
from trellis_dist.training.schedule import learning_rate
from trellis_dist.training.setup import Session, open_session, runtime
from trellis_dist.training.termination import TerminationRequest
from trellis_dist.training.watch.open import Report
from trellis_dist.training.watch.replicas import ReplicaError
from trellis_dist.training.watch.spikes import Spike

__all__ = ["EXIT_TERMINATED", "Job", "TrainResult", "run"]


def run(
    job: Job,
    run_dir: Path,
    *,
    resume: Resume = "auto",
    stop_at_step: int | None = None,
    report: Report | None = None,
) -> TrainResult:
    """Train ``job`` in ``run_dir`` until its last step, ``stop_at_step`` or a signal; called on every rank.

    Writes ``recipe.json``, ``metrics.jsonl``, ``console.jsonl``, ``starts.jsonl``, ``tensorboard/``,
    ``profile/`` and ``checkpoints/`` (every rank writes its part). A run killed anywhere continues from its
    newest verified checkpoint, bit for bit on the same mesh and machine.

    Args:
        job: the sections of a recipe.
        run_dir: folder of this run, shared by all ranks.
        resume: "auto" continues where a checkpoint is, "require" insists on one.
        stop_at_step: save and return after this step; the schedule still runs to ``training.steps``.
        report: told why this process is about to end when a step hangs; standard error unless given.

    Raises:
        ValueError: a mesh, data set, model or checkpoint that does not fit, with the remedy; another process
            that trains in ``run_dir``; or a run whose loss or gradient stayed non-finite (``DivergedError``).
        FileNotFoundError: ``resume="require"`` without a checkpoint, or no data set.
        OSError: the last save of this start failed.
    """
    started = time.monotonic()
    last = job.training.steps if stop_at_step is None else min(stop_at_step, job.training.steps)
    if last < 1:
        raise ValueError(f"stop_at_step = {stop_at_step}: use 1 or more steps")
    mesh = check_combination(
        mesh=job.mesh,
        tensor=job.tensor,
        sequence=job.sequence,
        model=job.model,
        data=job.data,
        training=job.training,
        global_rows=job.global_rows,
        world_size=env.world_size(),
    )
    check_rollback(job.training, job.checkpoint)
    job = dataclasses.replace(job, mesh=mesh)
    with runtime(job) as device, RunLock(Path(run_dir)) as lock:
        session = open_session(
            job, Path(run_dir), resume=resume, device=device, started=started, lock=lock, report=report
        )
        if session is None:
            return _finished_before(job, Path(run_dir))
        failed = True
        try:
            result = _Loop(session).until(last)
            _say_closing(session, result)
            failed = False
            return result
        except Exception as error:
            session.starts.end("failed")
            if isinstance(error, DivergedError | ReplicaError):
                session.saver.drain()  # every rank raised it at the same place, and what is saved was sound
            raise
        finally:
            session.close(failed=failed)


def _say_closing(session: Session, result: TrainResult) -> None:
    """Print and log the summary of this start, on rank 0; what was trained and saved does not hang on it."""
    session.starts.end(result.outcome)
    if not env.is_main():
        return
    try:
        closing = _closing(session.job, session.run_dir, result.outcome)
    except Exception as error:
        session.metrics.say(f"alert: {result.outcome}, without a summary: {error!r}")
    else:
        session.metrics.say(closing.text, kind="end", **closing.facts)


def _closing(job: Job, run_dir: Path, outcome: Outcome) -> Closing:
    training = job.training
    tokens = training.global_batch_tokens
    return close_run(run_dir, outcome=outcome, steps=training.steps, tokens_per_step=tokens)


def _finished_before(job: Job, run_dir: Path) -> TrainResult:
    """Report a run that has nothing left to do from its own metrics."""
    if env.is_main():
        with contextlib.suppress(Exception):  # as above
            print(_closing(job, run_dir, "finished").text, file=sys.stderr, flush=True)
    rows = read_rows(run_dir / "metrics.jsonl")
    validation = [row for row in rows if "loss/validation" in row]
    steps = job.training.steps
    return TrainResult(
        outcome="finished",
        step=steps,
        tokens=steps * job.training.global_batch_tokens,
        resumed_step=steps,
        loss=rows[-1].get("loss/train") if rows else None,
        validation=_validation_part(validation[-1]) if validation else {},
    )


def _validation_part(row: dict[str, float]) -> dict[str, float]:
    return {key: row[key] for key in ("loss/validation", "validation/bits_per_byte") if key in row}


class _Loop:
    """The state of one start of a run that nothing has to remember."""

    def __init__(self, session: Session) -> None:
        self.session, self.request = session, TerminationRequest()
        self.loss: float | None = None
        self.validation: dict[str, float] = {}
        self.measured: dict[str, float] = {}  # at the last step
        self.first_loss: float | None = None
        self._meter, self._probes = RowMeter(session), Probes(session)
        self._busy = 0.0  # seconds this rank computed in the last step

    def until(self, last: int) -> TrainResult:
        """Train up to step ``last`` and save."""
        session, terminated = self.session, False
        with self.request:
            self._finish_row()
            while session.progress.step < last and not terminated:
                terminated = self._step()
            self._arm("saving the last step", long=True)
            terminated = not self._finish() or terminated
        finished = session.progress.step >= session.job.training.steps
        # A last step that is not saved for want of time is another start's to do again.
        outcome: Outcome = "terminated" if terminated else "finished" if finished else "stopped"
        return self._result(outcome)

    def _finish(self) -> bool:
        """Save the last step; when asked to end, as far as that fits into the grace period. True if saved."""
        session, request = self.session, self.request
        if session.progress.step != session.saver.saved_step:
            session.guards.check_replicas(session.progress.step, saving=True)
        within = session.job.checkpoint.grace_s - request.waited if request.received else math.inf
        saved = session.saver.finish(session.engine, session.progress, measured=self.measured, within=within)
        if request.received:
            grace = f"{request.waited:.1f} s after it, of {session.job.checkpoint.grace_s:.0f} s"
            session.metrics.say(
                f"{request.name}: step {session.saver.saved_step} is saved ({grace}); start again to resume"
            )
        return saved

    def _step(self) -> bool:
        """Do one step with what is due after it; True when any rank was asked to end (no step is done)."""
        session, begin = self.session, time.monotonic()
        self._arm("reading rows", long=self.first_loss is None, ahead=1)
        batches = session.loader.micro_batches(session.progress.samples)
        self._meter.begin_step(data_seconds=time.monotonic() - begin)
        counted = sum(batch.valid_tokens for batch in batches)
        session.watch.enter("agreement between the ranks")
        said = [counted, self.request.received, session.saver.status, self._busy]
        valid, asked, statuses, busy = zip(*gather_scalars(said), strict=True)
        session.saver.settle(statuses)
        if any(asked):
            return True
        step = session.progress.step + 1
        session.guards.note_busy(step - 1, busy)
        rate = self._rate(step)
        # Every sequence and tensor rank counts the whole rows, so each token was counted sp * tp times.
        tokens = int(sum(valid)) // (session.mesh.sp * session.mesh.tp)
        session.guards.before_step()
        self._meter.agreed(tokens)
        self._probes.before_step(step, batches)
        self._meter.begin_passes()
        session.profiler.before_step(step)
        session.busy.begin()
        result = session.engine.train_step(batches, lr=rate, valid_tokens=max(1, tokens))
        self._busy = session.busy.finish()
        self._advance(step, result, time.monotonic() - begin)
        self._profile_after(step)
        spike = session.guards.note_result(step, result, batches, samples=session.progress.samples)
        if spike is None or not self._rolled_back(spike):
            self._afterwards(step, rate, result)
        return False

    def _profile_after(self, step: int) -> None:
        """Tell the profiler; where ranks write their profiles, which may take minutes, all wait for them."""
        profiler = self.session.profiler
        if not profiler.writes_after(step):
            return profiler.after_step(step)
        self._arm("writing the profile", long=True)
        profiler.after_step(step)
        gather_scalars([step])
        return self._arm("measuring", long=False)

    def _rolled_back(self, spike: Spike) -> bool:
        """Say that there is a spike, and go back before it if the run is to."""
        session = self.session
        session.metrics.say(f"alert: step {session.progress.step}: {spike}")
        if session.job.training.spike_action != "rollback":
            return False
        self._arm("rollback", long=True)
        done = roll_back(session, spike)
        where = f"went back to step {session.progress.step}; the rows in between are skipped"
        session.metrics.say(f"rollback: {where if done else 'no checkpoint before the spike, going on'}")
        return done

    def _arm(self, operation: str, *, long: bool, ahead: int = 0) -> None:
        """Begin a phase of the step that is done, or ``ahead`` of it."""
        training = self.session.job.training
        seconds = training.first_step_timeout_s if long else training.step_timeout_s
        self.session.watch.arm(seconds, step=self.session.progress.step + ahead, operation=operation)

    def _rate(self, step: int) -> float:
        job = self.session.job
        return learning_rate(step, peak=job.optimizer.lr, steps=job.training.steps, schedule=job.schedule)

    def _advance(self, step: int, result: StepResult, seconds: float) -> None:
        session = self.session
        progress, job = session.progress, session.job
        progress.step = step
        progress.samples += job.global_rows
        progress.tokens += job.training.global_batch_tokens
        progress.skipped += not result.applied
        self.loss = result.loss
        self._meter.end_step(result, seconds=seconds)
        session.starts.note(step, seconds)
        speed = job.training.global_batch_tokens / seconds
        session.metrics.advance(step, loss=result.loss, tokens_per_second=speed)

    def _afterwards(self, step: int, rate: float, result: StepResult) -> None:
        """Validate, write the row, save: whatever is due after ``step``."""
        session, job = self.session, self.session.job
        last = step == job.training.steps
        row = self._row(step, rate, result) if self._row_due(step) else {}
        self.measured = {"loss/train": result.loss}
        if last or (job.training.validation_interval and step % job.training.validation_interval == 0):
            row = row or self._row(step, rate, result)
            if not self._validate(row, last=last):
                return  # somebody is waiting for the end
        self.measured |= {key: row[key] for key in row if key.startswith(("loss/", "validation/"))}
        if row:
            session.metrics.write(row)
        session.guards.check_replicas(step)
        if step % job.checkpoint.interval == 0 and not last:
            self._arm("beginning to save", long=True)
            session.guards.check_replicas(step, saving=True)
            session.saver.save(session.engine, session.progress, measured=self.measured)

    def _validate(self, row: dict[str, float], *, last: bool) -> bool:
        """Add a validation pass to ``row``; False if a request to end broke it off: the next start makes it.

        The one after the last step is not broken off, because no start comes after it.
        """
        self._arm("validation", long=True)
        found = self.session.validator.run(
            self.session.engine, interrupted=None if last else self._asked_to_end
        )
        self.session.saver.pending_row = {} if found else dict(row)
        self.validation = _validation_part(found) or self.validation
        row |= found
        return bool(found)

    def _finish_row(self) -> None:
        """Make the validation that the start before broke off, and write its row."""
        row = dict(self.session.pending_row)
        if row and self._validate(row, last=False):
            # A start that made it too, and died before its next save, has left its own.
            self.session.metrics.rewind(int(row["step"]) - 1)
            self.session.metrics.write(row)

    def _asked_to_end(self) -> bool:
        """Whether any rank was; every rank calls it."""
        return any(row[0] for row in gather_scalars([self.request.received]))

    def _row_due(self, step: int) -> bool:
        job = self.session.job
        regular = self.first_loss is None or step % job.logging.interval == 0
        return regular or step == job.training.steps or self._probes.due(step)

    def _row(self, step: int, rate: float, result: StepResult) -> dict[str, float]:
        """Return what was measured at ``step`` and since the last row."""
        row = self._meter.row(step, rate=rate, result=result)
        if self.first_loss is None:
            self.first_loss = time.monotonic() - self.session.started
            row["perf/seconds_to_first_loss"] = self.first_loss
        return row | self._probes.after_step(step)

    def _result(self, outcome: Outcome) -> TrainResult:
        session = self.session
        return TrainResult(
            outcome=outcome,
            step=session.progress.step,
            tokens=session.progress.tokens,
            resumed_step=session.resumed_step,
            loss=self.loss,
            validation=self.validation,
            seconds=time.monotonic() - session.started,
            seconds_to_first_loss=self.first_loss,
        )
