"""The rival on a CPU: the chunkwise equations of docs/math.md as a plain loop, differentiated by autograd.

Per chunk (rows are tokens), from zero memories:

    Z = K S^T;  U = phi'(Z) o (phi(Z) - A);   Yhat = mu Q S^T - ((Q K^T) o E) U;   P = LN(SiLU(Yhat))
    Z = V R^T;  W = phi'(Z) o (phi(Z) - A);   Y = mu P R - ((P W^T) o E) V
    S+ = e^{l_C} S - (tau U)^T K;   R+ = e^{l_C} R - (tau W)^T V

with E = Omega diag(gamma), phi = SiLU, the stale update, and T a multiple of C. It is written as one would
without caring for backward: batched over sequences and heads, products as matmul, fused activations where
PyTorch has them, the gates of all chunks at once before the loop. How the loop gets at a chunk matters more
than the rest:

    split      the chunks are copied out and split off before the loop; their gradients are stacked once
    indexed    x[i] in the loop on views of the operands, as such loops are mostly written; the gradient of
               every index is a whole tensor of zeros around one chunk, so backward moves (T / C)^2 chunks

Shapes: q, k [B, T, H, D]; v [B, T, H, V]; alpha [B, T, H, M]; gates [B, T, H]; S, R [B, H, M, .].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["plain_loop"]


def plain_loop(operands: Mapping[str, Tensor], *, chunk_size: int, indexed: bool = False) -> Tensor:
    """y [B, T, H, V] of ``compress_kv`` with phi = silu, readout = ln_silu, update = stale.

    ``indexed`` chooses how the loop gets at a chunk (see the module).

    Raises:
        ValueError: T is no multiple of ``chunk_size``.
    """
    batch, length, heads, _ = operands["q"].shape
    if length % chunk_size:
        raise ValueError(f"T = {length} is no multiple of chunk_size = {chunk_size}: the plain loop needs it")

    def chunks(x: Tensor) -> Tensor:  # [T / C, B, H, C, .]
        views = x.view(batch, -1, chunk_size, heads, x.shape[-1]).permute(1, 0, 3, 2, 4)
        return views if indexed else views.contiguous()

    q, k, v, alpha = (chunks(operands[name]) for name in ("q", "k", "v", "alpha"))
    cumulative = chunks(operands["log_decay"][..., None]).cumsum(-2)  # l [T / C, B, H, C, 1]
    step = chunks(operands["step_size"][..., None])
    mu, total = cumulative.exp(), cumulative[..., -1:, :].exp()
    tau = step * (cumulative[..., -1:, :] - cumulative).exp()
    future = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=q.device).triu(1)
    omega = (cumulative - cumulative.mT).masked_fill(future, -torch.inf).exp() * step.mT  # Omega diag(gamma)

    S = q.new_zeros(batch, heads, alpha.shape[-1], q.shape[-1])
    R = q.new_zeros(batch, heads, alpha.shape[-1], v.shape[-1])
    outputs = []
    for of_chunk in _each((q, k, v, alpha, mu, tau, total, omega), indexed):
        q_i, k_i, v_i, alpha_i, mu_i, tau_i, total_i, omega_i = of_chunk
        u, w = _inner_gradient(k_i @ S.mT, alpha_i), _inner_gradient(v_i @ R.mT, alpha_i)
        y_hat = mu_i * (q_i @ S.mT) - ((q_i @ k_i.mT) * omega_i) @ u
        s = functional.silu(y_hat)
        p = functional.layer_norm(s, s.shape[-1:])
        outputs.append(mu_i * (p @ R) - ((p @ w.mT) * omega_i) @ v_i)
        S = total_i * S - (tau_i * u).mT @ k_i
        R = total_i * R - (tau_i * w).mT @ v_i
    return torch.stack(outputs).permute(1, 0, 3, 2, 4).reshape(batch, length, heads, -1)


def _each(tensors: tuple[Tensor, ...], indexed: bool) -> Iterator[tuple[Tensor, ...]]:
    """The tensors' slices along their first dimension, together."""
    if not indexed:
        return zip(*(x.unbind() for x in tensors))
    return (tuple(x[i] for x in tensors) for i in range(tensors[0].shape[0]))


def _inner_gradient(z: Tensor, alpha: Tensor) -> Tensor:
    """phi'(z) (phi(z) - alpha), phi = SiLU."""
    sigma = torch.sigmoid(z)
    phi = z * sigma
    return (sigma + phi * (1 - sigma)) * (phi - alpha)
