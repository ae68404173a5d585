"""Skips end a run after a budget and leave a diagnosis; a loss spike is warned of, or rolled back."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from checkpoints.commit import list_steps
from checkpoints.config import CheckpointConfig
from checkpoints.state import load_run_state
from checkpoints.verify import latest_verified
from tests.distributed import gloo_pool
from tests.training.small_run import exact_rows, make_job, state, write_dataset
from trellis_dist.files import FileSystem, Piece
from trellis_dist.training import saving
from trellis_dist.training.engines.base import StepResult
from trellis_dist.training.engines.common import CommonEngine
from trellis_dist.training.engines.local import LocalEngine
from trellis_dist.training.guards import DivergedError, SkipBudget
from trellis_dist.training.job import Job, TrainResult
from trellis_dist.training.loop import run
from trellis_dist.training.rollback import check_rollback

SPIKES = {"spike_window": 4, "spike_patience": 2, "spike_deviations": 6.0, "steps": 24}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "set")


def test_the_budget_counts_consecutive_skips():
    budget = SkipBudget(2)
    bad, good = StepResult.judge(loss=float("nan"), grad_norm=1.0), StepResult.judge(loss=1.0, grad_norm=1.0)
    for step, result in enumerate([bad, bad, good, bad, bad], start=1):
        budget.note(step, result)
    assert budget.used_up
    with pytest.raises(
        DivergedError, match=r"3 updates in a row.*step 6: loss nan.*max_skipped_steps = 2"
    ) as e:
        budget.note(6, bad)
    # A run folder keeps its optimizer: the remedy must be one that the launcher accepts.
    assert "start again in another --run-dir with a lower optimizer.lr" in str(e.value)


def spoil(patch: pytest.MonkeyPatch, steps: range, change) -> None:
    """Have the results of these train_step calls of this process changed, for every engine."""
    train_step, calls = CommonEngine.train_step, []

    def wrapped(self, *args, **kwargs):
        result = train_step(self, *args, **kwargs)
        calls.append(1)
        return change(result) if len(calls) in steps else result

    patch.setattr(CommonEngine, "train_step", wrapped)


def leap(result: StepResult) -> StepResult:
    return StepResult(result.loss + 5.0, result.grad_norm, True)


def bad_gradient(patch: pytest.MonkeyPatch, first: int) -> None:
    """From step ``first`` on, one parameter's gradient holds two NaN on this rank before it is reduced."""
    reduce, calls = LocalEngine._reduce, []

    def wrapped(self):
        calls.append(1)
        if len(calls) >= first:
            name = self._held[2].name
            gradient = dict(self.model.named_parameters())[name].grad
            gradient.view(-1)[:2] = float("nan")
        reduce(self)

    patch.setattr(LocalEngine, "_reduce", wrapped)


def two_steps_case(job: Job, folder: Path) -> TrainResult:
    return run(job, folder, stop_at_step=2)


def diverge_case(job: Job, folder: Path, spoilt: int) -> tuple[str, dict[str, bytes]]:
    """Rank ``spoilt`` has a NaN gradient from its third step on; what was said, and the last weights."""
    from trellis_dist.parallel import env

    seen: list[torch.nn.Module] = []
    with pytest.MonkeyPatch.context() as patch:
        build = CommonEngine.__init__

        def note(self, model, options):
            build(self, model, options)
            seen.append(self.model)

        patch.setattr(CommonEngine, "__init__", note)
        if env.rank() == spoilt:
            bad_gradient(patch, 3)
        with pytest.raises(DivergedError) as stopped:
            run(job, folder)
    return str(stopped.value), {n: p.detach().numpy().tobytes() for n, p in seen[0].named_parameters()}


def test_a_gradient_that_is_not_finite_on_one_rank_stops_all_together_with_a_diagnosis(
    data: Path, tmp_path: Path
):
    job = make_job(data, training={"max_skipped_steps": 2, "micro_batch": 1})
    gloo_pool(2).run(two_steps_case, job, tmp_path / "clean")
    answers = gloo_pool(2).run(diverge_case, job, tmp_path / "run", 1)
    texts = [text for text, _ in answers]
    assert texts[0] == texts[1]
    assert "3 updates in a row" in texts[0]
    assert "non-finite gradient first in" in texts[0]
    assert "on ranks 0, 1" in texts[0], "the reduced gradient is bad on all ranks"
    good = state(tmp_path / "clean", 2)
    for _, weights in answers:  # as they were after the last good step
        assert weights == {name: good[f"model/{name}"] for name in weights}
    folder = tmp_path / "run" / "diagnostics" / "step-00000005"
    assert sorted(path.name for path in folder.iterdir()) == [
        f"rank-0000{rank}.{kind}" for rank in (0, 1) for kind in ("json", "safetensors")
    ]
    table = json.loads((folder / "rank-00001.json").read_text())
    assert table["history"][2]["gradient_norm"] == "nan"
    assert sum(row["nonfinite"] for row in table["gradients"]) == 2
    assert sum(row["nonfinite"] for row in table["weights"]) == 0
    assert table["samples"] == 5 * job.global_rows


class SlowDisk(FileSystem):
    """A checkpoint takes longer than a step."""

    def write_large(self, path: Path, pieces: Iterable[Piece]) -> None:
        time.sleep(1.0)
        super().write_large(path, pieces)


def diverge_while_saving_case(job: Job, folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "FILE_SYSTEM", SlowDisk())
        bad_gradient(patch, 3)
        with pytest.raises(DivergedError, match=r"step 5"):
            run(job, folder)


def test_a_save_in_flight_when_the_run_stops_for_its_losses_is_brought_to_its_end(data: Path, tmp_path: Path):
    job = make_job(data, training={"max_skipped_steps": 2, "micro_batch": 1}, checkpoint={"interval": 4})
    gloo_pool(2).run(diverge_while_saving_case, job, tmp_path)
    assert latest_verified(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step-00000004"


def test_a_spike_is_warned_of_and_training_goes_on(data: Path, tmp_path: Path, monkeypatch, capsys):
    spoil(monkeypatch, range(12, 14), leap)
    result = run(make_job(data, training={**SPIKES, "validation_interval": 0}), tmp_path)
    assert result.step == 24
    said = capsys.readouterr().err
    assert said.count("deviations above the median") == 1
    assert "alert: step 13: loss" in said
    monkeypatch.undo()
    run(make_job(data, training={"steps": 24}), tmp_path / "plain")
    assert state(tmp_path, 24) == state(tmp_path / "plain", 24), "a warning changes nothing"


@pytest.fixture(scope="module")
def rolled_back(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that leapt at steps 12 and 13 of its first pass: saved at 5 and 10, back to 10, on to 24."""
    folder = tmp_path_factory.mktemp("rolled-back")
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, range(12, 14), leap)
        assert run(make_job(data, training={**SPIKES, "spike_action": "rollback"}), folder).step == 24
    return folder


def test_a_rollback_restores_the_state_before_and_skips_the_rows(rolled_back: Path):
    rows = exact_rows(rolled_back)
    assert [row["step"] for row in rows] == list(range(1, 25)), "each step is there once"
    assert list(list_steps(rolled_back / "checkpoints")) == [24, 20, 15, 10, 5]
    states = {step: load_run_state(path) for step, path in list_steps(rolled_back / "checkpoints").items()}
    assert [states[step]["rollbacks"] for step in (5, 10, 15, 24)] == [0, 0, 1, 1]
    # Steps 11 to 13 were read, and are not read again.
    assert [states[step]["samples"] // 4 for step in (10, 15, 24)] == [10, 18, 27]


def rollback_case(job: Job, folder: Path) -> TrainResult:
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, range(12, 14), leap)
        return run(job, folder)


def resume_case(job: Job, folder: Path) -> TrainResult:
    """Stop at the checkpoint, and go on from it with the rows after those of three steps."""
    from trellis_dist.training import setup

    run(job, folder, stop_at_step=10)
    find = setup.find_start

    def skipped(*args, **kwargs):
        start = find(*args, **kwargs)
        start.progress.samples += 3 * 4
        return start

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "find_start", skipped)
        return run(job, folder)


def test_a_rollback_gives_the_bits_of_a_new_process(rolled_back: Path, data: Path, tmp_path: Path):
    resume_case(make_job(data, training=SPIKES), tmp_path)
    assert state(tmp_path, 24) == state(rolled_back, 24)


@pytest.mark.parametrize(
    "engine",
    [{"engine": "deepspeed", "zero_stage": 1}, {"engine": "deepspeed", "zero_stage": 3}, {"engine": "fsdp2"}],
    ids=["zero1", "zero3", "fsdp2"],
)
def test_engines_that_divide_their_state_roll_back_to_the_same_bits(
    data: Path, tmp_path: Path, engine: dict[str, object]
):
    training = {**SPIKES, "micro_batch": 1, "replica_check_interval": 5, **engine}
    back = make_job(data, training={**training, "spike_action": "rollback"})
    gloo_pool(2).run(rollback_case, back, tmp_path / "back")
    gloo_pool(2).run(resume_case, make_job(data, training=training), tmp_path / "new")
    assert load_run_state(tmp_path / "back" / "checkpoints" / "step-00000024")["rollbacks"] == 1
    assert state(tmp_path / "back", 24) == state(tmp_path / "new", 24)


def test_a_rollback_beside_a_retention_keeps_a_checkpoint(data: Path, tmp_path: Path, monkeypatch):
    """The save of step 12, in the spike, removes step 6 while the rollback looks for a step before it."""
    spoil(monkeypatch, range(12, 14), leap)
    keeping = {"interval": 2, "keep": 2}
    job = make_job(data, training={**SPIKES, "spike_action": "rollback"}, checkpoint=keeping)
    assert run(job, tmp_path).step == 24
    assert list(list_steps(tmp_path / "checkpoints")) == [24, 22]
    assert load_run_state(tmp_path / "checkpoints" / "step-00000024")["rollbacks"] == 1
    for keep, wanted in ((1, 2), (2, None)):
        checkpoint = CheckpointConfig(interval=2, keep=keep)
        if wanted is None:
            check_rollback(job.training, checkpoint)
            continue
        with pytest.raises(ValueError, match=f"set checkpoint.keep to {wanted} or more"):
            check_rollback(job.training, checkpoint)


def test_without_a_checkpoint_before_it_the_run_goes_on_and_the_budget_ends_it(
    data: Path, tmp_path: Path, monkeypatch, capsys
):
    spoil(monkeypatch, range(12, 14), leap)
    job = make_job(
        data, training={**SPIKES, "spike_action": "rollback"}, checkpoint={"interval": 100, "keep": 0}
    )
    assert run(job, tmp_path / "a").step == 24
    assert "no checkpoint before the spike, going on" in capsys.readouterr().err
    monkeypatch.undo()
    spoil(monkeypatch, range(12, 14), leap)
    job = make_job(data, training={**SPIKES, "spike_action": "rollback", "max_rollbacks": 0})
    with pytest.raises(DivergedError, match=r"max_rollbacks = 0 times before"):
        run(job, tmp_path / "b")


def test_a_resumed_run_remembers_the_losses_before(data: Path, tmp_path: Path, monkeypatch, capsys):
    """Killed right before a spike, the next start finds it with the losses of the one before."""
    run(make_job(data, training=SPIKES), tmp_path, stop_at_step=11)
    spoil(monkeypatch, range(1, 3), leap)
    run(make_job(data, training=SPIKES), tmp_path)
    assert "alert: step 13: loss" in capsys.readouterr().err
