"""One work unit: read, normalise, split, tokenise, commit; a pure function of inputs and config.

A committed unit is a folder ``work/units/KEY``: train.tokens and validation.tokens (the documents' tokens end
to end) and unit.json, which lists the documents in order and the hash of both files. KEY is the hash of all
that decides the content, so a unit made by any worker, in any run, at any time, is the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from data_pipeline import normalize
from data_pipeline.config import SourceConfig
from data_pipeline.holdout import document_hash
from data_pipeline.readers import Document, Quarantined
from data_pipeline.shard import token_dtype
from data_pipeline.sources import Unit, unit_documents
from data_pipeline.tokenizer import Tokenizer
from trellis_dist.files import REAL, commit_directory, digest, read_json, sha256_file, write_json

__all__ = ["SPLITS", "VERSION", "Stage", "process_unit", "read_unit", "sample_texts"]

SPLITS = ("train", "validation")
# Raise when the code below changes what a unit contains.
VERSION = 1


@dataclass(frozen=True)
class Stage:
    """What decides a unit's output besides its inputs.

    Attributes:
        source: how records are read.
        held_out_below: a document whose hash (64 bit) is below this goes to the validation split.
        tokenizer_sha256: identity of the tokenizer.
    """

    source: SourceConfig
    held_out_below: int
    tokenizer_sha256: str

    def key(self, unit: Unit) -> str:
        """The unit's content address."""
        read = (self.source.text_column, self.source.max_documents, self.source.max_document_bytes)
        rules = [VERSION, normalize.VERSION, *read, self.source.text_document_bytes]
        return digest([unit.inputs, rules, str(self.held_out_below), self.tokenizer_sha256])


def process_unit(unit: Unit, stage: Stage, tokenizer_path: str, work: str) -> dict[str, Any]:
    """Make and commit one unit, unless it is committed already.

    Args:
        unit: the inputs.
        stage: what to do with them.
        tokenizer_path: .model file, whose hash is ``stage.tokenizer_sha256``.
        work: the data set's work folder, shared by all workers.

    Returns:
        The content of unit.json.

    Raises:
        OSError: an input vanished or the disk is full; nothing is committed then.
    """
    final = Path(work, "units", stage.key(unit))
    attempt = Path(work, "attempts", f"{final.name}-{os.getpid()}-{os.urandom(4).hex()}")
    tokenizer = Tokenizer.load(tokenizer_path)
    assert tokenizer.sha256 == stage.tokenizer_sha256, f"{tokenizer_path} changed while the job ran"
    attempt.mkdir(parents=True)
    try:
        write_json(attempt / "unit.json", _write_tokens(attempt, unit, stage, tokenizer))
        commit_directory(attempt, final)
    except FileExistsError:  # another worker was given the same unit and was faster: the content is the same
        REAL.remove_tree(attempt)
    except BaseException:
        REAL.remove_tree(attempt)
        raise
    return read_json(final / "unit.json")  # type: ignore[no-any-return]


def _write_tokens(attempt: Path, unit: Unit, stage: Stage, tokenizer: Tokenizer) -> dict[str, Any]:
    dtype = token_dtype(tokenizer.vocab_size)
    files = {split: open(attempt / f"{split}.tokens", "xb") for split in SPLITS}  # noqa: SIM115
    documents: list[list[Any]] = []
    quarantine: list[dict[str, Any]] = []
    try:
        for found in unit_documents(unit, stage.source):
            if isinstance(found, Quarantined):
                quarantine.append(asdict(found))
            else:
                documents.append(_write_document(files, found, stage, tokenizer, dtype))
    finally:
        for file in files.values():
            file.close()
    hashes = {split: sha256_file(attempt / f"{split}.tokens") for split in SPLITS}
    return {"documents": documents, "quarantine": quarantine, "sha256": hashes, "input_bytes": unit.size}


def _write_document(
    files: Mapping[str, IO[bytes]], document: Document, stage: Stage, tokenizer: Tokenizer, dtype: np.dtype
) -> list[Any]:
    """Append [BOS] pieces [EOS]; returns the record [split, tokens, bytes, source]."""
    ids = [tokenizer.bos_id, *tokenizer.encode(document.text), tokenizer.eos_id]
    split = SPLITS[document_hash(document.text) < stage.held_out_below]
    files[split].write(np.array(ids, dtype=dtype).tobytes())
    return [split, len(ids), len(document.text.encode()), document.source]


def read_unit(folder: Path) -> dict[str, Any] | None:
    """unit.json of a committed unit whose files match their hashes; otherwise None, the folder removed."""
    if not folder.is_dir():
        return None
    try:
        entry = read_json(folder / "unit.json")
        if all(sha256_file(folder / f"{split}.tokens") == entry["sha256"][split] for split in SPLITS):
            return entry  # type: ignore[no-any-return]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    REAL.remove_tree(folder)
    return None


def sample_texts(units: Iterable[Unit], source: SourceConfig, below: int, budget: int) -> Iterator[str]:
    """Documents that are not held out (hash `below` or more): about `budget` bytes from each unit's start."""
    for unit in units:
        left = budget
        for found in unit_documents(unit, source):
            if isinstance(found, Document) and document_hash(found.text) >= below:
                yield found.text
                left -= len(found.text.encode())
                if left <= 0:
                    break
