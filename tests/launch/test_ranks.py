"""Ranks: what one of them fails with reaches the user as one line."""

from __future__ import annotations

import errno
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch import worker
from launch.clusters import run_agent
from launch.failures import (
    RankError,
    is_restartable,
    log_folder,
    lost_contact,
    read_failures,
    record_failure,
)
from launch.planning import advice
from launch.ranks import explain, run_ranks
from launch.recipe import load_recipe, resolve
from trellis_dist.files import read_json, write_json
from trellis_dist.training.collectives import PeerFailedError
from trellis_dist.training.guards import DivergedError
from trellis_dist.training.watch.hang import GRACE_S
from trellis_dist.training.watch.status_page import StatusPage, status_path

BASE = str(Path(__file__).with_name("base.toml"))
HOST = socket.gethostname()


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
    with pytest.raises(RankError, match=rf"rank 0 on {HOST}: exit status 2; logs") as failed:
        run_ranks(1, run_dir=tmp_path, arguments=[f"--run-dir={tmp_path}", "--resume=perhaps"])
    assert not failed.value.restartable  # it would get the same arguments


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
    error = explain(ended({1: (1, 0)}), tmp_path, count=2)
    assert str(error) == f"rank 0 on {HOST}: train-00000.bin is damaged"
    assert error.detail == "the story"


@pytest.mark.parametrize("count, line", [(1, "steps = 0: use 1"), (2, f"rank 0 on {HOST}: steps = 0: use 1")])
def test_what_one_of_several_ranks_says_is_not_said_by_all(count: int, line: str, tmp_path: Path) -> None:
    record_failure(tmp_path, rank=0, message="steps = 0: use 1", detail="", restartable=False)
    assert str(explain(ended({0: (1, 10)}), tmp_path, count=count)) == line


@pytest.mark.parametrize(
    "ends, words",
    [
        # Rank 1 hangs: the watchdog of rank 0 ends it, half a minute later the agent kills the other.
        (
            {0: (1, 10), 1: (-9, 40)},
            f"rank 0 on {HOST}: exit status 1: a step outlived its timeout, or the rank could not start",
        ),
        ({0: (1, 40), 1: (-9, 10)}, f"rank 1 on {HOST}: killed by SIGKILL (out of memory?)"),
        ({0: (1, 10), 1: (-9, 10)}, f"rank 1 on {HOST}: killed by SIGKILL (out of memory?)"),
        ({0: (-15, 10), 1: (1, 10)}, f"rank 1 on {HOST}: exit status 1: a step outlived its timeout"),
        # Not training yet when the agent ended it, it took that for a request.
        ({0: (75, 10), 1: (-9, 10)}, f"rank 1 on {HOST}: killed by SIGKILL (out of memory?)"),
    ],
)
def test_of_two_silent_ranks_the_first_to_end_is_named(
    ends: dict[int, tuple[int, int]], words: str, tmp_path: Path
) -> None:
    assert words in str(explain(ended(ends), tmp_path, count=2))


def test_a_peer_killed_at_the_end_does_not_hide_the_record_of_the_first(tmp_path: Path) -> None:
    record_failure(tmp_path, rank=1, message="the disk is full", detail="")
    line = f"rank 1 on {HOST}: the disk is full"
    assert str(explain(ended({0: (-9, 40), 1: (1, 10)}), tmp_path, count=2)) == line
    assert "killed by SIGKILL" in str(explain(ended({0: (-9, 10), 1: (1, 10)}), tmp_path, count=2))


@pytest.mark.parametrize("end", [9, 10])
def test_the_verdict_on_a_hang_is_told_though_its_judge_ended_the_rank_it_is_about(
    end: int, tmp_path: Path
) -> None:
    verdict = f"rank 0 ({HOST}) has not been heard of for 7 s"
    record_failure(tmp_path, rank=1, message=verdict, detail="stacks", named=True)
    error = explain(ended({0: (-9, end), 1: (1, 10)}), tmp_path, count=2)
    assert str(error) == verdict
    assert error.restartable


def test_the_verdict_of_a_watch_outlives_what_its_own_main_thread_says_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others leave when they read the verdict, so its judge loses them before it has ended itself."""
    verdict, waited = f"rank 1 ({HOST}) is not in all_gather", []

    def hang(*_: object, report: Callable[[str, bool], None], **__: object) -> None:
        report(verdict, False)
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer")

    monkeypatch.setattr(worker, "train_rank", hang)
    monkeypatch.setattr(worker, "parse_recipe", lambda table, source: None)
    monkeypatch.setattr(worker.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "0")
    write_json(tmp_path / "recipe.json", {})
    assert worker.main(["--recipe", str(tmp_path / "recipe.json"), "--run-dir", str(tmp_path)]) == 1
    assert str(explain(ended({0: (1, 10), 1: (1, 10)}), tmp_path, count=2)) == verdict
    assert waited == [GRACE_S], "its watch ends this process, after those that hear nothing"


def test_a_rank_that_is_refused_waits_for_the_records_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("steps = 0: use 1")

    def record_the_other(_: float) -> None:
        waited.append(1)
        record_failure(tmp_path, rank=1, message="steps = 0: use 1", detail="", restartable=False)

    waited: list[int] = []
    monkeypatch.setattr(worker, "train_rank", refuse)
    monkeypatch.setattr(worker, "parse_recipe", lambda table, source: None)
    monkeypatch.setattr(worker.time, "sleep", record_the_other)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    write_json(tmp_path / "recipe.json", {})
    assert worker.main(["--recipe", str(tmp_path / "recipe.json"), "--run-dir", str(tmp_path)]) == 1
    assert waited == [1]
    assert str(explain(ended({0: (1, 10), 1: (1, 10)}), tmp_path, count=2)) == "steps = 0: use 1"


def test_a_watch_that_judges_after_its_main_thread_lost_a_peer_is_heard(tmp_path: Path) -> None:
    record_failure(tmp_path, rank=0, message="lost the connection", detail="", echo=True)
    worker.leave_hang(tmp_path, 0, "the verdict", False)
    assert str(explain(ended({0: (1, 10)}), tmp_path, count=2)) == "the verdict"


def test_a_record_marked_as_an_echo_is_one_whatever_it_says(tmp_path: Path) -> None:
    record_failure(tmp_path, rank=0, message="agreed to fail", detail="", echo=True)
    record_failure(tmp_path, rank=1, message="the disk is full", detail="")
    line = f"rank 1 on {HOST}: the disk is full"
    assert str(explain(ended({0: (1, 10), 1: (1, 10)}), tmp_path, count=2)) == line


def test_a_killed_rank_is_told_what_the_planner_thinks_of_its_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(advice, "host_share", lambda ranks: 10**9)
    write_json(tmp_path / "recipe.json", resolve(load_recipe("350m-c4", ["mesh.dp=2"])))
    line = str(explain(ended({0: (-9, 10)}), tmp_path, count=2))
    assert f"logs of the ranks are in {log_folder(tmp_path)}; the planner estimates " in line
    assert "planner" not in str(explain(ended({0: (-11, 10)}), tmp_path, count=2))
    failure = SimpleNamespace(exitcode=-9)
    said: list[str] = []
    monkeypatch.setattr(run_agent, "_say", said.append)
    for given in ([f"--run-dir={tmp_path}"], ["--run-dir", str(tmp_path)], []):
        assert run_agent._say_and_judge({0: failure}, ["--nproc-per-node=2", *given]) == 1
    assert ["the planner estimates" in line for line in said] == [True, True, False]


def test_records_are_in_the_order_of_what_they_say(tmp_path: Path) -> None:
    """Not of the files' times, which are those of another clock on a network file system."""
    record_failure(tmp_path, rank=0, message="the second", detail="")
    record_failure(tmp_path, rank=1, message="the first", detail="")
    path = log_folder(tmp_path) / "failure-rank-00001.json"
    write_json(path, {**read_json(path), "at": time.time() - 60})
    assert [failure.message for failure in read_failures(tmp_path)] == ["the first", "the second"]
    assert str(explain(ended({0: (1, 10), 1: (1, 10)}), tmp_path, count=2)) == f"rank 1 on {HOST}: the first"


def test_what_is_no_record_is_left_out(tmp_path: Path) -> None:
    record_failure(tmp_path, rank=0, message="the disk is full", detail="")
    (log_folder(tmp_path) / "failure-rank-00001.json").write_text("{")
    (log_folder(tmp_path) / "failure-rank-00002.json").write_text('{"rank": 2}')
    assert [failure.rank for failure in read_failures(tmp_path)] == [0]


def test_a_status_page_of_an_earlier_process_is_not_believed(tmp_path: Path) -> None:
    log_folder(tmp_path).mkdir()
    page = StatusPage(status_path(log_folder(tmp_path), 1), rank=1)
    page.write(step=12, operation="backward pass")
    killed = ended({1: (-9, 10)})
    assert "in step 12, backward pass; logs" in str(explain(killed, tmp_path, count=2))
    killed.failures[1].pid += 1
    assert "killed by SIGKILL (out of memory?); logs" in str(explain(killed, tmp_path, count=2))


@pytest.mark.parametrize(
    "error, restartable",
    [
        (ValueError("a bad key"), False),
        (DivergedError("nan"), False),
        (FileNotFoundError("nothing to load"), False),
        (ModuleNotFoundError("No module named 'x'"), False),
        (PermissionError("not writable"), False),
        (OSError(errno.ENOSPC, "disk full"), True),
        (ConnectionResetError("gone"), True),
        (KeyError("a bug"), True),
        (RuntimeError("CUDA error"), True),
        (PeerFailedError("the data failed on another rank"), True),  # which says whether it is
    ],
)
def test_what_a_restart_can_cure(error: Exception, restartable: bool) -> None:
    assert is_restartable(error) is restartable


def test_a_lost_peer_is_known_by_its_words_and_by_what_it_led_to() -> None:
    gone = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:4")
    assert lost_contact(gone)
    words = "lost the connection to another rank (Connection closed by peer [10.0.0.2]:4)"
    assert worker.error_line(gone) == words
    told = RuntimeError(f"{gone}. This is typically caused by a remote worker hanging. GLHF!")
    assert worker.error_line(told) == words
    wrapped = OSError("the save failed")
    wrapped.__cause__ = gone
    assert lost_contact(wrapped)
    assert not lost_contact(RuntimeError("shapes differ"))
    assert not lost_contact(OSError("Connection reset by peer"))  # of an object store, say


def test_ranks_of_one_machine_meet_without_its_host_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[str] = []
    monkeypatch.setattr("torch.distributed.run.main", given.extend)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)), raising=False)
    for name in ("GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "put back at the end")
    run_ranks(2, run_dir=tmp_path, arguments=[], grace_s=90.5)
    assert "--local-addr=127.0.0.1" in given
    assert "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1" in given
    assert os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "96"
    assert os.environ["OMP_NUM_THREADS"] == "3"
    if sys.platform == "linux":
        assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"


def ended(ends: dict[int, tuple[int, int]]) -> Any:
    """What torchrun reports: rank -> (exit status, seconds)."""
    failures = {
        rank: SimpleNamespace(exitcode=code, timestamp=at, pid=os.getpid())
        for rank, (code, at) in ends.items()
    }
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


def test_records_of_an_earlier_larger_job_are_not_this_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its ranks 2 and 3 are gone, and nobody of this job would remove what they left."""
    for rank in range(4):
        record_failure(tmp_path, rank=rank, message=f"mesh {rank}", detail="", restartable=False)
    assert [failure.rank for failure in read_failures(tmp_path)] == [0, 1, 2, 3]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert [failure.rank for failure in read_failures(tmp_path)] == [0, 1]
