"""Speed and memory of the compress operation beside its rivals: ``python -m benchmarks.kernels``.

Without a GPU: chunkwise against plain loops, time against length, decoding and memory, to
benchmarks/results/kernels_cpu.json. On a GPU (--device cuda, the default where there is one): every size,
update and rival, to benchmarks/results/kernels_GPU.json. A run that was killed, or that reached --minutes,
goes on where it stopped when it is started again. The tables are printed at the end; --show prints those of
a file.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from benchmarks.kernels.cpu import CpuPlan, cpu_cases
from benchmarks.kernels.device import Device, cuda_device
from benchmarks.kernels.gpu import GpuPlan, gpu_cases, warm_jobs
from benchmarks.kernels.record import Case, Deadline, Record, source_digest
from benchmarks.kernels.tables import floor_table, render
from benchmarks.kernels.targets import Target, cpu_targets, gpu_targets
from benchmarks.kernels.timing import Clock
from benchmarks.machine import machine, versions
from trellis_dist.files import read_json

__all__ = ["main", "run_cpu", "run_gpu"]

RESULTS = Path(__file__).resolve().parents[1] / "results"
RIVAL_PACKAGES = ("flash-linear-attention", "fla-core")
H200 = {"bytes_per_second": 4.8e12, "flops_per_second": 990e12}  # its data sheet: HBM3e, dense bf16
WARM_SHARE = 0.4  # of the time limit, for compiling ahead


def run_cpu(path: Path, plan: CpuPlan, deadline: Deadline, *, clock: Clock | None = None) -> int:
    """Measure on the CPU; the process's exit status."""
    record = Record(path, _identity("cpu", plan.as_json()))
    return _run(record, cpu_cases(plan, clock=clock), deadline, cpu_targets)


def run_gpu(path: Path, plan: GpuPlan, deadline: Deadline, device: Device) -> int:
    """Measure on a GPU; the process's exit status. Compiles ahead when there is something to measure."""
    record = Record(path, _identity("gpu", plan.as_json()))
    cases = gpu_cases(plan, device)
    if "compiled ahead" not in record.cases and record.left(cases):
        seconds = min(600.0, WARM_SHARE * deadline.left)
        ahead = Case("compiled ahead", lambda: device.warm(warm_jobs(plan), seconds), optional=True)
        record.run([ahead], deadline)
    return _run(record, cases, deadline, lambda found: gpu_targets(found, plan))


def _run(record: Record, cases: Sequence[Case], deadline: Deadline, targets: Any) -> int:
    """Measure what is left, print the tables; 1 where a case failed or is left."""
    left = record.run(cases, deadline)
    found: list[Target] = targets(record.cases)
    if left:
        record.data["targets"] = [target.as_json() for target in found]
        record.save()
    else:
        record.finish(targets=[target.as_json() for target in found])
    print(render(record.data))
    failed = [name for name, case in record.cases.items() if "error" in case and not case["optional"]]
    for name in failed:
        print(f"failed: {name}: {record.cases[name]['error']}")
    if left:
        print(f"{len(left)} cases left at the time limit: start again to go on ({', '.join(left)})")
    print(f"wrote {record.path}")
    return 1 if failed or left else 0


def _identity(part: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What makes two runs one."""
    known = versions() | {"cuda of torch": str(torch.version.cuda)}
    for name in RIVAL_PACKAGES:
        try:
            known[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "part": part,
        "machine": machine(),
        "versions": known,
        "source": source_digest("kernels", "benchmarks/kernels"),
        "settings": settings,
    }


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """End the process."""
        self.exit(2, f"{self.prog}: {message}\n")


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="python -m benchmarks.kernels", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument(
        "--output", type=Path, help="the JSON; default benchmarks/results/kernels_DEVICE.json"
    )
    parser.add_argument("--repetitions", type=int, help="measured rounds; default 9 on a CPU, 30 on a GPU")
    parser.add_argument("--minutes", type=float, help="start no case after this; default none, 8 on a GPU")
    parser.add_argument("--floors", action="store_true", help="print the floors of an H200, measure nothing")
    parser.add_argument(
        "--show", type=Path, metavar="JSON", help="print the tables of a file, measure nothing"
    )
    arguments = parser.parse_args(given)
    for name in ("repetitions", "minutes"):
        value = getattr(arguments, name)
        if value is not None and value <= 0:
            parser.error(f"--{name} {value}: give a positive number")
    return arguments


def main(given: Sequence[str] | None = None) -> int:
    """Entry; 2 for what the caller has to change."""
    arguments = _arguments(given)
    try:
        if arguments.show is not None:
            print(render(read_json(arguments.show)), end="")
            return 0
        if arguments.floors:
            print(floor_table(GpuPlan(), **H200))
            return 0
        return _measure(arguments)
    except (ValueError, OSError) as error:
        print(f"python -m benchmarks.kernels: {error}", file=sys.stderr)
        return 2


def _measure(arguments: argparse.Namespace) -> int:
    on_gpu = (arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")) == "cuda"
    minutes = 8.0 if arguments.minutes is None and on_gpu else arguments.minutes
    deadline = Deadline(None if minutes is None else 60 * minutes)
    changed = {} if arguments.repetitions is None else {"repetitions": arguments.repetitions}
    if not on_gpu:
        path = arguments.output or RESULTS / "kernels_cpu.json"
        return run_cpu(path, dataclasses.replace(CpuPlan(), **changed), deadline)
    device = cuda_device()
    path = arguments.output or RESULTS / f"kernels_{device.name}.json"
    return run_gpu(path, dataclasses.replace(GpuPlan(), **changed), deadline, device)


if __name__ == "__main__":
    sys.exit(main())
