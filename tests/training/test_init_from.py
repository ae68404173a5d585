"""A new run begins with the weights of another one, and with nothing else of it."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from checkpoints.pins import pinned_steps
from checkpoints.state import load_run_state
from tests.distributed import gloo_pool
from tests.training.small_run import exact_rows, make_job, state, write_dataset
from trellis_dist.models.baseline_config import BASELINES, READERS, BaselineConfig
from trellis_dist.models.config import AttentionConfig, ModelConfig
from trellis_dist.training.job import Job, TrainResult
from trellis_dist.training.loop import run
from trellis_dist.training.state import _check_same_function, find_start, let_go


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another data set, for the run that begins with the weights of the first."""
    return write_dataset(tmp_path_factory.mktemp("data") / "other", seed=5)


@pytest.fixture(scope="module")
def source(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    run(make_job(data), folder, stop_at_step=10)
    return folder


def beginning(data: Path, source: Path, **training: Any) -> Job:
    """A run from ``source`` with other data, rows twice as long and a learning rate of (almost) nothing."""
    job = make_job(data, training={"init_from": str(source), "validation_interval": 0, **training})
    return dataclasses.replace(
        job,
        data=dataclasses.replace(job.data, sequence_length=32),
        optimizer=dataclasses.replace(job.optimizer, lr=1e-30, weight_decay=0.0),
        training=dataclasses.replace(job.training, global_batch_tokens=4 * 32, micro_batch=1),
    )


def weights(folder: Path, step: int) -> dict[str, bytes]:
    return {name: value for name, value in state(folder, step).items() if name.startswith("model/")}


def one_step_case(job: Job, folder: Path) -> TrainResult:
    return run(job, folder, stop_at_step=1)


@pytest.mark.parametrize(
    "engine",
    [
        {},
        {"engine": "deepspeed", "zero_stage": 1},
        {"engine": "deepspeed", "zero_stage": 3},
        {"engine": "fsdp2"},
    ],
    ids=["local", "zero1", "zero3", "fsdp2"],
)
def test_the_weights_are_taken_over_and_nothing_else(
    other: Path, source: Path, tmp_path: Path, engine: dict[str, Any]
):
    (result, _) = gloo_pool(2).run(one_step_case, beginning(other, source, **engine), tmp_path)
    assert (result.resumed_step, result.step) == (0, 1)
    assert weights(tmp_path, 1) == weights(source, 10)
    saved = load_run_state(tmp_path / "checkpoints" / "step-00000001")
    assert (saved["optimizer_steps"], saved["samples"]) == (1, 4)
    # Moments of one step alone: beta 0.9 leaves a tenth of the first gradient.
    moments = [v for name, v in state(tmp_path, 1).items() if name.startswith("optimizer/exp_avg/")]
    assert any(any(part) for part in moments)
    assert moments != [v for name, v in state(source, 10).items() if name.startswith("optimizer/exp_avg/")]


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/step-00000010"])
def test_a_run_its_folder_of_checkpoints_or_one_of_them(
    other: Path, source: Path, tmp_path: Path, place: str, capsys
):
    run(beginning(other, source / place), tmp_path, stop_at_step=1)
    assert weights(tmp_path, 1) == weights(source, 10)
    assert f"weights from {source}/checkpoints/step-00000010" in capsys.readouterr().err
    origin = load_run_state(tmp_path / "checkpoints" / "step-00000001")["init_from"]
    digest = (source / "checkpoints/step-00000010/manifest.sha256").read_text().split()[0]
    path = str(source / "checkpoints" / "step-00000010")
    assert origin == {"path": path, "step": 10, "manifest_sha256": digest}


def test_a_start_that_has_a_checkpoint_resumes_it_and_needs_the_source_no_more(
    other: Path, source: Path, tmp_path: Path
):
    whole = dataclasses.replace(beginning(other, source), optimizer=make_job(other).optimizer)
    run(whole, tmp_path / "whole")
    run(whole, tmp_path / "parts", stop_at_step=7)
    for gone in ("", str(tmp_path / "nowhere")):
        rest = dataclasses.replace(whole, training=dataclasses.replace(whole.training, init_from=gone))
        result = run(rest, tmp_path / "parts", stop_at_step=13 if gone == "" else None)
    assert result.resumed_step == 13
    assert state(tmp_path / "parts", 20) == state(tmp_path / "whole", 20)
    assert exact_rows(tmp_path / "parts") == exact_rows(tmp_path / "whole")
    origins = [
        load_run_state(tmp_path / name / "checkpoints" / "step-00000020")["init_from"]
        for name in ("whole", "parts")
    ]
    assert origins[0] == origins[1] != None  # noqa: E711


def test_a_start_that_is_killed_before_its_first_save_begins_with_the_same_weights(
    data: Path, other: Path, tmp_path: Path
):
    """The run that the weights come from has gone on meanwhile."""

    def begin(job: Job) -> Path:
        start = find_start(tmp_path / "run" / "checkpoints", "auto", job, fingerprint="")
        assert pinned_steps(tmp_path / "source" / "checkpoints") == {
            start.weights and int(start.weights.name[5:])
        }
        let_go(start)
        assert pinned_steps(tmp_path / "source" / "checkpoints") == set()
        assert start.weights is not None
        return start.weights

    run(make_job(data), tmp_path / "source", stop_at_step=5)
    (tmp_path / "run").mkdir()
    first = begin(beginning(other, tmp_path / "source"))
    assert first.name == "step-00000005"
    run(make_job(data), tmp_path / "source", stop_at_step=10)
    assert begin(beginning(other, tmp_path / "source")) == first
    last = tmp_path / "source/checkpoints/step-00000010"
    assert begin(beginning(other, last)) == last, "another source is another choice"
    begin(beginning(other, tmp_path / "source"))
    shutil.rmtree(last)
    run(make_job(data, optimizer={"lr": 0.02}), tmp_path / "source", stop_at_step=10)
    with pytest.raises(ValueError, match=r"is not the checkpoint any more that .* began with"):
        begin(beginning(other, tmp_path / "source"))


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "heads": ({"num_heads": 1}, "model.num_heads = 1,"),
    "the pattern": ({"pattern": ("attention",)}, "model.pattern"),
    "the same pattern": ({"pattern": ("trellis", "trellis", "trellis")}, ""),
    "the epsilon": ({"norm_eps": 1e-5}, "model.norm_eps = 1e-05,"),
    "a nonlinearity": ({"trellis.phi": "tanh"}, "model.trellis.phi = tanh, but "),
    "a step size": ({"trellis.step_size_max": 1.0}, "model.trellis.step_size_max = 1.0,"),
    "the chunk": ({"trellis.chunk_size": 2}, ""),
    "the first draw": ({"init_std": 0.5, "trellis.gate_bias": 1.0, "trellis.step_size_bias": 1.0}, ""),
    "a layer that there is not": ({"attention.window": 3, "attention.rope_theta": 5.0}, ""),
}


@pytest.mark.parametrize("case", CHANGES)
def test_weights_are_taken_only_by_a_model_in_which_they_mean_the_same(
    other: Path, source: Path, tmp_path: Path, case: str
):
    """The shapes are the same in each case."""
    changes, words = CHANGES[case]
    job = beginning(other, source)
    section = dataclasses.asdict(job.model)
    for key, value in changes.items():
        table, _, name = key.rpartition(".")
        (section[table] if table else section)[name] = value
    job = dataclasses.replace(job, model=TypeAdapter(ModelConfig).validate_python(section))
    if words:
        with pytest.raises(ValueError) as refused:
            find_start(tmp_path / "checkpoints", "auto", job, fingerprint="")
        assert words in str(refused.value)
        assert len(str(refused.value).splitlines()) == 1
    else:
        start = find_start(tmp_path / "checkpoints", "auto", job, fingerprint="")
        let_go(start)
        assert start.weights is not None


def test_a_window_that_a_recipe_sets_is_not_laid_over_weights_without_one(tmp_path: Path):
    """TOML has no None: the model.toml of an import cannot take the recipe's window back."""

    def model(**attention: Any) -> ModelConfig:
        sizes = {"vocab_size": 8, "num_layers": 1, "dim": 4, "num_heads": 1}
        return ModelConfig(**sizes, pattern=("attention",), attention=AttentionConfig(**attention))

    saved = dataclasses.asdict(model())
    with pytest.raises(
        ValueError, match=r"model\.attention\.window = 3, but .* saved with None.*leave the key out"
    ):
        _check_same_function(saved, model(window=3), tmp_path)
    _check_same_function(saved, model(), tmp_path)
    _check_same_function(None, model(window=3), tmp_path)


OTHERS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "slots it has": ("gsa", {"slots": 8}, True),
    "slots it has not": ("gated_deltanet", {"slots": 8}, False),
    "steps of another kind": ("titans", {"ttt_step": 2.0}, False),
    "its steps": ("titans", {"titans_step": 2.0}, True),
    "its mini-batch": ("ttt_linear", {"mini_batch": 8}, True),
    "mini-batches it has not": ("rwkv7", {"mini_batch": 8, "titans_depth": 2, "titans_step": 2.0}, False),
    "where its gates began": ("titans", {"titans_keep_bias": 1.0, "titans_momentum_bias": 1.0}, False),
    "its convolution": ("mamba2", {"conv_values": False}, True),
}


@pytest.mark.parametrize("case", OTHERS)
def test_of_the_baselines_options_those_count_that_a_layer_reads(tmp_path: Path, case: str):
    kind, changed, refused = OTHERS[case]

    def model(**options: Any) -> ModelConfig:
        sizes = {"vocab_size": 8, "num_layers": 1, "dim": 4, "num_heads": 1}
        return ModelConfig(**sizes, pattern=(kind,), baselines=BaselineConfig(**options))

    saved = dataclasses.asdict(model())
    if refused:
        with pytest.raises(ValueError, match=rf"model\.baselines\.{next(iter(changed))} = "):
            _check_same_function(saved, model(**changed), tmp_path)
    else:
        _check_same_function(saved, model(**changed), tmp_path)


def test_every_reader_of_an_option_is_a_kind_and_every_option_is_one():
    assert set(READERS) <= {field.name for field in dataclasses.fields(BaselineConfig)}
    assert all(set(kinds) <= set(BASELINES) for kinds in READERS.values())


def test_what_cannot_be_begun_with_is_refused_in_one_line(
    data: Path, other: Path, source: Path, tmp_path: Path
):
    def refusal(job: Job) -> str:
        with pytest.raises((ValueError, FileNotFoundError)) as refused:
            run(job, tmp_path / "run")
        assert not list((tmp_path / "run").glob("checkpoints/step-*"))
        return str(refused.value)

    assert "no such folder; give a run or a checkpoint" in refusal(beginning(other, tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    assert "no sound checkpoint (step-N) in it" in refusal(beginning(other, tmp_path / "empty"))
    job = beginning(other, source)
    wider = dataclasses.replace(job, model=dataclasses.replace(job.model, mlp_hidden=48))
    assert "shape" in refusal(wider)
    deeper = dataclasses.replace(job, model=dataclasses.replace(job.model, num_layers=2))
    assert "it was saved from another model" in refusal(deeper)
    run(dataclasses.replace(make_job(data), model=deeper.model), tmp_path / "deep", stop_at_step=1)
    assert "weights that the model has not" in refusal(beginning(other, tmp_path / "deep"))
    shard = next((tmp_path / "deep/checkpoints/step-00000001").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x55")
    assert "is damaged" in refusal(beginning(other, shard.parent))
