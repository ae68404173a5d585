"""The rows of the fault table that take real runs: a trial or two of each, and that they can fail.

One killed rank (row 1) is in tests/launch/test_worker.py, stopped ranks (row 12) in
tests/training/watch/test_hang.py; a run that is asked to end (row 17) in tests/training/test_loop.py and
tests/launch/test_supervise.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.faults import rank_guards, rank_kills, rank_meshes, rank_pool
from benchmarks.faults.rank_hangs import skip_collective
from benchmarks.faults.rank_job import ENGINES, INTERVAL, STEPS, compare, job, sources, unharmed
from benchmarks.faults.rank_kills import kill_all_ranks, kill_in_flight
from benchmarks.faults.rank_meshes import CHAINS
from benchmarks.faults.row import Outcome, Trial
from benchmarks.faults.runs import ROWS
from trellis_dist.training.job import Job


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What the trials of a row share; the ranks that stay for them end with this module."""
    folder = tmp_path_factory.mktemp("faults")
    # What `unharmed` would start the command for, on ranks that are there already.
    whole = folder / f"unharmed-local-{sources()}"
    rank_pool.pool(2).run(train, job(folder, ENGINES["local"]), whole)
    yield folder
    rank_pool.close_pools()


def train(job: Job, run_dir: Path) -> None:
    from trellis_dist.training.loop import run

    run(job, run_dir)


def folder(shared: Path, name: str) -> Path:
    path = shared / name
    path.mkdir()
    return path


def test_all_rows_of_real_runs_are_there() -> None:
    assert sorted(ROWS) == [1, 2, 12, 13, 14, 15, 16, 17, 18]


def test_the_chains_go_from_every_engine_to_every_engine() -> None:
    ways = {way for chain in CHAINS for way in itertools.pairwise(chain)}
    assert ways == {(first, second) for first in range(6) for second in range(6)}


def test_ranks_killed_inside_a_save_are_started_again_to_the_same_bits(shared: Path) -> None:
    outcome = kill_in_flight(folder(shared, "all"), 0)
    assert outcome.ok, outcome.note
    # Training waits for the save in flight before it begins the next one.
    assert outcome.numbers["lost steps"] <= 2 * INTERVAL < STEPS


@pytest.mark.parametrize("lost, ok", [(3, True), (4, False)])
def test_more_steps_lost_than_the_interval_fail_the_row(
    lost: int, ok: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Outcome(True, "local, inside a save", {"lost steps": lost})
    monkeypatch.setattr(rank_kills, "kill_in_flight", lambda folder, index: found)
    outcome = kill_all_ranks(tmp_path, 0)
    assert outcome.ok is ok
    assert outcome.numbers["lost steps"] == lost


def test_a_run_that_differs_is_told(shared: Path) -> None:
    whole = unharmed(shared, {"training.engine": "local"}, "local")
    assert compare(whole, whole) == ""
    other = folder(shared, "other")
    (other / "checkpoints").symlink_to(whole / "checkpoints")
    lines = (whole / "metrics.jsonl").read_text().splitlines()
    (other / "metrics.jsonl").write_text("\n".join(lines[:-1]))
    assert "holds the steps [1, 2, 3" in compare(other, whole)
    (other / "metrics.jsonl").write_text("\n".join([*lines[:6], lines[6].replace("5.", "6."), *lines[7:]]))
    assert compare(other, whole).startswith("step 7: ")
    (other / "metrics.jsonl").write_text("\n".join(lines))
    (other / "checkpoints").unlink()
    (folder(other, "checkpoints") / f"step-{STEPS:08d}").symlink_to(
        sorted((whole / "checkpoints").iterdir())[0]
    )
    assert "tensors differ" in compare(other, whole)


def test_a_skipped_collective_is_named_by_the_command(shared: Path) -> None:
    outcome = skip_collective(folder(shared, "skip"), 2)
    assert outcome.ok, outcome.note


@pytest.mark.parametrize(
    "trial, index",
    [
        (rank_guards.poison_gradient, 1),
        (rank_guards.poison_gradient, 2),
        (rank_guards.poison_gradient, 11),
        (rank_guards.flip_bit, 2),
        (rank_guards.flip_bit, 6),
        (rank_guards.flip_bit, 7),
        (rank_guards.slow_rank, 0),
        (rank_meshes.change_mesh, 3),
    ],
)
def test_faults_on_real_ranks(trial: Trial, index: int, shared: Path) -> None:
    outcome = trial(folder(shared, f"{trial.__name__}-{index}"), index)
    assert outcome.ok, outcome.note


def test_a_fault_that_is_not_injected_fails_its_row(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clean = [("", "embedding_weight")] * 4
    monkeypatch.setattr(rank_guards, "pool", lambda _: Silent(clean))
    assert "not found in time" in rank_guards.flip_bit(folder(shared, "no flip"), 0).note
    applied = {"applied": [True] * 10, "kept": False, "went on": True, "error": ""}
    monkeypatch.setattr(rank_guards, "pool", lambda _: Silent([applied, applied]))
    assert "updates were applied" in rank_guards.poison_gradient(folder(shared, "no poison"), 0).note
    monkeypatch.setattr(rank_guards, "pool", lambda _: Silent([[], []]))
    assert "was slowed from step" in rank_guards.slow_rank(folder(shared, "no delay"), 0).note


class Silent:
    """Ranks on which nothing happens."""

    def __init__(self, answers: list) -> None:
        self.answers = answers

    def run(self, function, job, folder: Path, *arguments) -> list:
        (folder / "rank-0.log").write_text("")
        return self.answers


def test_other_rows_and_other_losses_fail_the_row_of_meshes(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {"0": ["a", "b"], "4": ["c", "d"]}
    assert rank_meshes._other_rows({"0": ["b", "a"], "4": ["c", "d"]}, rows) == ""
    assert "1 steps read other rows, first after 4" in rank_meshes._other_rows(
        {"0": ["a", "b"], "4": ["c", "e"]}, rows
    )
    assert "data counters" in rank_meshes._other_rows({"0": ["a", "b"]}, rows)
    losses = [{"step": 1.0, "loss/train": 2.0}, {"step": 2.0, "loss/train": 4.0}]
    assert rank_meshes._worst([{**losses[0]}, {**losses[1], "loss/train": 4.4}], losses, "loss/train") > 0.09
    assert rank_meshes._worst(losses[:1], losses, "loss/train") == float("inf")
