"""Pins hold against a removal at every moment; those of the dead run out and are cleared away."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoints.pins import (
    EXPIRY,
    clear_pins,
    list_pins,
    pin,
    pinned,
    pinned_steps,
    removal_mark,
    unpin,
)
from checkpoints.retention import Retention, retain
from checkpoints.state import verify_checkpoint
from tests.checkpoints.helpers import DyingFileSystem, saved


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for step in (1, 2):
        saved(tmp_path, step)
    return tmp_path


def _names(root: Path) -> list[str]:
    return sorted(item.name for item in (root / ".pins").iterdir())


def test_a_pin_keeps_its_step_until_the_last_owner_goes(root: Path) -> None:
    one = root / "step-00000001"
    before = sorted(one.iterdir())
    pin(one, "a")
    pin(one, "b")
    pin(one, "b")
    assert pinned_steps(root) == {1}
    assert [(p.step, p.owner, p.pid) for p in list_pins(root)] == [(1, o, os.getpid()) for o in "ab"]
    unpin(one, "a")
    unpin(one, "a")
    assert retain(root, Retention(1)) == []
    unpin(one, "b")
    assert sorted(one.iterdir()) == before, "a committed checkpoint is never written to"
    assert retain(root, Retention(1)) == [one]


def test_pinned_while_a_block_runs(root: Path) -> None:
    def fail() -> None:
        with pinned(root / "step-00000002", "export") as path:
            assert pinned_steps(root) == {2}
            assert verify_checkpoint(path) == []
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert pinned_steps(root) == set()


def test_a_step_that_went_cannot_be_pinned(root: Path) -> None:
    with pytest.raises(FileNotFoundError, match="step-00000009 is gone or being removed: choose another"):
        pin(root / "step-00000009", "a")
    assert not (root / ".pins").exists()
    (root / "step-00000001" / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="gone or being removed"):
        pin(root / "step-00000001", "a")
    removal_mark(root / "step-00000002").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="gone or being removed"):
        pin(root / "step-00000002", "a")
    assert _names(root) == []


def test_a_pin_runs_out_unless_refreshed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = time.time()
    pin(root / "step-00000001", "dead")
    pin(root / "step-00000002", "alive")
    monkeypatch.setattr(time, "time", lambda: start + EXPIRY - 60)
    assert pinned_steps(root) == {1, 2}
    pin(root / "step-00000002", "alive")
    monkeypatch.setattr(time, "time", lambda: start + EXPIRY + 60)
    assert pinned_steps(root) == {2}
    assert [p.expired for p in list_pins(root)] == [True, False]


def test_pins_of_steps_that_are_gone_are_cleared(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pin(root / "step-00000001", "a")
    kept = pin(root / "step-00000002", "a")
    (root / "step-00000001").rename(root / "elsewhere")
    assert pinned_steps(root) == {2}
    (root / ".pins" / "notes.txt").write_text("")
    clear_pins(root)
    assert _names(root) == ["notes.txt", kept.name]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"owner": 1, "host": "h", "pid": "x", "time": 0}'])
def test_a_damaged_pin_still_holds_until_its_file_is_old(root: Path, content: str) -> None:
    path = pin(root / "step-00000001", "a")
    path.write_text(content)
    assert [p.owner for p in list_pins(root)] == ["unknown"]
    assert pinned_steps(root) == {1}
    os.utime(path, (0, 0))
    assert pinned_steps(root) == set()


def test_what_is_no_pin_is_passed_over(root: Path) -> None:
    folder = root / ".pins"
    folder.mkdir()
    for name in ("step-00000001.json", "step-1-0123456789abcdef.json", "step-00000001-0123.json"):
        (folder / name).write_text("{}")
    assert list_pins(root) == []


class Meanwhile(DyingFileSystem):
    """Does `work` just before the `moment`-th operation."""

    def __init__(self, moment: int, work: Callable[[], object]) -> None:
        super().__init__()
        self.moment, self.work = moment, work

    def _step(self, operation: str, path: Path) -> None:
        if len(self.log) == self.moment:
            self.moment = -1
            self.work()
        super()._step(operation, path)


def _try_pin(checkpoint: Path) -> bool:
    try:
        pin(checkpoint, "evaluation")
    except FileNotFoundError:
        return False
    return True


def test_a_pin_at_every_moment_of_a_removal_holds_or_is_refused(tmp_path: Path) -> None:
    outcomes = []
    for moment in range(30):
        root = tmp_path / str(moment)
        one = saved(root, 1)
        saved(root, 2)
        held: list[bool] = []
        removed = retain(
            root,
            Retention(1),
            file_system=Meanwhile(moment, lambda one=one, held=held: held.append(_try_pin(one))),
        )
        if not held:  # the removal was over before
            break
        assert held[0] == (removed == [])
        if held[0]:
            assert verify_checkpoint(one) == [], "a checkpoint was removed under its reader"
        assert pinned_steps(root) == ({1} if held[0] else set())
        outcomes.append(held[0])
    assert len(outcomes) > 8
    assert outcomes[0]
    assert not outcomes[-1]


def test_a_removal_at_every_moment_of_a_pin_is_seen(tmp_path: Path) -> None:
    outcomes = []
    for moment in range(6):
        root = tmp_path / str(moment)
        one = saved(root, 1)
        saved(root, 2)
        removed: list[list[Path]] = []
        system = Meanwhile(
            moment, lambda root=root, removed=removed: removed.append(retain(root, Retention(1)))
        )
        try:
            pin(one, "evaluation", file_system=system)
            held = True
        except FileNotFoundError:
            held = False
        if removed:
            assert held == (removed == [[]])
            outcomes.append(held)
        assert held == (verify_checkpoint(one) == []) == (pinned_steps(root) == {1})
    assert True in outcomes
    assert False in outcomes
