"""SLURM: the submission, and the batch script, against an srun, sbatch and scontrol that record and run."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import cli

BASE = str(Path(__file__).with_name("base.toml"))
ROOT = Path(__file__).resolve().parents[2]
BATCH = ROOT / "launch" / "slurm" / "train.sbatch"

# One process per task, as srun starts them: SIGUSR1 goes on to all, SIGTERM kills them, the highest status
# counts.
SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" >"$FAKES/srun-arguments"
while [[ $1 == --* ]]; do
    [[ $1 != --ntasks=* ]] || tasks=${1#*=}
    shift
done
for ((place = 0; place < tasks; place++)); do
    SLURM_NODEID=$place SLURM_PROCID=$place setsid "$@" &
    ranks+=($!)
done
signal() { for rank in "${ranks[@]}"; do kill -s "$1" -- "-$rank"; done; }
trap 'signal USR1' USR1
trap 'signal KILL' TERM
printf '%s\n' "${ranks[@]}" >"$FAKES/steps"
touch "$FAKES/srun-runs"
highest=0
for rank in "${ranks[@]}"; do
    while wait "$rank"; status=$?; kill -0 "$rank" 2>/dev/null; do :; done
    wait "$rank"
    status=$?
    ((status <= highest)) || highest=$status
done
exit "$highest"
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in
show) printf 'node-a\\nnode-b\\n' ;;
requeue) printf '%s\\n' "$2" >>"$FAKES/requeued" ;;
esac
"""
# In the place of launch/torchrun/train.sh: it waits for a signal, saves, and finds that when it starts again.
NODE = """#!/usr/bin/env bash
terms=''
printf '%s\\n' "$@" >"$FAKES/node-$SLURM_NODEID"
[[ ! -e $FAKES/saved-$SLURM_NODEID ]] || exit 0
[[ -z ${FAIL:-} || $SLURM_NODEID = 0 ]] || exit "$FAIL"
[[ -z ${FAIL:-} ]] || exit 75
save() {
    touch "$FAKES/saving-$SLURM_NODEID"
    while [[ -n ${SLOW:-} && ! -e $FAKES/go ]]; do sleep 0.05; done
    touch "$FAKES/saved-$SLURM_NODEID"
    exit 75
}
trap save USR1
# A shell that the trap starts would get the next signal too: it counts in this one, and says so last.
trap 'terms+=x; printf x >>"$FAKES/terms-$SLURM_NODEID"; [[ $terms != xx ]] || exit 75' TERM
touch "$FAKES/ready-$SLURM_NODEID"
while :; do sleep 0.05; done
"""


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def fakes(tmp_path: Path) -> Path:
    """A folder for what the fakes record, with the fakes in its bin/ and a checkout's launcher."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        executable(tmp_path / "bin" / name, text)
    executable(tmp_path / "launch" / "torchrun" / "train.sh", NODE)
    return tmp_path


def start(fakes: Path, *arguments: str, **variables: str) -> subprocess.Popen[bytes]:
    """The batch script as slurmd starts it: a copy, elsewhere, with the job's variables."""
    copy = fakes / "slurmd" / "slurm_script"
    executable(copy, BATCH.read_text())
    job = {
        "SLURM_JOB_ID": "12345",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "TRELLIS_ROOT": str(fakes),
        "FAKES": str(fakes),
        "PATH": f"{fakes / 'bin'}:{os.environ['PATH']}",
    }
    return subprocess.Popen([str(copy), *arguments], env={**os.environ, **job, **variables})


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within a minute"
        time.sleep(0.02)


def ready(fakes: Path) -> bool:
    return all((fakes / name).exists() for name in ("ready-0", "ready-1", "srun-runs"))


def test_a_preempted_job_saves_is_requeued_and_goes_on(fakes: Path) -> None:
    job = start(fakes, "--ranks-per-node=4", "350m-c4", "--set", "a.b=c d", SLURM_CPUS_PER_TASK="6")
    until(lambda: ready(fakes))
    job.send_signal(signal.SIGUSR1)  # to the batch script alone: --signal=B:USR1
    assert job.wait(timeout=60) == 75
    assert (fakes / "requeued").read_text() == "12345\n"
    step = (fakes / "srun-arguments").read_text().splitlines()
    assert {
        "--nodes=2",
        "--ntasks=2",
        "--ntasks-per-node=1",
        "--kill-on-bad-exit=0",
        "--cpus-per-task=6",
    } <= set(step)
    given = (fakes / "node-1").read_text().splitlines()
    assert given[:6] == ["--nodes", "2", "--master", "node-a", "--port", "22345"]
    assert given[6:] == ["--job", "12345-0", "--ranks-per-node=4", "350m-c4", "--set", "a.b=c d"]
    again = start(fakes, "350m-c4", SLURM_RESTART_COUNT="1")
    assert again.wait(timeout=60) == 0
    assert "12345-1" in (fakes / "node-0").read_text().splitlines()
    assert (fakes / "requeued").read_text() == "12345\n"


def test_a_run_of_an_array_is_requeued_as_itself(fakes: Path) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "12300", "SLURM_ARRAY_TASK_ID": "4"}
    job = start(fakes, "--sweep=optimizer.lr=1,2", "350m-c4", **array)
    until(lambda: ready(fakes))
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=60) == 75
    assert (fakes / "requeued").read_text() == "12300_4\n"
    assert (fakes / "node-0").read_text().splitlines()[8:10] == ["--task", "4"]


def scancel(fakes: Path, job: subprocess.Popen[bytes]) -> None:
    """As slurmd: SIGTERM for every process of the steps and for the batch script, none for srun."""
    for step in (fakes / "steps").read_text().split():
        os.killpg(int(step), signal.SIGTERM)
    job.send_signal(signal.SIGTERM)


def test_a_cancelled_job_is_not_requeued_and_a_second_sigterm_ends_it(fakes: Path) -> None:
    job = start(fakes, "350m-c4")
    until(lambda: ready(fakes))
    for count in (1, 2):
        scancel(fakes, job)
        said = [fakes / f"terms-{place}" for place in (0, 1)]
        until(lambda: all(path.exists() and len(path.read_text()) == count for path in said))  # noqa: B023
    assert job.wait(timeout=60) == 75
    assert not (fakes / "requeued").exists()


def test_the_time_limit_may_come_during_the_save(fakes: Path) -> None:
    """SIGTERM after SIGUSR1: the job is requeued all the same."""
    job = start(fakes, "350m-c4", SLOW="1")
    until(lambda: ready(fakes))
    job.send_signal(signal.SIGUSR1)
    until(lambda: all((fakes / f"saving-{place}").exists() for place in (0, 1)))
    job.send_signal(signal.SIGTERM)
    (fakes / "go").touch()
    assert job.wait(timeout=60) == 75
    assert (fakes / "requeued").read_text() == "12345\n"


def test_a_job_of_which_one_node_failed_is_not_requeued(fakes: Path) -> None:
    """The other node, asked to end by that, ends with 75, which is higher."""
    assert start(fakes, "350m-c4", FAIL="1").wait(timeout=60) == 1
    assert not (fakes / "requeued").exists()


def test_the_submission_is_what_the_dry_run_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    executable(tmp_path / "bin" / "sbatch", f'#!/bin/sh\nprintf "%s\\n" sbatch "$@" >{tmp_path}/submitted\n')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    given = ["launch", "slurm", BASE, "--nodes", "1", "--gpus-per-node", "2", "--cpus-per-node", "16"]
    given += [
        "--time",
        "2:00:00",
        "--partition",
        "p",
        "--account",
        "a",
        "--sbatch=--constraint=h100",
        "--parallel",
        "2",
    ]
    given += ["--sweep", "optimizer.lr=1e-3,2e-3,3e-3", "--max-restarts", "1"]
    run = ["--", "--set", "checkpoint.grace_s=100"]
    assert cli.main([*given, *run]) == 0
    submitted = (tmp_path / "submitted").read_text().splitlines()
    expected = {
        *("--job-name=trellis-base", "--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=2"),
        *(
            "--cpus-per-task=16",
            "--time=2:00:00",
            "--partition=p",
            "--account=a",
            "--signal=B:USR1@160",
            "--requeue",
        ),
        *("--open-mode=append", "--array=0-2%2", "--constraint=h100", f"--export=ALL,TRELLIS_ROOT={ROOT}"),
    }
    assert expected <= set(submitted)
    script = submitted.index(str(BATCH))
    assert submitted[script + 1 :] == [
        *("--ranks-per-node=2", "--max-restarts=1", "--sweep=optimizer.lr=1e-3,2e-3,3e-3"),
        *(BASE, "--set", "checkpoint.grace_s=100"),
    ]
    capsys.readouterr()
    assert cli.main([*given, "--dry-run", *run]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert shlex.split(printed[1]) == submitted
    assert sum("run folder runs/base-sweep/" in line for line in printed) == 3


def test_a_sweep_of_one_value_is_an_array_too(capsys: pytest.CaptureFixture[str]) -> None:
    """Its job is told which task it is by nothing else."""
    given = ["launch", "slurm", BASE, "--nodes", "2", "--sweep", "optimizer.lr=1e-3", "--dry-run"]
    assert cli.main(given) == 0
    said, warned = capsys.readouterr()
    assert "--array=0-0" in shlex.split(said.splitlines()[1])
    assert "without --cpus-per-node SLURM gives each node" in warned


def test_without_slurm_the_remedy_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["launch", "slurm", BASE, "--nodes", "2"]) == 1
    assert "sbatch is not here: run this on a login node" in capsys.readouterr().err
