"""What splitting the sequence over ranks costs and gives: ``python -m benchmarks.sequence_parallel``.

Writes benchmarks/results/sequence_parallel.json and docs/wavefront.png and prints the tables; about ten
minutes on two quiet cores. A run that was killed goes on where it stopped, and measures again what failed,
when it is started again; --only measures some sections, --again measures them anew; --show prints the tables
of a file.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: every process has one thread

from benchmarks.kernels.record import Deadline, Record
from benchmarks.machine import machine, versions
from benchmarks.sequence_parallel.picture import draw
from benchmarks.sequence_parallel.plan import Plan
from benchmarks.sequence_parallel.sections import all_cases
from benchmarks.sequence_parallel.tables import PART, render
from benchmarks.sequence_parallel.targets import all_targets
from trellis_dist.files import read_json

__all__ = ["main", "measure"]

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks" / "results" / "sequence_parallel.json"
PICTURE = ROOT / "docs" / "wavefront.png"
ROOMS = ("kernels", "trellis_dist/models", "trellis_dist/parallel", "trellis_dist/training/engines")


def measure(path: Path, picture: Path, plan: Plan, *, only: str = "", again: bool = False) -> int:
    """Measure what is left (of the cases that begin with ``only``); 1 where a case failed or is left."""
    record = (_Kept if only else Record)(path, _identity(plan))
    cases = all_cases(plan, record.cases)
    for name in [name for name, case in record.cases.items() if "error" in case]:
        del record.cases[name]
    for case in cases:
        if again and case.name.startswith(only):
            record.cases.pop(case.name, None)
    record.run([case for case in cases if case.name.startswith(only)], Deadline())
    targets = [target.as_json() for target in all_targets(record.cases)]
    left = [case.name for case in record.left(cases)]
    if left:
        record.data["targets"] = targets
        record.save()
    else:
        record.finish(targets=targets)
    print(render(record.data))
    failed = [name for name, case in record.cases.items() if "error" in case]
    for name in failed:
        print(f"failed: {name}: {record.cases[name]['error']}")
    if not left and not failed:
        draw(record.data, picture)
    print(f"wrote {path}" + (f"; left: {', '.join(left)}" if left else f" and {picture}"))
    return 1 if failed or left else 0


class _Kept(Record):
    """A finished record is gone on with too: some of its cases are asked for by name."""

    def _continue(self, found: Any, identity: dict[str, Any]) -> None:
        super()._continue(found | {"complete": False} if isinstance(found, dict) else found, identity)


def _identity(plan: Plan) -> dict[str, Any]:
    """What makes two runs one."""
    return {
        "part": PART,
        "machine": machine(),
        "versions": versions(),
        "source": _source_digest(),
        "settings": plan.as_json(),
    }


def _source_digest() -> str:
    """SHA-256 over what is measured and what measures."""
    digest = hashlib.sha256()
    for room in (*ROOMS, "benchmarks/sequence_parallel"):
        for path in sorted((ROOT / room).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """End the process."""
        self.exit(2, f"{self.prog}: {message}\n")


def main(given: Sequence[str] | None = None) -> int:
    """Entry; 2 for what the caller has to change."""
    name = "python -m benchmarks.sequence_parallel"
    parser = _Parser(prog=name, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULT, help="the JSON")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="the PNG")
    parser.add_argument("--only", default="", help="measure the cases that begin so, such as throughput")
    parser.add_argument("--again", action="store_true", help="measure them although they have a result")
    parser.add_argument("--show", type=Path, metavar="JSON", help="print the tables of a file")
    arguments = parser.parse_args(given)
    try:
        if arguments.show is not None:
            print(render(read_json(arguments.show)), end="")
            return 0
        return measure(
            arguments.output, arguments.picture, Plan(), only=arguments.only, again=arguments.again
        )
    except (ValueError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
