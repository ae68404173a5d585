"""The fault table, injected for real: ``python -m benchmarks.faults --work DIR``.

Each row is injected as often as its count says, or with --quick a few times. Every trial is appended to
DIR/trials.jsonl when it is done; a run that was killed goes on after the last one, as long as the sources are
the same. What became of them goes to benchmarks/results/faults.json (of a quick run: to DIR/faults.json).
--rows runs some rows, and leaves the others in the file as they are; --show prints the table of the file.
Exit status 1 if a row is not n of n.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.faults.row import Row
from benchmarks.faults.table import render, summary
from benchmarks.faults.trials import Trials
from benchmarks.kernels.record import source_digest
from benchmarks.machine import machine, versions
from trellis_dist.files import read_json, write_json

__all__ = ["RESULT", "main", "measure"]

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks" / "results" / "faults.json"
SOURCES = ("checkpoints", "data_pipeline", "evals", "kernels", "launch", "trellis_dist", "benchmarks/faults")


def all_rows() -> dict[int, Row]:
    """Number -> row, of all row modules."""
    from benchmarks.faults import files, runs, service

    return dict(sorted({**files.ROWS, **runs.ROWS, **service.ROWS}.items()))


def measure(rows: Mapping[int, Row], work: Path, output: Path, *, quick: bool) -> int:
    """Run what is left of `rows`, write `output` after each row; 1 where a row is not n of n."""
    source = source_digest(*SOURCES)
    trials = Trials(work, source)
    identity = {"machine": machine(), "versions": versions(), "quick": quick}
    found = _known(output, identity)
    failed = []
    for number, row in rows.items():
        count = row.quick if quick else row.full
        result = summary(row, trials.run(number, row, count), trials.run_stock(number, row, count))
        found["rows"][str(number)] = result | {"source": source}
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, found)
        print(f"row {number}: {result['passed']} of {result['of']}, {result['seconds']} s", flush=True)
        if result["passed"] != result["of"]:
            failed.append(number)
    print(f"wrote {output}" + (f"; not n of n: rows {', '.join(map(str, failed))}" if failed else ""))
    return 1 if failed else 0


def _known(output: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """What `output` has of the same machine and versions, so that rows can be run one at a time."""
    if output.is_file():
        found: dict[str, Any] = read_json(output)
        if all(found.get(key) == value for key, value in identity.items()):
            return found
        print(f"{output} is of another machine, versions or kind of run: begun afresh")
    return {**identity, "rows": {}}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0, 1 (a row is not n of n) or 2 (misuse)."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder of the trials, on the disk that is tried")
    parser.add_argument("--rows", type=int, nargs="+", help="only these rows")
    parser.add_argument("--quick", action="store_true", help="a few trials of each row")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/faults.json")
    parser.add_argument("--show", action="store_true", help="print the table of the file, run nothing")
    given = parser.parse_args(arguments)
    if given.show:
        print(render(read_json(given.output or RESULT)))
        return 0
    if given.work is None:
        parser.error("give --work DIR")
    torch.set_num_threads(1)  # trials fork, and a pool of threads does not survive that
    rows = all_rows()
    unknown = [number for number in given.rows or () if number not in rows]
    if unknown:
        parser.error(f"--rows {unknown[0]}: there are {', '.join(map(str, rows))}")
    chosen = {number: row for number, row in rows.items() if given.rows is None or number in given.rows}
    output = given.output or (given.work / RESULT.name if given.quick else RESULT)
    return measure(chosen, given.work, output, quick=given.quick)


if __name__ == "__main__":
    sys.exit(main())
