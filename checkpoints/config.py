"""The checkpoint section of a recipe."""

from __future__ import annotations

from dataclasses import dataclass

from trellis_dist.validation import STRICT

__all__ = ["CheckpointConfig"]


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When a run's state is saved and how many saves are kept.

    Attributes:
        interval: steps between saves; the last step is always saved.
        keep: newest checkpoints kept; 0 keeps all.
    """

    __pydantic_config__ = STRICT

    interval: int = 1000
    keep: int = 3

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ValueError(f"checkpoint.interval = {self.interval}: use 1 or more steps")
        if self.keep < 0:
            raise ValueError(f"checkpoint.keep = {self.keep}: use 0 (all) or more")
