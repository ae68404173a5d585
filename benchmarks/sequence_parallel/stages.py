"""How long each stage of a real layer takes on this machine: one thread, one segment, nobody beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.timing import summary
from benchmarks.sequence_parallel.pacing import Pacer, watch
from benchmarks.sequence_parallel.simulate import StageTimes
from benchmarks.sequence_parallel.subject import make_batches
from trellis_dist.models.config import ModelConfig
from trellis_dist.models.language_model import LanguageModel, build_language_model
from trellis_dist.parallel.halo import HaloConvolution
from trellis_dist.parallel.mesh import Mesh
from trellis_dist.parallel.segments import Segments
from trellis_dist.parallel.sequence import StatePassing

__all__ = ["measure_stages", "stage_times"]


class _NoNeighbours:
    """The transfers of a rank that is alone in its line: it sends and expects nothing."""

    mesh = Mesh()

    def send_right(self, *_: Tensor) -> None:
        """Nothing."""

    def expect_left(self, *_: Tensor) -> None:
        """Nothing."""

    send_left, expect_right = send_right, expect_left


def measure_stages(
    model: ModelConfig, *, rows: int, length: int, repetitions: int
) -> dict[str, dict[str, float]]:
    """Milliseconds of every stage of a layer over ``rows`` x ``length`` tokens: median and spread.

    All layers of ``model`` count alike.
    """
    torch.set_num_threads(1)
    built = build_language_model(model, seed=0)
    _cut(built)
    pacer = Pacer()
    batch = make_batches(model.vocab_size, rows=rows, length=length)[0]
    with watch(built.blocks, pacer):
        for _ in range(1 + repetitions):
            built.zero_grad()
            built.loss_sum(batch.tokens, batch.labels).backward()
    # One entry for each layer and round; those of the first round are warm-up.
    warm_up = model.num_layers
    return {name: summary([1e3 * x for x in found[warm_up:]]) for name, found in pacer.seconds.items()}


def _cut(model: LanguageModel) -> None:
    """Give every layer the code of a sequence rank, without neighbours."""
    transfers: Any = _NoNeighbours()
    for block in model.blocks:
        mixer: Any = block.mixer
        segments = Segments(Mesh(), chunk_size=mixer.options.chunk_size)
        mixer.operation = StatePassing(transfers, segments)
        mixer.convolution = HaloConvolution(mixer.convolution, transfers, segments)


def stage_times(milliseconds: dict[str, dict[str, float]]) -> StageTimes:
    """The medians, in seconds."""
    return StageTimes(**{name: 1e-3 * found["median"] for name, found in milliseconds.items()})
