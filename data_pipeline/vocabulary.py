"""The tokenizer of a data set: given, or trained on a sample of what is kept to train on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline import tokenizer
from data_pipeline.clean import read_documents, read_texts
from data_pipeline.commit import commit_unit, read_unit, unit_folder, versions
from data_pipeline.config import TokenizerConfig
from data_pipeline.holdout import SPLITS, Holdout
from data_pipeline.pipeline import Copies
from data_pipeline.progress import say
from data_pipeline.run import Run
from data_pipeline.tokenise import kept
from data_pipeline.tokenizer import Tokenizer, train_tokenizer
from trellis_dist.files import atomic_write, digest

__all__ = ["given_tokenizer", "obtain_tokenizer"]

# A tokenizer's sample takes no less than this from a work unit that it draws on.
SAMPLE_PAGE = 65536
MODEL = "tokenizer.model"
# Raise when the code below draws another sample.
VERSION = 1


def given_tokenizer(options: TokenizerConfig) -> Tokenizer:
    """The tokenizer at ``options.path``. Raises ValueError: there is none, or it cannot serve."""
    path = Path(options.path or "")
    if not path.is_file():
        raise ValueError(f"data.tokenizer.path = {str(path)!r} does not exist: leave it out to train one")
    return Tokenizer.load(path, bos_token=options.bos_token, eos_token=options.eos_token)


def obtain_tokenizer(options: TokenizerConfig, copies: Copies, holdout: Holdout, run: Run) -> Path:
    """Path of the given tokenizer, of the one trained before on the same sample, or of a new one.

    It is a committed unit's file: what stands in the data set's folder belongs to its manifest, and is
    replaced together with it.
    """
    if options.path is not None:
        codec = given_tokenizer(options)
        return _committed(run, codec.sha256, lambda: codec.model)
    chosen = _sample(options, copies, holdout, run)
    content = [[folder.name, hashlib.sha256(wanted.tobytes()).hexdigest()] for folder, wanted in chosen]
    own = [VERSION, tokenizer.VERSION, *versions("sentencepiece")]

    def train() -> bytes:
        say(run.progress, f"training a {options.model_type} tokenizer of {options.vocab_size} pieces")
        return train_tokenizer(options, _texts(chosen, options.sample_bytes))

    return _committed(run, digest([own, content, asdict(options)]), train)


def _committed(run: Run, key: str, make: Callable[[], bytes]) -> Path:
    def write(folder: Path) -> dict[str, Any]:
        atomic_write(folder / MODEL, make())
        return {}

    folder = unit_folder(run.work, "tokenizer", key)
    if read_unit(folder) is None:
        commit_unit(run.work, "tokenizer", key, write)
    return folder / MODEL


# A clean unit, and which of its documents may be read: bool [n].
Chosen = tuple[Path, np.ndarray]


def _sample(options: TokenizerConfig, copies: Copies, holdout: Holdout, run: Run) -> list[Chosen]:
    """Units that the sample draws on: all, or of a huge corpus some, spread evenly over it."""
    most = max(1, options.sample_bytes // SAMPLE_PAGE)
    chosen = []
    for number in range(0, len(copies.keys), -(-len(copies.keys) // most)):
        folder = unit_folder(run.work, "clean", copies.keys[number])
        documents = read_documents(folder)
        train = holdout.splits(documents["hash"]) == SPLITS.index("train")
        chosen.append((folder, train & kept(documents, copies.dropped(number))))
    return chosen


def _texts(chosen: Sequence[Chosen], budget: int) -> Iterator[str]:
    """Equal shares of every unit, from its start."""
    share = -(-budget // len(chosen))
    for folder, wanted in chosen:
        left = share
        for text in read_texts(folder, wanted):
            yield text
            left -= len(text.encode())
            if left <= 0:
                break
