"""One pre-norm block: x + mixer(norm(x)), then x + mlp(norm(x))."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from trellis_dist.models.config import ModelConfig
from trellis_dist.models.context import SequenceContext
from trellis_dist.models.mlp import SwiGLU
from trellis_dist.models.norm import RMSNorm
from trellis_dist.models.pads import FrontPads
from trellis_dist.models.region import Region, call
from trellis_dist.models.registry import build_mixer

__all__ = ["Block"]


class Block(nn.Module):
    """A token mixer and a SwiGLU on one residual stream.

    Attributes:
        whole, region: call the whole block and its SwiGLU half; parallel/ replaces them to recompute those in
            the backward pass.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.mixer = build_mixer(config.layer_kind(layer), config, layer)
        self.mlp_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.mlp = SwiGLU(config)
        self.whole: Region = call
        self.region: Region = call

    def forward(self, x: Tensor, context: SequenceContext) -> Tensor:
        """[B, T, dim] -> [B, T, dim]."""
        return self.whole(self._layer, x, context)  # type: ignore[no-any-return]

    def _layer(self, x: Tensor, context: SequenceContext) -> Tensor:
        x = x + self.mixer(self.mixer_norm(x), context)
        return self.region(self._finish, x)  # type: ignore[no-any-return]

    def init_state(self, batch: int) -> Any:
        """The mixer's state before the first token of ``batch`` rows."""
        return self.mixer.init_state(batch)  # type: ignore[operator]

    def prefill(self, x: Tensor, state: Any, pads: FrontPads | None = None) -> tuple[Tensor, Any]:
        """Continue ``state`` over x [B, T, dim]; only some mixers take ``pads``."""
        given = (self.mixer_norm(x), state) if pads is None else (self.mixer_norm(x), state, pads)
        mixed, state = self.mixer.prefill(*given)  # type: ignore[operator]
        return self._finish(x + mixed), state

    def after(self, x: Tensor, state: Any) -> Tensor:
        """As ``prefill``, without the state after x, which some mixers then do not make."""
        if not hasattr(self.mixer, "after"):
            return self.prefill(x, state)[0]
        return self._finish(x + self.mixer.after(self.mixer_norm(x), state))  # type: ignore[operator]

    def decode_step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Continue ``state`` by one token, x [B, dim]."""
        mixed, state = self.mixer.decode_step(self.mixer_norm(x), state)  # type: ignore[operator]
        return self._finish(x + mixed), state

    def _finish(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]
