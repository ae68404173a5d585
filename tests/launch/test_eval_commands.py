"""`trellis eval` and `trellis generate` on every kind of model, on one rank and two; one-line refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch import evaluation
from launch.cli import main
from launch.evaluation import EvalRequest, settings_of
from launch.failures import read_failures
from tests.evals.conftest import write_checkpoint
from tests.evals.test_peers import save_peer
from tests.launch.scored_run import write_scored_run
from trellis_dist.training.errors import EchoError

ROOT = Path(__file__).resolve().parents[2]
MQAR = ["--tasks", "mqar", "--set", "evals.mqar_pairs=[2]", "--set", "evals.mqar_length=[16]"]
SMALL = [*MQAR, "--set", "evals.mqar_samples=70", "--set", "evals.device=cpu"]
TASKS = [*SMALL, "--tasks", "mqar,context_length", "--set", "evals.context_lengths=[32]"]
REQUEST = EvalRequest(
    model="",
    assignments=["evals.mqar_samples=3"],
    step=None,
    dataset_dir=None,
    output=None,
    trust_remote_code=False,
    dtype="float32",
    as_json=False,
)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scored_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def models(run_dir: Path) -> dict[str, Path]:
    """One folder of each kind."""
    parent = run_dir.parents[1]
    assert main(["export", str(run_dir), str(parent / "export")]) == 0
    save_peer(parent / "peer")
    return {
        "run": run_dir,
        "checkpoint": run_dir / "checkpoints" / "step-00000007",
        "export": parent / "export",
        "peer": parent / "peer",
    }


def records_of(folder: Path) -> dict[str, Any]:
    return {
        path.name.split("-")[0].split(".")[0]: json.loads(path.read_text()) for path in folder.glob("*.json")
    }


# --- one rank


@pytest.mark.parametrize("kind", ["run", "checkpoint", "export", "peer"])
def test_any_model_is_scored_into_a_folder_and_not_again(
    models: dict[str, Path], kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    command = ["eval", str(models[kind]), *SMALL, "--output", str(output)]
    assert main([*command, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    record = json.loads((output / "mqar.json").read_text())
    assert printed == {"mqar": record}
    assert record["model"] == {"run": "base", "checkpoint": "base"}.get(kind, kind)
    assert record["result"]["groups"]["2/16"]["samples"] == 70
    assert (record["settings"]["samples"], set(record["scalars"])) == (70, {"mqar/2/16"})
    page = (output / "report.html").read_text()
    assert "Recall of pairs" in page
    assert record["digest"][:12] in page
    assert main(command) == 0
    assert capsys.readouterr().out == f"results in {output}, report {output / 'report.html'}\n"
    assert json.loads((output / "mqar.json").read_text()) == record  # its seconds too: it was not run again
    assert main([*command, "--set", "evals.mqar_seed=1"]) == 0
    again = json.loads((output / "mqar.json").read_text())
    assert again["key"] != record["key"]


def test_a_run_and_its_export_score_alike_and_other_weights_have_other_keys(
    models: dict[str, Path], tmp_path: Path
) -> None:
    for kind in ("run", "export", "peer"):
        assert main(["eval", str(models[kind]), *SMALL, "--output", str(tmp_path / kind)]) == 0
    found = {kind: records_of(tmp_path / kind)["mqar"] for kind in ("run", "export", "peer")}
    assert found["run"]["result"] == found["export"]["result"]
    assert len({record["key"] for record in found.values()}) == 3


def test_a_run_keeps_its_results_itself(
    run_dir: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = shutil.copytree(run_dir, tmp_path / "tiny")
    write_checkpoint(run, step=9, seed=3)
    assert main(["eval", str(run), *TASKS, "--step", "7"]) == 0
    assert main(["eval", str(run / "checkpoints" / "step-00000009"), *TASKS]) == 0
    names = {path.name for path in (run / "evals").iterdir()}
    assert names == {f"{task}-step-{step}.json" for task in ("mqar", "context_length") for step in (7, 9)}
    assert "Loss by length of context" in (run / "report.html").read_text()
    assert (run / "summary.json").is_file()


REFUSED = {
    "no model": (["eval", "TMP/none", "--output", "TMP/out"], "is no run folder (recipe.json), no export"),
    "no folder for results": (["eval", "PEER", *SMALL], "name a folder for the results with --output DIR"),
    "a task of a run": (
        ["eval", "PEER", "--tasks", "mqar,perplexity", "--output", "TMP/out"],
        "perplexity scores a trained run on its held-out text, and ",
    ),
    "tasks of a run, not named": (["eval", "PEER", "--output", "TMP/out"], "choose others with --tasks ("),
    "a misspelt task": (["eval", "PEER", "--tasks", "piqaa"], "no such task; did you mean piqa"),
    "no task": (["eval", "RUN", "--tasks", ","], "names none: choose among"),
    "another section": (["eval", "PEER", "--set", "model.dim=3"], "only evals.* can be set here"),
    "an unknown key": (
        ["eval", "PEER", *SMALL, "--set", "evals.mqar_pair=3", "--output", "TMP/out"],
        "evals.mqar_pair = 3: unknown key; did you mean evals.mqar_pairs?",
    ),
    "a step of a peer": (
        ["eval", "PEER", *SMALL, "--step", "3", "--output", "TMP/out"],
        "only a run has steps",
    ),
    "two steps": (["eval", "RUN/checkpoints/step-00000007", *SMALL, "--step", "3"], "leave --step out"),
    "halves of a run": (
        ["eval", "RUN", *SMALL, "--dtype", "bfloat16", "--output", "TMP/out"],
        "ours are scored in float32",
    ),
    "no prompt": (["generate", "RUN"], "no prompt: give --prompt TEXT"),
    "no prompts": (["generate", "RUN", "--prompts", "TMP/none.txt"], "none.txt"),
    "nothing that generates": (
        ["generate", "TMP", "--prompt", "a"],
        "is no run folder (recipe.json), no export",
    ),
    "an empty stop": (["generate", "RUN", "--prompt", "a", "--stop", ""], "stop holds an empty string"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_in_one_line(
    models: dict[str, Path], case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, words = REFUSED[case]
    places = {"TMP": str(tmp_path), "RUN": str(models["run"]), "PEER": str(models["peer"])}
    for name, place in places.items():
        arguments = [
            item.replace(name, place, 1) if item.split("/")[0] == name else item for item in arguments
        ]
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("trellis: error: ")
    assert len(printed.err.splitlines()) == 1
    assert words in printed.err
    assert not (tmp_path / "out").exists()


def test_code_of_a_folder_runs_only_when_asked_to(models: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(models["peer"], tmp_path / "peer")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    command = ["eval", str(folder), *SMALL, "--output", str(tmp_path / "out")]
    assert main(command) == 1
    assert not (tmp_path / "ran").exists()
    assert main([*command, "--trust-remote-code"]) == 1  # it runs, and defines no Config
    assert (tmp_path / "ran").exists()


# --- ranks


def test_two_ranks_give_the_scores_of_one(
    models: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    alone, both = tmp_path / "alone", tmp_path / "both"
    command = ["eval", str(models["run"]), *TASKS, "--set", "evals.context_documents=9"]
    assert main([*command, "--output", str(alone)]) == 0
    capfd.readouterr()
    assert main([*command, "--output", str(both), "--ranks", "2"]) == 0
    assert capfd.readouterr().out == f"results in {both}, report {both / 'report.html'}\n"
    one, two = records_of(alone), records_of(both)
    assert set(one) == {"mqar", "context_length"}
    for name, record in one.items():
        assert (record["result"], record["key"]) == (two[name]["result"], two[name]["key"])


def test_under_torchrun_ranks_fail_with_one_line(models: dict[str, Path], tmp_path: Path) -> None:
    here = ["--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2", "-m", "launch.cli"]
    options = [*TASKS, "--set", "evals.context_lengths=[1000000]", "--output", str(tmp_path)]
    refused = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *here, "eval", str(models["run"]), *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert refused.returncode != 0
    assert (tmp_path / "mqar.json").is_file()  # what was scored before is kept
    assert refused.stderr.count("trellis: error") == 1
    assert "evals.context_lengths = [1000000]: the validation split has" in refused.stderr


@pytest.mark.parametrize("error", [ValueError("no such key"), EchoError("another rank failed: rank 1: x")])
def test_a_rank_leaves_its_failure_for_the_launcher(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: EvalRequest) -> None:
        raise error

    monkeypatch.setattr(evaluation, "_as_rank", fail)
    monkeypatch.setenv("RANK", "0")
    (tmp_path / "request.json").write_text(json.dumps(dataclasses.asdict(REQUEST)))
    assert evaluation.main([str(tmp_path)]) == 1
    (failure,) = read_failures(tmp_path)
    assert failure.echo == isinstance(error, EchoError)
    assert str(error) in failure.message


def test_each_rank_reads_the_same_request(models: dict[str, Path]) -> None:
    request = dataclasses.replace(REQUEST, model=str(models["run"]))
    config, recipe = settings_of(request)
    assert config.mqar_samples == 3
    assert recipe is not None
    assert recipe.evals == config


# --- generate


@pytest.mark.parametrize("kind", ["run", "checkpoint", "export", "peer"])
def test_every_model_writes_and_several_prompts_together(
    models: dict[str, Path], kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "more.jsonl").write_text('{"prompt": "import "}\n{"prompt": "a much longer prompt"}\n')
    options = ["--tokens", "8", "--seed", "5"]
    many = ["--prompt", "def ", "--prompts", str(tmp_path / "more.jsonl"), *options]
    assert main(["generate", str(models[kind]), *many, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == ["def ", "import ", "a much longer prompt"]
    for line in lines:
        assert line["tokens"] <= 8
        assert line["finish"] in ("eos", "length")
    assert main(["generate", str(models[kind]), "--prompt", "import ", *options]) == 0
    assert capsys.readouterr().out == f"import {lines[1]['text']}\n"  # alone, and as it came
    assert main(["generate", str(models[kind]), *many]) == 0
    shown = capsys.readouterr().out
    assert f"import {lines[1]['text']}\n----" in shown


def test_one_text_comes_in_pieces(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pieces = []
    write = sys.stdout.write
    monkeypatch.setattr(sys.stdout, "write", lambda text: (pieces.append(text), write(text))[1])
    greedy = ["--prompt", "def ", "--tokens", "12", "--temperature", "0"]
    assert main(["generate", str(models["run"]), *greedy]) == 0
    text = capsys.readouterr().out
    assert "".join(pieces) == text
    assert len(pieces) > 4
    stop = text[len("def ") + 2 : len("def ") + 4]
    assert main(["generate", str(models["run"]), *greedy, "--stop", stop]) == 0
    assert capsys.readouterr().out == text[: text.index(stop, 4)] + "\n"
