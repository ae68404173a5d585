"""Parameters, floating-point operations and decode-state bytes of a configuration, without building it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from trellis_dist.models.config import ATTENTION_KINDS, LayerKind, ModelConfig

if TYPE_CHECKING:
    from trellis_dist.models.mixers.recurrent import RecurrentMixer

__all__ = [
    "ParameterCounts",
    "flops_per_token",
    "memory_elements",
    "operation_flops_per_token",
    "parameter_counts",
    "scan_flops_per_token",
    "state_bytes",
]


@dataclass(frozen=True)
class ParameterCounts:
    """Number of parameters.

    Attributes:
        total: every distinct parameter (a tied embedding once).
        embedding: the embedding, plus the output projection when it is not tied.
        non_embedding: the rest.
    """

    total: int
    embedding: int
    non_embedding: int


def parameter_counts(config: ModelConfig) -> ParameterCounts:
    """Count on torch's meta device: no memory is taken whatever the size."""
    from trellis_dist.models.language_model import LanguageModel

    with torch.device("meta"):
        model = LanguageModel(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    embedding = config.vocab_size * config.dim * (1 if config.tie_embeddings else 2)
    return ParameterCounts(total=total, embedding=embedding, non_embedding=total - embedding)


def flops_per_token(config: ModelConfig, *, sequence_length: int) -> float:
    """Forward and backward FLOPs per trained token, the model's own (recomputation is not counted).

    A multiply-add is 2 FLOPs and the backward pass twice the forward. Attention counts the average causal
    context of a document of ``sequence_length`` tokens; Trellis counts whole chunks, as they are computed.
    """
    forward = 2.0 * config.vocab_size * config.dim
    for layer in range(config.num_layers):
        forward += 2.0 * 3 * config.dim * config.mlp_width
        forward += _mixer_flops(config, layer, sequence_length)
    return 3.0 * forward


def _mixer_flops(config: ModelConfig, layer: int, sequence_length: int) -> float:
    """Forward FLOPs per token of the mixer of layer ``layer``."""
    kind = config.layer_kind(layer)
    if kind == "trellis":
        return _trellis_flops(config, layer)
    if kind in ATTENTION_KINDS:
        return _attention_flops(config, kind, sequence_length)
    return _baseline(kind).flops_per_token(config)


def _baseline(kind: LayerKind) -> type[RecurrentMixer]:
    from trellis_dist.models.mixers.recurrent import RecurrentMixer
    from trellis_dist.models.registry import MIXERS

    mixer = MIXERS[kind]
    assert isinstance(mixer, type), f"{kind} is no mixer class"
    assert issubclass(mixer, RecurrentMixer), f"{kind} counts itself"
    return mixer


def _trellis_flops(config: ModelConfig, layer: int) -> float:
    """Forward FLOPs per token of the Trellis mixer of layer ``layer`` (docs/math.md, chunkwise form)."""
    heads, head_dim, options = config.num_heads, config.head_dim, config.trellis
    slots, chunk = options.slots, options.chunk_size
    gates = (2 if config.gate(layer) == "learned" else 1) * (2 if options.value_gates == "own" else 1)
    projections = 5 * config.dim**2 + config.dim * heads * (options.projected_slots + gates)
    convolution = options.convolved_width(config.dim, heads) * options.conv_kernel
    readout = 2 * slots * head_dim + 2 * chunk * (head_dim + slots)  # Q S', P R; Q K', E U, P W', E V
    return 2.0 * (projections + convolution + heads * readout) + scan_flops_per_token(config)


def scan_flops_per_token(config: ModelConfig) -> float:
    """Forward FLOPs per token of one layer's scan, the part that runs one chunk after the other."""
    options, head_dim = config.trellis, config.head_dim
    slots, chunk = options.slots, options.chunk_size
    scan: float = 4 * slots * head_dim  # Z = K S', S update, and the same for the value memory
    if options.update == "corrected":  # K K', L^-1 B and L^-1 itself (C^3 / 6), and the same for the values
        scan += 2 * chunk * (head_dim + slots) + chunk**2 / 3
    return 2.0 * config.num_heads * scan


def operation_flops_per_token(config: ModelConfig, kind: LayerKind) -> float:
    """Forward FLOPs per token of the recurrence of one layer of a recurrent baseline."""
    return config.num_heads * _baseline(kind).operation_flops(config)


def memory_elements(config: ModelConfig, kind: LayerKind) -> int:
    """Numbers that a recurrent layer of ``kind`` hands on at a segment's end, of one row; attention none."""
    if kind in ATTENTION_KINDS:
        return 0
    if kind == "trellis":
        return 2 * config.trellis.slots * config.dim
    shapes = _baseline(kind).memory_shapes(config)
    return config.num_heads * sum(torch.Size(shape).numel() for shape in shapes)


def _window(config: ModelConfig, kind: LayerKind) -> int | None:
    return config.attention.sliding_window if kind == "sliding_window" else config.attention.window


def _attention_flops(config: ModelConfig, kind: LayerKind, sequence_length: int) -> float:
    """Forward FLOPs per token of one attention mixer."""
    window = _window(config, kind)
    context = (sequence_length + 1) / 2
    if window is not None and window < sequence_length:
        context = window - window * (window - 1) / (2 * sequence_length)
    return 2.0 * (4 * config.dim**2 + 2 * config.dim * context)


def state_bytes(config: ModelConfig, *, position: int, element_bytes: int = 4) -> int:
    """Decode-state bytes of one sequence after ``position`` tokens.

    Trellis holds both memories and their copies from the chunk's start, in fp32 or wider, and the tail of the
    convolution: it does not grow. Attention holds keys and values of every token (or of the last ``window``).
    The baselines hold what `mixers.recurrent` says.

    Args:
        element_bytes: of an activation (4 for fp32, 2 for bf16).
    """
    kinds = [config.layer_kind(layer) for layer in range(config.num_layers)]
    return sum(_layer_bytes(config, kind, position, element_bytes) for kind in kinds)


def _layer_bytes(config: ModelConfig, kind: LayerKind, position: int, element_bytes: int) -> int:
    if kind == "trellis":
        options = config.trellis
        memories = 4 * max(4, element_bytes) * config.dim * options.slots
        width = options.convolved_width(config.dim, config.num_heads)
        return memories + max(options.conv_kernel - 1, 0) * width * element_bytes
    if kind in ATTENTION_KINDS:
        window = _window(config, kind)
        return 2 * (position if window is None else min(position, window)) * config.dim * element_bytes
    return _baseline(kind).state_bytes(config, element_bytes)
