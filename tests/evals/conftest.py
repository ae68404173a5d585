"""A small but real run folder: real shards, a SentencePiece tokenizer, a committed checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.faults.service_run import (
    LENGTH,
    VOCAB,
    library_texts,
    write_checkpoint,
    write_dataset,
    write_run,
)
from evals.queue import Queue

__all__ = [
    "LENGTH",
    "VOCAB",
    "library_texts",
    "write_checkpoint",
    "write_dataset",
    "write_run",
]


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def queue(tmp_path, clock):
    return Queue(tmp_path / "queue.sqlite", clock=clock)


@pytest.fixture(scope="session")
def dataset_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "set"
    write_dataset(folder)
    return folder


@pytest.fixture
def run_dir(tmp_path, dataset_dir) -> Path:
    torch.manual_seed(0)
    return write_run(tmp_path / "runs" / "tiny", dataset_dir)
