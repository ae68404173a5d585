"""What a table says about its text: passes over it, and how much context its documents hold."""

import numpy as np
import pytest

from data_pipeline.loader import TokenDataset
from data_pipeline.manifest import load_manifest
from launch.cli import main
from launch.experiments import pool
from launch.experiments.expand import Options, expand
from launch.experiments.page import Page, Section, Table, Text
from launch.experiments.pool import perform_all
from launch.experiments.tables import read_experiment
from launch.experiments.text import context_shares, repeats, with_notes
from launch.recipe import load_recipe
from tests.evals.conftest import write_dataset
from trellis_dist.models.counts import parameter_counts
from trellis_dist.models.registry import MIXERS

PAGE = Page("Title", "subtitle", [Text("what the paper did"), Section("Perplexity"), Text("numbers")])


@pytest.fixture
def shards(tmp_path, monkeypatch):
    """The shards of `tiny`, small ones, and where they are looked for."""
    (tmp_path / "shards").mkdir()
    write_dataset(tmp_path / "shards" / "tiny")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "shards" / "tiny"


def test_runs_that_see_their_text_more_than_twice_say_so_in_one_line(shards, capsys, monkeypatch):
    tokens = load_manifest(shards).splits["train"].tokens
    often = expand("gates", "tiny", Options())
    (line,) = repeats(often.specs.values())
    assert line.startswith(f"2 runs of 4,096,000 tokens on the {tokens:,} in shards/tiny")
    assert f"{4_096_000 / tokens:.1f} times over" in line
    steps = 2 * tokens // 8192  # not quite twice
    options = (f"training.steps={steps}", "schedule.warmup_steps=1")
    twice = expand("gates", "tiny", Options(overrides=options))
    assert repeats(twice.specs.values()) == []
    assert with_notes(PAGE, twice) == PAGE
    noted = with_notes(PAGE, often)
    assert [type(block) for block in noted.blocks] == [Text, Text, Section, Text]
    assert noted.blocks[1] == Text(line)

    assert main(["reproduce", "gates", "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == line
    said: list[str] = []
    monkeypatch.setattr(pool, "perform_in", lambda shop, spec: {"name": spec.name})
    perform_all(list(often.specs.values()), shards / "root", jobs=1, say=said.append)
    assert said == [line]


def test_a_text_that_is_not_there_yet_says_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = expand("figure2", "tiny", Options(only=("trellis",)))
    assert repeats(found.specs.values()) == []
    table = with_notes(PAGE, found).blocks[2]
    assert isinstance(table, Table)
    assert {row[2] for row in table.rows} == {"no shards here"}


def _counted(shards, length):
    """The share, target by target."""
    data = TokenDataset(shards, "train", sequence_length=64, seed=0)
    before = np.concatenate([np.arange(1, len(data.tokens_of(i))) for i in range(data.num_documents)])
    return float((before >= length).mean())


def test_the_share_of_targets_with_enough_context_is_that_of_the_documents(shards):
    found = context_shares(shards, (1, 40, 128, 512, 10**6))
    assert found[1] == 1.0
    assert 0 < found[512] < found[128] < 1
    assert found[10**6] == 0
    for length in (40, 128, 512):
        assert found[length] == pytest.approx(_counted(shards, length))


def test_an_experiment_that_compares_contexts_shows_the_share_of_each(shards):
    found = expand("table4", "tiny", Options(only=("trellis",), overrides=("training.steps=60",)))
    page = with_notes(PAGE, found)
    table = next(block for block in page.blocks if isinstance(block, Table))
    shares = context_shares(shards, (128, 256, 512, 1024, 2048, 4096, 8192))
    wanted = {f"{length:,}": f"{100 * share:.1f}%" for length, share in shares.items()}
    assert {row[1]: row[2] for row in table.rows} == wanted
    assert page.blocks[-2:] == PAGE.blocks[-2:]


def test_w_is_a_uuid_and_the_page_says_that_it_is_ambiguous():
    table = read_experiment("table3")
    (papers,) = (group for group in table.groups if group.paper)
    asked = [column.value for column in papers.columns if column.label.startswith("W ")]
    assert asked == [f"niah_single_3/generation/{{{n}}}" for n in ("1k", "2k", "4k")]
    assert "ambiguous" in table.setting


def test_the_table_of_baselines_has_every_layer_kind_and_the_hybrid():
    found = expand("baselines", "tiny", Options())
    models = {row: spec.resolved.model for (row, _, _), spec in found.specs.items()}
    single = {kind for model in models.values() if len(model.pattern) == 1 for kind in model.pattern}
    assert single == set(MIXERS)
    hybrid = models["trellis_window"]
    assert hybrid.pattern == ("trellis", "sliding_window")
    assert hybrid.trellis == load_recipe("scales/tiny").model.trellis
    assert hybrid.mlp_hidden is not None
    sizes = {row: parameter_counts(model).total for row, model in models.items()}
    assert sizes["trellis_window"] == pytest.approx(sizes["trellis"], rel=0.02)
