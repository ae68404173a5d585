"""Reading batches: tokens per second of one core for each packing, and the time to the first batch.

The data set is synthetic: one shard of about a million documents and a billion tokens, 2 GB, so that nothing
that grows with its index goes unseen. Its files have just been written and are in the page cache.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.hand_made import BOS, EOS, write_documents
from benchmarks.machine import machine, versions
from data_pipeline.loader import BatchLoader, TokenDataset
from data_pipeline.manifest import ShardInfo, load_manifest
from data_pipeline.pack import Packing
from data_pipeline.rows import build_row_index, needs_row_index, row_index_path
from data_pipeline.shard import token_dtype

__all__ = ["PACKINGS", "measure_loader", "write_synthetic"]

SEQUENCE_LENGTH, CHUNK, MICRO_BATCH, GLOBAL_BATCH = 2048, 64, 8, 32
VOCAB = 32_000
PACKINGS: tuple[tuple[Packing, int], ...] = (
    ("concat", 1),
    ("best_fit", 1),
    ("per_document", 1),
    ("concat", CHUNK),
    ("best_fit", CHUNK),
    ("per_document", CHUNK),
)
# Runs in a process of its own; prints when its imports were done and what it measured after them.
CHILD = """
import json, sys, time
started = time.time()
from data_pipeline.loader import BatchLoader, TokenDataset
imported = time.time()
folder, packing, width, align, verify = sys.argv[1:]
data = TokenDataset(
    folder, "train", sequence_length=int(width), seed=0, packing=packing, align=int(align),
    verify=verify == "True",
)
BatchLoader(data, global_batch=8, micro_batch=8).micro_batches(0)
print(json.dumps({"imports": imported - started, "first_batch": time.time() - imported, "end": time.time()}))
"""


def measure_loader(
    directory: Path | None = None, *, tokens: int = 10**9, documents: int = 10**6, seconds: float = 3.0
) -> dict[str, Any]:
    """Write the synthetic data set, measure, remove it.

    Args:
        directory: folder on the disk to use, with room for 2.2 bytes per token; None takes the temporary one.
        tokens, documents: of the data set, about.
        seconds: of reading for each packing.

    Returns:
        Machine, versions, the data set, and for each packing (packing-C): tokens_per_second of one thread's
        CPU time, index_seconds (to make the row index; 0 without one), the share of positions that predict,
        and first_batch_seconds of a fresh process: with and without its imports, with the row index there
        already.
    """
    folder = Path(tempfile.mkdtemp(prefix="loader-", dir=directory))
    try:
        shard = write_synthetic(folder, tokens=tokens, documents=documents)
        found = {
            f"{packing}-{align}": _measure(folder, shard, packing, align, seconds)
            for packing, align in PACKINGS
        }
        checked = _first_batch(folder, "concat", 1, verify=True)
    finally:
        shutil.rmtree(folder)
    return {
        "machine": machine(),
        "versions": versions(),
        "sequence_length": SEQUENCE_LENGTH,
        "micro_batch": MICRO_BATCH,
        "dataset": {"tokens": shard.tokens, "documents": shard.documents, "bin_bytes": 2 * shard.tokens},
        "packings": found,
        "first_batch_with_hashes_checked_seconds": checked,
    }


def write_synthetic(folder: Path, *, tokens: int, documents: int, seed: int = 0) -> ShardInfo:
    """A data set of one train shard in ``folder``: log-normal document lengths (sigma 1), random tokens."""
    draw = np.random.default_rng(seed)
    lengths = draw.lognormal(0.0, 1.0, documents)
    lengths = np.maximum(2, lengths * (tokens / lengths.sum())).astype(np.int64)
    write_documents(folder, {"train": {"corpus": [_documents(lengths, draw)]}}, vocab_size=VOCAB)
    return load_manifest(folder).splits["train"].shards[0]


def _documents(lengths: np.ndarray, draw: np.random.Generator) -> Iterator[np.ndarray]:
    """BOS, a slice of one random text, EOS."""
    text = draw.integers(3, VOCAB, size=int(lengths.max()) + 2**20).astype(token_dtype(VOCAB))
    for length, place in zip(lengths.tolist(), draw.integers(0, 2**20, size=len(lengths)).tolist()):
        document = text[place : place + length].copy()
        document[0], document[-1] = BOS, EOS
        yield document


def _measure(folder: Path, shard: ShardInfo, packing: Packing, align: int, seconds: float) -> dict[str, Any]:
    index = _index(folder, shard, packing, align)
    data = TokenDataset(
        folder,
        "train",
        sequence_length=SEQUENCE_LENGTH,
        seed=0,
        packing=packing,
        align=align,
        verify=False,
    )
    loader = BatchLoader(data, global_batch=GLOBAL_BATCH, micro_batch=MICRO_BATCH)
    return {
        "tokens_per_second": _throughput(loader, seconds),
        "positions_that_predict": data.utilisation,
        "rows": data.num_samples,
        **index,
        "first_batch_seconds": _first_batch(folder, packing, align, verify=False),
    }


def _index(folder: Path, shard: ShardInfo, packing: Packing, align: int) -> dict[str, float]:
    """Seconds and bytes of the row index, and the documents it cuts."""
    if not needs_row_index(packing, align):
        return {"index_seconds": 0.0, "index_bytes": 0}
    begin = time.perf_counter()
    counts = build_row_index(folder, shard, packing=packing, sequence_length=SEQUENCE_LENGTH, align=align)
    seconds = time.perf_counter() - begin
    path = row_index_path(folder, shard.name, packing=packing, sequence_length=SEQUENCE_LENGTH, align=align)
    return {
        "index_seconds": seconds,
        "index_bytes": path.stat().st_size,
        "cut_documents": counts["cut_documents"],
    }


def _throughput(loader: BatchLoader, seconds: float) -> float:
    """Positions per second of this thread's CPU time, in shuffled order, after a first pass of warm-up."""
    tokens, step = loader.global_batch * loader.dataset.sequence_length, 0
    for step in range(20):
        loader.micro_batches(step * loader.global_batch)
    begin, first = time.thread_time(), step
    while time.thread_time() - begin < seconds:
        step += 1
        loader.micro_batches(step * loader.global_batch)
    return (step - first) * tokens / (time.thread_time() - begin)


def _first_batch(folder: Path, packing: Packing, align: int, *, verify: bool) -> dict[str, float]:
    """Seconds of a fresh process from its start, and from the end of its imports, to its first batch."""
    arguments = [str(folder), packing, str(SEQUENCE_LENGTH), str(align), str(verify)]
    begin = time.time()
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    return {"without_imports": found["first_batch"], "with_start_and_imports": found["end"] - begin}
