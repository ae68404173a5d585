"""The baselines' section of a model: what the recurrent layers that Trellis is measured against may choose.

Standard library only, as ``config``. All of them stand in the block of the recurrent models of the paper
(arXiv 2512.23852, figure 1): a short convolution before the recurrence, per-head norm and GELU gate after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trellis_dist.validation import STRICT, require

__all__ = ["BASELINES", "MINI_BATCH_KINDS", "READERS", "BaselineConfig"]

# Layer kinds that read this section.
BASELINES = (
    "linear_attention",
    "abc",
    "gsa",
    "deltanet",
    "gated_deltanet",
    "mamba2",
    "ttt_linear",
    "rwkv7",
    "titans",
)

# Those whose gradients are taken at the start of a mini-batch: its size is part of the function.
MINI_BATCH_KINDS = ("ttt_linear", "titans")

# Who reads the options that not all of them read.
READERS = {
    "mini_batch": MINI_BATCH_KINDS,
    "slots": ("abc", "gsa"),
    "ttt_step": ("ttt_linear",),
    "titans_depth": ("titans",),
    "titans_step": ("titans",),
    "titans_keep_bias": ("titans",),
    "titans_momentum_bias": ("titans",),
    "skip_values": ("deltanet", "gated_deltanet"),
}


@dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    """The recurrent baselines (docs/baselines.md).

    Attributes:
        conv_kernel: taps of the causal depthwise convolution, with a SiLU after it; 0 leaves the SiLU alone.
        conv_values: convolve the values too, as the DeltaNet family and Mamba2 do; else queries and keys
            alone have the convolution and its SiLU.
        chunk_size: tokens that are computed together. Another rounds differently and is no other function.
        mini_batch: tokens of ttt_linear and titans that share a gradient; part of the function, like
            ``trellis.chunk_size``.
        slots: memory slots per head of abc and gsa.
        ttt_step: of ttt_linear; a token's step is below ttt_step / head width (its authors' base rate: 1).
        titans_depth: layers of the MLP that a titans head keeps; the paper has one or more. From 2 on each
            layer's gradients go through the others, and training gradients grow with the sequence's length.
        titans_step: of titans; the steps of a mini-batch sum to at most this (our choice: the gradients of a
            mini-batch are taken at one point, so that their sum is what has to be bounded). Above 1 gradients
            of small language models spiked a thousandfold; recall of a few pairs learned faster with 8.
        skip_values: of deltanet and gated_deltanet; add d v to what a head reads, as Mamba2 does and
            ``trellis.skip_values`` (not theirs: it tells what of a layer's lead is the skip).
        head_norm_eps: added to the mean square of a head's output where it is normalised; unless given, each
            kind's own (docs/baselines.md). ``trellis.head_norm_eps`` is the same of Trellis.
        backend: "fla" runs the recurrences of linear_attention, deltanet, gated_deltanet, mamba2, gsa, rwkv7
            by flash-linear-attention's Triton kernels where tensors are on a GPU (not tried on one yet);
            "torch" and everything else run in plain PyTorch.
        titans_keep_bias, titans_momentum_bias: of titans; where the logits of its forget gate 1 - alpha and
            of its momentum eta start.
    """

    __pydantic_config__ = STRICT

    conv_kernel: int = 4
    conv_values: bool = True
    chunk_size: int = 64
    mini_batch: int = 16
    slots: int = 64
    ttt_step: float = 1.0
    titans_depth: int = 1
    titans_step: float = 1.0
    titans_keep_bias: float = 4.0
    titans_momentum_bias: float = 0.0
    skip_values: bool = False
    head_norm_eps: float | None = None
    backend: Literal["torch", "fla"] = "torch"

    def __post_init__(self) -> None:
        require(
            self.conv_kernel >= 0,
            f"model.baselines.conv_kernel = {self.conv_kernel}: use 0 (none) or more taps",
        )
        for name in ("chunk_size", "mini_batch"):
            value = getattr(self, name)
            require(value >= 1, f"model.baselines.{name} = {value}: use 1 or more tokens")
        require(1 <= self.slots <= 1024, f"model.baselines.slots = {self.slots}: use 1 to 1024 memory slots")
        for name in ("ttt_step", "titans_step"):
            require(
                getattr(self, name) > 0, f"model.baselines.{name} = {getattr(self, name)}: must be positive"
            )
        eps = self.head_norm_eps
        require(
            eps is None or eps > 0,
            f"model.baselines.head_norm_eps = {eps}: must be positive; leave it out for each kind's own",
        )
        require(
            1 <= self.titans_depth <= 4,
            f"model.baselines.titans_depth = {self.titans_depth}: use 1 to 4 layers",
        )
