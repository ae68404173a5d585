"""The mesh section of a recipe: how many ranks, and what each axis splits."""

from __future__ import annotations

from dataclasses import dataclass

from trellis_dist.validation import STRICT

__all__ = ["MeshConfig"]


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Three axes, outer to inner: data ``dp`` x sequence ``sp`` x tensor ``tp``.

    Attributes:
        dp: data-parallel replicas; None takes what the world size leaves (world / (sp * tp)). On one machine
            that is one replica per CUDA device, fewer where they would not divide the rows of a step.
        cpu_dp: replicas on a machine without CUDA when dp is left open.
        sp: contiguous sequence segments; memories are passed from rank to rank.
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
