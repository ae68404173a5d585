"""Row 18: a run that stops twice and goes on with other ranks, another mesh and another engine each time."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.faults.rank_job import ENGINES, STEPS, exact_rows, job, sources
from benchmarks.faults.rank_pool import pool, to_log
from benchmarks.faults.row import Outcome
from trellis_dist.training.job import Job
from trellis_dist.training.parity.cases import Tolerance

__all__ = ["CHAINS", "change_mesh"]

# A walk from engine to engine that takes every one of the 36 ways, from an engine to itself too.
_WALK = tuple(map(int, "0010203040511213141522324253343544550"))
CHAINS = [_WALK[first : first + 3] for first in range(0, len(_WALK) - 1, 2)]
ON_FOUR: tuple[dict[str, int], ...] = ({"dp": 4}, {"dp": 2, "tp": 2}, {"dp": 2, "sp": 2}, {"sp": 2, "tp": 2})
ON_TWO: tuple[dict[str, int], ...] = ({"tp": 2}, {"sp": 2}, {"dp": 2})
STOPS = (13, 26, STEPS)
TOLERANCE = Tolerance()


def change_mesh(folder: Path, index: int) -> Outcome:
    """4 ranks, then 2, then 4: the rows must be those of an unbroken run, the losses within the tolerance."""
    expected_rows, expected = _unbroken(folder.parent)
    engines = [list(ENGINES)[number] for number in CHAINS[index % len(CHAINS)]]
    meshes = [ON_FOUR[index % 4], ON_TWO[index % 3], ON_FOUR[(index + 1 + index // 4) % 4]]
    rows: dict[str, list[str]] = {}
    for name, mesh, stop in zip(engines, meshes, STOPS, strict=True):
        values = ENGINES[name] | {f"mesh.{axis}": mesh.get(axis, 1) for axis in ("dp", "sp", "tp")}
        ranks = pool(4 if stop != STOPS[1] else 2)
        for found in ranks.run(_run, job(folder.parent, values), folder, stop):
            for counter, digests in found.items():
                rows.setdefault(counter, []).extend(digests)
    way = " -> ".join(_named(name, mesh) for name, mesh in zip(engines, meshes, strict=True))
    wrong = _other_rows(rows, expected_rows)
    worst = {
        key: _worst(exact_rows(folder / "run"), expected, key) for key in ("loss/train", "loss/validation")
    }
    norm = _worst(exact_rows(folder / "run"), expected, "optim/gradient_norm")
    if max(worst.values()) > TOLERANCE.loss or norm > TOLERANCE.norm:
        wrong = wrong or f"losses differ by {worst}, gradient norms by {norm:.1e}"
    numbers = {"relative error of the loss": max(worst.values()), "of the gradient norm": norm}
    return Outcome(not wrong, f"{way}{wrong and ': ' + wrong}", numbers)


def _named(engine: str, mesh: dict[str, int]) -> str:
    return f"{engine} {'x'.join(f'{axis}{size}' for axis, size in mesh.items())}"


def _other_rows(rows: dict[str, list[str]], expected: dict[str, list[str]]) -> str:
    """Which step read other rows than in the unbroken run."""
    if rows.keys() != expected.keys():
        return f"data counters {sorted(rows.keys() ^ expected.keys())} are in one of the two runs"
    other = [counter for counter in rows if sorted(rows[counter]) != sorted(expected[counter])]
    return f"{len(other)} steps read other rows, first after {min(map(int, other))} rows" if other else ""


def _worst(rows: list[dict[str, float]], expected: list[dict[str, float]], key: str) -> float:
    """Largest relative difference over the steps; infinite where a step is missing."""
    mine, theirs = ({row["step"]: row[key] for row in table if key in row} for table in (rows, expected))
    if mine.keys() != theirs.keys():
        return float("inf")
    return max(abs(mine[step] - theirs[step]) / abs(theirs[step]) for step in theirs)


def _unbroken(shared: Path) -> tuple[dict[str, list[str]], list[dict[str, float]]]:
    """Rows by data counter, and metrics, of a run on two ranks that nothing stopped."""
    folder = shared / f"unbroken-{sources()}"
    record = folder / "rows.json"
    if not record.exists():
        folder.mkdir(exist_ok=True)
        merged: dict[str, list[str]] = {}
        for found in pool(2).run(_run, job(shared, ENGINES["local"]), folder, STEPS):
            for counter, digests in found.items():
                merged.setdefault(counter, []).extend(digests)
        record.write_text(json.dumps(merged))
    return json.loads(record.read_text()), exact_rows(folder / "run")


def _run(job: Job, folder: Path, stop: int) -> dict[str, list[str]]:
    """On every rank: train to ``stop``; digests of the rows it read, by data counter (once per replica)."""
    from data_pipeline.prefetch import Prefetcher
    from trellis_dist.parallel import env
    from trellis_dist.training.loop import run

    read, seen = Prefetcher.micro_batches, {}

    def noted(self: Any, counter: int) -> Any:
        batches = read(self, counter)
        rows = [row for batch in batches for row in batch.tokens]
        seen[str(counter)] = [hashlib.sha256(row.numpy().tobytes()).hexdigest() for row in rows]
        return batches

    to_log(folder)
    with patch.object(Prefetcher, "micro_batches", noted):
        run(job, folder / "run", stop_at_step=stop)
    shares_rows = job.mesh.sp * job.mesh.tp
    return seen if env.rank() % shares_rows == 0 else {}
