"""Two ranks on one global batch against two processes that know nothing of each other, one thread each.

Both sides train the same model on rows of the same length, and the same number of tokens in all: the pair
shares the global batch, each of the two alone takes half as much for itself, both at the same time. They take
turns, and the ratio is taken round by round, so what drifts in the machine drifts for both. The two alone run
the local engine, whatever the pair runs.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist

from benchmarks.kernels.timing import in_turns, summary
from benchmarks.sequence_parallel.ranks import Ranks
from benchmarks.sequence_parallel.subject import Subject, make_batches
from trellis_dist.training.engines.base import Engine

__all__ = ["Pair", "measure_throughput"]


@dataclass(frozen=True)
class Pair:
    """One way for two ranks to share a global batch.

    Attributes:
        name: for the tables.
        subject: mesh and engine of the pair.
        length: T of every row.
        rows: of a micro-batch of one rank, on the pair and alone.
        micro_batches: per step of one process alone; with sp 2 the pair takes twice as many.
    """

    name: str
    subject: Subject
    length: int
    rows: int = 1
    micro_batches: int = 1

    @property
    def tokens(self) -> int:
        """Of the global batch of the pair, and of the two processes alone together."""
        return 2 * self.rows * self.length * self.micro_batches


def measure_throughput(pairs: list[Pair], *, repetitions: int) -> dict[str, Any]:
    """Tokens a second of every pair and of the two alone, and the ratios, round by round.

    All ``pairs`` have one length, number of rows and model, so that they share the two alone.
    """
    first = pairs[0]
    alone = replace(first, name="alone", subject=Subject(first.subject.model))
    with contextlib.ExitStack() as stack:
        groups = {pair.name: stack.enter_context(Ranks(2)) for pair in pairs}
        single = stack.enter_context(Ranks(2, joined=False))
        turns: dict[str, Callable[[int], float]] = {
            "alone": lambda _: sum(first.tokens / 2 / seconds for seconds in single.run(_step, alone))
        }
        for pair in pairs:
            turns[pair.name] = functools.partial(_rate_of_pair, pair, groups[pair.name])
        rates = in_turns(turns, repetitions=repetitions)
    ratios = {
        pair.name: summary([a / b for a, b in zip(rates[pair.name], rates["alone"], strict=True)])
        for pair in pairs
    }
    return {
        "length": first.length,
        "tokens": first.tokens,
        "tokens_per_second": {name: summary(found) for name, found in rates.items()},
        "ratio": ratios,
    }


def _rate_of_pair(pair: Pair, ranks: Ranks, _round: int) -> float:
    return float(pair.tokens / max(ranks.run(_step, pair)))


def _step(pair: Pair) -> float:
    """On one process: seconds of a training step, from a start that the ranks of a group share."""
    engine = _engine(pair.subject)
    # dp ranks take different rows, sp ranks the same whole rows, of which each trains on its segment.
    replica = dist.get_rank() if pair.subject.dp > 1 else 0
    batches = make_batches(
        pair.subject.model.vocab_size,
        rows=pair.rows,
        length=pair.length,
        micro_batches=pair.micro_batches * pair.subject.sp,
        seed=replica,
    )
    valid = pair.subject.dp * sum(batch.valid_tokens for batch in batches)
    if dist.is_initialized():
        dist.barrier()
    begin = time.perf_counter()
    engine.train_step(batches, lr=1e-4, valid_tokens=valid)
    return time.perf_counter() - begin


@functools.cache
def _engine(subject: Subject) -> Engine:
    """Built once in each process."""
    return subject.build()
