"""`trellis export` and `trellis import` from end to end; a fresh process opens an exported folder."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from checkpoints.pins import pin, pinned_steps
from checkpoints.reader import CheckpointReader
from checkpoints.upload import upload
from evals.runs import load_run
from launch.cli import main
from launch.recipe import load_recipe
from tests.launch.scored_run import write_scored_run

ROOT = Path(__file__).resolve().parents[2]
TEXT = "def parse(self, text):\n    return <s>text</s>"

# What a user's own program does; SETTINGS and FOLDER are put in.
FRESH = """
import json, sys
IMPORT
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(FOLDER, **SETTINGS)
tokenizer = AutoTokenizer.from_pretrained(FOLDER, **SETTINGS)
ids = tokenizer(TEXT, return_tensors="pt")
written = model.generate(**ids, max_new_tokens=8, do_sample=False)
model.save_pretrained(FOLDER + "-again")
tokenizer.save_pretrained(FOLDER + "-again")
found = {"ids": ids["input_ids"].tolist(), "written": written.tolist()}
found |= {"logits": model(**ids).logits.tolist(), "kind": type(model).__name__}
print(json.dumps({**found, "code": type(model).__module__}))
"""
WAYS = {
    "an import": ("import data_pipeline.huggingface", "{}"),
    "no import": ("", "{'trust_remote_code': True}"),
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scored_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def exported(run_dir: Path) -> Path:
    output = run_dir.parents[1] / "out"
    assert main(["export", str(run_dir), "--format", "hf", "--output", str(output)]) == 0
    return output


@pytest.mark.parametrize("way", WAYS)
def test_a_fresh_process_opens_the_folder(run_dir: Path, exported: Path, way: str, tmp_path: Path) -> None:
    statement, settings = WAYS[way]
    folder = tmp_path / "exported"
    assert main(["export", str(run_dir), "--format", "hf", "--output", str(folder)]) == 0
    code = FRESH.replace("IMPORT", statement).replace("SETTINGS", settings)
    code = code.replace("FOLDER", repr(str(folder))).replace("TEXT", repr(TEXT))
    # As with the package installed: its rooms are on the path, the working directory is another.
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
    }
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    loaded = load_run(run_dir, device="cpu")
    model, tokenizer = loaded.model, loaded.tokenizer
    ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(TEXT)]])
    assert found["ids"] == ids.tolist()
    torch.testing.assert_close(torch.tensor(found["logits"]), model(ids).detach(), atol=1e-5, rtol=1e-5)
    for _ in range(8):
        ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert found["written"] == ids.tolist()
    assert (found["kind"], "transformers_modules" in found["code"]) == (
        "TrellisForCausalLM",
        way == "no import",
    )
    assert main(["import", f"{folder}-again", "--output", str(tmp_path / "start")]) == 0
    reader = CheckpointReader(tmp_path / "start" / "step-00000000")
    for name, parameter in model.named_parameters():
        assert torch.equal(reader.read(f"model/{name}"), parameter.detach()), name


def test_an_exported_folder_is_verified_and_generates(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", str(exported)]) == 0
    assert main(["generate", str(exported), "--prompt", "def ", "--tokens", "1"]) == 0
    for path in sorted(exported.iterdir()):
        good = path.read_bytes()
        bad = good.replace(b'"', b"'", 1) if path.suffix == ".json" else bytes([good[0] ^ 1]) + good[1:]
        path.write_bytes(bad)
        capsys.readouterr()
        assert main(["doctor", str(exported)]) == 1
        assert path.name in capsys.readouterr().out
        path.write_bytes(good)
    assert main(["doctor", str(exported)]) == 0


def _examined(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    status = main(["doctor", str(path), "--json"])
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert status == (1 if report["problems"] else 0)
    return report


def test_files_that_an_export_does_not_list_are_noted(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(exported, folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    report = _examined(folder, capsys)
    assert report["problems"] == []
    (note,) = report["notes"]
    assert note.startswith(f"{folder / 'model.safetensors.index.json'} is not listed in export.json")
    (folder / "export.json").write_text("{}")
    assert _examined(folder, capsys)["notes"] == []


def test_a_model_without_hashes_is_no_data_set_and_stays_as_it_is(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(exported, folder)
    (folder / "export.json").unlink()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    report = _examined(folder, capsys)
    assert (report["kind"], report["repaired"]) == ("export", [])
    assert report["problems"] == [f"{folder}: no export.json: nothing to compare with; export again"]
    (folder / "config.json").write_text('{"model_type": "llama"}')
    assert main(["doctor", str(folder)]) == 1
    assert "no data set" in capsys.readouterr().err
    (folder / "config.json").write_bytes(before["config.json"])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_checkpoint_of_a_run_is_exported_in_either_form(run_dir: Path, tmp_path: Path) -> None:
    checkpoint = str(run_dir / "checkpoints" / "step-00000007")
    assert main(["export", checkpoint, str(tmp_path / "plain")]) == 0
    assert main(["export", checkpoint, "--output", str(tmp_path / "hf"), "--format", "hf"]) == 0
    assert (tmp_path / "hf" / "trellis_auto.py").is_file()
    assert not (tmp_path / "plain" / "trellis_auto.py").exists()
    for name in ("plain", "hf"):
        assert json.loads((tmp_path / name / "export.json").read_text())["source"]["step"] == 7
    moved = tmp_path / "step-00000007"
    moved.mkdir()
    for arguments in ([checkpoint, "--step", "8"], [str(moved)]):
        assert main(["export", *arguments, "--output", str(tmp_path / "no")]) == 1
    assert not (tmp_path / "no").exists()


def test_a_checkpoint_is_pinned_while_it_is_verified_and_exported(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, seen = run_dir / "checkpoints", []

    def watched(work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            seen.append((work.__name__, pinned_steps(root)))
            return work(*arguments, **options)

        return run

    for module, name in (("checkpoints.verify", "verify_checkpoint"), ("checkpoints.export", "export_model")):
        work = getattr(importlib.import_module(module), name)
        monkeypatch.setattr(f"{module}.{name}", watched(work))
    assert main(["export", str(run_dir), str(tmp_path / "out")]) == 0
    assert seen == [("verify_checkpoint", {7}), ("export_model", {7})]
    assert pinned_steps(root) == set()


def test_a_step_that_goes_before_its_pin_is_passed_over(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_dir, run)
    root = run / "checkpoints"

    def racing(checkpoint: Path, owner: str) -> Path:
        """Step 9 goes before its pin; another comes before the folder is listed again."""
        if checkpoint.name == "step-00000009":
            shutil.rmtree(checkpoint)
            (root / "hidden").rename(root / "step-00000007")
        return pin(checkpoint, owner)

    (root / "step-00000007").rename(root / "hidden")
    (root / "step-00000009").mkdir()
    monkeypatch.setattr("checkpoints.pins.pin", racing)
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "export.json").read_text())["source"]["step"] == 7


@pytest.mark.filterwarnings("ignore::checkpoints.commit.CheckpointWarning")
def test_a_damaged_step_is_passed_over_and_a_folder_of_others_is_not_written_to(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(checkpoint: Path, owner: str) -> Path:
        raise PermissionError(13, "Permission denied", str(checkpoint.parent))

    run = tmp_path / "run"
    shutil.copytree(run_dir, run)
    shutil.copytree(run / "checkpoints" / "step-00000007", run / "checkpoints" / "step-00000008")
    monkeypatch.setattr("checkpoints.pins.pin", refused)
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "export.json").read_text())["source"]["step"] == 7
    assert main(["export", str(run), "--step", "8", str(tmp_path / "no")]) == 1


def test_a_llama_is_imported_and_everything_left_out_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"vocab_size": 384, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).save_pretrained(
        tmp_path / "llama"
    )
    capsys.readouterr()
    arguments = ["import", "--from-transformer", str(tmp_path / "llama"), "--output", str(tmp_path / "start")]
    assert main([*arguments, "--set", "model.trellis.slots=4", "--set", "model.trellis.chunk_size=8"]) == 0
    shown = capsys.readouterr().out
    for words in ("rotary positions", "mixer.alpha_weight", "grouped queries", "--init-from"):
        assert words in shown, words
    assert main(["doctor", str(tmp_path / "start" / "step-00000000")]) == 0
    section = tomllib.loads((tmp_path / "start" / "model.toml").read_text())["model"]
    assert (section["dim"], section["trellis"]["slots"]) == (16, 4)
    recipe = load_recipe(f"quickstart+{tmp_path / 'start' / 'model.toml'}", ["data.tokenizer.vocab_size=384"])
    assert (recipe.model.dim, recipe.model.trellis.chunk_size) == (16, 8)


BAD = {
    "no folder": (["export", "RUN"], "give OUTPUT"),
    "two folders": (["export", "RUN", "a", "--output", "b"], "give OUTPUT"),
    "no output": (["import", "RUN"], "--output FOLDER"),
    "nothing": (["import", "--output", "TMP/x"], "one of the two"),
    "both": (["import", "RUN", "--from-transformer", "RUN", "--output", "TMP/x"], "one of the two"),
    "no model": (["import", "RUN", "--output", "TMP/x"], "config.json"),
    "a key of an export": (
        ["import", "RUN", "--output", "TMP/x", "--set", "model.dim=3"],
        "keeps its section",
    ),
    "a seed of an export": (["import", "RUN", "--output", "TMP/x", "--seed", "0"], "nothing is drawn"),
    "a strange key": (
        ["import", "--from-transformer", "RUN", "--output", "TMP/x", "--set", "data.seed=3"],
        "only model.*",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_misuse_is_one_line(
    case: str, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, words = BAD[case]
    given = [item.replace("RUN", str(run_dir)).replace("TMP", str(tmp_path)) for item in arguments]
    assert main(given) == 1
    printed = capsys.readouterr().err
    assert words in printed
    assert len(printed.splitlines()) == 1
    assert not (tmp_path / "x").exists()


def test_an_uploaded_checkpoint_comes_back_or_is_refused_in_one_line(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = next((run_dir / "checkpoints").glob("step-*"))
    store = tmp_path / "store"
    upload(checkpoint, store.as_uri())
    url, back = f"{store.as_uri()}/{checkpoint.name}", tmp_path / "back"
    assert main(["download", url, "--output", str(back)]) == 0
    assert f"is in {back / checkpoint.name}, verified" in capsys.readouterr().out
    assert main(["doctor", str(back / checkpoint.name)]) == 0
    (store / checkpoint.name / "manifest.sha256").unlink()
    assert main(["download", url, "--output", str(tmp_path / "other")]) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert "holds no finished checkpoint" in error[0]
    assert not list(tmp_path.glob("other/step-*"))
