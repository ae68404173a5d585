"""The validation pass: held-out rows in a fixed order, each counted once."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator

from data_pipeline.loader import Batch, BatchLoader, TokenDataset
from trellis_dist.parallel.mesh import Mesh
from trellis_dist.training.collectives import sum_scalars
from trellis_dist.training.engines.base import Engine

__all__ = ["Validator"]

IGNORED = -100
TOGETHER = 8  # micro-batches between two questions whether to go on


class Validator:
    """Scores an engine on the validation split: on any mesh the same rows, the mean over their tokens."""

    def __init__(self, dataset: TokenDataset, *, rows: int, micro_batch: int, mesh: Mesh) -> None:
        """Take ``rows`` rows spread over ``dataset``, 0 for all; ``ValueError`` when it has none."""
        self._rows = min(rows, dataset.num_samples) if rows else dataset.num_samples
        self._whole = self._rows == dataset.num_samples
        self._loader = BatchLoader(
            dataset,
            global_batch=micro_batch * mesh.dp,
            micro_batch=micro_batch,
            dp_rank=mesh.dp_rank,
            dp_size=mesh.dp,
            shuffle=not self._whole,  # a part of the split stands for all of it, and for all sources
        )
        self._bytes = dataset.num_bytes
        self._mesh = mesh

    def run(self, engine: Engine, *, interrupted: Callable[[], bool] | None = None) -> dict[str, float]:
        """Return ``loss/validation`` (nats per token); for a whole split ``validation/bits_per_byte`` too.

        ``interrupted``, the same on every rank, is asked every few micro-batches; once it is true there is
        nothing to return.
        """
        batches, nats, seen = self._batches(), 0.0, 0
        while part := list(itertools.islice(batches, TOGETHER)):
            if interrupted is not None and interrupted():
                return {}
            more = engine.evaluate(part)
            nats, seen = nats + more[0], seen + more[1]
        total, counted = sum_scalars([nats, seen])
        nats, tokens = total / self._mesh.tp, counted / (self._mesh.sp * self._mesh.tp)
        metrics = {"loss/validation": nats / max(1.0, tokens)}
        if self._whole:
            metrics["validation/bits_per_byte"] = nats / (math.log(2) * self._bytes)
        return metrics

    def _batches(self) -> Iterator[Batch]:
        """Yield this rank's micro-batches, equally many on all ranks, also those without a label to predict.

        Engines that divide weights over dp gather them in every forward pass, on all ranks together.
        """
        share = self._loader.micro_batch
        for counter in range(0, self._rows, self._loader.global_batch):
            first = counter + self._mesh.dp_rank * share
            for batch in self._loader.micro_batches(counter):
                yield _first_rows(batch, self._rows - first)


def _first_rows(batch: Batch, count: int) -> Batch:
    """Mask the labels of all but the first ``count`` rows."""
    if count >= len(batch.labels):
        return batch
    labels = batch.labels.clone()
    labels[max(0, count) :] = IGNORED
    return dataclasses.replace(batch, labels=labels, valid_tokens=int((labels != IGNORED).sum()))
