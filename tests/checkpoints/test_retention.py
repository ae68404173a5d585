"""Old checkpoints go only while a newer one is known to be good; half a removal leaves nothing loadable."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints.commit import CheckpointWarning, list_steps, remove_checkpoint
from checkpoints.config import CheckpointConfig
from checkpoints.pins import pin, removal_mark
from checkpoints.retention import Retention, retain, retention_of, select
from checkpoints.state import latest_verified
from tests.checkpoints.helpers import DyingFileSystem, FailingFileSystem, Killed, contents, saved
from trellis_dist.files import REAL

STEPS = st.sets(st.integers(0, 60), max_size=14)


def _steps(root: Path) -> list[int]:
    return list(list_steps(root))


def _damage(path: Path) -> None:
    shard = path / "rank-00000.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def _measured(root: Path, losses: dict[int, float | None]) -> None:
    """Steps whose run state holds these validation losses; None: not measured there."""
    for step, loss in losses.items():
        metrics = {} if loss is None else {"loss/validation": loss, "other": -step}
        saved(root, step, state={"step": step, "metrics": metrics})


@pytest.mark.parametrize("keep, left", [(0, [5, 4, 3, 2, 1]), (1, [5]), (2, [5, 4]), (9, [5, 4, 3, 2, 1])])
def test_the_newest_are_kept(tmp_path: Path, keep: int, left: list[int]) -> None:
    for step in range(1, 6):
        saved(tmp_path, step, keep=keep)
    assert _steps(tmp_path) == left
    assert len(list(tmp_path.iterdir())) == len(left)


def test_only_rank_zero_removes(tmp_path: Path) -> None:
    for step in range(1, 5):
        saved(tmp_path, step, world=2, keep=2)
    assert _steps(tmp_path) == [4, 3]


@given(
    steps=STEPS,
    last=st.integers(0, 5),
    every=st.integers(0, 9),
    best=st.integers(0, 5),
    lower=st.booleans(),
    metrics=st.dictionaries(st.integers(0, 60), st.floats(-3, 3) | st.just(math.nan), max_size=20),
    pins=STEPS,
)
@settings(max_examples=400, deadline=None)
def test_what_is_selected(
    steps: set[int],
    last: int,
    every: int,
    best: int,
    lower: bool,
    metrics: dict[int, float],
    pins: set[int],
) -> None:
    kept = select(steps, Retention(last, every, best, lower_is_better=lower), metrics, pins)
    assert kept <= steps
    if last == 0:
        assert kept == steps
        return
    newest = set(sorted(steps)[-last:])
    multiples = {step for step in steps if every and step % every == 0}
    assert newest | multiples | (steps & pins) <= kept
    measured = {step: metrics[step] for step in steps if step in metrics and not math.isnan(metrics[step])}
    better = {s: sum((v < x) if lower else (v > x) for v in measured.values()) for s, x in measured.items()}
    by_metric = {step for step, count in better.items() if count < best}
    only_best = kept - newest - multiples - pins
    assert only_best <= by_metric, "one that nothing asks for is kept"
    assert len(kept & by_metric) >= min(best, len(measured))
    certain = {step for step in by_metric if sum(better[s] <= better[step] for s in measured) <= best}
    assert certain <= kept, "a best one is not"


def test_of_equal_metrics_the_later_step_is_better() -> None:
    assert select([1, 2, 3, 4], Retention(1, best=1), {1: 0.5, 2: 0.5, 3: 0.7}, ()) == {2, 4}


def test_every_nth_best_and_pinned_stay(tmp_path: Path) -> None:
    _measured(tmp_path, {1: 0.9, 2: None, 3: 0.1, 4: 0.2, 5: 0.8, 6: 0.7, 7: math.nextafter(0.1, 1), 8: 0.9})
    pin(tmp_path / "step-00000005", "evaluation")
    # Best: 3 and 7, by far; 4 only as a multiple of 4; 2 was not measured.
    policy = retention_of(CheckpointConfig(interval=1, keep=1, keep_every=4, keep_best=2))
    removed = retain(tmp_path, policy)
    assert [path.name[-1] for path in removed] == ["6", "2", "1"]
    assert _steps(tmp_path) == [8, 7, 5, 4, 3]
    assert retain(tmp_path, Retention(1, best=1, metric="other")) == [
        tmp_path / f"step-0000000{step}" for step in (7, 4, 3)
    ]
    assert _steps(tmp_path) == [8, 5], "the lowest of the other metric is the newest itself"


def test_the_largest_is_best_when_asked_for(tmp_path: Path) -> None:
    _measured(tmp_path, {1: 0.9, 2: 0.1, 3: 0.5})
    assert retain(tmp_path, retention_of(CheckpointConfig(keep=1, keep_best=1, best_mode="max"))) == [
        tmp_path / "step-00000002"
    ]


@pytest.mark.parametrize("metrics", [{"loss/validation": "low"}, {"loss/validation": True}, [0.1], None])
def test_a_metric_that_is_no_number_does_not_compete(tmp_path: Path, metrics: object) -> None:
    saved(tmp_path, 1, state={"metrics": metrics})
    _measured(tmp_path, {2: 0.5, 3: None})
    assert retain(tmp_path, Retention(1, best=1)) == [tmp_path / "step-00000001"]


def test_a_damaged_state_does_not_compete(tmp_path: Path) -> None:
    _measured(tmp_path, {1: 0.5, 2: 0.9, 3: None})
    state = tmp_path / "step-00000001" / "state.json"
    state.write_text(state.read_text().replace("0.5", "0.4"))
    assert retain(tmp_path, Retention(1, best=1)) == [tmp_path / "step-00000001"]


def test_the_only_verified_one_is_never_removed(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        saved(tmp_path, step)
    _damage(tmp_path / "step-00000002")
    _damage(tmp_path / "step-00000003")
    with pytest.warns(CheckpointWarning, match="none of the newest 2 .* nothing older is removed"):
        assert retain(tmp_path, Retention(2)) == []
    assert _steps(tmp_path) == [3, 2, 1]
    with pytest.warns(CheckpointWarning):
        assert latest_verified(tmp_path) == tmp_path / "step-00000001"


def test_a_step_without_its_files_does_not_count_as_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        saved(tmp_path, step)
    (tmp_path / "step-00000003" / "rank-00000.safetensors").unlink()
    assert retain(tmp_path, Retention(1)) == [tmp_path / "step-00000001"]
    assert _steps(tmp_path) == [3, 2], "the damaged newest is left for a person to look at"


def test_a_pinned_one_that_is_damaged_stays_too(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        saved(tmp_path, step)
    for step in (1, 2):
        (tmp_path / f"step-0000000{step}" / "state.json").write_text("")
    pin(tmp_path / "step-00000001", "a person")
    assert retain(tmp_path, Retention(1)) == [tmp_path / "step-00000002"]


def test_the_manifest_goes_first(tmp_path: Path) -> None:
    for step in (1, 2):
        path = saved(tmp_path, step)
    system = DyingFileSystem()
    assert retain(tmp_path, Retention(1), file_system=system) == [tmp_path / "step-00000001"]
    assert system.log[:3] == [
        ("create", removal_mark(path).name.replace("2", "1")),
        ("write", removal_mark(path).name.replace("2", "1")),
        ("unlink", "manifest.json"),
    ]
    assert system.log[3] == ("fsync-directory", "step-00000001")
    assert [item.name for item in tmp_path.iterdir()] == ["step-00000002"]


def test_a_removal_killed_at_every_boundary_leaves_nothing_loadable(tmp_path: Path) -> None:
    counter = DyingFileSystem()
    remove_checkpoint(saved(tmp_path / "count", 1), file_system=counter)
    for stop_at in range(len(counter.log)):
        root = tmp_path / f"at-{stop_at}"
        path = saved(root, 1)
        saved(root, 2)
        with pytest.raises(Killed):
            remove_checkpoint(path, file_system=DyingFileSystem(stop_at))
        (root / "step-00000002").rename(root / "kept")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CheckpointWarning)
            assert (latest_verified(root) is None) == (stop_at > 0)
        (root / "kept").rename(root / "step-00000002")
        saved(root, 3, keep=2)  # finishes the removal
        assert sorted(item.name for item in root.iterdir()) == ["step-00000002", "step-00000003"]


def test_retention_killed_at_every_boundary_recovers(tmp_path: Path) -> None:
    def prepared(root: Path) -> Path:
        _measured(root, {1: 0.3, 2: 0.1, 3: 0.2, 4: None})
        return root

    policy, counter = Retention(1, best=1), DyingFileSystem()
    retain(prepared(tmp_path / "count"), policy, file_system=counter)
    assert len(counter.log) > 16
    for stop_at in range(len(counter.log)):
        root = prepared(tmp_path / f"at-{stop_at}")
        with pytest.raises(Killed):
            retain(root, policy, file_system=DyingFileSystem(stop_at))
        assert latest_verified(root) == root / "step-00000004"
        assert {4, 2} <= set(_steps(root))
        saved(root, 5, tensors=contents(5))
        retain(root, Retention(2, best=1))
        assert sorted(item.name for item in root.iterdir()) == [f"step-0000000{step}" for step in (2, 4, 5)]
        pin(root / "step-00000002", "evaluation")  # no mark of the killed removal is in the way


def test_a_removal_that_fails_says_so_and_leaves_no_mark(tmp_path: Path) -> None:
    for step in (1, 2):
        saved(tmp_path, step)
    with pytest.raises(OSError, match="No space left"):
        retain(tmp_path, Retention(1), file_system=FailingFileSystem("unlink", "manifest.json"))
    assert _steps(tmp_path) == [2, 1]
    assert not removal_mark(tmp_path / "step-00000001").exists()


def test_nothing_to_retain(tmp_path: Path) -> None:
    assert retain(tmp_path, Retention(1), file_system=REAL) == []
    assert retain(tmp_path / "nowhere", Retention(1)) == []
    with pytest.raises(ValueError, match="use 0 or more"):
        Retention(last=-1)
