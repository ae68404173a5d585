"""TTT-linear (Sun et al., arXiv 2407.04620, sections 2.3 to 2.7), as its authors' code defines it.

A head's memory is a linear layer W [D, V], b [V]; with W~ = [W; b] and k~ = [k, 1], z = W^T k + b = W~^T k~.
C tokens are a mini-batch; i counts them in it, j <= i. Their gradients are taken at its start:

    g_j = d/dz ||k_j + LN(z_j) - v_j||^2 / 2  at  z_j = W~_0^T k~_j
    A_i = A_{i-1} + e_i k~_i g_i^T,  A_{-1} = 0      W~_i = W~_0 - s_i A_i      y_i = q_i + LN(W~_i^T q~_i)

and the next mini-batch starts at the last W~_i. The step of token j as token i sees it is s_i e_j: e_j is the
learned step of the token that is written, s_i >= 0 the scale of the slot that reads (1 / (i + 1) and learned,
so that W~_i follows the mean of the gradients so far). flash-linear-attention's ``fla.ops.ttt`` has one step
per token and takes that of the reading token; both agree where s and e are constants.

s_i = 0 would hide A_i, so inside a mini-batch a head keeps (W~_0, A_i) and not W~_i; A = 0 at its end.

Chunkwise (the dual form), rows of Q~, K~ are a mini-batch's tokens, G those g_j:

    Z = Q~ W~_0 - diag(s) tril(Q~ K~^T) diag(e) G        W~+ = W~_0 - s_{C-1} (diag(e) K~)^T G

Shapes: q, k, v, y [B, T, H, D], D = V; step = e [B, T, H]; norm_weight, norm_bias [H, V] of LN;
slot_scale = s [H, C]; W~, A [N, H, D + 1, V].
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.baselines.grid import Grid, Memory, compute_dtype
from kernels.baselines.mini_batch import MiniBatches, ResidualLoss, read_residual
from kernels.layout import PackedLayout

__all__ = ["ttt_linear"]


def ttt_linear(
    tokens: Mapping[str, Tensor], weights: Mapping[str, Tensor], memory: Memory, layout: PackedLayout
) -> tuple[Tensor, Memory]:
    """The recurrence above; see `grid.Operation`. Chunks are the mini-batches.

    Tokens q, k, v, step; weights norm_weight, norm_bias, slot_scale; memory (W~, A), of which A is read only
    where ``layout.offsets`` says that a mini-batch has begun.
    """
    grid, batches = Grid(layout, compute_dtype(*tokens.values())), MiniBatches.of(layout)
    weight, bias = (weights[name].to(grid.dtype).unsqueeze(-2) for name in ("norm_weight", "norm_bias"))
    scale = weights["slot_scale"].to(grid.dtype)
    q, k = grid.reads(tokens["q"]), grid.reads(tokens["k"])
    loss = ResidualLoss(k, grid.reads(tokens["v"]), weight, bias)
    queries, keys = _with_one(q), _with_one(k)
    written = keys * grid.scalars(tokens["step"])[..., None]
    tail, last = written.mT, scale[:, -1, None, None]
    whole = tail * last

    def step(now: Memory, chunks: slice) -> tuple[Memory, Memory]:
        state, begun = now
        g = loss.gradient(keys[chunks] @ state, chunks)
        ends, kept = batches.ends(chunks), (state, g)
        carried = chunks.start == 0 and batches.entered > 0
        if ends is None and not carried:
            return (torch.baddbmm(*_flat(state, whole[chunks], g), alpha=-1).view_as(state), begun), kept
        total = begun + tail[chunks] @ g if carried else tail[chunks] @ g
        after = state - last * total
        if ends is None:
            return (after, torch.zeros_like(total)), kept
        return (torch.where(ends, after, state), total.masked_fill(ends, 0)), kept

    state, begun = memory
    begun = batches.entering(begun, fresh=torch.zeros_like(begun))
    (before, g), final = grid.scan(step, (state, begun))
    z = (queries @ written.mT).tril() @ g
    z = _slot_scales(z, queries, scale, batches, layout.rank_documents(begun))
    return grid.tokens(read_residual(q, queries @ before - z, weight, bias), tokens["v"]), final


def _slot_scales(z: Tensor, queries: Tensor, scale: Tensor, batches: MiniBatches, begun: Tensor) -> Tensor:
    """s_i of every slot times what it reads of the gradients, those of tokens before the call included."""
    if batches.slots is None:
        return z * scale[..., None]
    n, slot = batches.entered, torch.arange(z.shape[-2], device=z.device)
    # Behind the end of a mini-batch lie pads, which may hold anything.
    entered = (batches.slots[:, None] + slot).clamp(max=len(slot) - 1)  # [n, C]
    first = (z[:n] + queries[:n] @ begun) * scale[:, entered].movedim(0, 1)[..., None]
    return torch.cat([first, z[n:] * scale[..., None]])


def _with_one(x: Tensor) -> Tensor:
    """[..., D] -> [..., D + 1], the last one 1."""
    return F.pad(x, (0, 1), value=1.0)


def _flat(*xs: Tensor) -> tuple[Tensor, ...]:
    """[n, H, ...] -> [n H, ...]."""
    return tuple(x.flatten(0, 1) for x in xs)
