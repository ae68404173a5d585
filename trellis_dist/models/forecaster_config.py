"""What fixes a forecaster: its window, its patches, and the blocks between them. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from trellis_dist.models.config import ModelConfig
from trellis_dist.validation import STRICT, require

__all__ = ["DLinearConfig", "ForecasterConfig"]


@dataclass(frozen=True, kw_only=True)
class ForecasterConfig:
    """A channel-independent patch forecaster (PatchTST, arXiv 2211.14730) over this project's blocks.

    Attributes:
        look_back: L, steps that are read.
        horizon: steps that are forecast.
        channels: C, series of one window; they share every weight but those of the normalisation.
        patch_length, stride: steps of one patch, and between the starts of two (PatchTST: 16 and 8; ours do
            not overlap, which halves the tokens).
        dropout: share of features left out in training, after the embedding and before the head.
        body: the blocks; its vocabulary is not used (1 will do).
    """

    __pydantic_config__ = STRICT

    look_back: int
    horizon: int
    channels: int
    patch_length: int = 16
    stride: int = 16
    dropout: float = 0.2
    body: ModelConfig

    def __post_init__(self) -> None:
        for name in ("look_back", "horizon", "channels", "patch_length", "stride"):
            require(getattr(self, name) >= 1, f"forecaster.{name} = {getattr(self, name)}: use 1 or more")
        require(
            self.patch_length <= self.look_back,
            f"forecaster.patch_length = {self.patch_length} is longer than look_back = {self.look_back}: "
            "use shorter patches or a longer look-back",
        )
        require(
            self.stride <= self.patch_length,
            f"forecaster.stride = {self.stride} leaves steps between patches of {self.patch_length} unread: "
            "use a stride up to patch_length",
        )
        require(0 <= self.dropout < 1, f"forecaster.dropout = {self.dropout}: use 0 to below 1")

    @property
    def patches(self) -> int:
        """Tokens of one series, after its end was padded by one stride."""
        return (self.look_back + self.stride - self.patch_length) // self.stride + 1


@dataclass(frozen=True, kw_only=True)
class DLinearConfig:
    """Zeng et al. 2023 (arXiv 2205.13504), one pair of linear maps for all channels.

    Attributes:
        look_back, horizon: steps that are read and forecast.
        window: steps of the moving average that is the trend; odd (theirs: 25).
    """

    __pydantic_config__ = STRICT

    look_back: int
    horizon: int
    window: int = 25

    def __post_init__(self) -> None:
        for name in ("look_back", "horizon", "window"):
            require(getattr(self, name) >= 1, f"dlinear.{name} = {getattr(self, name)}: use 1 or more")
        require(self.window % 2 == 1, f"dlinear.window = {self.window}: use an odd number, it is centred")
