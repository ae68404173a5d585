"""How fast text becomes tokens and tokens become batches: ``python -m benchmarks.data``.

Takes real books (--books FOLDER of Project Gutenberg .txt files; --evals FOLDER of evaluation sets, for
decontamination), copies them with their words in another order to a gigabyte and more, and measures
`prepare` beside bare encoding and a plain script, all stages together and apart, deduplication of two million
documents, memory, kills, and the loader on a billion tokens. About half an hour on two quiet cores and 20 GB
of disk under --work. A run that was killed goes on where it stopped; --only measures some cases, --again
measures them anew; --show prints the tables of benchmarks/results/data.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.data.cases import Bench, Plan, all_cases
from benchmarks.data.derived import all_targets, extrapolation
from benchmarks.data.tables import render
from benchmarks.kernels.record import Deadline, Record, source_digest
from benchmarks.machine import machine, versions
from trellis_dist.files import read_json

__all__ = ["main", "measure"]

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks" / "results" / "data.json"
ROOMS = ("data_pipeline", "benchmarks/data")


class _Kept(Record):
    """A finished record is gone on with too: some of its cases are asked for by name."""

    def _continue(self, found: Any, identity: dict[str, Any]) -> None:
        super()._continue(found | {"complete": False} if isinstance(found, dict) else found, identity)


def measure(path: Path, bench: Bench, *, only: str = "", again: bool = False) -> int:
    """Measure what is left (of the cases that begin with ``only``); 1 where a case failed or is left."""
    identity = {
        "machine": machine(),
        "versions": versions(),
        "source": source_digest(*ROOMS),
        "settings": dataclasses.asdict(bench.plan),
    }
    record = (_Kept if only or again else Record)(path, identity)
    cases = all_cases(bench)
    for name, case in list(record.cases.items()):
        if "error" in case or (again and name.startswith(only)):
            del record.cases[name]
    record.run([case for case in cases if case.name.startswith(only)], Deadline())
    left = [case.name for case in record.left(cases)]
    targets = [target.as_json() for target in all_targets(record.cases)]
    record.data |= {"targets": targets, "extrapolation": extrapolation(record.cases)}
    if left:
        record.save()
    else:
        record.finish()
    print(render(record.data))
    failed = [name for name, case in record.cases.items() if "error" in case]
    print(f"wrote {path}" + (f"; left: {', '.join(left)}" if left else ""))
    return 1 if failed or left else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0, 1 (a case failed or is left) or 2 (misuse)."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__.splitlines()[0])
    parser.add_argument("--books", type=Path, help="folder of Project Gutenberg .txt files")
    parser.add_argument("--evals", type=Path, help="folder of evaluation sets (.jsonl), for decontamination")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "trellis-data-benchmark")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--only", default="", help="cases that begin with this")
    parser.add_argument("--again", action="store_true", help="measure them anew")
    parser.add_argument("--show", action="store_true", help="print the tables of the file, measure nothing")
    given = parser.parse_args(arguments)
    if given.show:
        print(render(read_json(given.output)))
        return 0
    if given.books is None:
        parser.error("--books FOLDER is needed: Project Gutenberg texts, about 20 MB")
    given.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(Plan(), given.books, given.evals, given.work)
    return measure(given.output, bench, only=given.only, again=given.again)


if __name__ == "__main__":
    sys.exit(main())
