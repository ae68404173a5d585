"""A run from job to checkpoints: 10 + 10 steps equal 20, and every way it may be refused or interrupted."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

from checkpoints.state import latest_verified, load_run_state, verify_checkpoint
from data_pipeline.config import SourceConfig
from data_pipeline.loader import BatchLoader
from data_pipeline.manifest import load_manifest
from data_pipeline.pack import Packing
from tests.data_pipeline.written import VOCAB, documents
from tests.data_pipeline.written import write_dataset as write_documents
from tests.distributed import gloo_pool
from tests.training.small_run import exact_rows, make_job, state, write_dataset
from trellis_dist.files import FileSystem
from trellis_dist.parallel.config import MeshConfig
from trellis_dist.training import evaluate as evaluation
from trellis_dist.training import loop, saving, setup
from trellis_dist.training.engines.local import LocalEngine
from trellis_dist.training.errors import EchoError
from trellis_dist.training.guards import DivergedError
from trellis_dist.training.job import Job, TrainResult
from trellis_dist.training.loop import run
from trellis_dist.training.metrics import read_rows
from trellis_dist.training.state import Progress, check_same_run, run_state
from trellis_dist.training.watch.hang import HangWatch


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of 20 steps without interruption."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    result = run(make_job(data), folder)
    assert (result.outcome, result.step, result.exit_status) == ("finished", 20, 0)
    return folder


def after_step(monkeypatch: pytest.MonkeyPatch, step: int, action, *, engine: type = LocalEngine) -> None:
    """Do ``action`` at the end of the ``step``-th step of this start."""
    counted = []
    train_step = engine.train_step

    def wrapped(self, *args, **kwargs):
        result = train_step(self, *args, **kwargs)
        counted.append(1)
        if len(counted) == step:
            action()
        return result

    monkeypatch.setattr(engine, "train_step", wrapped)


def test_a_run_leaves_rows_checkpoints_and_its_recipe(data: Path, whole: Path):
    rows = exact_rows(whole)
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert [row["step"] for row in rows if "loss/validation" in row] == [10, 20]
    assert rows[-1]["validation/bits_per_byte"] > 0
    assert rows[-1]["tokens"] == 20 * 64
    assert rows[-1]["loss/train"] < rows[0]["loss/train"]
    names = sorted(path.name for path in (whole / "checkpoints").glob("step-*"))
    assert names == ["step-00000005", "step-00000010", "step-00000015", "step-00000020"]
    assert json.loads((whole / "recipe.json").read_text()) == make_job(data).recipe


def test_ten_and_ten_steps_equal_twenty(data: Path, whole: Path, tmp_path: Path):
    first = run(make_job(data), tmp_path, stop_at_step=10)
    assert (first.outcome, first.step, first.resumed_step) == ("stopped", 10, 0)
    second = run(make_job(data), tmp_path, resume="require")
    assert (second.outcome, second.step, second.resumed_step) == ("finished", 20, 10)
    assert exact_rows(tmp_path) == exact_rows(whole)
    assert state(tmp_path, 20) == state(whole, 20)


def test_a_crash_between_saves_repeats_no_row(data: Path, whole: Path, tmp_path: Path, monkeypatch):
    def crash():
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        after_step(patch, 14, crash)
        with pytest.raises(RuntimeError, match="power cut"):
            run(make_job(data), tmp_path)
    assert [row["step"] for row in exact_rows(tmp_path)] == list(range(1, 14))
    assert run(make_job(data), tmp_path).resumed_step == 10
    assert exact_rows(tmp_path) == exact_rows(whole)
    assert state(tmp_path, 20) == state(whole, 20)


def test_a_finished_run_is_returned_at_once(data: Path, whole: Path):
    before = (whole / "metrics.jsonl").read_bytes()
    result = run(make_job(data), whole)
    assert (result.outcome, result.step, result.resumed_step) == ("finished", 20, 20)
    assert result.validation == {
        key: value
        for key, value in exact_rows(whole)[-1].items()
        if key.split("/")[-1] in ("validation", "bits_per_byte")
    }
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_resume_where_there_is_nothing_is_refused(data: Path, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*: start without --resume"):
        run(make_job(data), tmp_path, resume="require")


def damage(checkpoint: Path) -> None:
    file = checkpoint / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")


def test_a_damaged_checkpoint_is_passed_over_and_made_again(
    data: Path, whole: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
):
    run(make_job(data), tmp_path, stop_at_step=10)
    damage(tmp_path / "checkpoints/step-00000010")
    assert run(make_job(data), tmp_path).resumed_step == 5
    assert any("step-00000010 is damaged and was passed over" in str(w.message) for w in recwarn)
    assert exact_rows(tmp_path) == exact_rows(whole)
    assert state(tmp_path, 10) == state(whole, 10)


def test_nothing_but_damaged_checkpoints_is_an_error(data: Path, tmp_path: Path):
    run(make_job(data), tmp_path, stop_at_step=2)
    damage(tmp_path / "checkpoints/step-00000002")
    with (
        pytest.warns(RuntimeWarning, match="damaged"),
        pytest.raises(ValueError, match=r"none of the 1 checkpoints .* is intact"),
    ):
        run(make_job(data), tmp_path)


def test_changed_data_or_model_is_refused_with_both_values(data: Path, whole: Path, tmp_path: Path):
    other = write_dataset(tmp_path / "other", seed=1)
    ours, theirs = (load_manifest(folder).fingerprint for folder in (data, other))
    with pytest.raises(ValueError, match=f"data fingerprint is {theirs}, but .* trained with {ours}"):
        run(make_job(other), whole)
    with pytest.raises(ValueError, match=r"model\.mlp_hidden = 32, but .* saved with 24"):
        run(make_job(data, model={"mlp_hidden": 32}), whole)


def test_rows_packed_or_mixed_otherwise_are_refused_with_both_values(data: Path, tmp_path: Path):
    job = make_job(data)
    mixture = {"books": SourceConfig(weight=2.0), "code": SourceConfig(weight=1.0)}
    changes = {
        "packing": ("best_fit", "packing is best_fit, but .* concat"),
        "chunk_aligned": (True, "chunk_aligned is True, but .* False"),
        "mixture": (mixture, r"mixture is {'books': 2.0, 'code': 1.0}, but .* {}"),
    }
    state = run_state(job, Progress(), optimizer_steps=0, fingerprint="f")
    for key, (value, words) in changes.items():
        other = dataclasses.replace(job, data=dataclasses.replace(job.data, **{key: value}))
        with pytest.raises(ValueError, match=words):
            check_same_run(state, other, fingerprint="f", checkpoint=tmp_path)
        saved = run_state(other, Progress(), optimizer_steps=0, fingerprint="f")
        check_same_run(json.loads(json.dumps(saved)), other, fingerprint="f", checkpoint=tmp_path)
        # A state from before there was a choice.
        del state["data"][key]
        check_same_run(state, job, fingerprint="f", checkpoint=tmp_path)
        with pytest.raises(ValueError, match=words):
            check_same_run(state, other, fingerprint="f", checkpoint=tmp_path)


@pytest.mark.parametrize("packing", ["concat", "best_fit", "per_document"])
def test_a_weighted_mixture_trains_says_what_it_mixes_and_resumes(tmp_path: Path, capsys, packing: Packing):
    sources = {"books": [documents(0, 9), documents(1, 8)], "code": [documents(2, 5)]}
    folder = write_documents(tmp_path / "set", {"train": sources, "validation": {"code": [documents(3, 3)]}})
    job = make_job(folder, model={"vocab_size": VOCAB}, training={"steps": 6})
    mixture = {"books": SourceConfig(weight=1.0), "code": SourceConfig(weight=3.0)}
    rows = dataclasses.replace(job.data, packing=packing, chunk_aligned=True, mixture=mixture)
    job = dataclasses.replace(job, data=rows)
    run(job, tmp_path / "whole")
    said = capsys.readouterr().err
    assert f"packing: {packing}, documents start at multiples of a chunk; " in said
    assert re.search(r"mixture: books 2[45]\.\d%, code 7[56]\.\d% of the rows", said)
    run(job, tmp_path / "parts", stop_at_step=2)
    run(job, tmp_path / "parts", resume="require")
    assert exact_rows(tmp_path / "parts") == exact_rows(tmp_path / "whole")


def test_a_run_that_ends_or_fails_leaves_no_thread(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run(make_job(data), tmp_path / "ends", stop_at_step=2)
    assert prefetching() == []

    def broken(self: BatchLoader, counter: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(BatchLoader, "micro_batches", broken)
    with pytest.raises(OSError, match="Input/output error"):
        run(make_job(data), tmp_path / "fails")
    assert prefetching() == []


def prefetching() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "prefetch"]


def test_a_model_field_added_after_the_checkpoint_has_its_default(data: Path, tmp_path: Path):
    def saved_by(job: Job) -> dict:
        state = run_state(job, Progress(), optimizer_steps=0, fingerprint="f")
        for name in ("update", "readout_affine", "value_gates"):
            del state["model"]["trellis"][name]
        del state["model"]["tie_embeddings"]
        return state

    job = make_job(data)
    changed = dataclasses.replace(
        job.model, trellis=dataclasses.replace(job.model.trellis, value_gates="own")
    )
    check_same_run(saved_by(job), job, fingerprint="f", checkpoint=tmp_path)
    with pytest.raises(ValueError, match=r"model\.trellis = .*'own'.* saved with .*'shared'"):
        check_same_run(
            saved_by(job), dataclasses.replace(job, model=changed), fingerprint="f", checkpoint=tmp_path
        )


def test_what_cannot_work_is_refused_before_training(data: Path, tmp_path: Path):
    large = write_dataset(tmp_path / "large", vocab=1000)
    with pytest.raises(
        ValueError, match=r"1000 pieces, model\.vocab_size is 17: set model\.vocab_size to 1000"
    ):
        run(make_job(large), tmp_path / "run")
    with pytest.raises(ValueError, match=r"global_batch_tokens = 70 is no multiple .* use 64"):
        run(make_job(data, training={"global_batch_tokens": 70}), tmp_path / "run")
    with pytest.raises(ValueError, match=r"mesh\.sp = 2 .* data\.chunk_aligned"):
        run(make_job(data, mesh={"sp": 2}), tmp_path / "run")
    with pytest.raises(ValueError, match="stop_at_step = 0"):
        run(make_job(data), tmp_path / "run", stop_at_step=0)
    shard = large / "train-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    with pytest.raises(ValueError, match=r"train-00000\.bin is damaged"):
        run(make_job(large, model={"vocab_size": 1000}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


class FullDisk(FileSystem):
    """A disk that has no room for tensors: for so many files, or for good."""

    def __init__(self, refusals: int | None = None):
        self.left = refusals

    def write(self, path, pieces):
        if self.left != 0 and path.suffix == ".safetensors":
            self.left = None if self.left is None else self.left - 1
            raise OSError(28, "No space left on device")
        super().write(path, pieces)


def test_a_full_disk_while_saving_costs_no_checkpoint_and_no_step(
    data: Path, whole: Path, tmp_path: Path, monkeypatch, capsys
):
    run(make_job(data), tmp_path, stop_at_step=5)
    with monkeypatch.context() as patch:
        patch.setattr(saving, "FILE_SYSTEM", FullDisk(refusals=2))
        assert run(make_job(data), tmp_path).step == 20
    captured = capsys.readouterr().err
    assert captured.count("alert: checkpoint of step") == 2
    assert "No space left on device" in captured
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000005", "step-00000020"]
    assert state(tmp_path, 20) == state(whole, 20)
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["health/failed_saves"] == 2


class SlowDisk(FileSystem):
    """Every save takes a tenth of a second more."""

    def rename(self, source: Path, target: Path) -> None:
        if re.fullmatch(r"step-[0-9]+", target.name):
            time.sleep(0.1)
        super().rename(source, target)


def test_time_lost_to_saves_is_in_the_rows_and_none_of_it_twice(
    data: Path, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.setattr(saving, "FILE_SYSTEM", SlowDisk())
    job = make_job(
        data, checkpoint={"interval": 3, "background": False}, logging={"interval": 7}, training={"steps": 16}
    )
    run(job, tmp_path)
    rows = {row["step"]: row for row in read_rows(tmp_path / "metrics.jsonl")}
    told = {step for step, row in rows.items() if "perf/save_seconds" in row}
    assert told == {7, 10, 14, 16}  # after the saves of steps 3 and 6, 9, 12, 15
    for step, saves in ((7, 2), (10, 1), (14, 1), (16, 1)):
        assert rows[step]["perf/save_blocked_seconds"] >= 0.1 * saves
    assert "the last save took 0." in capsys.readouterr().err


def test_the_watch_does_not_judge_what_comes_after_the_last_save(data: Path, tmp_path: Path, monkeypatch):
    order = ["begun"]
    for kind, name in ((HangWatch, "disarm"), (saving.Saver, "close")):
        real = getattr(kind, name)
        monkeypatch.setattr(
            kind, name, lambda self, name=name, real=real: (order.append(name), real(self))[1]
        )
    run(make_job(data), tmp_path, stop_at_step=2)
    assert order[order.index("close") - 1] == "disarm"


def test_a_full_disk_at_the_end_is_an_error_with_the_earlier_checkpoint_intact(
    data: Path, tmp_path: Path, monkeypatch
):
    run(make_job(data), tmp_path, stop_at_step=5)
    monkeypatch.setattr(saving, "FILE_SYSTEM", FullDisk())
    with pytest.raises(OSError, match=r"step 7 not saved .*No space left"):
        run(make_job(data), tmp_path, stop_at_step=7)
    assert latest_verified(tmp_path / "checkpoints") == tmp_path / "checkpoints/step-00000005"


def test_sigterm_saves_at_the_next_step_boundary(data: Path, whole: Path, tmp_path: Path, monkeypatch):
    previous = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        after_step(patch, 7, lambda: os.kill(os.getpid(), signal.SIGTERM))
        result = run(make_job(data), tmp_path)
    assert (result.outcome, result.step, result.exit_status) == ("terminated", 7, 75)
    assert signal.getsignal(signal.SIGTERM) == previous
    assert run(make_job(data), tmp_path).resumed_step == 7
    assert exact_rows(tmp_path) == exact_rows(whole)
    assert state(tmp_path, 20) == state(whole, 20)


def state_row(run_dir: Path, step: int) -> dict[str, float]:
    (row,) = [row for row in exact_rows(run_dir) if row["step"] == step]
    return row


def crash() -> None:
    raise RuntimeError("crash")


def test_sigterm_in_a_validation_pass_is_heard_and_the_next_start_makes_the_pass(
    data: Path, whole: Path, tmp_path: Path, monkeypatch
):
    asked = []

    def evaluate(self, batches):
        asked.append(len(batches))
        if len(asked) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, batches)

    real = LocalEngine.evaluate
    monkeypatch.setattr(evaluation, "TOGETHER", 2)
    with monkeypatch.context() as patch:
        patch.setattr(LocalEngine, "evaluate", evaluate)
        result = run(make_job(data), tmp_path)
    assert (result.outcome, result.step, asked) == ("terminated", 10, [2])
    assert [row["step"] for row in exact_rows(tmp_path)] == list(range(1, 10))
    # Retention by a metric goes by numbers of this very step, which has no validation yet.
    measured = load_run_state(tmp_path / "checkpoints/step-00000010")["metrics"]
    assert measured == {"loss/train": state_row(whole, 10)["loss/train"]}
    with monkeypatch.context() as patch:
        after_step(patch, 3, crash)  # step 10 is validated, and not saved again
        with pytest.raises(RuntimeError, match="crash"):
            run(make_job(data), tmp_path)
    assert run(make_job(data), tmp_path).resumed_step == 10
    assert exact_rows(tmp_path) == exact_rows(whole)
    assert state(tmp_path, 20) == state(whole, 20)


def test_a_last_step_for_which_there_was_no_time_is_another_starts(
    data: Path, whole: Path, tmp_path: Path, monkeypatch
):
    """SIGTERM in the last step, the save of the one before in flight, and no time for another."""
    keeping = {"interval": 19, "grace_s": 1.0}
    with monkeypatch.context() as patch:
        after_step(patch, 20, lambda: os.kill(os.getpid(), signal.SIGTERM))
        patch.setattr(saving.Saver, "_fits", lambda self, deadline: False)
        patch.setattr(saving.Saver, "settle", lambda self, statuses: None)  # so that it is in flight still
        result = run(make_job(data, checkpoint=keeping), tmp_path)
    assert (result.outcome, result.step, result.exit_status) == ("terminated", 20, 75)
    assert latest_verified(tmp_path / "checkpoints") == tmp_path / "checkpoints/step-00000019"
    assert run(make_job(data, checkpoint=keeping), tmp_path).outcome == "finished"
    assert state(tmp_path, 20) == state(whole, 20)


def test_uploads_follow_commits_and_a_finished_run_sends_its_last_one_again(
    data: Path, tmp_path: Path, capsys
):
    store = tmp_path / "store"
    job = make_job(data, checkpoint={"upload": store.as_uri(), "interval": 10})
    run(job, tmp_path / "run")
    assert {path.name for path in store.iterdir()} >= {"step-00000020"}
    assert "upload: step-00000020 is uploaded" in capsys.readouterr().err
    shutil.rmtree(store / "step-00000020")
    assert run(job, tmp_path / "run").resumed_step == 20
    assert "upload: step-00000020 is uploaded" in capsys.readouterr().err
    assert verify_checkpoint(store / "step-00000020") == []


def test_a_run_that_diverges_stops_after_its_budget(data: Path, tmp_path: Path, capsys):
    job = make_job(data, training={"max_skipped_steps": 2, "z_loss": 1e38})
    with pytest.raises(DivergedError, match=r"3 updates in a row .*step 3.*max_skipped_steps = 2"):
        run(job, tmp_path)
    assert capsys.readouterr().err.count("skipped:") == 3


def test_validation_on_part_of_the_split_reports_no_bits_per_byte(data: Path, tmp_path: Path):
    job = make_job(data, training={"validation_rows": 3, "steps": 1})
    assert set(run(job, tmp_path).validation) == {"loss/validation"}


def test_after_an_error_no_rank_waits_in_a_shutdown(data: Path, monkeypatch):
    left: list[str] = []
    monkeypatch.setattr(setup.env, "shutdown", lambda: left.append("group"))
    with pytest.raises(RuntimeError, match="a peer died"), setup.runtime(make_job(data)):
        raise RuntimeError("a peer died")
    assert left == []
    with setup.runtime(make_job(data)):
        pass
    assert left == ["group"]


# The same through DeepSpeed on two ranks.


def run_case(job: Job, run_dir: Path, stop_at_step: int | None) -> TrainResult:
    return run(job, run_dir, stop_at_step=stop_at_step)


def refused_case(job: Job, run_dir: Path) -> tuple[str, bool]:
    with pytest.raises(ValueError) as refused:
        run(job, run_dir)
    return str(refused.value), isinstance(refused.value, EchoError)


def full_disk_case(job: Job, run_dir: Path) -> tuple[str, bool]:
    """The disk of rank 1 is full: both ranks learn of it and raise."""
    from trellis_dist.parallel import env

    real = saving.FILE_SYSTEM
    if env.rank() == 1:
        saving.FILE_SYSTEM = FullDisk()
    try:
        with pytest.raises(OSError) as failed:
            run(job, run_dir, stop_at_step=2)
    finally:
        saving.FILE_SYSTEM = real
    return str(failed.value), isinstance(failed.value, EchoError)


def sigterm_case(job: Job, run_dir: Path) -> TrainResult:
    """Only rank 1 is told to end, after its third step."""
    from trellis_dist.parallel import env
    from trellis_dist.training.engines.deepspeed import DeepSpeedEngine

    with pytest.MonkeyPatch.context() as patch:
        if env.rank() == 1:
            end = functools.partial(os.kill, os.getpid(), signal.SIGTERM)
            after_step(patch, 3, end, engine=DeepSpeedEngine)
        return run(job, run_dir)


def blind_case(job: Job, run_dir: Path) -> TrainResult:
    """Rank 1 sees no checkpoint: what it resumes from is what rank 0 chose."""
    from trellis_dist.parallel import env

    def nothing(*_: object, **__: object) -> None:
        raise AssertionError("rank 1 looked for itself")

    with pytest.MonkeyPatch.context() as patch:
        if env.rank() == 1:
            patch.setattr(setup, "find_start", nothing)
        return run(job, run_dir)


def test_one_rank_chooses_what_all_resume_from(data: Path, tmp_path: Path):
    job = make_job(
        data, training={"engine": "deepspeed", "micro_batch": 1, "steps": 4}, checkpoint={"interval": 2}
    )
    gloo_pool(2).run(run_case, job, tmp_path, 2)
    assert [found.resumed_step for found in gloo_pool(2).run(blind_case, job, tmp_path)] == [2, 2]


@pytest.mark.parametrize("stage", [0, 1])
def test_deepspeed_on_two_ranks_resumes_bit_for_bit(stage: int, data: Path, tmp_path: Path):
    job = make_job(data, training={"engine": "deepspeed", "zero_stage": stage, "micro_batch": 1})
    pool = gloo_pool(2)
    assert [r.step for r in pool.run(run_case, job, tmp_path / "whole", None)] == [20, 20]
    pool.run(run_case, job, tmp_path / "parts", 10)
    assert [r.resumed_step for r in pool.run(run_case, job, tmp_path / "parts", None)] == [10, 10]
    assert exact_rows(tmp_path / "parts") == exact_rows(tmp_path / "whole")
    assert state(tmp_path / "parts", 20) == state(tmp_path / "whole", 20)


@pytest.mark.parametrize("stage", [0, 1])
def test_two_ranks_train_as_one_and_a_run_changes_ranks_on_the_way(stage: int, data: Path, tmp_path: Path):
    # A small rate: at 0.3 this model amplifies rounding a thousandfold, on one process too.
    plain = {"kind": "sgd", "lr": 0.02, "clip_norm": 0.0}
    local = make_job(data, optimizer=plain)
    two = make_job(
        data, optimizer=plain, training={"engine": "deepspeed", "zero_stage": stage, "micro_batch": 1}
    )
    run(local, tmp_path / "one")
    gloo_pool(2).run(run_case, two, tmp_path / "two", None)
    run(local, tmp_path / "both", stop_at_step=7)
    gloo_pool(2).run(run_case, two, tmp_path / "both", 13)
    assert run(local, tmp_path / "both").resumed_step == 13
    expected = exact_rows(tmp_path / "one")
    for name in ("two", "both"):
        for row, reference in zip(exact_rows(tmp_path / name), expected, strict=True):
            assert row["optim/gradient_norm"] == pytest.approx(reference["optim/gradient_norm"], rel=1e-4)
            assert row.keys() == reference.keys()
            for key in row.keys() - {"optim/gradient_norm"}:
                assert row[key] == pytest.approx(reference[key], rel=1e-5)


def test_a_refusal_found_by_one_rank_reaches_both(tmp_path: Path):
    data = write_dataset(tmp_path / "set")
    shard = data / "validation-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    job = make_job(data, training={"engine": "deepspeed", "micro_batch": 1})
    first, second = gloo_pool(2).run(refused_case, job, tmp_path / "run")
    assert "validation-00000.bin is damaged" in first[0]
    assert "on another rank" in second[0]
    assert (first[1], second[1]) == (False, True)
    whole = {"micro_batch": 1, "engine": "deepspeed", "zero_stage": 0, "offload_optimizer": True}
    refused = make_job(data, training=whole)
    assert "use training.zero_stage = 1" in gloo_pool(2).run(refused_case, refused, tmp_path / "run")[1][0]


def test_a_full_disk_on_one_rank_reaches_both(data: Path, tmp_path: Path):
    job = make_job(data, training={"engine": "deepspeed", "micro_batch": 1})
    first, second = gloo_pool(2).run(full_disk_case, job, tmp_path)
    assert "another rank failed" in first[0]
    assert "No space left on device" in second[0]
    assert (first[1], second[1]) == (True, False)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_sigterm_on_one_rank_saves_on_both(data: Path, tmp_path: Path):
    job = make_job(data, training={"engine": "deepspeed", "micro_batch": 1})
    results = gloo_pool(2).run(sigterm_case, job, tmp_path)
    assert [(r.outcome, r.step) for r in results] == [("terminated", 3)] * 2
    assert latest_verified(tmp_path / "checkpoints") == tmp_path / "checkpoints/step-00000003"


def test_the_loop_exports_what_the_launcher_imports():
    assert {"Job", "TrainResult", "run", "EXIT_TERMINATED"} <= set(loop.__all__)


def test_two_segments_of_the_sequence_train_as_one(data: Path, tmp_path: Path):
    """State passing over a whole run: packed documents, the loop, validation and checkpoints."""
    whole = with_rows(data, chunk_aligned=True)
    cut = dataclasses.replace(whole, mesh=MeshConfig(sp=2))
    run(whole, tmp_path / "one")
    gloo_pool(2).run(run_case, cut, tmp_path / "two", None)
    one, two = exact_rows(tmp_path / "one"), exact_rows(tmp_path / "two")
    assert [row["step"] for row in two] == list(range(1, 9))
    for ours, theirs in zip(two, one, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert ours[key] == pytest.approx(value, rel=1e-4 if "norm" in key else 1e-5), key
    # Without the alignment the rows are others, so what is compared above is the aligned run.
    run(with_rows(data, chunk_aligned=False), tmp_path / "plain")
    assert exact_rows(tmp_path / "plain")[0]["loss/train"] != one[0]["loss/train"]


def with_rows(data: Path, *, chunk_aligned: bool) -> Job:
    """8 steps of 4 rows that two segments of whole chunks can share."""
    # Parity is measured with SGD and no clipping: Adam amplifies what the order of a sum rounds.
    sgd = {"kind": "sgd", "lr": 0.02, "clip_norm": 0.0}
    job = make_job(data, optimizer=sgd, training={"steps": 8, "global_batch_tokens": 4 * 32})
    # The per-head norm divides the output of a memory that is almost empty by sqrt(eps), its rounding too.
    model = dataclasses.replace(job.model, norm_eps=1e-2)
    rows = dataclasses.replace(job.data, chunk_aligned=chunk_aligned, sequence_length=32)
    return dataclasses.replace(job, model=model, data=rows)
