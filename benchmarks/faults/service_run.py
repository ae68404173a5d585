"""A small but real run for evaluations (shards, tokenizer, checkpoints), and the service as a process."""

from __future__ import annotations

import argparse
import ast
import base64
import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np
import psutil

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
from trellis_dist.files import sha256_file
from trellis_dist.models.config import ModelConfig, TrellisConfig
from trellis_dist.models.language_model import build_language_model

__all__ = [
    "LENGTH",
    "VOCAB",
    "Address",
    "Service",
    "library_texts",
    "request",
    "write_checkpoint",
    "write_dataset",
    "write_evals",
    "write_run",
]

ROOT = Path(__file__).resolve().parents[2]
VOCAB, LENGTH = 384, 96
LIMIT_S = 120.0
Address = tuple[str, int]
Jobs = list[dict[str, Any]]


def library_texts() -> list[str]:
    """Pieces of the standard library, 3,000 characters at most."""
    files = [str(module.__file__) for module in (argparse, ast, base64, textwrap, shutil)]
    sources = [Path(file).read_text(encoding="utf-8") for file in files]
    return [source[i : i + 3000] for source in sources for i in range(0, min(len(source), 30_000), 3000)]


def _write_split(folder: Path, name: str, texts: list[str], tokenizer: Tokenizer) -> SplitInfo:
    ids = [np.array([tokenizer.bos_id, *tokenizer.encode(d), tokenizer.eos_id]) for d in texts]
    files = write_shard(folder / f"{name}-00000", ids, dtype=token_dtype(VOCAB))
    size = sum(len(d.encode()) for d in texts)
    info = ShardInfo(
        f"{name}-00000", "corpus", files.sha256_bin, files.sha256_idx, files.documents, files.tokens, size
    )
    return SplitInfo(files.documents, files.tokens, size, (info,))


def write_dataset(folder: Path) -> Tokenizer:
    """A prepared data set as data_pipeline writes it."""
    folder.mkdir()
    texts = library_texts()
    model = train_tokenizer(TokenizerConfig(vocab_size=VOCAB, threads=1), texts)
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "quarantine.jsonl").write_text("")
    tokenizer = Tokenizer(model)
    splits = {
        "train": _write_split(folder, "train", texts[4:], tokenizer),
        "validation": _write_split(folder, "validation", texts[:4], tokenizer),
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


def write_evals(run: Path, **evals: Any) -> None:
    """Replace the evals section of a run's recipe."""
    recipe = json.loads((run / "recipe.json").read_text())
    recipe["evals"] = evals
    (run / "recipe.json").write_text(json.dumps(recipe))


def request(
    address: Address,
    method: str,
    path: str,
    body: object = None,
    headers: Mapping[str, str] | None = None,
) -> tuple[int, dict[str, str], str]:
    """Status, headers and text of one request on a connection of its own."""
    connection = http.client.HTTPConnection(*address, timeout=60)
    try:
        data = None if body is None else json.dumps(body)
        given = {"Content-Type": "application/json", **(headers or {})}
        connection.request(method, path, body=data, headers=given)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read().decode()
    finally:
        connection.close()


class Service:
    """`trellis eval-service` as a process; a context that ends it.

    Args:
        root: folder of the run folders.
        token: clients need it when set.
        said: file that gets its log; without one it goes where this process's goes.
    """

    def __init__(self, root: Path, *, token: str = "", said: Path | None = None) -> None:
        self._root, self._token, self._said = root, token, said
        self.start()

    def start(self) -> None:
        """Start it, for the second time after a kill, and wait until it answers."""
        command = [sys.executable, "-m", "launch.cli", "eval-service", str(self._root), "--port", "0"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRELLIS_TOKEN": self._token}
        stream: IO[bytes] | None = None if self._said is None else open(self._said, "ab")  # noqa: SIM115
        try:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=stream, text=True
            )
        finally:
            if stream is not None:
                stream.close()
        assert self.process.stdout is not None, "it is a pipe"
        match = re.match(r"http://(\S+):(\d+)/ ", self.process.stdout.readline())
        if match is None:
            raise RuntimeError("the service did not start")
        self.address: Address = match[1], int(match[2])

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self._end(self.process.terminate)

    def kill(self) -> None:
        """SIGKILL to the server alone."""
        self._end(self.process.kill)

    def _end(self, signal: Callable[[], None]) -> None:
        signal()
        self.process.wait(30)
        assert self.process.stdout is not None, "it is a pipe"
        self.process.stdout.close()

    def ask(self, method: str, path: str, body: object = None) -> Any:
        """The parsed answer of a request that must not be refused."""
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        status, _, text = request(self.address, method, path, body, headers)
        if status >= 300:
            raise RuntimeError(f"{method} {path}: {status} {text}")
        return json.loads(text)

    def workers(self) -> list[psutil.Process]:
        """Its worker processes."""
        found = psutil.Process(self.process.pid).children()
        return [child for child in found if "spawn_main" in " ".join(child.cmdline())]

    def wait_for(self, condition: Callable[[Jobs], Any], *, seconds: float = LIMIT_S) -> Any:
        """The first true value of condition(jobs), looked for often; RuntimeError after ``seconds``."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            jobs = self.ask("GET", "/jobs")["jobs"]
            if value := condition(jobs):
                return value
            time.sleep(0.03)
        raise RuntimeError(f"waited for {seconds:.0f} s in vain: {jobs}")
