import dataclasses
import json
import os
import signal
import threading
import time

import pytest

from evals.tasks.registry import get_task
from launch.experiments import perform as perform_module
from launch.experiments import pool
from launch.experiments.children import CutError, FailedError, Slice, run_command
from launch.experiments.equal import equal_width, of_equal_size
from launch.experiments.perform import Workshop, perform, perform_in
from launch.experiments.pool import perform_all
from launch.experiments.result import known_result
from launch.experiments.spec import RunSpec, assignments, changes
from launch.machine import commit
from launch.recipe import load_recipe, resolve
from tests.evals.conftest import LENGTH, VOCAB, write_dataset
from tests.launch.experiment_text import tiny_spec
from trellis_dist.files import read_json, write_json
from trellis_dist.models.config import ModelConfig
from trellis_dist.models.counts import parameter_counts
from trellis_dist.models.registry import MIXERS

# The shards that tests of the evaluation have.
ON_SHARDS = (
    f"model.vocab_size={VOCAB}",
    f"data.tokenizer.vocab_size={VOCAB}",
    f"data.sequence_length={LENGTH}",
    f"training.global_batch_tokens={4 * LENGTH}",
    "training.steps=300",
    "checkpoint.interval=30",
)
BIG = ModelConfig(vocab_size=2048, num_layers=2, dim=128, num_heads=2)


def test_a_table_becomes_assignments_that_the_recipe_reads_back():
    table = {
        "model": {"trellis": {"gates": ["learned", "off"], "phi": "tanh"}, "mlp_hidden": 96},
        "data.sequence_length": 256,
        "optimizer": {"lr": 1e-3},
        "training": {"compile": None},
    }
    recipe = load_recipe("quickstart", ["training.compile=inductor", *assignments(table)])
    assert recipe.model.trellis.gates == ("learned", "off")
    assert (recipe.model.trellis.phi, recipe.model.mlp_hidden) == ("tanh", 96)
    assert (recipe.data.sequence_length, recipe.optimizer.lr) == (256, 1e-3)
    assert recipe.training.compile == "none"  # None is the default again


@pytest.mark.parametrize("name", ["", "a/b", "..", "-x", "a b"])
def test_a_name_that_is_no_file_name_is_refused(name):
    with pytest.raises(ValueError, match="names no run"):
        RunSpec(name=name, recipe="quickstart")


def test_the_digest_is_of_what_fixes_the_weights(tmp_path):
    base = tiny_spec(tmp_path)
    for free in (
        "logging.interval=7",
        "checkpoint.keep=3",
        "training.micro_batch=2",
        f"data.source.path={tmp_path}/elsewhere",
        "data.directory=other",
        "mesh.cpu_dp=1",
        "evals.ruler_samples=3",
    ):
        assert tiny_spec(tmp_path, "other-name", free).digest == base.digest, free
    for fixing in (
        "training.seed=1",
        "model.trellis.chunk_size=8",
        "optimizer.lr=1e-3",
        "data.validation_fraction=0.1",
        "training.init_from=some/run",
    ):
        assert tiny_spec(tmp_path, "tiny", fixing).digest != base.digest, fixing


def test_a_stored_recipe_that_lacks_a_newer_key_is_the_same_run(tmp_path):
    spec = tiny_spec(tmp_path)
    stored = resolve(spec.resolved)
    del stored["model"]["trellis"]["value_gates"]
    assert changes(stored, spec.resolved, source="stored") == {}
    stored["model"]["trellis"]["slots"] = 9
    assert changes(stored, spec.resolved, source="stored") == {"model.trellis.slots": (9, 16)}


def test_a_result_of_another_run_is_refused_in_one_line(tmp_path):
    spec = tiny_spec(tmp_path)
    path = tmp_path / "tiny.json"
    write_json(path, {"recipe": resolve(spec.resolved), "mark": 1})
    assert known_result(path, spec)["mark"] == 1
    assert known_result(tmp_path / "none.json", spec) is None
    with pytest.raises(ValueError, match=r"training\.seed 0 -> 3.*use another --root") as refused:
        known_result(path, tiny_spec(tmp_path, "tiny", "training.seed=3"))
    assert "\n" not in str(refused.value)


def test_a_result_counts_only_for_what_it_scored(tmp_path):
    spec = tiny_spec(tmp_path, "tiny", "evals.perplexity_text=/there/text")
    path = tmp_path / "tiny.json"
    write_json(path, {"recipe": resolve(spec.resolved)})
    moved = tiny_spec(tmp_path, "tiny", "evals.perplexity_text=/here/text")
    assert known_result(path, moved) is not None
    assert known_result(path, tiny_spec(tmp_path)) is None
    more = tiny_spec(tmp_path, "tiny", "evals.perplexity_text=/x", "evals.mqar_samples=7")
    assert known_result(path, more) is None


def test_scores_of_another_essay_or_other_suites_are_not_these(tmp_path):
    essay, suites = tmp_path / "essay.txt", tmp_path / "suites"
    suites.mkdir()
    essay.write_text("Prose of one kind. " * 9)
    (suites / "piqa.jsonl").write_text("{}\n")
    tasks = 'evals.tasks=["niah_single_2", "piqa"]'
    spec = tiny_spec(tmp_path, "t", tasks, f"evals.ruler_essay={essay}", f"evals.suites_folder={suites}")
    settings = {task: get_task(task).settings(spec.resolved.evals) for task in ("niah_single_2", "piqa")}
    scores = {task: {"settings": dict(found)} for task, found in settings.items()}
    path = tmp_path / "t.json"
    write_json(path, {"recipe": resolve(spec.resolved), "scores": scores})
    assert known_result(path, spec) is not None
    essay.write_text("Prose of another kind. " * 9)
    assert known_result(path, spec) is None
    essay.unlink()
    assert known_result(path, spec) is not None, "scores outlive their text"
    (suites / "piqa.jsonl").write_text("{ }\n")
    assert known_result(path, spec) is None


@pytest.mark.parametrize("kind", sorted(MIXERS))
def test_every_layer_kind_is_made_as_large_as_trellis(kind):
    found = of_equal_size(dataclasses.replace(BIG, pattern=(kind,)), BIG)
    wanted = parameter_counts(BIG).total
    assert abs(parameter_counts(found).total - wanted) <= 0.02 * wanted
    assert found.mlp_hidden % 8 == 0


def test_equal_width_finds_the_width_that_was_there():
    config = dataclasses.replace(BIG, mlp_hidden=328)
    assert equal_width(BIG, parameters=parameter_counts(config).total) == 328


def test_what_no_width_makes_equal_is_refused():
    with pytest.raises(ValueError, match=r"no model\.mlp_hidden makes a model of trellis layers"):
        equal_width(BIG, parameters=parameter_counts(BIG).embedding)


def test_a_failed_command_is_its_error_line_and_a_finished_slice_starts_none(tmp_path):
    log = tmp_path / "log"
    with pytest.raises(FailedError, match="no recipe 'nothing-of-that-name'"):
        run_command(["train", "nothing-of-that-name"], log=log, slice_=Slice(), threads=1)
    run_command(["--help"], log=log, slice_=Slice(10), threads=1)
    assert "Usage" in log.read_text()
    with pytest.raises(CutError):
        run_command(["--help"], log=log, slice_=Slice(0), threads=1)


def _stand_in(monkeypatch, perform_one):
    monkeypatch.setattr(pool, "perform_in", perform_one)
    monkeypatch.setattr(pool, "prepare_shards", lambda shop, spec: None)


def test_runs_go_on_side_by_side_and_one_that_fails_stops_no_other(tmp_path, monkeypatch):
    meeting = threading.Barrier(2, timeout=60)

    def one(shop, spec):
        if spec.name in ("a", "b"):
            meeting.wait()  # only if two are at work
        if spec.name == "b":
            raise FailedError("it broke")
        return {"name": spec.name}

    _stand_in(monkeypatch, one)
    specs = [tiny_spec(tmp_path, name) for name in "abc"]
    outcome = perform_all(specs, tmp_path, jobs=2, say=lambda line: None)
    assert sorted(outcome.results) == ["a", "c"]
    assert (outcome.failed, outcome.left, outcome.asked) == ({"b": "it broke"}, ["b"], False)


def test_runs_that_the_slice_has_no_time_for_are_left(tmp_path, monkeypatch):
    def one(shop, spec):
        if spec.name == "b":
            shop.slice_.end()
            raise CutError("ended")
        return {"name": spec.name}

    _stand_in(monkeypatch, one)
    outcome = perform_all([tiny_spec(tmp_path, name) for name in "abc"], tmp_path, jobs=1, say=print)
    assert (sorted(outcome.results), outcome.left, outcome.asked) == (["a"], ["b", "c"], True)


def test_a_signal_ends_the_slice_and_the_old_handler_is_back(tmp_path, monkeypatch):
    def one(shop, spec):
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 60
        while not shop.slice_.over and time.monotonic() < deadline:
            time.sleep(0.01)
        raise CutError("ended")

    _stand_in(monkeypatch, one)
    before = signal.getsignal(signal.SIGTERM)
    outcome = perform_all([tiny_spec(tmp_path, name) for name in "ab"], tmp_path, jobs=1, say=print)
    assert (outcome.asked, outcome.left, outcome.failed) == (True, ["a", "b"], {})
    assert signal.getsignal(signal.SIGTERM) is before


def test_results_that_are_there_are_not_performed_again(tmp_path, monkeypatch):
    def one(shop, spec):
        raise AssertionError(f"{spec.name} is done")

    _stand_in(monkeypatch, one)
    spec = tiny_spec(tmp_path)
    (tmp_path / "results").mkdir()
    write_json(tmp_path / "results" / "tiny.json", {"recipe": resolve(spec.resolved)})
    assert perform_all([spec], tmp_path, jobs=1, say=print).left == []


def test_two_runs_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="two runs are named tiny"):
        perform_all([tiny_spec(tmp_path), tiny_spec(tmp_path)], tmp_path, jobs=1)


def _end_at_a_checkpoint(run_dir, slice_):
    """End the slice as soon as the run has saved something."""
    deadline = time.monotonic() + 250
    while not list((run_dir / "checkpoints").glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    slice_.end()


def test_a_real_run_is_cut_goes_on_and_is_scored_once(tmp_path):
    write_dataset(tmp_path / "shards")
    spec = tiny_spec(tmp_path, "tiny", *ON_SHARDS)
    root = tmp_path / "root"
    shop = Workshop(root=root, slice_=Slice(), say=lambda line: None)
    watcher = threading.Thread(target=_end_at_a_checkpoint, args=(shop.run_dir(spec), shop.slice_))
    watcher.start()
    with pytest.raises(CutError):
        perform_in(shop, spec)
    watcher.join()
    assert not shop.result(spec).exists()

    found = perform(spec, root, say=lambda line: None)
    assert found["training"]["starts"] == 2
    assert found == read_json(root / "results" / "tiny.json")
    assert found["training"]["tokens"] == 300 * 4 * LENGTH
    assert found["validation"]["loss"] < 0.9 * found["scores"]["perplexity"]["result"]["ln_vocab"]
    assert found["validation"]["by_position"][0]["from"] == 0
    assert found["model"]["parameters"] == parameter_counts(spec.resolved.model).total
    assert found["training"]["seconds_per_token"] > 0
    assert any(key.endswith("/stale_error_key") for key in found["training"]["probes"])
    assert found["data"] == json.loads((tmp_path / "shards" / "manifest.json").read_text())["fingerprint"]
    assert found["commit"] == commit() or commit() is None

    logged = (root / "logs" / "tiny.log").read_bytes()
    assert perform(spec, root, say=lambda line: None) == found
    assert (root / "logs" / "tiny.log").read_bytes() == logged  # no command was started again

    (root / "results" / "tiny.json").unlink()
    with pytest.raises(ValueError, match=r"another run named tiny \(training\.steps 300 -> 301\)"):
        perform(tiny_spec(tmp_path, "tiny", *ON_SHARDS, "training.steps=301"), root)


def test_shards_are_made_once(tmp_path, monkeypatch):
    made = []

    def prepare(arguments, *, log, slice_, threads):
        made.append(arguments[0])
        (tmp_path / "shards").mkdir()
        (tmp_path / "shards" / "manifest.json").write_text("{}")

    monkeypatch.setattr(perform_module, "run_command", prepare)
    shop = Workshop(root=tmp_path, slice_=Slice(), say=lambda line: None)
    for name in ("a", "b"):
        perform_module.prepare_shards(shop, tiny_spec(tmp_path, name))
    assert made == ["prepare"]
