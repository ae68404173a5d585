"""The command line: one clear line for what a user can cause, a traceback only with --debug."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cli import main
from launch.planning.memory import NO_PARTS

BASE = str(Path(__file__).with_name("base.toml"))

BAD = {
    "unknown key": (["plan", BASE, "--set", "model.dimm=128"], "did you mean model.dim?"),
    "mesh that does not fit": (["plan", BASE, "--set", "mesh.dp=3"], "dp 3"),
    "segments of packed documents": (
        ["plan", BASE, "--set", "mesh.sp=2", "--set", "mesh.dp=1"],
        "would fall inside a chunk",
    ),
    "missing corpus": (["prepare", BASE, "--corpus", "nowhere/at/all.txt"], "no such file or folder"),
    "unpinned data set": (
        ["prepare", "350m-c4", "--set", "data.source.revision="],
        "--set data.source.revision=COMMIT",
    ),
    "resume without checkpoint": (
        ["train", BASE, "--resume", "--run-dir", "RUN"],
        "nothing to resume",
    ),
    "train before prepare": (
        ["train", BASE, "--run-dir", "RUN", "--dataset-dir", "RUN/none"],
        "trellis prepare",
    ),
    "eval of no run": (["eval", "RUN"], "is no run folder"),
    "export of no run": (["export", "RUN", "RUN/out"], "is no run folder"),
    "doctor of nothing": (["doctor", "RUN/nothing"], "no such file or folder"),
    "doctor of anything": (["doctor", "RUN"], "is no checkpoint"),
    "service open to others without a token": (["eval-service", "RUN", "--host", "0.0.0.0"], "needs a token"),
    "unknown recipe": (["plan", "quikstart"], "quickstart"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_a_non_zero_exit(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, words = BAD[case]
    status = main([item.replace("RUN", str(tmp_path)) for item in arguments])
    printed = capsys.readouterr()
    assert status == 1
    assert printed.err.startswith("trellis: error: ")
    assert len(printed.err.splitlines()) == 1
    assert words in printed.err
    assert "Traceback" not in printed.out


def test_init_from_is_a_recipe_key_that_holds_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launch import training_run

    trained: list[str] = []
    monkeypatch.setattr(
        training_run, "train", lambda recipe, *_, **__: trained.append(recipe.training.init_from)
    )
    monkeypatch.chdir(tmp_path)
    assert main(["train", BASE, "--init-from", "runs/old"]) == 0
    assert main(["train", BASE]) == 0
    assert trained == [str(tmp_path / "runs" / "old"), ""]


def test_debug_adds_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", BASE, "--set", "model.dimm=1", "--debug"]) == 1
    printed = capsys.readouterr().err
    assert "Traceback (most recent call last)" in printed
    assert printed.splitlines()[-1].startswith("trellis: error: ")


@pytest.mark.parametrize(
    "arguments",
    [["plan"], ["no-such-command"], ["plan", BASE, "--no-such-option"], ["prepare", BASE, "--workers", "0"]],
)
def test_misuse_is_one_line_and_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


HEAVY = ("torch", "pydantic", "numpy", "ray", "deepspeed", "lm_eval")


def test_help_imports_nothing_heavy_and_a_subprocess_reports_its_status() -> None:
    code = (
        "import sys; from launch.cli import main; status = main(['--help']); "
        f"sys.exit(status or ' '.join(sys.modules.keys() & set({HEAVY})) or None)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0, f"imported by --help: {shown.stderr}"
    for command in (
        "plan",
        "prepare",
        "train",
        "eval",
        "eval-service",
        "run",
        "generate",
        "export",
        "doctor",
    ):
        assert command in shown.stdout
    refused = subprocess.run(
        [sys.executable, "-m", "launch.cli", "plan", "nothing"], capture_output=True, text=True, timeout=60
    )
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr


def test_plan_prints_what_the_recipe_means(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", BASE, "--set", "optimizer.lr=1e-3"]) == 0
    shown = capsys.readouterr().out
    assert "optimizer.lr = 0.001" in shown
    assert "default: 0.003" in shown
    assert "global rows" in shown
    assert "without embeddings" in shown


def test_plan_json_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--device", "h100", "--devices", "8"]
    assert main(["plan", "350m-c4+contexts/16k", "--set", "mesh.dp=8", *where, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    batch, memory = plan["batch"], plan["memory_per_rank_bytes"]
    assert batch["global_rows"] == batch["micro_batch"] * batch["accumulation"] * batch["dp"]
    assert batch["tokens"] == batch["steps"] * batch["global_rows"] * batch["sequence_length"]
    assert memory["total"] == sum(value for part, value in memory.items() if part not in NO_PARTS)
    parameters = plan["parameters"]["total"]
    assert memory["weights"] == 2 * parameters
    assert memory["optimizer_moments"] == pytest.approx(8 * parameters / 8, abs=8)
