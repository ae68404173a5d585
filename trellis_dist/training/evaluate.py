"""The validation pass: held-out rows in a fixed order, each counted once."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from trellis_dist.parallel.mesh import Mesh
from trellis_dist.training.collectives import sum_scalars
from trellis_dist.training.engines.base import Engine

if TYPE_CHECKING:
    from data_pipeline.loader import Batch, TokenDataset

__all__ = ["Validator"]


class Validator:
    """Scores an engine on the validation split.

    Rows go round the replicas in turn, so any mesh scores the same rows and the loss is the mean over all
    their valid tokens.
    """

    def __init__(self, dataset: TokenDataset, *, rows: int, micro_batch: int, mesh: Mesh) -> None:
        """Take the first ``rows`` rows of ``dataset``, 0 for all; ``ValueError`` when it has none."""
        if dataset.num_samples == 0:
            raise ValueError(
                "the validation split has no whole row: raise data.validation_fraction or give more text"
            )
        self._dataset = dataset
        self._rows = min(rows, dataset.num_samples) if rows else dataset.num_samples
        self._micro_batch = micro_batch
        self._mesh = mesh

    @property
    def covers_split(self) -> bool:
        """Whether a pass scores every row of the split."""
        return self._rows == self._dataset.num_samples

    def run(self, engine: Engine) -> dict[str, float]:
        """Return ``loss/validation`` (nats per token); over a whole split ``validation/bits_per_byte`` too."""
        nats, tokens = engine.evaluate(self._batches())
        nats, tokens_seen = sum_scalars([nats, tokens])
        valid = tokens_seen / self._mesh.sp
        metrics = {"loss/validation": nats / max(1.0, valid)}
        if self.covers_split:
            metrics["validation/bits_per_byte"] = nats / (math.log(2) * self._dataset.num_bytes)
        return metrics

    def _batches(self) -> list[Batch]:
        raise NotImplementedError
