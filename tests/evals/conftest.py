"""A small but real run folder: real shards, a SentencePiece tokenizer, a committed checkpoint."""

from __future__ import annotations

import argparse
import ast
import base64
import json
import shutil
import textwrap
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoints.logical import LogicalTensor
from checkpoints.state import save_checkpoint
from data_pipeline.config import TokenizerConfig
from data_pipeline.manifest import (
    Manifest,
    ShardInfo,
    SplitInfo,
    fingerprint_of,
    load_manifest,
    write_manifest,
)
from data_pipeline.shard import token_dtype, write_shard
from data_pipeline.tokenizer import Tokenizer, train_tokenizer
from evals.queue import Queue
from trellis_dist.files import sha256_file
from trellis_dist.models.config import ModelConfig, TrellisConfig
from trellis_dist.models.language_model import build_language_model

VOCAB, LENGTH = 384, 96


def _documents() -> list[str]:
    sources = [Path(module.__file__).read_text() for module in (argparse, ast, base64, textwrap, shutil)]
    return [source[i : i + 3000] for source in sources for i in range(0, min(len(source), 30_000), 3000)]


def _write_split(folder: Path, name: str, documents: list[str], tokenizer: Tokenizer) -> SplitInfo:
    ids = [np.array([tokenizer.bos_id, *tokenizer.encode(d), tokenizer.eos_id]) for d in documents]
    files = write_shard(folder / f"{name}-00000", ids, dtype=token_dtype(VOCAB))
    size = sum(len(d.encode()) for d in documents)
    info = ShardInfo(
        f"{name}-00000", "corpus", files.sha256_bin, files.sha256_idx, files.documents, files.tokens, size
    )
    return SplitInfo(files.documents, files.tokens, size, (info,))


def write_dataset(folder: Path) -> Tokenizer:
    """A prepared data set as data_pipeline writes it."""
    folder.mkdir()
    documents = _documents()
    model = train_tokenizer(TokenizerConfig(vocab_size=VOCAB, threads=1), documents)
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "quarantine.jsonl").write_text("")
    tokenizer = Tokenizer(model)
    splits = {
        "train": _write_split(folder, "train", documents[4:], tokenizer),
        "validation": _write_split(folder, "validation", documents[:4], tokenizer),
    }
    identity = {
        "sha256": tokenizer.sha256,
        "vocab_size": VOCAB,
        "bos": tokenizer.bos_id,
        "eos": tokenizer.eos_id,
    }
    manifest = Manifest(
        fingerprint=fingerprint_of("test", tokenizer.sha256, splits),
        config_digest="test",
        source={"kind": "stdlib"},
        listing=None,
        tokenizer=identity,
        splits=splits,
        sources={},
        quarantined=0,
        stages={},
        logs={"quarantine.jsonl": sha256_file(folder / "quarantine.jsonl")},
    )
    write_manifest(folder, manifest)
    return tokenizer


def write_checkpoint(run: Path, *, step: int, seed: int) -> None:
    """Commit a model with fresh weights as the checkpoint of ``step``."""
    recipe = json.loads((run / "recipe.json").read_text())
    config = ModelConfig(**(recipe["model"] | {"trellis": TrellisConfig(**recipe["model"]["trellis"])}))
    model = build_language_model(config, seed=seed)
    tensors = [LogicalTensor.whole(f"model/{n}", p.detach()) for n, p in model.named_parameters()]
    data = {"fingerprint": load_manifest(recipe["data"]["directory"]).fingerprint}
    save_checkpoint(run / "checkpoints", step=step, tensors=tensors, run_state={"step": step, "data": data})


def write_run(run: Path, dataset: Path) -> Path:
    """A run folder with one checkpoint, of step 7."""
    run.mkdir(parents=True)
    model = ModelConfig(
        vocab_size=VOCAB,
        num_layers=2,
        dim=32,
        num_heads=2,
        pattern=["trellis"],
        trellis=TrellisConfig(slots=8, chunk_size=16, gates=["learned"]),
    )
    recipe = {
        "name": "tiny",
        "model": asdict(model),
        "data": {"directory": str(dataset), "sequence_length": LENGTH},
        "evals": {"tasks": ["perplexity", "sample"], "sample_tokens": 8},
    }
    (run / "recipe.json").write_text(json.dumps(recipe))
    write_checkpoint(run, step=7, seed=0)
    return run


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
