"""Everything parallelism does to a model, in order, in one place; the model itself knows nothing of it."""

from __future__ import annotations

import math
from typing import Literal

from torch import nn

from trellis_dist.models.language_model import LanguageModel
from trellis_dist.models.mixers.attention import AttentionMixer
from trellis_dist.models.mixers.recurrent import RecurrentMixer
from trellis_dist.models.mixers.trellis import TrellisMixer
from trellis_dist.models.parallel_kind import undeclared
from trellis_dist.parallel.all_to_all import AllToAllAttention, AllToAllCompress
from trellis_dist.parallel.compile import apply_compile
from trellis_dist.parallel.halo import HaloConvolution
from trellis_dist.parallel.mesh import Mesh
from trellis_dist.parallel.recompute import RecomputeMode, apply_recompute
from trellis_dist.parallel.recurrent import AllToAllRecurrent, PassMemory
from trellis_dist.parallel.segments import Segments
from trellis_dist.parallel.sequence import StatePassing
from trellis_dist.parallel.tensor import split_tensors
from trellis_dist.parallel.transfers import Transfers

__all__ = ["apply_parallelism"]


def apply_parallelism(
    model: nn.Module,
    mesh: Mesh,
    *,
    recompute: Literal["none"] | RecomputeMode = "none",
    compile_backend: str = "none",
) -> Segments:
    """Split ``model`` (a ``LanguageModel`` or a part of one) over ``mesh``, in place.

    Args:
        recompute: which activations the backward pass computes again instead of keeping them.
        compile_backend: of torch.compile for each block, or "none".

    Returns:
        What cuts each batch for this rank: ``tokens, labels, cu_seqlens = segments.cut(tokens, labels,
        cu_seqlens)`` before every forward pass (the batch itself when sp = 1).

    Raises:
        ValueError: a parameter declares no parallel kind, or a layer cannot be split over the sequence.
    """
    _check_declared(model)
    grids = _chunk_sizes(model)
    segments = Segments(mesh, chunk_size=math.lcm(*grids), grids=grids)
    if mesh.tp > 1:
        split_tensors(model, mesh)
    transfers = _split_sequence(model, mesh, segments) if mesh.sp > 1 else None
    if recompute != "none":
        apply_recompute(model, mode=recompute, transfers=transfers, segments=segments)
    apply_compile(model, backend=compile_backend)
    return segments


def _check_declared(model: nn.Module) -> None:
    names = undeclared(model)
    if names:
        raise ValueError(
            f"parameter {names[0]} (and {len(names) - 1} more) declares no parallel kind, so its gradient "
            "would be counted wrongly: make it with models.init.new_parameter"
        )


def _chunk_sizes(model: nn.Module) -> tuple[int, ...]:
    """Of all layers that have chunks, ascending."""
    sizes = {m.options.chunk_size for m in model.modules() if isinstance(m, TrellisMixer)}
    return tuple(sorted(sizes | {m.chunk_size for m in model.modules() if isinstance(m, RecurrentMixer)}))


def _split_sequence(model: nn.Module, mesh: Mesh, segments: Segments) -> Transfers:
    """One set of transfers for all layers: their order is the order in which the layers run."""
    transfers = Transfers(mesh)
    for module in model.modules():
        if isinstance(module, TrellisMixer):
            module.convolution = HaloConvolution(module.convolution, transfers, segments)
            passing = mesh.sequence_mode == "state_passing"
            module.operation = (
                StatePassing(transfers, segments) if passing else AllToAllCompress(mesh, segments)
            )
        elif isinstance(module, RecurrentMixer):
            module.convolution = HaloConvolution(module.convolution, transfers, segments)
            module.operation = (
                PassMemory(module.operation, transfers, segments)
                if mesh.sequence_mode == "state_passing"
                else AllToAllRecurrent(module.operation, mesh, segments)
            )
        elif isinstance(module, AttentionMixer):
            module.operation = AllToAllAttention(mesh, segments)
        elif isinstance(module, LanguageModel):
            module.split_over["sp"] = mesh.sp
    return transfers
