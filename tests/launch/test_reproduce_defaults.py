"""Every table expands into models that can be built, with today's defaults of Trellis and with others."""

import dataclasses
from pathlib import Path

import pytest

from launch import recipe
from launch.experiments.expand import Options, expand
from launch.experiments.tables import experiment_names, models, read_experiment
from launch.layers import recipe_names
from launch.recipe import load_recipe
from trellis_dist.models.config import ModelConfig, TrellisConfig
from trellis_dist.models.counts import parameter_counts

SCALES = ("tiny", "small", "paper")
# Far from the paper's form, and with every option that fixes another: slots, the gates' form, their biases.
OTHERS = {
    "update": "corrected",
    "phi": "tanh",
    "readout": "silu",
    "head_norm_eps": 0.05,
    "step_bound": "token",
    "step_size_max": 1.0,
    "alpha_norm": "none",
    "gate_form": "rate",
    "learned_initial_memory": True,
    "initial_value_memory": "identity",
    "value_gates": "own",
    "value_gate_bias": 8.0,
    "value_step_size_bias": -4.0,
    "targets": "values",
    "conv_values": True,
    "skip_values": True,
}
# Keys that say how large Trellis is: a scale's, not a form's.
OF_THE_SCALE = {"slots", "chunk_size"}


def _ship(monkeypatch, kind, changed):
    """Other defaults of a configuration: for a call of it, and for whoever reads its fields."""
    keywords = {**kind.__init__.__kwdefaults__, **changed}
    monkeypatch.setattr(kind.__init__, "__kwdefaults__", keywords)
    for item in dataclasses.fields(kind):
        if item.name in changed:
            monkeypatch.setattr(item, "default", changed[item.name])
            monkeypatch.setattr(kind, item.name, changed[item.name])
    recipe._ADAPTERS.clear()  # it has read the fields


@pytest.fixture(params=["as shipped", "others"])
def defaults(request):
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield _defaults(request.param, monkeypatch)
    recipe._ADAPTERS.clear()


def _defaults(which, monkeypatch):
    if which == "others":
        _ship(monkeypatch, TrellisConfig, OTHERS)
        _ship(monkeypatch, ModelConfig, {"mixer_out_init": "zero"})
        made = load_recipe("125m-pile").model
        assert (made.trellis.targets, made.mixer_out_init, TrellisConfig().phi) == ("values", "zero", "tanh")
    return which


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", experiment_names())
def test_every_run_is_a_model_and_baselines_are_as_large_as_the_base(defaults, name, scale):
    found = expand(name, scale, Options(essay=Path("essay.txt")))
    assert not found.absent
    base = found.experiment.base
    for (row, run, seed), spec in found.specs.items():
        trained = next(each for each in found.rows if each.name == row).trained
        assert spec.resolved.model.pattern == trained.pattern
        if not trained.is_trellis:
            wanted, size = (
                parameter_counts(found.specs[key].resolved.model).total
                for key in ((base, run, seed), (row, run, seed))
            )
            assert abs(size - wanted) <= 0.02 * wanted, spec.name


def test_one_name_is_one_run_in_all_tables(defaults):
    digests: dict[str, set[str]] = {}
    for name in experiment_names():
        for spec in expand(name, "tiny", Options(essay=Path("essay.txt"))).specs.values():
            digests.setdefault(spec.name, set()).add(spec.digest)
    assert {name for name, found in digests.items() if len(found) > 1} == set()


def _layers(name):
    """The Trellis layer of each row."""
    specs = expand(name, "tiny", Options()).specs
    return {row: spec.resolved.model.trellis for (row, _, _), spec in specs.items()}


def test_rows_differ_from_their_base_in_what_they_are_named_after(defaults):
    slots, gates, figure = map(_layers, ("slots", "retention", "figure2"))
    assert {dataclasses.replace(each, slots=64) for each in slots.values()} == {slots["trellis-slots-64"]}
    learned = gates["trellis-gates-learned"]
    assert dataclasses.replace(learned, gates=("fixed",)) == gates["trellis-gates-fixed"]
    assert dataclasses.replace(learned, gate_floor=0.9) == gates["trellis-gates-floor-0.9"]
    shipped, without = figure["trellis"], figure["trellis-no-gate"]
    assert dataclasses.replace(shipped, gates=("off",), value_gate_bias=None) == without
    assert shipped == load_recipe("scales/tiny").model.trellis


def test_the_papers_form_is_pinned_whole_and_is_the_same_whatever_is_shipped(defaults):
    pinned = models()["trellis_paper"]
    fields = {f"model.trellis.{item.name}" for item in dataclasses.fields(TrellisConfig)}
    kept = {f"model.trellis.{name}" for name in OF_THE_SCALE}
    assert {*pinned.set, *pinned.unset} == fields - kept | {"model.mixer_out_init"}
    assert not set(pinned.set) & set(pinned.unset)
    specs = expand("table2", "tiny", Options(only=("trellis-paper",))).specs
    (model,) = (spec.resolved.model for spec in specs.values())
    assert (model.mixer_out_init, model.trellis.value_gate_bias, model.trellis.phi) == (
        "scaled",
        None,
        "silu",
    )
    assert (model.trellis.targets, model.trellis.head_norm_eps) == ("own", None)


def test_every_table_names_a_base_that_is_a_trellis():
    for name in experiment_names():
        assert read_experiment(name).base_row.trained.is_trellis, name


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_is_a_model(defaults, name):
    assert parameter_counts(load_recipe(name).model).total > 0
