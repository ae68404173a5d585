"""Ranks: what one of them fails with reaches the user as one line."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch import worker
from launch.ranks import RankError, explain, log_folder, record_failure, run_ranks
from launch.recipe import load_recipe, resolve
from trellis_dist.files import read_json, write_json

BASE = str(Path(__file__).with_name("base.toml"))


def test_the_error_of_a_rank_is_the_error_of_the_run(tmp_path: Path) -> None:
    table = resolve(load_recipe(BASE))
    table["model"]["dimm"] = 1
    write_json(tmp_path / "recipe.json", table)
    with pytest.raises(RankError) as caught:
        run_ranks(
            2, run_dir=tmp_path, arguments=[f"--recipe={tmp_path / 'recipe.json'}", f"--run-dir={tmp_path}"]
        )
    assert "model.dimm = 1: unknown key; did you mean model.dim?" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert "Traceback (most recent call last)" in caught.value.detail


def test_a_rank_that_dies_without_a_word_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # No recipe argument: argparse ends the rank with status 2 before it can record anything.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(RankError, match=r"rank 0: exit status 2; logs"):
        run_ranks(1, run_dir=tmp_path, arguments=[f"--run-dir={tmp_path}", "--resume=perhaps"])


def test_the_worker_records_its_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert worker.main([f"--recipe={tmp_path / 'none.json'}", f"--run-dir={tmp_path}"]) == 1
    failure = read_json(log_folder(tmp_path) / "failure-rank-00000.json")
    assert "none.json" in failure["message"]
    assert "Traceback" in failure["detail"]


def test_a_bug_is_named_as_one() -> None:
    assert worker.error_line(ValueError("say --this")) == "say --this"
    assert "launch/setup.sh" in worker.error_line(ModuleNotFoundError("No module named 'ray'", name="ray"))
    assert worker.error_line(KeyError("x")).startswith("KeyError: 'x' (a bug; run again with --debug")


def test_a_failure_that_cannot_be_written_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "logs").write_text("in the way")
    record_failure(tmp_path, rank=1, message="m", detail="the whole story")
    assert "the whole story" in capsys.readouterr().out


def test_the_rank_that_knows_the_cause_is_heard(tmp_path: Path) -> None:
    echo = "opening the data failed on another rank, which says why"
    record_failure(tmp_path, rank=1, message=echo, detail="")  # the first to write
    record_failure(tmp_path, rank=0, message="train-00000.bin is damaged", detail="the story")
    ended = SimpleNamespace(exitcode=1, timestamp=0)
    error = explain(SimpleNamespace(failures={1: ended}), tmp_path)
    assert str(error) == "rank 0: train-00000.bin is damaged"
    assert error.detail == "the story"


@pytest.mark.parametrize(
    "ends, words",
    [
        # Rank 1 hangs: the watchdog of rank 0 ends it, half a minute later the agent kills the other.
        (
            {0: (1, 10), 1: (-9, 40)},
            "rank 0: exit status 1: a step outlived its timeout, or the rank could not start",
        ),
        ({0: (1, 40), 1: (-9, 10)}, "rank 1: killed by SIGKILL (out of memory?)"),
        ({0: (1, 10), 1: (-9, 10)}, "rank 1: killed by SIGKILL (out of memory?)"),
        ({0: (-15, 10), 1: (1, 10)}, "rank 1: exit status 1: a step outlived its timeout"),
    ],
)
def test_of_two_silent_ranks_the_first_to_end_is_named(
    ends: dict[int, tuple[int, int]], words: str, tmp_path: Path
) -> None:
    assert words in str(explain(ended(ends), tmp_path))


def test_a_peer_killed_at_the_end_does_not_hide_the_record_of_the_first(tmp_path: Path) -> None:
    record_failure(tmp_path, rank=1, message="the disk is full", detail="")
    assert str(explain(ended({0: (-9, 40), 1: (1, 10)}), tmp_path)) == "the disk is full"
    assert "killed by SIGKILL" in str(explain(ended({0: (-9, 10), 1: (1, 10)}), tmp_path))


def test_a_record_marked_as_an_echo_is_one_whatever_it_says(tmp_path: Path) -> None:
    record_failure(tmp_path, rank=0, message="agreed to fail", detail="", echo=True)
    record_failure(tmp_path, rank=1, message="the disk is full", detail="")
    assert str(explain(ended({0: (1, 10), 1: (1, 10)}), tmp_path)) == "rank 1: the disk is full"


def test_ranks_of_one_machine_meet_without_its_host_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[str] = []
    monkeypatch.setattr("torch.distributed.run.main", given.extend)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)), raising=False)
    for name in ("GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    run_ranks(2, run_dir=tmp_path, arguments=[])
    assert "--local-addr=127.0.0.1" in given
    assert os.environ["OMP_NUM_THREADS"] == "3"
    if sys.platform == "linux":
        assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"


def ended(ends: dict[int, tuple[int, int]]) -> Any:
    """What torchrun reports: rank -> (exit status, seconds)."""
    failures = {rank: SimpleNamespace(exitcode=code, timestamp=at) for rank, (code, at) in ends.items()}
    return SimpleNamespace(failures=failures)


def test_files_of_the_callers_folder_are_not_taken_for_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "launch.py").write_text("raise SystemExit('the wrong launch')")
    (tmp_path / "evals").mkdir()
    (tmp_path / "evals" / "__init__.py").write_text("raise SystemExit('the wrong evals')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # Our own worker ran: it is what says that there is no such recipe.
    with pytest.raises(RankError, match=r"nowhere\.json"):
        run_ranks(
            1, run_dir=tmp_path / "run", arguments=["--recipe=nowhere.json", f"--run-dir={tmp_path / 'run'}"]
        )
