"""Whole runs on meshes of two ranks: the rows of one process, resumed bit for bit, one checkpoint for all."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints.state import CheckpointReader
from tests.distributed import gloo_pool
from tests.training.small_run import exact_rows, make_job, write_dataset
from trellis_dist.parallel.config import MeshConfig, SequenceConfig, TensorConfig
from trellis_dist.training.config import ProfileConfig
from trellis_dist.training.job import Job, TrainResult
from trellis_dist.training.loop import run
from trellis_dist.training.profiling import profile_folder

ROW, STEPS = 32, 6
TIMEOUT_S = 120.0  # three starts of a run in one case
MESHES: dict[str, dict[str, Any]] = {
    "tp": {"mesh": MeshConfig(tp=2)},
    "tp, sequence-parallel, recomputed": {
        "mesh": MeshConfig(tp=2),
        "tensor": TensorConfig(sequence_parallel=True),
        "training": {"engine": "deepspeed", "activation_checkpointing": "full"},
    },
    "sp, ZeRO 1": {"mesh": MeshConfig(sp=2), "training": {"engine": "deepspeed"}},
    "sp, all-to-all, FSDP2": {
        "mesh": MeshConfig(sp=2),
        "sequence": SequenceConfig(mode="all_to_all"),
        "training": {"engine": "fsdp2"},
    },
    "dp, ZeRO 3": {"training": {"engine": "deepspeed", "zero_stage": 3}},
    "dp, FSDP2": {"training": {"engine": "fsdp2", "offload_optimizer": True}},
    "dp, local": {"training": {"forwards_first": 2}},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    run(small_job(data), folder)
    return folder


def small_job(data: Path, *, training: dict[str, Any] | None = None, **sections: Any) -> Job:
    # Parity is measured with SGD and no clipping: Adam amplifies what the order of a sum rounds.
    settings = {"steps": STEPS, "global_batch_tokens": 4 * ROW, "micro_batch": 1, **(training or {})}
    job = make_job(
        data,
        model={"norm_eps": 1e-2, "vocab_size": 18},
        optimizer={"kind": "sgd", "lr": 0.02, "clip_norm": 0.0},
        training=settings,
        checkpoint={"interval": 3},
    )
    rows = dataclasses.replace(job.data, chunk_aligned=True, sequence_length=ROW)
    return dataclasses.replace(job, data=rows, **sections)


def stop_and_resume_case(job: Job, folder: Path) -> TrainResult:
    run(job, folder / "whole")
    run(job, folder / "parts", stop_at_step=3)
    # One step, so that the run also goes on after it: its trace takes longer to write than all runs to train.
    profiled = dataclasses.replace(job.logging, profile=ProfileConfig(enabled=True, start_step=5, steps=1))
    return run(dataclasses.replace(job, logging=profiled), folder / "parts", resume="require")


def passes(folder: Path, rank: int) -> set[str]:
    """What the trace of a rank names."""
    with gzip.open(profile_folder(folder, 5) / f"rank-{rank:05d}.trace.json.gz", "rt") as file:
        return {event["name"] for event in json.load(file)["traceEvents"] if "name" in event}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(folder / "checkpoints" / f"step-{STEPS:08d}")
    return {name: reader.read(name) for name in reader.names()}


@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_trains_as_one_process_and_resumes_exactly(name: str, data: Path, alone: Path, tmp_path: Path):
    results = gloo_pool(2).run(
        stop_and_resume_case, small_job(data, **MESHES[name]), tmp_path, timeout_s=TIMEOUT_S
    )
    assert [(r.resumed_step, r.step) for r in results] == [(3, STEPS)] * 2
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert exact_rows(tmp_path / "whole") == exact_rows(tmp_path / "parts")
    named = {"forward", "backward", "reduction of the gradients", "update of the weights"}
    assert all(named <= passes(tmp_path / "parts", rank) for rank in range(2))
    expected = exact_rows(alone)
    for row, theirs in zip(exact_rows(tmp_path / "whole"), expected, strict=True):
        assert row.keys() == theirs.keys()
        for key, value in theirs.items():
            assert row[key] == pytest.approx(value, rel=1e-4 if "norm" in key else 1e-5), key
    for key, value in weights(alone).items():
        torch.testing.assert_close(whole[key], value, rtol=1e-4, atol=1e-6)


def test_a_run_goes_on_in_one_process_where_a_mesh_left_it(data: Path, alone: Path, tmp_path: Path):
    """Stopped on tensor shards, finished without: the same rows and weights."""
    gloo_pool(2).run(stop_case, small_job(data, **MESHES["tp"]), tmp_path)
    assert run(small_job(data), tmp_path, resume="require").resumed_step == 3
    for row, theirs in zip(exact_rows(tmp_path), exact_rows(alone), strict=True):
        assert row["loss/train"] == pytest.approx(theirs["loss/train"], rel=1e-5)
    mine = weights(tmp_path)
    for key, value in weights(alone).items():
        torch.testing.assert_close(mine[key], value, rtol=1e-4, atol=1e-6)


def stop_case(job: Job, folder: Path) -> TrainResult:
    return run(job, folder, stop_at_step=3)
