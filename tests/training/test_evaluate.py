"""The validation pass: every rank brings equally many batches, each row counts once."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from data_pipeline.loader import Batch, TokenDataset
from tests.distributed import gloo_pool
from tests.training.engine_cases import SGD, replicas, wrap
from tests.training.small_run import ROW, write_dataset
from tests.training.stand_in import TinyModel, global_rows, split
from trellis_dist.parallel import env
from trellis_dist.parallel.mesh import Mesh
from trellis_dist.training.engines.base import EngineOptions
from trellis_dist.training.evaluate import Validator


class Counting:
    """An engine that only counts what it is given."""

    def __init__(self) -> None:
        self.batches = self.tokens = 0

    def evaluate(self, batches: Iterable[Batch]) -> tuple[float, int]:
        for batch in batches:
            self.batches += 1
            self.tokens += batch.valid_tokens
        return 0.0, self.tokens


def test_all_replicas_bring_equally_many_batches(tmp_path: Path):
    """Two rows in micro-batches of two on two replicas: the second one has nothing left to score."""
    data = TokenDataset(
        write_dataset(tmp_path / "set"), "validation", sequence_length=ROW, seed=0, align=1, verify=False
    )
    seen = []
    for rank in range(2):
        engine = Counting()
        mesh = Mesh(dp=2, rank=rank, dp_rank=rank)
        Validator(data, rows=2, micro_batch=2, mesh=mesh).run(engine)
        seen.append((engine.batches, engine.tokens > 0))
    assert seen == [(1, True), (1, False)]


def unlabelled_case(engine: str) -> tuple[float, int]:
    """The last rank scores rows without a label: it must take part, and count nothing."""
    built = wrap(TinyModel(), engine, EngineOptions(optimizer=SGD, mesh=replicas()))
    tokens, labels = global_rows(0)
    if env.rank() == 1:
        labels[:] = -100
    return built.evaluate(split(tokens, labels, micro_batch=2, rank=env.rank(), ranks=2))


@pytest.mark.parametrize("engine", ["local", "zero1", "zero3", "fsdp2"])
def test_rows_without_labels_count_nothing(engine: str):
    (nats, tokens), nothing = gloo_pool(2).run(unlabelled_case, engine)
    assert nats > 0
    assert tokens > 0
    assert nothing == (0.0, 0)
