"""Recipes: composition, strictness, what is refused and with which words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from launch.layers import recipe_names
from launch.recipe import differences, load_recipe, parse_recipe, recipe_digest, resolve

BASE = str(Path(__file__).with_name("base.toml"))


def refusal(reference: str, *overrides: str) -> list[str]:
    with pytest.raises(ValueError) as caught:
        load_recipe(reference, overrides)
    return str(caught.value).splitlines()


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_loads_and_survives_the_saved_form(name: str) -> None:
    recipe = load_recipe(name)
    saved = json.loads(json.dumps(resolve(recipe)))
    again = parse_recipe(saved, source=name)
    assert again == recipe
    assert recipe_digest(again) == recipe_digest(recipe)
    assert recipe.name == name


@pytest.mark.parametrize("name", [name for name in recipe_names() if name != "quickstart"])
def test_recipes_of_the_paper_pin_their_corpus_and_say_what_is_ours(name: str) -> None:
    recipe = load_recipe(name)
    revision = recipe.data.source.revision or ""
    assert len(revision) == 40
    assert set(revision) <= set("0123456789abcdef")
    assert recipe.data.source.licence != "unknown"
    for key in (
        "training.global_batch_tokens",
        "schedule.warmup_steps",
        "model.vocab_size",
        "optimizer.weight_decay",
    ):
        assert recipe.choices[key].startswith("our choice: ")


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.endswith(("-c4", "-pile"))])
def test_a_corpus_is_cut_a_few_per_cent_above_the_run(name: str) -> None:
    recipe = load_recipe(name)
    budget = recipe.data.source.max_tokens
    assert budget is not None
    assert 1.02 < budget / recipe.tokens() < 1.06
    assert recipe.data.source.max_documents is None


@pytest.mark.parametrize("corpus", ["books", "c4", "gutenberg", "mixture", "pile"])
def test_every_corpus_goes_with_a_size_and_a_context(corpus: str) -> None:
    own = ["name=own", "data.directory=shards/own"]
    recipe = load_recipe(f"sizes/350m+corpora/{corpus}+contexts/2k", own)
    for source in recipe.data.sources.values():
        assert source.licence != "unknown"
        assert source.kind == "path" or len(source.revision or "") == 40


def test_the_mixture_takes_the_corpora_as_they_are_pinned_alone() -> None:
    sources = load_recipe("sizes/350m+corpora/mixture", ["name=own", "data.directory=own"]).data.sources
    for name, source in sources.items():
        alone = load_recipe(f"125m-{name}").data.source
        assert replace(source, weight=None, max_tokens=None) == replace(alone, max_tokens=None)


@pytest.mark.parametrize("context", ["2k", "4k", "8k", "16k", "32k"])
def test_a_context_changes_the_length_and_keeps_the_batch_in_tokens(context: str) -> None:
    recipe = load_recipe(f"350m-c4+contexts/{context}", ["mesh.dp=8"])
    assert recipe.data.sequence_length == int(context[:-1]) * 1024
    assert recipe.training.global_batch_tokens == 524288


def test_overrides_are_toml_or_bare_strings_and_an_empty_one_is_the_default() -> None:
    recipe = load_recipe(
        BASE,
        [
            "optimizer.lr=1",
            "model.trellis.phi=tanh",
            'model.trellis.gates=["off", "learned"]',
            "schedule.warmup_steps=",
        ],
    )
    assert recipe.optimizer.lr == 1.0
    assert recipe.model.trellis.phi == "tanh"
    assert recipe.model.trellis.gates == ("off", "learned")
    assert recipe.schedule.warmup_steps == 100


def test_null_leaves_a_key_without_a_value() -> None:
    assert load_recipe(BASE, ["model.mlp_hidden=96", "model.mlp_hidden=null"]).model.mlp_hidden is None
    assert load_recipe(BASE, ['data.source.licence="null"']).data.source.licence == "null"
    with pytest.raises(ValueError, match=r"optimizer\.lr = null"):
        load_recipe(BASE, ["optimizer.lr=null"])


@pytest.mark.parametrize(
    "override, words",
    [
        ("model.dimm=128", "model.dimm = 128: unknown key; did you mean model.dim?"),
        ("model.chunk_size=32", "did you mean model.trellis.chunk_size or model.baselines.chunk_size?"),
        ("modle.dim=128", "did you mean model?"),
        ("model.dim=wide", 'model.dim = "wide"'),
        ("model.dim=128.5", "model.dim = 128.5"),
        ("model.baselines.titans_keep_bias=nan", "titans_keep_bias = NaN: input should be a finite number"),
        ("model.trellis.gate_bias=-inf", "model.trellis.gate_bias = -Infinity"),
        ("optimizer.lr=inf", "optimizer.lr = Infinity"),
        ("data.source.weight=nan", "data.source.weight = NaN"),
        ('optimizer.lr="3e-3"', 'optimizer.lr = "3e-3"'),
        ("model.trellis.phi=relu", "'silu'"),
        ("training.steps=", "training.steps is missing"),
        ("model=3", "model = 3: this is a section"),
        ("model.dim=130", "model.num_heads = 4"),
        ("data.tokenizer.vocab_size=8192", "more than model.vocab_size = 4096"),
        ("data.sequence_length=500", "no multiple of data.sequence_length = 500: use 8000 or 8500"),
        ("mesh.dp=3", "16 rows"),
        ("mesh.tp=3", "mesh.tp = 3"),
        ("schedule.warmup_steps=100000", "schedule.warmup_steps = 100000"),
        ("choices.model.dimm=x", "choices"),
    ],
)
def test_one_line_names_key_value_and_remedy(override: str, words: str) -> None:
    lines = refusal(BASE, override)
    assert len(lines) == 1
    assert words in lines[0]


def test_sequence_ranks_are_refused_with_the_packing_as_the_reason() -> None:
    (line,) = refusal(BASE, "mesh.dp=1", "mesh.sp=2", "training.engine=local")
    assert "mesh.sp = 2 cuts rows at multiples of the chunk size, and with data.chunk_aligned = false" in line


def test_an_engine_that_cannot_be_is_refused() -> None:
    (line,) = refusal(BASE, "training.zero_stage=0", "training.precision=bf16")
    assert "use training.zero_stage = 1" in line


def test_wsd_needs_room_for_warm_up_and_decay() -> None:
    (line,) = refusal(BASE, "schedule.kind=wsd", "schedule.decay_fraction=1.0")
    assert "lower one of them" in line


def test_every_problem_gets_its_line() -> None:
    lines = refusal(BASE, "model.dimm=1", "training.stepz=2", "optimizer.lr=fast")
    assert len(lines) == 3


def test_unknown_recipe_names_the_closest() -> None:
    with pytest.raises(FileNotFoundError, match="350m-c4"):
        load_recipe("350m-c44")


def test_a_recipe_may_not_extend_itself(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('extends = ["b"]')
    (tmp_path / "b.toml").write_text('extends = ["a"]')
    with pytest.raises(ValueError, match="extends itself"):
        load_recipe(str(tmp_path / "a.toml"))


def test_a_file_extends_shipped_parts_and_files_beside_it(tmp_path: Path) -> None:
    (tmp_path / "beside.toml").write_text("[optimizer]\nlr = 1e-3\n")
    (tmp_path / "mine.toml").write_text('name = "mine"\nextends = ["quickstart", "beside"]\n')
    recipe = load_recipe(str(tmp_path / "mine.toml"))
    assert recipe.optimizer.lr == 1e-3
    assert recipe.model.dim == load_recipe("quickstart").model.dim


def test_a_path_may_hold_a_plus(tmp_path: Path) -> None:
    path = tmp_path / "a+b" / "c+d.toml"
    path.parent.mkdir()
    path.write_text('name = "mine"\nextends = ["quickstart"]\n')
    assert load_recipe(str(path)).name == "mine"
    assert (
        load_recipe(f"{path}+contexts/2k", ["training.global_batch_tokens=8192"]).data.sequence_length == 2048
    )


def test_broken_toml_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "broken.toml").write_text("name = ")
    with pytest.raises(ValueError, match=r"broken\.toml: not valid TOML"):
        load_recipe(str(tmp_path / "broken.toml"))


def test_corpus_replaces_the_source_and_gets_its_own_folders(tmp_path: Path) -> None:
    (tmp_path / "novels").mkdir()
    local = load_recipe(BASE, corpus=str(tmp_path / "novels"))
    assert local.data.source.kind == "path"
    assert local.data.directory != load_recipe(BASE).data.directory
    assert local.name.startswith("base-novels-")
    hub = load_recipe("350m-c4", corpus="owner/texts:en@0123abc")
    source = hub.data.source
    assert (source.kind, source.name, source.subset, source.revision) == (
        "huggingface",
        "owner/texts",
        "en",
        "0123abc",
    )
    assert source.max_documents is None


def test_missing_corpus_says_both_spellings() -> None:
    with pytest.raises(FileNotFoundError, match="NAME@COMMIT"):
        load_recipe(BASE, corpus="owner/texts")


def test_differences_are_dotted() -> None:
    before, after = (
        resolve(load_recipe(BASE)),
        resolve(load_recipe(BASE, ["model.trellis.slots=16"])),
    )
    assert differences(before, after) == {"model.trellis.slots": (32, 16)}
