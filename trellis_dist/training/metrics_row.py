"""The row of an interval: what was measured at its last step, and means since the row before.

Every rank counts and takes part in one small exchange per row; rank 0 writes. docs/monitoring.md says what
each key means.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from trellis_dist.models.counts import flops_per_token
from trellis_dist.parallel import env
from trellis_dist.training.collectives import gather_scalars
from trellis_dist.training.engines.base import StepResult
from trellis_dist.training.engines.factory import uses_bf16
from trellis_dist.training.peak import peak_flops
from trellis_dist.training.step_times import StepClock, slept_seconds

if TYPE_CHECKING:
    from trellis_dist.training.setup import Session

__all__ = ["RowMeter", "memory_bytes"]

MIXTURE_ROWS = 10_000  # rows of an interval whose sources are counted: the last ones


class RowMeter:
    """Counts what happens between two rows of one start of a run."""

    def __init__(self, session: Session) -> None:
        """Listen to the session's engine."""
        self._session, job = session, session.job
        self._on_gpu = session.mesh.device.type == "cuda"
        self._clock = StepClock(session.engine, device=session.mesh.device)
        bf16 = uses_bf16(job.training, session.mesh)
        override = job.logging.peak_tflops
        self._peak = peak_flops(session.mesh.device, bf16=bf16, override_tflops=override)
        self._flops = flops_per_token(job.model, sequence_length=job.data.sequence_length)
        self._first: tuple[int, float] | None = None  # step of this start, and when it was done
        self._reset()

    def _reset(self) -> None:
        self._seconds = self._data = self._exchange = 0.0
        self._steps = self._clipped = self._valid = 0
        self._samples, self._waited = self._session.progress.samples, self._session.loader.waited

    def begin_step(self, *, data_seconds: float) -> None:
        """The rows of a step are there; what comes now is agreement between the ranks and the step itself."""
        self._data += data_seconds
        self._began = self._waiting_clock()

    def agreed(self, valid_tokens: int) -> None:
        """The ranks have agreed that the step is done, over ``valid_tokens`` tokens of the whole mesh."""
        self._valid += valid_tokens
        self._exchange += self._waiting_clock() - self._began

    def _waiting_clock(self) -> float:
        """Seconds; on a CPU those slept, where the system tells."""
        slept = None if self._on_gpu else slept_seconds()
        return time.perf_counter() if slept is None else slept

    def begin_passes(self) -> None:
        """What comes now is the step itself."""
        self._clock.begin()

    def end_step(self, result: StepResult, *, seconds: float) -> None:
        """The step is done and counted; it took ``seconds``, its rows included."""
        self._clock.end()
        if self._first is None:
            self._first = (self._session.progress.step, time.monotonic())
        clip_norm = self._session.job.optimizer.clip_norm
        self._clipped += bool(clip_norm) and result.grad_norm > clip_norm
        self._seconds, self._steps = self._seconds + seconds, self._steps + 1

    def row(self, step: int, *, rate: float, result: StepResult) -> dict[str, float]:
        """Return what is known after ``step``; every rank calls it. Speeds leave validation out."""
        session = self._session
        tokens = self._steps * session.job.training.global_batch_tokens
        row: dict[str, float] = {
            "step": step,
            "tokens": session.progress.tokens,
            "loss/train": result.loss,
            "optim/lr": rate,
            "optim/gradient_norm": result.grad_norm,
            "perf/tokens_per_second": tokens / self._seconds,
            "perf/step_seconds": self._seconds / self._steps,
        }
        if session.job.optimizer.clip_norm:
            row["optim/clip_fraction"] = self._clipped / self._steps
        if self._peak is not None:
            speed = row["perf/tokens_per_second"] * self._flops
            row["perf/mfu"] = speed / (self._peak * session.mesh.world_size)
        row |= self._left(step)
        row |= self._times()
        row |= self._data_row(tokens)
        row |= self._health()
        row |= session.starts.row()
        self._reset()
        return row

    def _left(self, step: int) -> dict[str, float]:
        """Seconds to the last step at the pace of this start, which needs two steps to show."""
        if self._first is None or step <= self._first[0]:
            return {}
        pace = (time.monotonic() - self._first[1]) / (step - self._first[0])
        return {"perf/eta_seconds": pace * (self._session.job.training.steps - step)}

    def _times(self) -> dict[str, float]:
        """Parts of a step on this rank, and what is worst or usual over all ranks."""
        session, steps, parts = self._session, self._steps, self._clock.parts()
        found = {"perf/data_seconds": self._data / steps}
        for part in ("forward", "backward", "reduction", "update"):
            found[f"perf/{part}_seconds"] = parts.get(part, 0.0) / steps
        slept = self._clock.slept()
        exchange = self._exchange + (parts.get("reduction", 0.0) if slept is None else slept)
        saves = session.saver.times()
        memory = memory_bytes(session.mesh.device)
        said = [exchange / self._seconds, (session.loader.waited - self._waited) / steps, *memory.values()]
        shares, waits, *sizes = zip(*gather_scalars(said), strict=True)
        if session.mesh.world_size > 1:
            found["perf/communication_share"] = sum(shares) / len(shares)
        found["perf/loader_wait_seconds"] = max(waits)
        found |= {name: max(all_ranks) for name, all_ranks in zip(memory, sizes, strict=True)}
        stall = saves.get("perf/save_blocked_seconds", 0.0)
        return found | saves | {"perf/save_stall_seconds": stall / steps}

    def _data_row(self, tokens: int) -> dict[str, float]:
        session = self._session
        progress, data = session.progress, session.loader.dataset
        seen = progress.tokens // session.job.data.sequence_length
        row = {
            "data/tokens_seen": float(progress.tokens),
            "data/epoch": progress.samples / data.order.size,
            "data/rows_skipped": float(max(0, progress.samples - seen)),
            "data/utilisation": self._valid / tokens,
        }
        if len(data.source_rows) > 1 and env.is_main():
            first = max(self._samples, progress.samples - MIXTURE_ROWS)
            row |= self._mixture(np.arange(first, progress.samples, dtype=np.int64))
        return row

    def _mixture(self, samples: np.ndarray) -> dict[str, float]:
        """Share of each source in the rows of these samples."""
        session = self._session
        rows, _ = session.loader.dataset.order.rows(samples, session.job.global_rows)
        counts = session.loader.dataset.sources_of(rows)
        return {f"data/mixture/{name}": count / len(samples) for name, count in counts.items()}

    def _health(self) -> dict[str, float]:
        session = self._session
        counts = {
            "health/skipped_steps": session.progress.skipped,
            "health/rollbacks": session.progress.rollbacks,
            "health/slow_ranks": session.guards.slow_ranks,
            "health/failed_saves": session.saver.failures,
        }
        return {name: float(count) for name, count in counts.items()}


def memory_bytes(device: torch.device) -> dict[str, float]:
    """Bytes that this process has of the device's memory; on a CPU what it has resident."""
    if device.type == "cuda":
        return {
            "memory/used_bytes": float(torch.cuda.memory_allocated(device)),
            "memory/peak_bytes": float(torch.cuda.max_memory_allocated(device)),
            "memory/reserved_bytes": float(torch.cuda.memory_reserved(device)),
        }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    statm = Path("/proc/self/statm")
    used = int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else peak
    return {"memory/used_bytes": float(used), "memory/peak_bytes": float(max(peak, used))}
