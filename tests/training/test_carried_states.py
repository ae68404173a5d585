"""Runs whose rows take over states: bit for bit after a resume, on any mesh; a skipped step drops them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints.logical import LogicalTensor
from checkpoints.state import CheckpointReader, save_checkpoint
from data_pipeline.loader import Batch, BatchLoader, TokenDataset
from tests.distributed import gloo_pool
from tests.training.small_run import ROW, exact_rows, make_job, state, write_dataset
from trellis_dist.models.carry import CarriedState, Carry
from trellis_dist.models.language_model import build_language_model
from trellis_dist.parallel.config import MeshConfig
from trellis_dist.parallel.mesh import build_mesh
from trellis_dist.parallel.segments import Segments
from trellis_dist.training.carry import RowStates
from trellis_dist.training.engines.factory import build_engine
from trellis_dist.training.job import Job, TrainResult
from trellis_dist.training.loop import run

# A step that ends in the middle of a run of rows, and of a chunk.
RUN, STOP, PLACES = 3, 7, 4
# Summing in another order must not grow: Adam would amplify it.
PLAIN = {"kind": "sgd", "lr": 0.02, "clip_norm": 0.0}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "set")


def job_of(data: Path, *, training: dict[str, Any] | None = None, **sections: Any) -> Job:
    """Ten steps; 18 pieces divide over tp."""
    model = {"vocab_size": 18, **sections.pop("model", {})}
    made = make_job(data, model=model, training={"steps": 10, **(training or {})}, **sections)
    return with_runs(made, RUN)


def with_runs(job: Job, rows: int) -> Job:
    return dataclasses.replace(job, data=dataclasses.replace(job.data, carry_rows=rows))


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of one process without interruption."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    run(job_of(data, optimizer=PLAIN), folder)
    return folder


def test_a_resume_in_the_middle_of_a_document_is_bit_for_bit(data: Path, alone: Path, tmp_path: Path):
    job = job_of(data, optimizer=PLAIN)
    run(job, tmp_path, stop_at_step=STOP)
    names = set(state(tmp_path, STOP))
    assert {"carry/0/key_memory", "carry/0/value_chunk_start", "carry/0/query_tail"} <= names
    assert run(job, tmp_path).resumed_step == STOP
    assert exact_rows(tmp_path) == exact_rows(alone)
    assert state(tmp_path, 10) == state(alone, 10)


def test_without_its_states_it_would_be_another_run(data: Path, alone: Path, tmp_path: Path, monkeypatch):
    job = job_of(data, optimizer=PLAIN)
    run(job, tmp_path, stop_at_step=STOP)
    monkeypatch.setattr(RowStates, "load", lambda self, reader: self.forget())
    run(job, tmp_path)
    found, expected = exact_rows(tmp_path), exact_rows(alone)
    assert found[:STOP] == expected[:STOP]
    assert found[STOP]["loss/train"] != expected[STOP]["loss/train"]


def test_states_change_what_is_learned_and_validation_does_not_touch_them(
    data: Path, alone: Path, tmp_path: Path
):
    validated = job_of(data, optimizer=PLAIN, training={"validation_interval": 2})
    run(validated, tmp_path / "validated")
    losses = [row["loss/train"] for row in exact_rows(tmp_path / "validated")]
    assert losses == [row["loss/train"] for row in exact_rows(alone)]
    # The same rows in the same order, every one from new memories.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RowStates, "enter", lambda self, batch: None)
        run(job_of(data, optimizer=PLAIN), tmp_path / "anew")
    anew = [row["loss/train"] for row in exact_rows(tmp_path / "anew")]
    assert anew[0] == losses[0]
    assert all(a != b for a, b in zip(anew[1:RUN], losses[1:RUN]))


def run_case(job: Job, folder: Path, stop_at_step: int | None) -> TrainResult:
    return run(job, folder, stop_at_step=stop_at_step)


MESHES: dict[str, dict[str, Any]] = {
    "zero1 dp": {"training": {"engine": "deepspeed", "zero_stage": 1, "micro_batch": 1}},
    "zero3 dp": {"training": {"engine": "deepspeed", "zero_stage": 3, "zero3_persistence_threshold": 0}},
    "fsdp2 dp, full": {"training": {"engine": "fsdp2", "activation_checkpointing": "full"}},
    "local tp": {"mesh": {"tp": 2}, "training": {"activation_checkpointing": "selective"}},
}


@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_hands_its_states_on_and_resumes_exactly(name: str, data: Path, alone: Path, tmp_path: Path):
    job = job_of(data, optimizer=PLAIN, **MESHES[name])
    pool = gloo_pool(2)
    pool.run(run_case, job, tmp_path / "whole", None)
    pool.run(run_case, job, tmp_path / "parts", STOP)
    assert [r.resumed_step for r in pool.run(run_case, job, tmp_path / "parts", None)] == [STOP, STOP]
    assert exact_rows(tmp_path / "parts") == exact_rows(tmp_path / "whole")
    assert state(tmp_path / "parts", 10) == state(tmp_path / "whole", 10)
    assert_close(tmp_path / "whole", alone)
    # And one process goes on where the mesh left it.
    pool.run(run_case, job, tmp_path / "both", STOP)
    assert run(job_of(data, optimizer=PLAIN), tmp_path / "both").resumed_step == STOP
    assert_close(tmp_path / "both", alone)


def assert_close(found: Path, expected: Path) -> None:
    for row, reference in zip(exact_rows(found), exact_rows(expected), strict=True):
        assert row["loss/train"] == pytest.approx(reference["loss/train"], rel=1e-5)
        assert row["optim/gradient_norm"] == pytest.approx(reference["optim/gradient_norm"], rel=1e-4)
    ours, theirs = (
        CheckpointReader(folder / "checkpoints" / "step-00000010") for folder in (found, expected)
    )
    names = [name for name in theirs.names() if name.startswith("carry/")]
    assert names
    assert set(names) <= set(ours.names())
    for name in names:
        torch.testing.assert_close(ours.read(name), theirs.read(name), rtol=1e-3, atol=1e-5)


def test_another_order_of_rows_is_refused_with_both_values(data: Path, tmp_path: Path):
    run(job_of(data), tmp_path, stop_at_step=1)
    with pytest.raises(ValueError, match=r"data carry_rows is 4, but .* was trained with 3"):
        run(with_runs(job_of(data), 4), tmp_path)
    larger = job_of(data, training={"global_batch_tokens": 8 * ROW})
    with pytest.raises(ValueError, match=r"data rows per step is 8, but .* was trained with 4"):
        run(larger, tmp_path)


@pytest.mark.parametrize(
    "sections, message",
    [
        ({"model": {"pattern": ("trellis", "attention"), "num_layers": 2}}, "only trellis layers hand"),
        ({"training": {"compile": "aot_eager"}}, "which no graph holds"),
    ],
)
def test_what_cannot_hand_states_on_is_refused(data: Path, tmp_path: Path, sections: Any, message: str):
    with pytest.raises(ValueError, match=message) as refused:
        run(job_of(data, **sections), tmp_path)
    assert "data.carry_rows = 3" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_convolution_inputs_come_back_in_their_own_type(dtype: torch.dtype, tmp_path: Path):
    """Memories are fp32 whatever the weights are; two micro-batches are loaded as four."""
    mesh = build_mesh(MeshConfig())
    states = RowStates(global_rows=4, micro_batch=2, mesh=mesh)
    generator = torch.Generator().manual_seed(0)
    for slot in (0, 2):
        memories = [torch.randn(2, 2, 3, 4, generator=generator) for _ in range(4)]
        carry = Carry([0, 0])
        carry.leaving[0] = CarriedState(*memories, tail=torch.randn(2, 3, 16, generator=generator).to(dtype))
        tokens = torch.zeros(2, 1, dtype=torch.long)
        states.leave(Batch(tokens, tokens, torch.tensor([0, 1, 2]), 2, slot, torch.zeros(2)), carry)
    path = save_checkpoint(tmp_path, step=1, tensors=states.logical_tensors(), run_state={})
    loaded = RowStates(global_rows=4, micro_batch=1, mesh=mesh)
    loaded.load(CheckpointReader(path))
    ours, theirs = (joined(rows.logical_tensors()) for rows in (states, loaded))
    assert ours["carry/0/query_tail"].dtype == dtype
    assert ours["carry/0/key_memory"].dtype == torch.float32
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(ValueError, match="states of 4 rows, a step has 8"):
        RowStates(global_rows=8, micro_batch=2, mesh=mesh).load(CheckpointReader(path))


def joined(parts: Iterable[LogicalTensor]) -> dict[str, torch.Tensor]:
    found: dict[str, list[torch.Tensor]] = {}
    for part in parts:
        found.setdefault(part.name, []).append(part.local)
    return {name: torch.cat(pieces) for name, pieces in found.items()}


def test_states_of_a_skipped_step_are_dropped(data: Path):
    job = job_of(data)
    mesh = build_mesh(job.mesh)
    states = RowStates(global_rows=PLACES, micro_batch=2, mesh=mesh)
    model = build_language_model(job.model, seed=0)
    segments = Segments(mesh, chunk_size=job.model.trellis.chunk_size)
    engine = build_engine(
        model, job.training, optimizer=job.optimizer, mesh=mesh, segments=segments, states=states
    )
    rows = TokenDataset(data, "train", sequence_length=ROW, seed=0, carry_rows=RUN)
    loader = BatchLoader(rows, global_batch=PLACES, micro_batch=2)

    def step(number: int) -> bool:
        batches = loader.micro_batches(number * PLACES)
        valid = sum(batch.valid_tokens for batch in batches)
        return engine.train_step(batches, lr=0.01, valid_tokens=valid).applied

    assert step(0)
    kept = {(item.name, item.offset): item for item in states.logical_tensors()}
    assert {item.global_shape[0] for item in kept.values()} == {PLACES}
    engine.evaluate(loader.micro_batches(3 * PLACES))
    for item in states.logical_tensors():
        assert torch.equal(item.local, kept[item.name, item.offset].local)
    assert all(bool(item.local.isfinite().all()) for item in kept.values())
    with torch.no_grad():
        model.norm.weight.fill_(float("inf"))
    assert not step(1)
    assert not list(states.logical_tensors())
    with torch.no_grad():
        model.norm.weight.fill_(1.0)
    assert step(2), "the next rows start from new memories"
    assert all(bool(item.local.isfinite().all()) for item in states.logical_tensors())
