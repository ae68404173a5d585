"""Titans' neural memory (Behrouz et al., arXiv 2501.00663, section 3): momentum and forgetting.

A head's memory is an MLP of L layers W^1 .. W^L, with a normalised residual: k + LN(z^L),

    x^1 = k      z^l = x^l W^l      x^{l+1} = silu(z^l)

C tokens are a mini-batch. Their gradients g^l = d loss / d z^l are taken at its start, each of its own token,
of the loss ||k + LN(z^L) - v||^2 / 2 (`mini_batch`). Every layer then moves, M its W and S its momentum:

    S_t = h_t S_{t-1} - e_t x_t g_t^T      M_t = a_t M_{t-1} + S_t      y_t = q_t + LN(MLP of the M_t at q_t)

a_t = 1 - alpha_t of the paper keeps, h_t (its eta) is the momentum, e_t (its theta) the step; the 2 of the
gradient of ||.||^2 is absorbed in it. The paper leaves the memory's form open; LN and the residual are those
of TTT (arXiv 2407.04620) and of ``fla.ops.titans``, which adds M q where we add q. Inside a mini-batch a head
keeps (M, S, M at its start) of every layer; at its end M is the start of the next.

Chunkwise, for one layer, rows of X, G are a chunk's tokens, of U what its queries have become (U^1 = Q),
i >= j, M and S before it; A_ij and H_ij are the products of a and of h over j < t <= i, A_i and H_i those
over t <= i: from sums of logarithms, nothing is divided.

    E = A H diag(e)      f_i = sum_{j<=i} A_ij H_j
    Z = diag(A_i) U M + diag(f) U S - ((U X^T) o E) G            U^{l+1} = silu(Z),  y = q + LN(Z^L)
    M+ = A_C M + f_C S - (diag(E_C) X)^T G                       S+ = H_C S - (diag(H_Cj e_j) X)^T G

Shapes: q, k, v, y [B, T, H, D], D = V; step, log_keep, log_momentum [B, T, H]; norm_weight, norm_bias [H, V];
memories W^1 .. W^L, S^1 .. S^L, then the start's W^1 .. W^L [N, H, D, D].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.baselines.grid import Grid, Memory, compute_dtype, decay_matrix
from kernels.baselines.mini_batch import MiniBatches, ResidualLoss, read_residual
from kernels.layout import PackedLayout

__all__ = ["titans"]


def titans(
    tokens: Mapping[str, Tensor], weights: Mapping[str, Tensor], memory: Memory, layout: PackedLayout
) -> tuple[Tensor, Memory]:
    """The recurrence above; see `grid.Operation`. Chunks are the mini-batches.

    Tokens q, k, v, step, log_keep, log_momentum; weights norm_weight, norm_bias; three memories for each
    layer, of which the start's are read only where ``layout.offsets`` says that a mini-batch has begun.
    """
    grid, batches = Grid(layout, compute_dtype(*tokens.values())), MiniBatches.of(layout)
    weight, bias = (weights[name].to(grid.dtype).unsqueeze(-2) for name in ("norm_weight", "norm_bias"))
    q, k = grid.reads(tokens["q"]), grid.reads(tokens["k"])
    loss = ResidualLoss(k, grid.reads(tokens["v"]), weight, bias)
    scalars = (grid.scalars(tokens[name]) for name in ("step", "log_keep", "log_momentum"))
    gates = _Coefficients(*scalars, valid=layout.valid)
    depth = len(memory) // 3

    def step(now: Memory, chunks: slice) -> tuple[Memory, Memory]:
        layers, momenta, starts = now[:depth], now[depth : 2 * depth], now[2 * depth :]
        xs, gs = _gradients(k[chunks], starts, loss, chunks)
        moved = [
            gates.advance(m, s, x, g, chunks) for m, s, x, g in zip(layers, momenta, xs, gs, strict=True)
        ]
        after = tuple(m for m, _ in moved)
        ends = batches.ends(chunks)
        if ends is not None:
            starts = tuple(torch.where(ends, m, old) for m, old in zip(after, starts, strict=True))
        state = (*after, *(s for _, s in moved), *(after if ends is None else starts))
        return state, (*layers, *momenta, *xs[1:], *gs)

    fresh = zip(memory[2 * depth :], memory[:depth], strict=True)
    entering = (*memory[: 2 * depth], *(batches.entering(start, fresh=m) for start, m in fresh))
    kept, final = grid.scan(step, entering)
    layers, momenta, inner, gs = _split(kept, depth, depth, depth - 1, depth)
    u = q
    for i, (m, s, x, g) in enumerate(zip(layers, momenta, (k, *inner), gs, strict=True)):
        u = gates.read(F.silu(u) if i else u, m, s, x, g)
    return grid.tokens(read_residual(q, u, weight, bias), tokens["v"]), final


class _Coefficients:
    """What the gates of all chunks [P, H, C] make of states, gradients and queries.

    Pads have a step of 0 and logarithms of 0, and those that are not ``valid`` add no momentum to the memory.
    """

    def __init__(self, step: Tensor, log_keep: Tensor, log_momentum: Tensor, *, valid: Tensor | None) -> None:
        keep, momentum = log_keep.cumsum(-1), log_momentum.cumsum(-1)
        kept, carried = decay_matrix(keep), decay_matrix(momentum)  # A_ij and H_ij
        if valid is not None:
            kept = kept * valid[:, None, None, :]
        self._written = (kept @ carried) * step[..., None, :]  # E
        self._keep, self._momentum = keep.exp()[..., None], momentum.exp()[..., None]  # A_i and H_i
        self._entered = kept @ self._momentum  # f
        # Rows that make M+ and S+ of X and G: negative, since the gradient is descended.
        last = torch.stack([self._written[..., -1, :], carried[..., -1, :] * step], dim=-2)
        self._last = -last.unsqueeze(-1)  # [P, H, 2, C, 1]

    def advance(self, m: Tensor, s: Tensor, x: Tensor, g: Tensor, chunks: slice) -> tuple[Tensor, Tensor]:
        """M+ and S+ [n, H, D, V] of x [n, H, C, D] and g [n, H, C, V] of ``chunks``."""
        written = (self._last[chunks] * x.unsqueeze(2)).mT @ g.unsqueeze(2)
        to_memory, to_momentum = written.unbind(2)
        keep, entered, momentum = (c[chunks, :, -1:] for c in (self._keep, self._entered, self._momentum))
        return to_memory + keep * m + entered * s, to_momentum + momentum * s

    def read(self, u: Tensor, m: Tensor, s: Tensor, x: Tensor, g: Tensor) -> Tensor:
        """Z [P, H, C, V] of what queries have become, u [P, H, C, D]."""
        now = (self._keep * u) @ m + (self._entered * u) @ s
        return now - ((u @ x.mT) * self._written) @ g


def _gradients(
    k: Tensor, layers: Sequence[Tensor], loss: ResidualLoss, chunks: slice
) -> tuple[list[Tensor], list[Tensor]]:
    """Each layer's inputs x and gradients g [n, H, C, .] at the keys k of ``chunks``."""
    xs, zs = [k], [k @ layers[0]]
    for layer in layers[1:]:
        xs.append(F.silu(zs[-1]))
        zs.append(xs[-1] @ layer)
    gs = [loss.gradient(zs[-1], chunks)]
    for layer, z in zip(layers[:0:-1], zs[-2::-1], strict=True):
        sigma = z.sigmoid()
        gs.append((gs[-1] @ layer.mT) * (sigma * (1 + z * (1 - sigma))))
    return xs, gs[::-1]


def _split(xs: Memory, *sizes: int) -> list[Memory]:
    """``xs`` in runs of ``sizes``."""
    parts, begin = [], 0
    for size in sizes:
        parts.append(xs[begin : begin + size])
        begin += size
    return parts
