"""Stage "tokens": the documents of one clean unit that are kept, split and tokenised.

A committed unit holds, for the documents kept, in order: train.tokens, validation.tokens and test.tokens
(their tokens end to end) and documents (RECORD, one row each).
"""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np

from data_pipeline import tokenizer
from data_pipeline.clean import read_documents, read_texts
from data_pipeline.commit import check_key, commit_unit, unit_folder, versions
from data_pipeline.holdout import SPLITS, Holdout
from data_pipeline.shard import token_dtype
from data_pipeline.tokenizer import Tokenizer
from trellis_dist.files import digest

__all__ = ["LABEL", "SIZE", "SPLIT", "TOKENS", "TokenStage", "kept", "read_records", "token_unit"]

DOCUMENTS = "documents"
# Columns of the int64 record of a document: index in SPLITS, label of the clean unit, tokens, bytes.
SPLIT, LABEL, TOKENS, SIZE = range(4)
RECORD = np.dtype("<i8")
VERSION = 1


@dataclass(frozen=True)
class TokenStage:
    """What decides a unit's output besides its text and the documents dropped.

    Attributes:
        held_out: which documents are held out.
        tokenizer: path of the tokenizer.
        tokenizer_sha256: identity of it.
        library: the package that encodes with it.
    """

    held_out: Holdout
    tokenizer: str
    tokenizer_sha256: str
    library: str = "sentencepiece"

    def key(self, clean: str, dropped: np.ndarray) -> str:
        """Content address of the tokens of the clean unit with that key."""
        copies = hashlib.sha256(dropped.tobytes()).hexdigest()
        own = [VERSION, tokenizer.VERSION, *versions(self.library)]
        return digest([own, clean, copies, self.held_out.address(), self.tokenizer_sha256])


def kept(documents: np.ndarray, dropped: np.ndarray) -> np.ndarray:
    """bool [n]: documents that are neither copies nor hold evaluation text.

    Args:
        documents: DOCUMENT [n] of a clean unit.
        dropped: positions of the copies.
    """
    chosen: np.ndarray = documents["dirty"] == 0
    chosen[dropped] = False
    return chosen


def token_unit(clean: str, dropped: np.ndarray, stage: TokenStage, key: str, work: str) -> dict[str, Any]:
    """Make and commit the tokens of one clean unit, unless they are committed already.

    Args:
        clean: key of the clean unit.
        dropped: uint32, positions of its copies, sorted.
        stage: what to do.
        key: the unit's content address, as the driver has it.
        work: the data set's work folder, shared by all workers.

    Returns:
        unit.json: ``documents``, ``tokens``, ``bytes`` per split, each a list in the order of SPLITS.

    Raises:
        OSError: the disk is full, ...; nothing is committed then.
        RuntimeError: this node is not like the driver's.
    """
    check_key(stage.key(clean, dropped), key)

    def write(folder: Path) -> dict[str, Any]:
        codec = _tokenizer(stage.tokenizer, stage.tokenizer_sha256)
        unit = unit_folder(work, "clean", clean)
        documents = read_documents(unit)
        chosen = kept(documents, dropped)
        records = np.zeros((int(chosen.sum()), 4), RECORD)
        records[:, SPLIT] = stage.held_out.splits(documents["hash"][chosen])
        records[:, LABEL], records[:, SIZE] = documents["label"][chosen], documents["bytes"][chosen]
        with ExitStack() as stack:
            files = [stack.enter_context(open(folder / f"{name}.tokens", "xb")) for name in SPLITS]
            for record, text in zip(records, read_texts(unit, chosen)):
                record[TOKENS] = _write_tokens(files[record[SPLIT]], text, codec)
        records.tofile(folder / DOCUMENTS)
        return _sums(records)

    return commit_unit(work, "tokens", key, write)


def _write_tokens(file: IO[bytes], text: str, codec: Tokenizer) -> int:
    """Append [BOS] pieces [EOS]; returns how many."""
    ids = np.concatenate([[codec.bos_id], codec.encode_array(text), [codec.eos_id]])
    file.write(ids.astype(token_dtype(codec.vocab_size)).tobytes())
    return len(ids)


def _sums(records: np.ndarray) -> dict[str, Any]:
    parts = [records[records[:, SPLIT] == split] for split in range(len(SPLITS))]
    columns = {"tokens": TOKENS, "bytes": SIZE}
    sums = {name: [int(part[:, column].sum()) for part in parts] for name, column in columns.items()}
    return sums | {"documents": [len(part) for part in parts]}


@lru_cache(maxsize=1)
def _tokenizer(path: str, sha256: str) -> Tokenizer:
    """The tokenizer, opened once per worker."""
    codec = Tokenizer.load(path)
    assert codec.sha256 == sha256, f"{path} changed while the job ran"
    return codec


def read_records(folder: Path) -> np.ndarray:
    """Records of a committed unit's documents: int64 [documents, 4], columns SPLIT, LABEL, TOKENS, SIZE."""
    return np.fromfile(folder / DOCUMENTS, RECORD).reshape(-1, 4)
