"""What `prepare` is measured beside: bare encoding in as many processes, and a straightforward script."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

__all__ = ["bare_encoding", "documents_of", "straightforward_script"]

# Documents that a worker of the script gets at a time.
CHUNK = 64


def documents_of(path: Path, size: int) -> Iterator[str]:
    """The file in documents of at most `size` bytes, cut at blank lines, as the pipeline's reader cuts it."""
    from data_pipeline.readers import _cut

    for part in _cut(path.read_bytes(), size):
        yield part.decode()


def bare_encoding(model: Path, paths: Sequence[Path], *, size: int, processes: int) -> dict[str, Any]:
    """SentencePiece's own ``encode`` over documents that are in memory already; nothing is kept or written.

    Returns:
        seconds (of the slowest process, from a common start), tokens.
    """
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(processes), context.Queue()
    workers = [
        context.Process(target=_encode_all, args=(str(model), paths[i::processes], size, barrier, results))
        for i in range(processes)
    ]
    for worker in workers:
        worker.start()
    found = [results.get() for _ in workers]
    for worker in workers:
        worker.join()
    begin = min(start for start, _, _ in found)
    return {"seconds": max(stop for _, stop, _ in found) - begin, "tokens": sum(n for _, _, n in found)}


def _encode_all(model: str, paths: Sequence[Path], size: int, barrier: Any, results: Any) -> None:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    documents = [document for path in paths for document in documents_of(path, size)]
    barrier.wait()
    start = time.monotonic()
    tokens = sum(len(processor.encode(document)) for document in documents)
    results.put((start, time.monotonic(), tokens))


def straightforward_script(
    model: Path, paths: Sequence[Path], output: Path, *, size: int, processes: int
) -> dict[str, Any]:
    """The usual preprocessing script: a pool encodes documents, the parent writes an indexed data set.

    Nothing is hashed, committed or resumed.

    Returns:
        seconds (the pool's start left out), tokens.
    """
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    documents = (document for path in paths for document in documents_of(path, size))
    builder = IndexedDatasetBuilder(f"{output}.bin", dtype=np.uint16)
    tokens = 0
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, _open_model, (str(model),)) as pool:
        pool.map(_encode_one, ["warm"] * processes * 4)
        start = time.monotonic()
        for ids in pool.imap(_encode_one, documents, CHUNK):
            builder.add_document(torch.tensor(ids), [len(ids)])
            tokens += len(ids)
        builder.finalize(f"{output}.idx")
        seconds = time.monotonic() - start
    return {"seconds": seconds, "tokens": tokens}


def _open_model(model: str) -> None:
    import sentencepiece

    global _PROCESSOR
    _PROCESSOR = sentencepiece.SentencePieceProcessor(model_file=model)


def _encode_one(document: str) -> list[int]:
    ids: list[int] = _PROCESSOR.encode(document)
    return [1, *ids, 2]


_PROCESSOR: Any = None
