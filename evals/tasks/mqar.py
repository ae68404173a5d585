"""Multi-query associative recall: after each repeated key its value must be the most probable piece."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from evals.config import EvalConfig
from evals.mqar import Pieces, Rows, find_pieces, make_rows, predict
from evals.oracle import RecallModel
from evals.samples import Sample, clip, share
from evals.scorer import Scorer, TextCodec
from evals.states import context_start
from evals.tasks.protocol import Result, Task

if TYPE_CHECKING:
    from evals.subject import Subject

__all__ = ["TASK"]

ORACLE_ROWS = 8


def _settings(config: EvalConfig) -> Mapping[str, Any]:
    return {
        "pairs": sorted(set(config.mqar_pairs)),
        "length": sorted(set(config.mqar_length)),
        "samples": config.mqar_samples,
        "seed": config.mqar_seed,
    }


def _run(subject: Subject, config: EvalConfig, progress: bool) -> Result:
    """Every number of pairs in rows of every length, then the oracle on the first rows."""
    tokenizer, scorer = subject.tokenizer, Scorer(subject.model, subject.tokenizer)
    pieces = find_pieces(tokenizer, pairs=max(config.mqar_pairs))
    groups, samples, oracle = {}, [], 100.0
    settings = list(product(sorted(set(config.mqar_pairs)), sorted(set(config.mqar_length))))
    for pairs, length in tqdm(settings, desc="mqar", disable=not progress):
        rows = _rows(pieces, tokenizer, config, pairs=pairs, length=length)
        part = _samples(tokenizer, rows, predict(scorer, rows), pairs=pairs, length=length, config=config)
        groups[part[0].group] = share([sample.score for sample in part])
        samples += [sample.to_json() for sample in part]
        oracle = min(oracle, _oracle(tokenizer, rows))
    return {
        "groups": groups,
        "chance": 100.0 / tokenizer.vocab_size,
        "oracle": oracle,
        "keys": len(pieces.keys),
        "values": len(pieces.values),
        "samples": samples,
    }


def _rows(pieces: Pieces, tokenizer: TextCodec, config: EvalConfig, *, pairs: int, length: int) -> Rows:
    indices, start = range(config.mqar_samples), context_start(tokenizer, [pieces.filler])
    return make_rows(pieces, start=start, pairs=pairs, length=length, indices=indices, seed=config.mqar_seed)


def _oracle(tokenizer: TextCodec, rows: Rows) -> float:
    """The same scoring, in percent, of a model that looks up what followed a token before."""
    few = rows.part(slice(ORACLE_ROWS))
    found = predict(Scorer(RecallModel(tokenizer.vocab_size), tokenizer), few)
    return 100.0 * float((found == few.answers).double().mean())


def _samples(
    tokenizer: TextCodec, rows: Rows, found: torch.Tensor, *, pairs: int, length: int, config: EvalConfig
) -> list[Sample]:
    """One sample per row, whose score is the share of its keys that were answered."""

    def text(ids: torch.Tensor) -> str:
        return " | ".join(tokenizer.decode([piece]).strip() for piece in ids.tolist())

    right = (found == rows.answers).double().mean(1).tolist()
    return [
        Sample(
            id=f"{config.mqar_seed}/{pairs}/{length}/{index}",
            group=f"{pairs}/{length}",
            score=score,
            prompt=clip(text(rows.tokens[index, -length:])),
            answer=clip(text(rows.answers[index])),
            output=clip(text(found[index])),
            length=length,
        )
        for index, score in enumerate(right)
    ]


def _scalars(result: Result) -> dict[str, float]:
    return {f"mqar/{group}": part["score"] for group, part in result["groups"].items()}


def _chance(result: Result) -> dict[str, float]:
    return {f"mqar/{group}": result["chance"] for group in result["groups"]}


TASK = Task(name="mqar", settings=_settings, run=_run, scalars=_scalars, chance=_chance)
