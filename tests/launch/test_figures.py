"""`trellis figures` from a run to its page, and what it refuses."""

import dataclasses
import json
import shutil

import pytest
import torch

from evals.figures.trace import trace
from evals.runs import load_run
from evals.states import context_ids, context_start
from launch.cli import main
from launch.experiments import pictures
from launch.experiments.pictures import can_draw
from launch.figures.measure import Extent, measure
from launch.figures.page import figures_page
from launch.figures.training import _spread, at_checkpoints
from tests.evals.conftest import write_checkpoint
from tests.launch.scored_run import write_scored_run
from trellis_dist.models.language_model import build_language_model

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. "


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    run = write_scored_run(tmp_path_factory.mktemp("run"))
    recipe = json.loads((run / "recipe.json").read_text())
    recipe["evals"] |= {"mqar_pairs": [2], "mqar_length": [32], "ruler_lengths": [512, 4096]}
    (run / "recipe.json").write_text(json.dumps(recipe))
    rows = [{"step": n, "trellis/layer_00/forget_gate": 1 - n / 16} for n in (2, 4)]
    write_checkpoint(run, step=3, seed=9)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def test_the_command_from_run_to_page(run_dir, tmp_path, capsys, monkeypatch):
    draw = pictures.draw  # one of some thirty: each takes half a second
    monkeypatch.setattr(
        pictures, "draw", lambda chart, path: draw(chart, path) if chart.name == "gate" else []
    )
    text, suites = tmp_path / "book.txt", tmp_path / "suites"
    text.write_text(TEXT * 60)
    suites.mkdir()
    row = {"goal": "How to fold?", "sol1": "Fold.", "sol2": "Eat.", "label": 0}
    (suites / "piqa.jsonl").write_text((json.dumps(row) + "\n") * 3)
    command = ["figures", str(run_dir), str(run_dir), "--tokens", "512", "--items", "3", "--text", str(text)]
    assert main([*command, "--suites", str(suites), "--output", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "figures.json").read_text())
    run = load_run(run_dir, device="cpu")
    ids = run.tokenizer.encode(TEXT * 60)
    row = [*context_start(run.tokenizer, ids), *ids][:512]
    seen = trace(run.model, torch.tensor([row]), piece=8)
    assert found["text"]["ends"] == list(range(8, 513, 8))
    wanted = seen.gate[0].unflatten(-1, (64, 8)).mean(-1)
    torch.testing.assert_close(torch.tensor(found["text"]["gate"]), wanted)
    torch.testing.assert_close(torch.tensor(found["text"]["value_norm"]), seen.value_norm[0])
    assert found["training"] == {"forget_gate": {"0": [[2, 0.875], [4, 0.75]]}}
    assert found["reasoning"]["piqa"]["items"] == 3
    assert [one["step"] for one in found["checkpoints"]] == [3, 7]
    assert "Saved checkpoints on the same text" in (tmp_path / "out" / "figures.md").read_text()
    for row in found["checkpoints"]:
        assert row["beside"]["positions"]["ends"] == row["items"]["positions"]["ends"]
        assert row["beside"]["positions"]["gate"] != row["items"]["positions"]["gate"]
    assert [one["group"] for one in found["recall"]["needle"]["accuracy"]] == ["512"]
    assert [one["tokens"] for one in found["speeds"]] == [512]
    assert [one["losses"] for one in found["others"]] == [found["losses"]]
    assert found["losses"]["targets"] == len(ids)
    page = (tmp_path / "out" / "figures.html").read_text()
    for title in (
        "Forget gate of the key pass",
        "by position in reasoning items, layer",
        "Through training",
        "piqa, 3 items",
        "Throughput",
    ):
        assert title in page
    if can_draw():
        assert (tmp_path / "out" / "figures-gate.png").read_bytes().startswith(b"\x89PNG")
    assert "out/figures.html" in capsys.readouterr().out


def test_a_model_without_trellis_layers_has_recall_and_losses(run_dir):
    run = load_run(run_dir, device="cpu")
    config = dataclasses.replace(run.model.config, pattern=("attention",))
    recipe = {**run.recipe, "evals": {"mqar_pairs": [2], "mqar_length": [32], "ruler_lengths": [512]}}
    other = dataclasses.replace(run, model=build_language_model(config, seed=0).eval(), recipe=recipe)
    found = measure(other, "Words of a text. " * 400, Extent(tokens=512, items=3))
    assert found["layers"] == []
    assert not {"text", "held_open", "reasoning"} & set(found)
    assert [share["group"] for share in found["recall"]["needle"]["accuracy"]] == ["512"]
    page = figures_page(found, text="words").markdown()
    assert "No layer of this model is a Trellis layer" in page
    assert "Loss by position" in page


def test_further_runs_stand_beside_the_first_one(run_dir, tmp_path):
    run = load_run(run_dir, device="cpu")
    config = dataclasses.replace(run.model.config, pattern=("attention",))
    recipe = {**run.recipe, "evals": {"mqar_pairs": [2], "mqar_length": [32], "ruler_lengths": [512]}}
    base = dataclasses.replace(run, model=build_language_model(config, seed=0).eval(), recipe=recipe)
    text = "Words of a text. " * 400
    found = measure(base, text, Extent(tokens=512, items=3), others=[run, base])
    alone = measure(base, text, Extent(tokens=512, items=3))
    assert found["losses"] == alone["losses"] == found["others"][1]["losses"]
    assert found["others"][0]["losses"]["model"]["loss"] != alone["losses"]["model"]["loss"]
    page = figures_page(found, text="words")
    names = [run.name, f"{run.name}, step 7", f"{run.name}, run 3"]
    for name in ("loss", "speed"):
        (drawn,) = (chart for chart in page.charts if chart.name == name)
        assert list(drawn.series) == names
    first, other, _ = (chart.series for chart in page.charts if chart.name == "loss").__next__().values()
    assert [x for x, _ in first] == [x for x, _ in other]
    assert other[0][1] == pytest.approx(found["others"][0]["losses"]["by_position"][0]["loss"])
    strange = dataclasses.replace(run, tokenizer=_Bytes())
    with pytest.raises(ValueError, match=r"another tokenizer .* name runs of one tokenizer"):
        measure(base, text, Extent(tokens=512, items=3), others=[strange])


class _Bytes:
    def encode(self, text):
        return list(text.encode())


def test_saved_checkpoints_read_the_same_text(run_dir, tmp_path):
    run = tmp_path / "tiny"
    shutil.copytree(run_dir, run)
    write_checkpoint(run, step=5, seed=3)
    write_checkpoint(run, step=6, seed=4)
    damaged = next((run / "checkpoints" / "step-00000006").glob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-9])
    said = []
    loaded = load_run(run, device="cpu")
    found = at_checkpoints(loaded, TEXT * 20, suites=None, say=said.append)
    assert [row["step"] for row in found] == [3, 5, 7]
    assert any("step-00000006 is damaged" in line for line in said)
    ids = torch.tensor([context_ids(loaded.tokenizer, TEXT * 20)])
    for row in found:
        seen = trace(load_run(run, step=row["step"], device="cpu").model, ids, piece=10**4)
        assert row["prose"]["gate"] == pytest.approx(seen.gate[0].mean((1, 2)).tolist())
        assert row["prose"]["key_norm"] == pytest.approx(seen.key_norm[0, ..., -1].mean(1).tolist())
        assert row["needle"]["low"] <= row["needle"]["percent"] <= row["needle"]["high"]
        assert len(row["retention"]) == len(row["prose"]["gate"])
        assert max(row["retention"]) < 0
        bins = row["prose"]["positions"]
        piece = ids.shape[1] // 16
        assert bins["ends"] == [piece * place for place in range(1, 17)]
        wanted = seen.gate[0, 1, :, piece : 2 * piece].mean()
        assert bins["gate"][1][1] == pytest.approx(float(wanted))
    assert found[0]["prose"] != found[1]["prose"]
    assert at_checkpoints(load_run(run, step=3), TEXT, suites=None, say=said.append) == []


def test_at_most_eight_checkpoints_are_read():
    assert _spread(range(3)) == [0, 1, 2]
    assert _spread(range(0, 150, 10)) == [0, 20, 40, 60, 80, 100, 120, 140]


@pytest.mark.parametrize(
    "options,message",
    [
        (["--text", "NONE.txt"], "no such file; name a .txt or .jsonl file"),
        (["--suites", "NONE"], "no such folder; name one with the suites' rows"),
        (["--text", "SHORT"], "give one of 64 or more"),
    ],
)
def test_what_a_user_can_cause_is_one_line(run_dir, tmp_path, capsys, options, message):
    (tmp_path / "short.txt").write_text("Short.")
    options = [one.replace("SHORT", str(tmp_path / "short.txt")) for one in options]
    assert main(["figures", str(run_dir), *options, "--output", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert message in error[0]
    assert not (tmp_path / "out").exists()
