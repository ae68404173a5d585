"""The sizes of a run; another plan makes another record."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from trellis_dist.models.config import ModelConfig, TrellisConfig

__all__ = ["Plan", "WavePlan"]


@dataclass(frozen=True)
class WavePlan:
    """One traced step.

    Attributes:
        sp, micro_batches, forwards_first: of the step.
        shares: "measured" keeps the stages' shares of this machine; "quarter" makes the scan a quarter of the
            layer in each direction, as on a device where the parallel part is much faster.
    """

    sp: int
    shares: str
    micro_batches: int
    forwards_first: int = 1

    @property
    def name(self) -> str:
        """Of the case."""
        batches = "1 micro-batch" if self.micro_batches == 1 else f"{self.micro_batches} micro-batches"
        order = "" if self.forwards_first == 1 else f", {self.forwards_first} forwards first"
        return f"wavefront/sp {self.sp}, {self.shares} scan, {batches}{order}"


def _waves() -> tuple[WavePlan, ...]:
    one = tuple(WavePlan(sp, shares, 1) for sp, shares in ((4, "measured"), (4, "quarter"), (8, "measured")))
    return (*one, WavePlan(8, "quarter", 2), WavePlan(8, "quarter", 4, forwards_first=4))


@dataclass(frozen=True)
class Plan:
    """Sizes.

    Attributes:
        tiny: the model whose bytes are counted, over ``traffic_sp`` ranks, ``traffic_rows`` rows and
            ``traffic_micro_batches`` at each of ``traffic_lengths``, in every one of ``modes``.
        layer: the model whose stages are measured, on segments of ``layer_length`` tokens.
        waves: the traced steps, of ``wave_layers`` layers padded to ``layer_seconds`` forward + backward.
        slots: of the padded model; 768 give the state of 12 heads of 64 slots.
        meshes, lengths: sp and T of the extrapolation.
        small: the model of throughput and memory.
        engines: of the two ranks whose throughput is measured: an engine and its ZeRO stage.
        sp_lengths: T of sp 2, one row a micro-batch.
        dp_length, dp_rows, dp_micro_batches: T, rows and micro-batches of a rank of dp 2.
        memory_sp: ranks whose memory is measured, at ``memory_lengths`` tokens of a rank, and which fill
            ``memory_budget`` bytes in at most ``memory_tries`` more steps.
        repetitions: of stages, traced steps and throughput.
    """

    tiny: ModelConfig = field(
        default_factory=lambda: ModelConfig(
            vocab_size=64,
            num_layers=2,
            dim=64,
            num_heads=4,
            trellis=TrellisConfig(slots=16, chunk_size=16),
        )
    )
    modes: tuple[str, ...] = ("state_passing", "all_to_all")
    traffic_sp: int = 4
    traffic_rows: int = 2
    traffic_micro_batches: int = 2
    traffic_lengths: tuple[int, ...] = (1024, 4096, 16384)
    layer: ModelConfig = field(
        default_factory=lambda: ModelConfig(vocab_size=512, num_layers=2, dim=768, num_heads=12)
    )
    layer_length: int = 1024
    stage_repetitions: int = 5
    waves: tuple[WavePlan, ...] = field(default_factory=_waves)
    wave_layers: int = 24
    wave_repetitions: int = 3
    layer_seconds: float = 0.25
    slots: int = 768
    meshes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    lengths: tuple[int, ...] = (32768, 262144, 1048576)
    small: ModelConfig = field(
        default_factory=lambda: ModelConfig(
            vocab_size=2048, num_layers=8, dim=192, num_heads=6, trellis=TrellisConfig(slots=32)
        )
    )
    engines: tuple[tuple[str, int], ...] = (("local", 0), ("deepspeed", 1))
    sp_lengths: tuple[int, ...] = (8192, 16384)
    dp_length: int = 1024
    dp_rows: int = 4
    dp_micro_batches: int = 2
    repetitions: int = 5
    memory_sp: tuple[int, ...] = (1, 4)
    memory_lengths: tuple[int, ...] = (1024, 2048, 4096)
    memory_budget: int = 1 << 30
    memory_tries: int = 4

    def as_json(self) -> dict[str, Any]:
        """As it comes back from a file."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return found
