"""The mesh, tensor and sequence sections of a recipe: how many ranks, what each axis splits, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trellis_dist.validation import STRICT

__all__ = ["MeshConfig", "SequenceConfig", "SequenceMode", "TensorConfig"]

SequenceMode = Literal["state_passing", "all_to_all"]


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Three axes, outer to inner: data ``dp`` x sequence ``sp`` x tensor ``tp``.

    Attributes:
        dp: data-parallel replicas; None takes what the world size leaves (world / (sp * tp)). On one machine
            that is one replica per CUDA device, fewer where they would not divide the rows of a step.
        cpu_dp: replicas on a machine without CUDA when dp is left open.
        sp: contiguous sequence segments; ``sequence.mode`` says how layers see the other segments.
        tp: shards of heads, MLP and vocabulary.
    """

    __pydantic_config__ = STRICT

    dp: int | None = None
    sp: int = 1
    tp: int = 1
    cpu_dp: int = 1

    def __post_init__(self) -> None:
        for name in ("dp", "sp", "tp", "cpu_dp"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"mesh.{name} = {value}: use 1 or more ranks")

    def world_size(self) -> int | None:
        """Ranks the mesh needs, or None while ``dp`` is left open."""
        return None if self.dp is None else self.dp * self.sp * self.tp


@dataclass(frozen=True, kw_only=True)
class TensorConfig:
    """How ``mesh.tp`` splits a layer.

    Attributes:
        sequence_parallel: split the tokens of norms and residuals over tp too (Megatron's sequence
            parallelism): all-reduces become reduce-scatters and all-gathers of the same volume, and the
            activations between them take 1/tp of the memory.
    """

    __pydantic_config__ = STRICT

    sequence_parallel: bool = False


@dataclass(frozen=True, kw_only=True)
class SequenceConfig:
    """How layers see the segments that ``mesh.sp`` cuts.

    Attributes:
        mode: "state_passing" sends the memories at a segment's end to the next rank, 2 H M D numbers per row
            and layer whatever the length; "all_to_all" gives every rank the whole rows of some heads for the
            operation and sends T/sp tokens per layer. Softmax attention always uses the second.
    """

    __pydantic_config__ = STRICT

    mode: SequenceMode = "state_passing"
