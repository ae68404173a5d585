"""The tokenizer of a data set: given, or trained on a sample of what is kept to train on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from data_pipeline.clean import read_documents, read_texts
from data_pipeline.commit import unit_folder
from data_pipeline.config import TokenizerConfig
from data_pipeline.holdout import SPLITS, Holdout
from data_pipeline.pipeline import Copies, Feed
from data_pipeline.progress import say
from data_pipeline.run import Run
from data_pipeline.tokenise import kept
from data_pipeline.tokenizer import Tokenizer, train_tokenizer
from trellis_dist.files import atomic_write, digest

__all__ = ["given_tokenizer", "obtain_tokenizer"]

# A tokenizer's sample takes no less than this from a work unit that it draws on.
SAMPLE_PAGE = 65536


def given_tokenizer(options: TokenizerConfig) -> Tokenizer:
    """The tokenizer at ``options.path``. Raises ValueError: there is none, or it cannot serve."""
    path = Path(options.path or "")
    if not path.is_file():
        raise ValueError(f"data.tokenizer.path = {str(path)!r} does not exist: leave it out to train one")
    return Tokenizer.load(path, bos_token=options.bos_token, eos_token=options.eos_token)


def obtain_tokenizer(
    options: TokenizerConfig, feeds: Sequence[Feed], copies: Copies, holdout: Holdout, run: Run
) -> Tokenizer:
    """The given tokenizer, the one trained before on the same sample, or a new one; also in the directory."""
    if options.path is not None:
        tokenizer = given_tokenizer(options)
    else:
        tokenizer = _trained(options, _sample(options, feeds, copies, holdout, run), run)
    atomic_write(run.directory / "tokenizer.vocab", tokenizer.vocabulary())
    atomic_write(run.directory / "tokenizer.model", tokenizer.model)
    return tokenizer


# A clean unit, and which of its documents may be read: bool [n].
Chosen = tuple[Path, np.ndarray]


def _sample(
    options: TokenizerConfig, feeds: Sequence[Feed], copies: Copies, holdout: Holdout, run: Run
) -> list[Chosen]:
    """Units that the sample draws on: all, or of a huge corpus some, spread evenly over it."""
    keys = [key for feed in feeds for key in feed.open_keys]
    most = max(1, options.sample_bytes // SAMPLE_PAGE)
    chosen = []
    for key in keys[:: -(-len(keys) // most)]:
        folder = unit_folder(run.work, "clean", key)
        documents = read_documents(folder)
        train = holdout.splits(documents["hash"]) == SPLITS.index("train")
        chosen.append((folder, train & kept(documents, copies.dropped(key))))
    return chosen


def _trained(options: TokenizerConfig, chosen: Sequence[Chosen], run: Run) -> Tokenizer:
    content = [[folder.name, hashlib.sha256(wanted.tobytes()).hexdigest()] for folder, wanted in chosen]
    path = run.work / "tokenizers" / f"{digest([content, asdict(options)])}.model"
    if not path.is_file():
        say(run.progress, f"training a {options.model_type} tokenizer of {options.vocab_size} pieces")
        atomic_write(path, train_tokenizer(options, _texts(chosen, options.sample_bytes)))
    return Tokenizer.load(path)


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
