"""Restarts: after which failures, how often, and what is said of them; with stand-ins for ranks."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from launch.ending import TerminatedError
from launch.failures import RankError, log_folder, read_failures
from launch.ranks import run_ranks
from launch.supervise import supervise
from tests.launch.rank_stand_in import HANG, MODULE, starts, write_script

HOST = socket.gethostname()
ROOT = Path(__file__).resolve().parents[2]
PLACE = "in step 12, backward pass"
LAUNCHER = f"""
import functools, sys
from pathlib import Path
from launch import cli, training_run
training_run.run_ranks = functools.partial(training_run.run_ranks, module="{MODULE}")
training_run.preflight.check_dataset = lambda _: None
sys.exit(cli.main(sys.argv[1:]))
"""


def lost(run_dir: Path, *, commits: tuple[int, ...] = (), restartable: bool = True, fails: int = 99):
    """A start that fails ``fails`` times, committing the next of ``commits`` before it does."""
    begun: list[int] = []

    def start() -> None:
        begun.append(1)
        if len(begun) <= len(commits) and commits[len(begun) - 1]:
            (run_dir / "checkpoints" / f"step-{commits[len(begun) - 1]:08d}").mkdir(parents=True)
        if len(begun) <= fails:
            raise RankError("rank 1 died", "the story", restartable=restartable)

    return start, begun


def test_the_budget_counts_restarts_without_progress(tmp_path: Path) -> None:
    said: list[str] = []
    pauses: list[float] = []
    start, begun = lost(tmp_path, commits=(0, 0, 10, 0))
    with pytest.raises(RankError) as failed:
        supervise(start, run_dir=tmp_path, max_restarts=2, say=said.append, sleep=pauses.append)
    # Two in vain, of which the second start got to step 10; then two more.
    assert len(begun) == 5
    assert pauses == [1, 2, 1, 2]
    assert str(failed.value) == "rank 1 died (after 2 restarts without a new checkpoint)"
    assert failed.value.detail == "the story"
    assert said == [
        "rank 1 died; restart 1 of 2 in 1 s; no checkpoint yet",
        "rank 1 died; restart 2 of 2 in 2 s; no checkpoint yet",
        "rank 1 died; restart 1 of 2 in 1 s; newest checkpoint: step 10",
        "rank 1 died; restart 2 of 2 in 2 s; newest checkpoint: step 10",
    ]


def test_pauses_grow_to_a_minute(tmp_path: Path) -> None:
    pauses: list[float] = []
    start, _ = lost(tmp_path, fails=8)
    supervise(start, run_dir=tmp_path, max_restarts=8, say=lambda _: None, sleep=pauses.append)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]


@pytest.mark.parametrize("error", [TerminatedError("asked"), KeyboardInterrupt(), ValueError("bad")])
def test_only_a_failed_rank_is_restarted(error: BaseException, tmp_path: Path) -> None:
    def start() -> None:
        raise error

    with pytest.raises(type(error)):
        supervise(start, run_dir=tmp_path, max_restarts=3, sleep=pytest.fail)


@pytest.mark.parametrize("most, restartable", [(0, True), (3, False)])
def test_what_may_not_be_restarted_fails_as_it_is(most: int, restartable: bool, tmp_path: Path) -> None:
    start, begun = lost(tmp_path, restartable=restartable)
    with pytest.raises(RankError, match=r"^rank 1 died$"):
        supervise(start, run_dir=tmp_path, max_restarts=most, sleep=pytest.fail)
    assert len(begun) == 1


def test_a_negative_budget_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--max-restarts -1"):
        supervise(lambda: None, run_dir=tmp_path, max_restarts=-1)


def run(run_dir: Path, *ranks: list[str]) -> None:
    """Start the ranks once, each doing what its script says."""
    run_ranks(len(ranks), run_dir=run_dir, arguments=write_script(run_dir, *ranks), module=MODULE)


@pytest.mark.parametrize(
    "ranks, line, restartable",
    [
        # The other rank loses the connection and says so first; or waits until the agent ends it.
        ((["lose"], ["kill"]), f"rank 1 on {HOST}: killed by SIGKILL (out of memory?) {PLACE}; logs", True),
        ((["sleep 60"], ["kill"]), f"rank 1 on {HOST}: killed by SIGKILL (out of memory?) {PLACE}; l", True),
        ((["lose"], ["full"]), f"rank 1 on {HOST} {PLACE}: [Errno 28] No space left", True),
        ((["bug"], ["lose"]), f"rank 0 on {HOST} {PLACE}: KeyError: 'x' (a bug", True),
        ((["lose"], ["value 3"]), f"rank 1 on {HOST} {PLACE}: optimizer.lr = 3: use less", False),
        ((["sleep 60"], ["value 3"]), f"rank 1 on {HOST} {PLACE}: optimizer.lr = 3: use less", False),
        ((["value 3"], ["value 3"]), "optimizer.lr = 3: use less", False),
        ((["hang"], ["hang"]), HANG, True),
        ((["gloo"], ["gloo"]), f"rank 0 on {HOST} {PLACE}: lost the connection to another rank", True),
    ],
)
def test_a_failure_is_said_once_with_its_place(
    ranks: tuple[list[str], ...],
    line: str,
    restartable: bool,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(RankError) as failed:
        run(tmp_path, *ranks)
    assert str(failed.value).startswith(line)
    assert len(str(failed.value).splitlines()) == 1
    assert failed.value.restartable is restartable
    assert capfd.readouterr() == ("", "")


def test_a_crash_is_cured_by_a_restart(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = write_script(tmp_path, ["lose", "ok"], ["commit 7,kill", "ok"])
    start = partial(run_ranks, 2, run_dir=tmp_path, arguments=arguments, module=MODULE)
    supervise(start, run_dir=tmp_path, max_restarts=1, sleep=lambda _: None)
    assert [starts(tmp_path, rank) for rank in (0, 1)] == [2, 2]
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"trellis: rank 1 on {HOST}: killed by SIGKILL (out of memory?) {PLACE}; ")
    assert line.endswith("restart 1 of 1 in 1 s; newest checkpoint: step 7")
    assert not read_failures(tmp_path)


def launch(run_dir: Path, *ranks: list[str], options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """`trellis train` in a process of its own, with stand-ins for its ranks."""
    write_script(run_dir, *ranks)
    base = str(Path(__file__).with_name("base.toml"))
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, "train", base, "--run-dir", str(run_dir), *options],
        env=without_ranks(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def without_ranks() -> dict[str, str]:
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {key: value for key, value in os.environ.items() if key not in ranks}
    return {**kept, "PYTHONPATH": str(ROOT)}


def wait_for(condition, *, seconds: float = 200.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)


def ends(launcher: subprocess.Popen[str]) -> tuple[int, list[str]]:
    """Exit status, and the lines on stderr."""
    said = launcher.communicate(timeout=200)[1]
    return launcher.returncode, said.splitlines()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_ranks_that_are_asked_to_end_get_their_grace(number: signal.Signals, tmp_path: Path) -> None:
    script = ["asked,sleep 2,commit 9"]
    with launch(tmp_path, script, script, options=("--max-restarts", "3")) as launcher:
        wait_for(lambda: len(list(tmp_path.glob("listening-*"))) == 2 or launcher.poll() is not None)
        launcher.send_signal(number)
        status, lines = ends(launcher)
    assert lines == [
        f"trellis: ended by {number.name} with step 9 saved; start {tmp_path} again to resume it"
    ]
    assert status == 75
    assert starts(tmp_path) == 1


def test_a_save_longer_than_the_grace_is_cut_short(tmp_path: Path) -> None:
    """With the torch of this test; 2.11 has 30 seconds fixed."""
    script = ["asked,sleep 40,commit 9"]
    options = ("--set", "checkpoint.grace_s=0.5")
    with launch(tmp_path, script, ["asked"], options=options) as launcher:
        wait_for(lambda: len(list(tmp_path.glob("listening-*"))) == 2 or launcher.poll() is not None)
        launcher.send_signal(signal.SIGTERM)
        status, lines = ends(launcher)
    assert lines == [
        f"trellis: ended by SIGTERM: nothing was trained and saved in this start; start {tmp_path} again to "
        "resume it"
    ]
    assert status == 75


def test_a_signal_before_training_is_no_failure(tmp_path: Path) -> None:
    with launch(tmp_path, ["sleep 60"], ["sleep 60"], options=("--max-restarts", "3")) as launcher:
        wait_for(lambda: (starts(tmp_path) and starts(tmp_path, 1)) or launcher.poll() is not None)
        launcher.send_signal(signal.SIGUSR1)
        status, (line,) = ends(launcher)
    assert "ended by SIGUSR1: nothing was trained and saved in this start" in line
    assert status == 75
    assert starts(tmp_path) == 1


def test_a_signal_to_the_ranks_alone_ends_the_run_too(tmp_path: Path) -> None:
    with launch(tmp_path, ["asked,commit 4"], ["sleep 60"], options=("--max-restarts", "3")) as launcher:
        wait_for(lambda: (tmp_path / "listening-0").exists() or launcher.poll() is not None)
        page = read_page(tmp_path, 0)
        os.kill(page, signal.SIGUSR1)
        status, (line,) = ends(launcher)
    assert "ended by a signal to its ranks with step 4 saved" in line
    assert status == 75


def read_page(run_dir: Path, rank: int) -> int:
    """The process of a rank."""
    from trellis_dist.training.watch.status_page import read_status, status_path

    status = read_status(status_path(log_folder(run_dir), rank))
    assert status is not None
    return status.pid


def test_a_last_save_that_fails_is_an_error(tmp_path: Path) -> None:
    with launch(tmp_path, ["asked,full"], ["asked"]) as launcher:
        wait_for(lambda: len(list(tmp_path.glob("listening-*"))) == 2 or launcher.poll() is not None)
        launcher.send_signal(signal.SIGTERM)
        status, (line,) = ends(launcher)
    assert line.startswith(f"trellis: error: rank 0 on {HOST} {PLACE}: [Errno 28] No space left")
    assert status == 1


def test_a_signal_between_restarts_ends_the_run(tmp_path: Path) -> None:
    with launch(tmp_path, ["kill"], ["kill"], options=("--max-restarts", "9")) as launcher:
        wait_for(lambda: starts(tmp_path) == 4 or launcher.poll() is not None)
        wait_for(lambda: not alive(read_page(tmp_path, 0)))
        time.sleep(1)  # into the pause of 8 s
        launcher.send_signal(signal.SIGTERM)
        status, lines = ends(launcher)
    assert status == 75
    assert "nothing was trained and saved in this start" in lines[-1]
    assert len(lines) == 5
    assert starts(tmp_path) == 4


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def under_torchrun(run_dir: Path, *ranks: list[str], restarts: int) -> tuple[int, list[str]]:
    """Ranks that torchrun starts as on a cluster; status, and what `trellis` said."""
    write_script(run_dir, *ranks)
    base = str(Path(__file__).with_name("base.toml"))
    agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    arguments = ["train", base, "--run-dir", str(run_dir)]
    done = subprocess.run(
        [*agent, f"--nproc-per-node={len(ranks)}", f"--max-restarts={restarts}", "-m", MODULE, *arguments],
        env=without_ranks(),
        capture_output=True,
        text=True,
        timeout=280,
    )
    return done.returncode, [line for line in done.stderr.splitlines() if line.startswith("trellis: ")]


def test_torchrun_repeats_no_failure_that_a_restart_repeats(tmp_path: Path) -> None:
    status, lines = under_torchrun(tmp_path, ["lose"], ["value 3"], restarts=2)
    assert status == 1
    found = f"rank 1 on {HOST} {PLACE}: optimizer.lr = 3: use less"
    assert lines == [
        f"trellis: error: {found}",
        f"trellis: error: not started again, because a restart would repeat this: {found}",
    ]
    assert [starts(tmp_path, rank) for rank in (0, 1)] == [1, 1]
    # The next job on this folder, of the same name or not, starts anew.
    assert under_torchrun(tmp_path, ["ok"], ["ok"], restarts=0) == (0, [])


def test_torchrun_restarts_what_died_and_one_rank_says_so(tmp_path: Path) -> None:
    status, lines = under_torchrun(tmp_path, ["lose", "ok"], ["kill", "ok"], restarts=1)
    assert status == 0
    (line,) = lines
    assert line.startswith(f"trellis: error: rank 0 on {HOST} {PLACE}: lost the connection to another rank")
    assert line.endswith(f"; no word from rank 1 on {HOST} {PLACE}")
    assert [starts(tmp_path, rank) for rank in (0, 1)] == [2, 2]


def test_a_hang_under_torchrun_is_said_by_the_rank_that_judged_it(tmp_path: Path) -> None:
    assert under_torchrun(tmp_path, ["hang"], ["hang"], restarts=0) == (1, [f"trellis: error: {HANG}"])


def test_a_rank_of_torchrun_takes_no_budget_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from launch.cli import main

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    base = str(Path(__file__).with_name("base.toml"))
    assert main(["train", base, "--run-dir", str(tmp_path), "--max-restarts", "2"]) == 1
    assert "give the option to torchrun, or to launch/torchrun/train.sh" in capsys.readouterr().err


def test_the_whole_job_hands_the_budget_to_both_halves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launch import cli, main_job

    given: list[int] = []
    monkeypatch.setattr(main_job, "train", lambda *_, max_restarts, **__: given.append(max_restarts))
    monkeypatch.setattr(main_job, "check_machine", lambda *_, **__: 1)
    monkeypatch.setattr(main_job, "_prepare", lambda *_: "fingerprint")
    monkeypatch.setattr(main_job, "_evaluate", lambda *_: {})
    base = str(Path(__file__).with_name("base.toml"))
    assert cli.main(["run", base, "--run-dir", str(tmp_path), "--max-restarts", "4"]) == 0
    assert given == [4, 4]
