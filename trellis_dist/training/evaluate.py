"""The validation pass: held-out rows in a fixed order, each counted once."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from data_pipeline.loader import Batch, BatchLoader, TokenDataset
from trellis_dist.parallel.mesh import Mesh
from trellis_dist.training.collectives import sum_scalars
from trellis_dist.training.engines.base import Engine

__all__ = ["PositionLosses", "Validator"]

IGNORED = -100
FIRST_BUCKET = 64  # positions; every bucket after it is as long as all before it together
TOGETHER = 8  # micro-batches between two questions whether to go on


class PositionLosses:
    """Sums of token losses by the tokens that stand before in the document, as far as the row holds it.

    Buckets: 0-63, 64-127, 128-255, ...; rows of 64 tokens or fewer have one.
    """

    def __init__(self, length: int, *, device: torch.device) -> None:
        """Nothing yet, for rows of ``length`` tokens."""
        buckets = 1
        while FIRST_BUCKET << (buckets - 1) < length:
            buckets += 1
        self._sums = torch.zeros(2, buckets, dtype=torch.float64, device=device)

    def add(self, labels: Tensor, positions: Tensor, losses: Tensor) -> None:
        """Take ``losses`` of tokens at ``positions``, int64, where they have ``labels``; one shape."""
        kept = (labels != IGNORED).double().flatten()
        # The bucket is the number of edges 64, 128, 256, ... that a position has reached.
        edges = FIRST_BUCKET << torch.arange(self._sums.shape[1] - 1, device=positions.device)
        bucket = torch.bucketize(positions.flatten(), edges, right=True)
        self._sums[0].index_add_(0, bucket, losses.double().flatten() * kept)
        self._sums[1].index_add_(0, bucket, kept)

    def sums(self) -> list[float]:
        """Nats of each bucket, then tokens of each."""
        return [float(value) for value in self._sums.flatten().tolist()]

    @staticmethod
    def row(sums: list[float]) -> dict[str, float]:
        """``loss/position_<first>_<last>`` of the buckets that hold tokens, from summed ``sums``."""
        count, row = len(sums) // 2, {}
        for bucket, (nats, tokens) in enumerate(zip(sums[:count], sums[count:], strict=True)):
            first = FIRST_BUCKET << (bucket - 1) if bucket else 0
            last = (FIRST_BUCKET << bucket) - 1
            if tokens:
                row[f"loss/position_{first:04d}_{last:04d}"] = nats / tokens
        return row


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
        self._length = dataset.sequence_length
        self._mesh = mesh

    def run(self, engine: Engine, *, interrupted: Callable[[], bool] | None = None) -> dict[str, float]:
        """Return ``loss/validation`` (nats per token), and the same by position in the document; for a whole
        split ``validation/bits_per_byte`` too.

        ``interrupted``, the same on every rank, is asked every few micro-batches; once it is true there is
        nothing to return.
        """
        batches, nats, seen = self._batches(), 0.0, 0
        positions = PositionLosses(self._length, device=self._mesh.device)
        engine.token_losses = positions.add
        try:
            while part := list(itertools.islice(batches, TOGETHER)):
                if interrupted is not None and interrupted():
                    return {}
                more = engine.evaluate(part)
                nats, seen = nats + more[0], seen + more[1]
        finally:
            engine.token_losses = None
        total, counted, *by_position = sum_scalars([nats, seen, *positions.sums()])
        nats, tokens = total / self._mesh.tp, counted / (self._mesh.sp * self._mesh.tp)
        metrics = {"loss/validation": nats / max(1.0, tokens)}
        # All tp ranks saw the same tokens, which leaves the means as they are.
        metrics |= PositionLosses.row(by_position)
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
