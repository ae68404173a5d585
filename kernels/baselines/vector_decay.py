"""What the tokens of a chunk see of each other under a decay per channel.

Shapes: ... any leading dimensions, C tokens of a chunk, X and Y vectors a token, F channels.

    scores  A_ix,jy = sum_f  x_ixf e^{g_j+1,f + ... + g_if} y_jyf          for i >= j, else 0
    mix     O_ixf = sum_jy P_ix,jy e^{g_j+1,f + ... + g_if} y_jyf          over j <= i

The decay of a pair cannot be split into e^{l_i} e^{-l_j}, l the cumulative sum of g: the second factor
overflows. Here the chunk is halved. For i behind the middle and j before it the decay is that from the middle
to i times that from j to the middle, both products of numbers <= 1, so the pairs across the middle are one
matmul of scaled vectors; the halves are halved on, down to single tokens. Nothing is divided, no exponent is
positive or the difference of large ones, and g = -inf (a decay of 0) is allowed; where a factor underflows,
the decay of the pair, which is smaller, does too.

A level holds C F factors, made of those of the level before, so a chunk takes C F log2 C products and C F
memory; sub-chunks of c tokens whose decays are written out take c times C F of both. The backward pass makes
the factors again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.baselines.grid import LOG2_E

__all__ = ["chunk_decays", "mix", "scores"]


def chunk_decays(g: Tensor) -> tuple[Tensor, Tensor]:
    """From the chunk's start to behind each token, and from behind each token to the chunk's end.

    Args:
        g: log decays <= 0 [..., C, F].

    Returns:
        e^{g_0 + ... + g_i} and e^{g_i+1 + ... + g_C-1}, both [..., C, F] and sums of their own: the
        difference of two cumulative sums would round, and be NaN for a decay of 0.
    """
    g = g * LOG2_E
    later = F.pad(g[..., 1:, :], (0, 0, 0, 1))
    return g.cumsum(-2).exp2(), later.flip(-2).cumsum(-2).flip(-2).exp2()


def scores(x: Tensor, y: Tensor, g: Tensor) -> Tensor:
    """A, 0 where i < j: x [..., C, X, F], y [..., C, Y, F], g <= 0 [..., C, F] -> [..., C X, C Y]."""
    lead, (size, rows), columns = x.shape[:-3], x.shape[-3:-1], y.shape[-2]
    x, y, g = (_whole_powers(z.flatten(0, len(lead) - 1)) for z in (x, y, g))
    a: Tensor = _Scores.apply(x, y, g)  # type: ignore[no-untyped-call]
    return _unflat(a[:, : size * rows, : size * columns], 0, lead)


def mix(p: Tensor, y: Tensor, g: Tensor) -> Tensor:
    """O: p [..., C X, C Y], not read where i < j, y [..., C, Y, F], g <= 0 [..., C, F] -> [..., C, X, F]."""
    lead, (size, columns) = y.shape[:-3], y.shape[-3:-1]
    rows = p.shape[-2] // size
    p = p.flatten(0, len(lead) - 1)
    y, g = (_whole_powers(z.flatten(0, len(lead) - 1)) for z in (y, g))
    more = y.shape[1] - size
    p = F.pad(p, (0, more * columns, 0, more * rows)) if more else p
    strict: Tensor = _Mix.apply(p, y, g)  # type: ignore[no-untyped-call]
    o = strict + _own(p, rows, columns) @ y
    return _unflat(o[:, :size], 0, lead)


def _unflat(x: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    """``Tensor.unflatten``, with a type."""
    y: Tensor = x.unflatten(dim, tuple(sizes))
    return y


def _whole_powers(x: Tensor) -> Tensor:
    """[N, C, ...] with zeros behind, up to a power of two."""
    size = x.shape[1]
    more = (1 << (size - 1).bit_length()) - size
    return F.pad(x, (*[0] * (2 * x.dim() - 4), 0, more)) if more else x


class _Level(NamedTuple):
    """B pairs of neighbouring blocks of w tokens: C = 2 B w.

    Attributes:
        width: w.
        after: decay from the middle of a pair to behind each token of its second block [N, B, w, 1, F].
        before: decay from behind each token of the first block to the middle [N, B, w, 1, F].
    """

    width: int
    after: Tensor
    before: Tensor

    def second(self, x: Tensor) -> Tensor:
        """The second blocks of x [N, C, X, F], a view [N, B, w, X, F]."""
        return _unflat(x, 1, (-1, 2, self.width))[:, :, 1]

    def first(self, x: Tensor) -> Tensor:
        """The first blocks of x [N, C, X, F], a view [N, B, w, X, F]."""
        return _unflat(x, 1, (-1, 2, self.width))[:, :, 0]

    def across(self, a: Tensor, size: int) -> Tensor:
        """The pairs (second block, first block) of a [N, C X, C Y], C = ``size``: a view [N, B, w X, w Y]."""
        rows, columns = (n // size * self.width for n in a.shape[1:])
        blocks = _unflat(_unflat(a, 2, (-1, 2, columns)), 1, (-1, 2, rows))  # [N, B, 2, wX, B, 2, wY]
        return blocks[:, :, 1, :, :, 0].diagonal(dim1=1, dim2=3).movedim(-1, 1)


def _levels(g: Tensor) -> Iterator[_Level]:
    """From pairs of tokens to the halves of the chunk; the factors hold until the next level is asked for."""
    through = (g * LOG2_E).exp2_()  # from a block's start to behind each of its tokens
    rest = torch.ones_like(through)  # from behind each token to its block's end
    width = 1
    while width < g.shape[1]:
        a, b = (_unflat(x, 1, (-1, 2, width)) for x in (through, rest))
        yield _Level(width, a[:, :, 1, :, None], b[:, :, 0, :, None])
        b[:, :, 0] *= a[:, :, 1, -1:]
        a[:, :, 1] *= a[:, :, 0, -1:]
        width *= 2


def _own(a: Tensor, rows: int, columns: int) -> Tensor:
    """The blocks i = j of a [N, C X, C Y]: a view [N, C, X, Y]."""
    blocks = _unflat(_unflat(a, 2, (-1, columns)), 1, (-1, rows))
    return blocks.diagonal(dim1=1, dim2=3).movedim(-1, 1)


def _decay_gradient(x: Tensor, dx: Tensor, y: Tensor, dy: Tensor) -> Tensor:
    """dg [N, C, F], of the pairs i > j alone: token t decays those with i >= t > j.

    d(x, y) is what reaches x_i, y_j; x dx sums the pairs of a row i, y dy those of a column j.
    """
    per_token = (x * dx).sum(-2) - (y * dy).sum(-2)
    return per_token.flip(1).cumsum(1).flip(1)


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, g: Tensor) -> Tensor:
        ctx.save_for_backward(x, y, g)
        (n, size, rows, _), columns = x.shape, y.shape[2]
        a = x.new_zeros(n, size * rows, size * columns)
        _own(a, rows, columns).copy_(x @ y.mT)
        for level in _levels(g):
            behind, ahead = level.second(x) * level.after, level.first(y) * level.before
            level.across(a, size).copy_(behind.flatten(2, 3) @ ahead.flatten(2, 3).mT)
        return a

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, da: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, y, g = ctx.saved_tensors
        (_, size, rows, _), columns = x.shape, y.shape[2]
        dx, dy = torch.zeros_like(x), torch.zeros_like(y)
        for level in _levels(g):
            behind, ahead = level.second(x) * level.after, level.first(y) * level.before
            pairs = level.across(da, size).contiguous()
            level.second(dx).addcmul_((pairs @ ahead.flatten(2, 3)).view_as(behind), level.after)
            level.first(dy).addcmul_((pairs.mT @ behind.flatten(2, 3)).view_as(ahead), level.before)
        dg = _decay_gradient(x, dx, y, dy)
        own = _own(da, rows, columns)
        return dx.add_(own @ y), dy.add_(own.mT @ x), dg


class _Mix(torch.autograd.Function):
    """The pairs i > j of a mix; P on and above the diagonal gets no gradient here."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, y: Tensor, g: Tensor) -> Tensor:
        n, size, _, width = y.shape
        o = y.new_zeros(n, size, p.shape[1] // size, width)
        for level in _levels(g):
            ahead = level.first(y) * level.before
            seen = level.across(p, size) @ ahead.flatten(2, 3)
            out = level.second(o)
            out.addcmul_(seen.view(out.shape), level.after)
        ctx.save_for_backward(p, y, g, o)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        p, y, g, o = ctx.saved_tensors
        size = y.shape[1]
        dp, dy = torch.zeros_like(p), torch.zeros_like(y)
        for level in _levels(g):
            behind, ahead = level.second(do) * level.after, level.first(y) * level.before
            level.across(dp, size).copy_(behind.flatten(2, 3) @ ahead.flatten(2, 3).mT)
            written = level.across(p, size).mT @ behind.flatten(2, 3)
            level.first(dy).addcmul_(written.view_as(ahead), level.before)
        return dp, dy, _decay_gradient(do, o, y, dy)
