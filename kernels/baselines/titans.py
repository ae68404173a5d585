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
memories M and S [N, H, L, 2, D, D], and M at the start of the mini-batch [N, H, L, D, D].
"""

from __future__ import annotations

from collections.abc import Mapping

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

    Tokens q, k, v, step, log_keep, log_momentum; weights norm_weight, norm_bias; memory (M and S, M at the
    mini-batch's start), the second read only where ``layout.offsets`` says that a mini-batch has begun.
    """
    grid, batches = Grid(layout, compute_dtype(*tokens.values())), MiniBatches.of(layout)
    weight, bias = (weights[name].to(grid.dtype).unsqueeze(-2) for name in ("norm_weight", "norm_bias"))
    q, k = grid.reads(tokens["q"]), grid.reads(tokens["k"])
    loss = ResidualLoss(k, grid.reads(tokens["v"]), weight, bias)
    scalars = (grid.scalars(tokens[name]) for name in ("step", "log_keep", "log_momentum"))
    gates = _Coefficients(*scalars, valid=layout.valid)

    def step(now: Memory, chunks: slice) -> tuple[Memory, Memory]:
        state, start = now
        x, g = _gradients(k[chunks], start, loss, chunks)
        after = gates.advance(state, x, g, chunks)
        ends, layers = batches.ends(chunks), after[:, :, :, 0]
        if ends is not None:
            layers = torch.where(ends.unsqueeze(-1), layers, start)
        return (after, layers), (state, x, g)

    state, start = memory
    (before, x, g), final = grid.scan(step, (state, batches.entering(start, fresh=state[:, :, :, 0])))
    u = q
    for layer in range(g.shape[2]):
        u = gates.read(F.silu(u) if layer else u, *(part[:, :, layer] for part in (before, x, g)))
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
        # What a slot keeps of M and of S.
        self._entered = torch.stack([keep.exp(), (kept @ momentum.exp()[..., None])[..., 0]], dim=-1)
        # M+ and S+ of M and S, and of X and G: negative, since the gradient is descended.
        end = F.pad(momentum[..., -1:].exp(), (1, 0))
        self._moved = torch.stack([self._entered[..., -1, :], end], dim=-2)  # [P, H, 2, 2]
        self._last = -torch.stack([self._written[..., -1, :], carried[..., -1, :] * step], dim=-1)

    def advance(self, state: Tensor, x: Tensor, g: Tensor, chunks: slice) -> Tensor:
        """M+ and S+ [n, H, L, 2, D, V] of ``chunks``; x [n, H, L, C, D], g [n, H, L, C, V]."""
        written = _weighted(x, self._last[chunks].unsqueeze(2)).mT @ g  # [n, H, L, 2 D, V]
        moved = self._moved[chunks].unsqueeze(2).expand(*state.shape[:3], 2, 2)
        pairs = written.reshape(-1, 2, g.shape[-1] * x.shape[-1])
        return torch.baddbmm(pairs, moved.reshape(-1, 2, 2), state.reshape(pairs.shape)).view_as(state)

    def read(self, u: Tensor, state: Tensor, x: Tensor, g: Tensor) -> Tensor:
        """Z [P, H, C, V] of what queries have become, u [P, H, C, D], in one layer."""
        now = _weighted(u, self._entered) @ state.flatten(2, 3)
        return now - ((u @ x.mT) * self._written) @ g


def _weighted(x: Tensor, weights: Tensor) -> Tensor:
    """x [..., C, D] times each of two weights [..., C, 2], side by side [..., C, 2 D]."""
    return (x.unsqueeze(-2) * weights.unsqueeze(-1)).flatten(-2)


def _gradients(k: Tensor, start: Tensor, loss: ResidualLoss, chunks: slice) -> tuple[Tensor, Tensor]:
    """Inputs x and gradients g [n, H, L, C, .] of the layers ``start`` at the keys k of ``chunks``."""
    layers = start.unbind(2)
    xs, zs = [k], [k @ layers[0]]
    for layer in layers[1:]:
        xs.append(F.silu(zs[-1]))
        zs.append(xs[-1] @ layer)
    gs = [loss.gradient(zs[-1], chunks)]
    for layer, z in zip(layers[:0:-1], zs[-2::-1], strict=True):
        sigma = z.sigmoid()
        gs.append((gs[-1] @ layer.mT) * (sigma * (1 + z * (1 - sigma))))
    return torch.stack(xs, 2), torch.stack(gs[::-1], 2)
