"""Layer kinds by name. A new mixer is one file in ``mixers/`` and one line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

from trellis_dist.models.config import ModelConfig
from trellis_dist.models.context import SequenceContext
from trellis_dist.models.mixers.abc import ABCMixer
from trellis_dist.models.mixers.attention import AttentionMixer
from trellis_dist.models.mixers.gated_deltanet import DeltaNetMixer, GatedDeltaNetMixer
from trellis_dist.models.mixers.gsa import GSAMixer
from trellis_dist.models.mixers.linear_attention import LinearAttentionMixer
from trellis_dist.models.mixers.mamba2 import Mamba2Mixer
from trellis_dist.models.mixers.rwkv7 import RWKV7Mixer
from trellis_dist.models.mixers.titans import TitansMixer
from trellis_dist.models.mixers.trellis import TrellisMixer
from trellis_dist.models.mixers.ttt_linear import TTTLinearMixer

__all__ = ["MIXERS", "LayerState", "Mixer", "build_mixer"]


class LayerState(Protocol):
    """What one layer carries between decoding calls; immutable."""

    def bytes(self) -> int:
        """Bytes held."""
        ...


class Mixer(Protocol):
    """What a block asks of its token-mixing half. Shapes: B rows, T tokens, dim features.

    A mixer that can leave tokens out also has ``pads_within`` (`LanguageModel.pads_within`) and takes pads in
    ``prefill``; one that saves by making no state has ``after`` (`Block.after`).
    """

    def __call__(self, x: Tensor, context: SequenceContext) -> Tensor:
        """[B, T, dim] -> [B, T, dim], independent documents."""
        ...

    def init_state(self, batch: int) -> Any:
        """State before the first token of ``batch`` rows."""
        ...

    def prefill(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Continue ``state`` over [B, T, dim]."""
        ...

    def decode_step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Continue ``state`` by one token [B, dim]."""
        ...


MIXERS: dict[str, Callable[[ModelConfig, int], nn.Module]] = {
    "trellis": TrellisMixer,
    "attention": AttentionMixer,
    "sliding_window": AttentionMixer,
    "linear_attention": LinearAttentionMixer,
    "abc": ABCMixer,
    "gsa": GSAMixer,
    "deltanet": DeltaNetMixer,
    "gated_deltanet": GatedDeltaNetMixer,
    "mamba2": Mamba2Mixer,
    "rwkv7": RWKV7Mixer,
    "ttt_linear": TTTLinearMixer,
    "titans": TitansMixer,
}


def build_mixer(kind: str, config: ModelConfig, layer: int) -> nn.Module:
    """The mixer of layer ``layer`` (0-based).

    Raises:
        ValueError: ``kind`` is not registered.
    """
    if kind not in MIXERS:
        raise ValueError(f"model.pattern names {kind!r}: known layer kinds are {', '.join(sorted(MIXERS))}")
    return MIXERS[kind](config, layer)
