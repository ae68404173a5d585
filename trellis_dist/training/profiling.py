"""`--profile`: a few steps under torch.profiler, a Chrome trace per rank and a table of the top operators.

    ... | warm-up step | step, step, ... | written | ...

The trace opens in https://ui.perfetto.dev or chrome://tracing. The passes of a step stand in it by name:
"forward", "backward", "reduction of the gradients", "update of the weights". Profiling changes no number, and
a trace that cannot be written is an alert, not the end of the run.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from trellis_dist.files import write_json
from trellis_dist.parallel.transfers import sends_under_way, settle_sends
from trellis_dist.training.config import ProfileConfig

__all__ = ["Profiler", "profile_folder"]

TOP = 40  # operators in the table
STOP_S = 10.0  # for a device to come to the end of its work after an error
LARGEST = 256 << 20  # bytes of a compressed trace that is kept


def profile_folder(run_dir: Path, step: int) -> Path:
    """Where the profile whose first profiled step is ``step`` goes."""
    return run_dir / "profile" / f"step-{step:08d}"


class Profiler:
    """Profiles the steps a recipe asks for on one rank; every other step costs a comparison."""

    def __init__(
        self,
        config: ProfileConfig,
        run_dir: Path,
        *,
        rank: int,
        resumed_step: int,
        say: Callable[[str], None],
    ) -> None:
        """Profile what ``config`` asks for in a start that resumes at ``resumed_step``.

        ``say`` is told what was written, or why nothing was.
        """
        wanted = config.enabled and (not config.ranks or rank in config.ranks)
        self._config, self._run_dir, self._rank, self._say = config, run_dir, rank, say
        # The step before the first is profiled too and thrown away: the profiler's own start is slow.
        reachable = config.start_step >= resumed_step + 2
        first = config.start_step if reachable else resumed_step + 3
        self._first = first if wanted else 0
        self._last = first + config.steps - 1 if config.enabled else 0
        self._profile: Any = None
        self._at = 0  # the last step that was profiled

    def writes_after(self, step: int) -> bool:
        """Whether ranks write their profiles after ``step``; the same answer on all ranks."""
        return step == self._last

    def before_step(self, step: int) -> None:
        """``step`` is about to begin."""
        if not self._first or step < self._first - 1:
            return
        if self._profile is None:
            with self._tolerated("begin"):
                self._profile, self._at = self._made(), step - 1
                self._profile.start()

    def after_step(self, step: int) -> None:
        """``step`` is done; after the last one that is profiled the files are written."""
        if self._profile is None:
            return
        with self._tolerated("go on"):
            if step != self._at + 1:
                raise ValueError(f"step {self._at} was rolled back")
            self._at = step
            if step < self._last:
                self._profile.step()
        if step >= self._last:
            self.close()

    def _made(self) -> Any:
        from torch.profiler import ProfilerActivity, profile, schedule

        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        return profile(
            activities=activities,
            schedule=schedule(wait=0, warmup=1, active=self._config.steps, repeat=1),
            record_shapes=self._config.shapes,
            profile_memory=self._config.memory,
        )

    def close(self, *, failed: bool = False) -> None:
        """Stop, and write what was recorded, unless the run ``failed``; may be called twice."""
        profile, first = self._profile, self._first
        if profile is None:
            if first and not failed:
                self._say(f"alert: nothing was profiled: this start ended before step {first}")
            self._first = 0
        elif failed:
            self._drop()
        else:
            self._finish(profile, first)

    def _finish(self, profile: Any, first: int) -> None:
        with self._tolerated("be written"):
            settle_sends()
            profile.stop()
            self._profile, self._first = None, 0
            folder = profile_folder(self._run_dir, first)
            folder.mkdir(parents=True, exist_ok=True)
            self._write(profile, folder)

    def _drop(self) -> None:
        """End a profile without writing it; without this the process would go on recording."""
        profile, self._profile, self._first = self._profile, None, 0
        # It is stopped in the thread that started it, and waits for the device, where a collective may wait
        # for a rank that is dead; and sends must have been waited for, which that rank never takes. Such a
        # process is about to end, and may record until it does.
        if profile is not None and not sends_under_way() and _device_is_idle(STOP_S):
            with contextlib.suppress(Exception):
                profile.stop()

    def _write(self, profile: Any, folder: Path) -> None:
        stem = folder / f"rank-{self._rank:05d}"
        self._write_trace(profile, stem.with_suffix(".trace.json.gz"))
        averages = profile.key_averages()
        key = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        top = sorted(averages, key=lambda event: -getattr(event, key))[:TOP]
        write_json(stem.with_suffix(".operators.json"), [_operator(event) for event in top])
        stem.with_suffix(".operators.txt").write_text(
            averages.table(sort_by=key, row_limit=TOP), encoding="utf-8"
        )
        self._say(f"profile: {folder}; open a *.trace.json.gz in https://ui.perfetto.dev")

    def _write_trace(self, profile: Any, path: Path) -> None:
        """Write the trace; one that is too large to be looked at is dropped, and that is said."""
        attempt = path.with_name(f".{path.name}")  # torch compresses by the end of the name
        try:
            profile.export_chrome_trace(str(attempt))
            size = attempt.stat().st_size
            if size <= LARGEST:
                attempt.replace(path)
                return
            self._say(
                f"alert: the trace of rank {self._rank} has {size >> 20} MiB, more than {LARGEST >> 20}, and "
                "is not kept: profile fewer logging.profile.steps, without shapes and memory"
            )
        finally:
            attempt.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _tolerated(self, what: str) -> Iterator[None]:
        """What goes wrong with a profile ends the profile."""
        try:
            yield
        except Exception as error:
            settle_sends()
            self._drop()
            self._say(f"alert: the profile of rank {self._rank} could not {what}: {error}")


def _device_is_idle(limit_s: float) -> bool:
    """Wait until this rank's GPU has done its work; False if that takes more than ``limit_s``."""
    if not torch.cuda.is_initialized():
        return True
    thread = threading.Thread(
        target=_synchronize, args=(torch.cuda.current_device(),), name="trellis-profile", daemon=True
    )
    thread.start()
    thread.join(limit_s)
    return not thread.is_alive()


def _synchronize(device: int) -> None:
    with contextlib.suppress(RuntimeError):  # an error of the work itself: it is over, too
        torch.cuda.synchronize(device)


def _operator(event: Any) -> dict[str, Any]:
    """One row of the table; times in microseconds, over all profiled steps."""
    return {
        "name": event.key,
        "calls": event.count,
        "self_cpu_us": event.self_cpu_time_total,
        "cpu_us": event.cpu_time_total,
        "self_device_us": event.self_device_time_total,
        "device_us": event.device_time_total,
    }
