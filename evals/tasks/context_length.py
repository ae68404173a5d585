"""Length extrapolation: a model's loss on the same text, given ever more of what stands before it.

A window of text is [context | targets]. For each context length L the model reads the last L tokens of the
context from an empty state and is scored on the targets, so that the numbers of two lengths differ by context
alone. The longest context is scored at every position too.

    window      c_0 ... c_{N-1} | t_0 ... t_{K-1}          N = the longest length
    loss(L)   = mean over windows and i of  -ln p(t_i | c_{N-L} ... c_{N-1}, t_0 ... t_{i-1})

Of a run, windows with K = TARGETS tokens are cut from its held-out documents that are long enough; where
there are too few of those, from all documents end to end, and the result says which. Documents that begin
inside such a window are part of the context; the BOS that begins them is no target.

With ``evals.perplexity_text`` any model is scored on windows of that text too, whose targets are the same
bytes for every tokenizer, and whose contexts begin as that model's do (evals/text_windows.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from data_pipeline.loader import TokenDataset
from evals.config import EvalConfig
from evals.losses import ContextLosses
from evals.runs import LoadedRun
from evals.scorer import Scorer, TextCodec
from evals.tasks.protocol import Result, Task
from evals.text_windows import ENOUGH, Windows, cut_stretches, encode_stretches, spread
from evals.texts import read_documents, text_digest

if TYPE_CHECKING:
    from evals.subject import Subject

Array = NDArray[Any]

__all__ = ["TARGETS", "TASK", "cut_windows", "score_windows"]

TARGETS = 256
# Windows read together; fewer where their states would exceed the scorer's budget.
ROWS = 4
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def cut_windows(split: TokenDataset, lengths: Sequence[int], *, limit: int) -> Windows:
    """At most ``limit`` windows, spread over the split, for the longest of ``lengths`` that fits it.

    Raises:
        ValueError: the split is shorter than the shortest length.
    """
    fitting = [length for length in lengths if length + TARGETS <= split.num_tokens]
    if not fitting:
        raise ValueError(
            f"evals.context_lengths = {list(lengths)}: the {split.split} split has {split.num_tokens} tokens "
            f"and the shortest needs {min(lengths)} + {TARGETS}: use shorter ones, or hold out more text"
        )
    longest = max(fitting)
    width = longest + TARGETS
    sizes = np.array([len(split.tokens_of(i)) for i in range(split.num_documents)])
    whole = int((sizes // width).sum()) >= min(limit, ENOUGH)
    starts = _starts_inside(sizes, width) if whole else np.arange(0, sizes.sum() - width + 1, width)
    chosen = spread(starts, limit)
    begins = np.cumsum([0, *sizes])
    tokens = np.stack([_tokens(split, begins, int(start), width) for start in chosen])
    places = chosen[:, None] + np.arange(width)
    return Windows(tokens, ~np.isin(places, begins), longest, whole)


def _starts_inside(sizes: Array, width: int) -> Array:
    """Where windows inside single documents begin, in the documents put end to end."""
    begins = np.cumsum([0, *sizes])
    return np.concatenate(
        [begin + np.arange(0, size - width + 1, width) for begin, size in zip(begins, sizes)]
    )


def _tokens(split: TokenDataset, begins: Array, start: int, width: int) -> Array:
    """``width`` tokens from ``start`` on, of the documents put end to end."""
    document = int(np.searchsorted(begins, start, side="right")) - 1
    parts, start = [split.tokens_of(document)[start - int(begins[document]) :]], 0
    while sum(map(len, parts)) < width:
        document += 1
        parts.append(split.tokens_of(document))
    return np.concatenate(parts)[:width]


@dataclass(frozen=True)
class _Part:
    """Of one batch: nats on the targets by context length, and the losses by position of the longest."""

    nats: dict[int, float]
    by_position: ContextLosses


def score_windows(
    scorer: Scorer, windows: Windows, lengths: Sequence[int], *, progress: bool = False
) -> tuple[dict[int, float], ContextLosses]:
    """Nats on all targets for each context length, and losses by position in the longest.

    On several ranks each batch of windows is scored by one of them.
    """
    rows = min(ROWS, scorer.row_limit(windows.tokens.shape[1]))
    batches = range(0, len(windows.tokens), rows)

    def score(place: int) -> _Part:
        part = slice(batches[place], batches[place] + rows)
        scored = _score(scorer, windows, part, lengths)
        bar.update()
        return scored

    total = -(-len(batches) // scorer.ranks.size)
    with tqdm(total=total, desc="context_length", disable=not progress) as bar:
        parts = scorer.ranks.divide(len(batches), score)
    by_position = ContextLosses.up_to(len(windows.start) + windows.tokens.shape[1])
    for part in parts:
        by_position.merge(part.by_position)
    return {length: sum(part.nats[length] for part in parts) for length in lengths}, by_position


def _score(scorer: Scorer, windows: Windows, part: slice, lengths: Sequence[int]) -> _Part:
    tokens = torch.from_numpy(windows.tokens[part])
    start = torch.tensor(windows.start, dtype=torch.long).expand(len(tokens), -1)
    scored, nats = windows.scored[part], {}
    for length in lengths:
        if length == windows.longest:
            continue
        given = torch.cat([start, tokens[:, windows.longest - length :]], 1).to(scorer.device)
        read = start.shape[1] + length - 1
        state = scorer.read(given[:, :read], scorer.model.init_state(len(given)))
        nats[length] = _sum(scorer, given[:, read:], state, scored)
    whole = torch.cat([start, tokens], 1).to(scorer.device)
    log_probs, _ = scorer.log_probs(whole, scorer.model.init_state(len(whole)))
    losses = -log_probs.double().cpu().numpy()  # of tokens 1, 2, ...
    nats[windows.longest] = float(losses[:, -scored.shape[1] :][scored].sum())
    by_position = ContextLosses.up_to(whole.shape[1])
    positions = np.broadcast_to(np.arange(1, whole.shape[1]), losses.shape)
    is_target = np.pad(windows.is_target[part], ((0, 0), (start.shape[1], 0)))[:, 1:]
    by_position.add(losses[is_target], positions[is_target])
    return _Part(nats, by_position)


def _sum(scorer: Scorer, tokens: torch.Tensor, state: Any, is_target: Array) -> float:
    """Nats on the targets [B, K]; tokens [B, K + 1] follow ``state``."""
    log_probs, _ = scorer.log_probs(tokens, state)
    return -float(log_probs.double().cpu().numpy()[is_target].sum())


def _run(subject: Subject, config: EvalConfig, progress: bool) -> Result:
    """The held-out text of a run, and a named text with any model."""
    scorer = Scorer(subject.model, subject.tokenizer)
    result: Result = {}
    if isinstance(subject, LoadedRun):
        result = _held_out(scorer, subject, config, progress)
    if config.perplexity_text:
        result["on_text"] = _on_text(scorer, config.perplexity_text, config, progress)
    assert result, "a model that is no run has no held-out text: refused before"
    return result


def _held_out(scorer: Scorer, loaded: LoadedRun, config: EvalConfig, progress: bool) -> Result:
    trained = int(loaded.recipe["data"]["sequence_length"])
    split = TokenDataset(loaded.dataset_dir, "validation", sequence_length=trained, seed=0)
    wanted = sorted(set(config.context_lengths))
    windows = cut_windows(split, wanted, limit=config.context_documents)
    lengths = [length for length in wanted if length <= windows.longest]
    size = sum(_bytes(loaded.tokenizer, row[-TARGETS:].tolist()) for row in windows.tokens)
    longest = max(len(split.tokens_of(i)) for i in range(split.num_documents))
    return {
        **_scored(scorer, windows, lengths, wanted=wanted, size=size, progress=progress),
        "longest_document": longest,
        "trained_length": trained,
    }


def _on_text(scorer: Scorer, path: str, config: EvalConfig, progress: bool) -> Result:
    wanted = sorted(set(config.context_lengths))
    stretches = cut_stretches(read_documents(path), wanted, limit=config.context_documents)
    windows, lengths = encode_stretches(scorer, stretches)
    scored = _scored(scorer, windows, lengths, wanted=wanted, size=stretches.size, progress=progress)
    return {**scored, "digest": text_digest(path)}


def _scored(
    scorer: Scorer,
    windows: Windows,
    lengths: Sequence[int],
    *,
    wanted: Sequence[int],
    size: int,
    progress: bool,
) -> Result:
    """The losses of windows with ``size`` bytes of targets."""
    nats, by_position = score_windows(scorer, windows, lengths, progress=progress)
    targets = int(windows.scored.sum())
    return {
        "rows": [_row(length, nats[length], targets=targets, size=size) for length in lengths],
        "by_position": by_position.rows(),
        "skipped": [length for length in wanted if length not in lengths],
        "windows": len(windows.tokens),
        "targets": targets,
        "bytes": size,
        "text": "documents" if windows.whole else "documents end to end",
    }


def _row(length: int, nats: float, *, targets: int, size: int) -> dict[str, float]:
    loss = nats / targets
    return {
        "length": length,
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": nats / (math.log(2) * max(size, 1)),
    }


def _bytes(tokenizer: TextCodec, ids: Sequence[int]) -> int:
    """UTF-8 bytes of the text of ids; of a character that is cut at an end, one byte."""
    special = {tokenizer.bos_id, tokenizer.eos_id}
    text = tokenizer.decode([id_ for id_ in ids if id_ not in special])
    inner = text.strip(_REPLACEMENT)
    return len(inner.encode()) + len(text) - len(inner)


def _settings(config: EvalConfig) -> Mapping[str, Any]:
    """A named text counts by its content."""
    return {
        "lengths": sorted(set(config.context_lengths)),
        "windows": config.context_documents,
        "targets": TARGETS,
        **({"text": text_digest(config.perplexity_text)} if config.perplexity_text else {}),
    }


def _scalars(result: Result) -> dict[str, float]:
    """Bits per byte of the same targets by the tokens of context before them; of a named text apart."""
    parts = (("", result), ("text/", result.get("on_text", {})))
    return {
        f"context_length/{prefix}{row['length']}": row["bits_per_byte"]
        for prefix, part in parts
        for row in part.get("rows", ())
    }


TASK = Task(
    name="context_length", needs_run=True, takes_text=True, settings=_settings, run=_run, scalars=_scalars
)
