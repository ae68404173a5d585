"""The shell scripts: the dry run prints what would run, and a wrong Python is refused with the remedy."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import subprocess
from pathlib import Path

from launch import cli

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = ROOT / "launch" / "torchrun" / "train.sh"
ONE_EACH = ("--rendezvous", "static", "--ranks-per-node", "1")
LAUNCHERS = {
    "torchrun/train.sh": "torchrun",
    "deepspeed/train.sh": "deepspeed",
    "slurm/train.sbatch": "slurm",
    "ray/submit.sh": "ray",
    "kubernetes/render.sh": "kubernetes",
}


def shell(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(argument) for argument in arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def launched(*arguments: str) -> tuple[int, str, str]:
    """Status, output and errors of what the scripts hand over to, in this process: a start costs seconds."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as wrong:
        status = cli.main(["launch", "torchrun", *arguments])
    return status, out.getvalue(), wrong.getvalue()


def lines_of(text: str) -> list[list[str]]:
    return [shlex.split(line) for line in text.splitlines() if not line.startswith("#")]


def dry_run(*options: str) -> list[list[str]]:
    status, said, wrong = launched("--dry-run", "--ranks-per-node", "4", *options)
    assert status == 0, wrong
    return lines_of(said)


def test_static_rendezvous_gives_every_node_its_place() -> None:
    lines = dry_run(
        "--nodes",
        "3",
        "--master",
        "10.1.0.1",
        "--rendezvous",
        "static",
        "350m-c4",
        "--",
        "--set",
        "training.seed=2",
    )
    assert len(lines) == 3
    for place, line in enumerate(lines):
        assert f"--node-rank={place}" in line
        assert {"--nnodes=3", "--nproc-per-node=4", "--master-addr=10.1.0.1", "--master-port=29500"} <= set(
            line
        )
        assert line[-6:] == ["-m", "launch.cli", "train", "350m-c4", "--set", "training.seed=2"]


def test_c10d_rendezvous_is_the_same_command_everywhere() -> None:
    first, second = dry_run(
        "--nodes", "2", "--master", "host", "--port", "29511", "--job", "seven", "quickstart"
    )
    assert first == second
    assert {"--rdzv-backend=c10d", "--rdzv-endpoint=host:29511", "--rdzv-id=seven"} <= set(first)


def test_restarts_and_the_grace_reach_torchrun() -> None:
    node = ("--nodes", "1", "--master", "h")
    (line,) = dry_run(*node, "--max-restarts", "3", "--grace", "120", "quickstart")
    assert {"--max-restarts=3", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=125"} <= set(line)
    assert "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1" in line
    (line,) = dry_run(*node, "quickstart")
    assert {"--max-restarts=0", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=35"} <= set(line)
    (line,) = dry_run(*node, "quickstart", "--", "--set", "checkpoint.grace_s=90.5")
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=96" in line


def test_a_leading_zero_is_no_octal_number() -> None:
    lines = dry_run(
        "--nodes", "08", "--master", "h", "--rendezvous", "static", "--grace", "010", "quickstart"
    )
    assert len(lines) == 8
    assert {"--nnodes=8", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=15"} <= set(lines[0])


def test_every_launcher_says_what_it_takes() -> None:
    for script in LAUNCHERS:
        ran = shell(ROOT / "launch" / script, "--help", SLURM_JOB_ID="")
        assert ran.returncode == 0
        assert {"--dry-run", "--no-preflight", "--max-restarts"} <= set(ran.stdout.split())
        assert "set -" not in ran.stdout
        assert "no recipe" in shell(ROOT / "launch" / script, "--port", "1", SLURM_JOB_ID="").stderr


def test_every_launcher_hands_options_of_the_run_on_behind_the_recipe(tmp_path: Path) -> None:
    """Each script in a checkout whose interpreter only prints what it gets."""
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    for script, kind in LAUNCHERS.items():
        given = ["--dry-run", "--port", "7", "--grace=9", "q", "--set", "a.b=c d", "--resume"]
        ran = shell(tmp_path / "launch" / script, *given, SLURM_JOB_ID="")
        passed = ["--dry-run", "--port", "7", "--grace=9", "q", "--", "--set", "a.b=c d", "--resume"]
        assert ran.stdout.splitlines() == ["-m", "launch.cli", "launch", kind, *passed]


def test_overrides_with_spaces_survive_the_shell() -> None:
    given = ("--nodes", "1", "--master", "h", "--ranks-per-node", "1", "--dry-run", "quickstart")
    ran = shell(TORCHRUN, *given, "--set", 'model.pattern=["trellis", "attention"]')
    (line,) = lines_of(ran.stdout)
    assert line[-1] == 'model.pattern=["trellis", "attention"]'


def test_torchrun_refuses_what_cannot_work() -> None:
    for options, words in [
        (["--master", "h", "quickstart"], "--nodes is missing"),
        (["--nodes", "2", "quickstart"], "--master is missing"),
        (["--nodes", "2", "--master", "h"], "RECIPE"),
        (["--nodes", "2", "--master", "h", "--max-restarts", "-1", "quickstart"], "whole number"),
        (["--nodes", "two", "--master", "h", "quickstart"], "whole number"),
        (["--nodes", "2", "--master", "h", "--ranks-per-node", "0", "quickstart"], "use 1 or more"),
        (["--nodes", "2", "--master", "h", "--rendezvous", "etcd", "quickstart"], "use c10d or static"),
        (
            ["--nodes", "2", "--master", "h", "--rendezvous", "static", "--ranks-per-node", "1", "q"],
            "--node-rank",
        ),
        (["--nodes", "2", "--master", "h", *ONE_EACH, "--max-restarts", "1", "q"], "use --rendezvous c10d"),
    ]:
        status, said, wrong = launched(*options)
        assert (status, said) == (2, "")
        assert words in wrong
        assert len(wrong.splitlines()) == 1
    ran = shell(TORCHRUN, "--nodes", "two", "--master", "h", "quickstart")
    assert (ran.returncode, len(ran.stderr.splitlines())) == (2, 1)


def checkout(tmp_path: Path) -> Path:
    """A folder with the set-up script and what it hashes, but no .venv."""
    (tmp_path / "launch").mkdir()
    for name in ("launch/setup.sh", "constraints.txt", "pyproject.toml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    return tmp_path / "launch" / "setup.sh"


def test_an_old_python_is_refused(tmp_path: Path) -> None:
    old = tmp_path / "python-old"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo "Python 3.9.2" && exit 0\nexit 1\n')
    old.chmod(0o755)
    ran = shell("bash", checkout(tmp_path), "train", PYTHON=str(old))
    assert ran.returncode == 1
    assert "is Python 3.9.2: trellis-dist needs Python 3.11 or newer" in ran.stderr


def test_a_python_without_venv_names_the_package(tmp_path: Path) -> None:
    bare = tmp_path / "python-bare"
    bare.write_text('#!/bin/sh\ncase "$*" in *version_info*) exit 0;; esac\nexit 1\n')
    bare.chmod(0o755)
    ran = shell("bash", checkout(tmp_path), "train", PYTHON=str(bare))
    assert ran.returncode == 1
    assert "apt install python3-venv" in ran.stderr


def test_a_venv_killed_while_it_was_made_is_made_again(tmp_path: Path) -> None:
    script = checkout(tmp_path)
    calls = tmp_path / "calls"
    maker = tmp_path / "python-maker"
    maker.write_text(
        f'#!/bin/sh\n[ "$1" = -c ] || echo "$@" >> {calls}\ncase "$*" in *torch*) exit 1;; esac\n'
    )
    half = tmp_path / ".venv" / "bin" / "python"
    half.parent.mkdir(parents=True)
    half.write_text('#!/bin/sh\ncase "$*" in *version_info*) exit 0;; esac\nexit 1\n')
    for program in (maker, half):
        program.chmod(0o755)
    ran = shell("bash", script, "train", PYTHON=str(maker))
    assert calls.read_text().split()[:3] == ["-m", "venv", "--clear"]
    assert "pip could not install" in ran.stderr  # the maker of this test makes nothing


def test_a_relative_corpus_is_meant_from_the_callers_folder(tmp_path: Path) -> None:
    (tmp_path / "checkout" / "launch").mkdir(parents=True)
    (tmp_path / "checkout" / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / "here" / "my texts").mkdir(parents=True)
    for name, text in (("launch/setup.sh", ""), (".venv/bin/trellis", 'printf "%s\\n" "$@"\n')):
        (tmp_path / "checkout" / name).write_text(f"#!/bin/sh\n{text}")
        (tmp_path / "checkout" / name).chmod(0o755)
    script = tmp_path / "checkout" / "launch" / "quickstart.sh"
    script.write_bytes((ROOT / "launch" / "quickstart.sh").read_bytes())
    texts = tmp_path / "here" / "my texts"
    for given, passed in (
        (["--corpus", "my texts"], ["--corpus", str(texts)]),
        (["--corpus=my texts"], [f"--corpus={texts}"]),
        (["--corpus", "owner/name@abc", "--run-dir", "my texts"],) * 2,
        ([], []),
    ):
        ran = shell("bash", "-c", 'cd "$0" && bash "$@"', texts.parent, script, *given)
        assert ran.stdout.splitlines() == ["run", "quickstart", *passed]


def test_a_second_set_up_does_nothing(tmp_path: Path) -> None:
    script = checkout(tmp_path)
    digest = shell(
        "bash",
        "-c",
        f"cat {tmp_path}/constraints.txt {tmp_path}/pyproject.toml | sha256sum | cut -d ' ' -f 1",
    ).stdout.strip()
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".trellis-installed").write_text(f"{digest}\ndata\ntrain\n")
    ran = shell("bash", script, "train,data", PYTHON="/nonexistent")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert shell("bash", script, "train,evals", PYTHON="/nonexistent").returncode == 1
