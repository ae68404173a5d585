"""The GPU as the benchmark sees it: clock, graph replay, time by kernel, and kernels compiled ahead."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.kernels.record import Deadline
from benchmarks.kernels.sizes import Shape
from benchmarks.kernels.timing import Clock, CudaClock

__all__ = ["Device", "Job", "cuda_device"]


@dataclass(frozen=True)
class Job:
    """A contender to compile ahead, on every shape it will be timed at."""

    contender: str
    shapes: tuple[Shape, ...]

    @property
    def arguments(self) -> list[str]:
        """For ``python -m benchmarks.kernels.warm``."""
        sizes = [
            f"{s.batch},{s.length},{s.heads},{s.width},{s.slots},{s.chunk},{s.update}" for s in self.shapes
        ]
        return [self.contender, *sizes]


@dataclass(frozen=True)
class Device:
    """What the cases need of a device; tests make one of a CPU.

    Attributes:
        name: of the result file, kernels_NAME.json.
        device: where tensors live.
        backend: of ``compress_kv`` and ``decode_step``.
        clock: times a stretch of work.
        capture: a function to one that replays its kernels without the host.
        kernel_times: milliseconds by kernel name of one call.
        warm: compiles the jobs' kernels, as many as fit the seconds; says how it went.
        copy_bytes, matmul_width: sizes of the two ceilings.
    """

    name: str
    device: torch.device
    backend: str
    clock: Clock
    capture: Callable[[Callable[[], object]], Callable[[], object]]
    kernel_times: Callable[[Callable[[], object]], dict[str, float]]
    warm: Callable[[Sequence[Job], float], dict[str, Any]]
    copy_bytes: int
    matmul_width: int = 8192


def cuda_device() -> Device:
    """The current CUDA device. Raises ValueError where there is none."""
    if not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch sees no CUDA device here: use --device cpu")
    name = re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name().lower()).strip("_")
    return Device(
        name=name,
        device=torch.device("cuda"),
        backend="triton",
        clock=CudaClock(),
        capture=_capture,
        kernel_times=_kernel_times,
        warm=warm_in_processes,
        copy_bytes=min(8 << 30, torch.cuda.mem_get_info()[0] // 8),
    )


def _capture(work: Callable[[], object]) -> Callable[[], object]:
    """A CUDA graph of the work, run on a side stream first as capture asks for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def _kernel_times(work: Callable[[], object], times: int = 5) -> dict[str, float]:
    """Mean over a few calls, by torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(times):
            work()
        torch.cuda.synchronize()
    found = {event.key: event.device_time_total / 1e3 / times for event in seen.key_averages()}
    return {name: ms for name, ms in found.items() if ms > 0}


def warm_in_processes(
    jobs: Sequence[Job],
    seconds: float,
    *,
    module: str = "benchmarks.kernels.warm",
    width: int | None = None,
) -> dict[str, Any]:
    """Run every job once in a process of its own, side by side; what came of each.

    Triton compiles on one core, and keeps the result on disk for the process that times it. What is not ready
    in time is compiled there instead.
    """
    width = max(1, len(os.sched_getaffinity(0)) if width is None else width)
    deadline, waiting = Deadline(seconds), list(jobs)
    running: dict[str, subprocess.Popen[str]] = {}
    results: dict[str, str] = {}
    while (waiting or running) and not deadline.passed:
        while waiting and len(running) < width:
            job = waiting.pop(0)
            command = [sys.executable, "-m", module, *job.arguments]
            running[" ".join(job.arguments)] = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
        time.sleep(0.05)
        for name in [name for name, process in running.items() if process.poll() is not None]:
            results[name] = _outcome(running.pop(name))
    for name, process in running.items():
        process.kill()
        process.wait()
        results[name] = "stopped at the time limit"
    results |= {" ".join(job.arguments): "not started in time" for job in waiting}
    return {"jobs": results}


def _outcome(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None, "opened with a pipe"
    lines = process.stderr.read().strip().splitlines()
    process.stderr.close()
    return "ready" if process.returncode == 0 else (lines or [f"exit status {process.returncode}"])[-1][:300]
