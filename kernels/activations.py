"""The inner nonlinearity phi and the readout activation f, with the derivatives the kernels need.

Shapes: every tensor is [..., M]; a sum or mean over slots is over the last dimension.

    inner gradient      u = J_phi(z)^T (phi(z) - a)                     gradient of |phi(z) - a|^2 / 2 in z
      elementwise phi   u = phi' e,  e = phi(z) - a
      softmax           p = phi(z);  u = p (e - sum p e)
      ln_silu           s = SiLU(z), h = LN(s), r = 1 / sqrt(var s + eps);  u = s' A(e)
                        A(x) = r (x - mean x - h mean(h x))              backward of LN at s
    its backward, g = dL/du
      elementwise phi   dz = (phi'^2 + e phi'') g;  da = -phi' g
      softmax           t = p (g - sum g p);  dp = g (e - sum p e) - e sum g p + t;  dz = p (dp - sum p dp);
                        da = -t
      ln_silu           t = A(e), G = s' g;  dh = A(G) - r (G mean(h e) + e mean(h G));
                        ds = A(dh) - r h mean(G t);  dz = s' ds + s'' g t;  da = -A(G)
    readout  ln_silu    LN(SiLU(x)), eps 1e-5, no affine
             l2_silu    s / sqrt(sum s^2 + 1e-6), s = SiLU(x)
             softmax    softmax(x)
             silu       SiLU(w x + b): what was found faintly stays faint
             silu_rms   SiLU(w h + b), h = x / sqrt(mean x^2 + 1e-6)
    affine   the other readouts give w f(x) + b; w is 1 and b is 0 where they are missing

SiLU: sigma = sigmoid(z), s' = sigma (1 + z (1 - sigma)), s'' = sigma (1 - sigma) (2 + z (1 - 2 sigma)).
aten's fused backward formulas are called by name: one pass over memory where the expression takes five.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["ELEMENTWISE_PHI", "PHI", "READOUT", "UPDATE", "ReadoutPullBack", "apply_readout"]
__all__ += ["inner_backward", "inner_gradient", "readout_vjp"]

PHI = ("silu", "tanh", "identity", "ln_silu", "softmax")
ELEMENTWISE_PHI = ("silu", "tanh", "identity")
READOUT = ("ln_silu", "l2_silu", "softmax", "silu", "silu_rms")
UPDATE = ("stale", "corrected")
LN_EPS = 1e-5
L2_EPS = 1e-6
RMS_EPS = 1e-6

_aten: Any = torch.ops.aten


def inner_gradient(z: Tensor, alpha: Tensor, phi: str, *, out: Tensor | None = None) -> Tensor:
    """u = J_phi(z)^T (phi(z) - alpha), shapes [..., M]; into ``out`` where it is given."""
    out = torch.empty_like(z) if out is None else out
    if phi == "silu":
        _aten.silu_backward.grad_input(functional.silu(z).sub_(alpha), z, grad_input=out)
        return out
    if phi == "tanh":
        t = torch.tanh(z)
        _aten.tanh_backward.grad_input(t - alpha, t, grad_input=out)
        return out
    if phi == "identity":
        return torch.sub(z, alpha, out=out)
    value, vjp = _normaliser(z, phi)
    return out.copy_(vjp(value - alpha))


def inner_backward(z: Tensor, alpha: Tensor, grad: Tensor, phi: str, *, out: tuple[Tensor, Tensor]) -> None:
    """(dz, dalpha) of ``inner_gradient`` for the gradient ``grad`` = dL/du, into ``out``, shapes [..., M]."""
    dz, dalpha = out
    if phi == "silu":
        _silu_inner_backward(z, alpha, grad, out)
    elif phi == "tanh":
        t = torch.tanh(z)
        first = _aten.tanh_backward(grad, t)  # phi' g
        error = (t - alpha).mul_(grad).mul_(t)
        curvature = _aten.tanh_backward(error, t)  # e g t phi', and phi'' = -2 t phi'
        _aten.tanh_backward.grad_input(first, t, grad_input=dz).sub_(curvature, alpha=2)
        torch.neg(first, out=dalpha)
    elif phi == "identity":
        dz.copy_(grad)
        torch.neg(grad, out=dalpha)
    else:
        rows = _softmax_inner_backward if phi == "softmax" else _ln_silu_inner_backward
        for target, value in zip(out, rows(z, alpha, grad), strict=True):
            target.copy_(value)


def apply_readout(
    x: Tensor, readout: str, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """P [..., M] from x [..., M]; weight and bias broadcast to it."""
    if readout == "silu":
        return functional.silu(_affine(x, weight, bias))
    if readout == "silu_rms":
        return functional.silu(_affine(x * _inverse_rms(x), weight, bias))
    if readout == "softmax":
        return _affine(torch.softmax(x, -1), weight, bias)
    s = functional.silu(x)
    if readout == "ln_silu":
        return _affine(functional.layer_norm(s, s.shape[-1:], None, None, LN_EPS), weight, bias)
    return _affine(s * _inverse_norm(s), weight, bias)


class ReadoutPullBack(NamedTuple):
    """Gradients of x [..., M] and, not yet summed over tokens, of the affine; None where there is none."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None


def readout_vjp(
    x: Tensor, readout: str, weight: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Callable[[Tensor], ReadoutPullBack]]:
    """P as ``apply_readout`` gives it, and the function dP -> its gradients."""
    if readout in ("silu", "silu_rms"):
        return _silu_vjp(x, readout, weight, bias)
    h, vjp = _normaliser(x, readout)

    def pull_back(grad: Tensor) -> ReadoutPullBack:
        dx = vjp(grad if weight is None else grad * weight)
        return ReadoutPullBack(dx, None if weight is None else grad * h, None if bias is None else grad)

    return _affine(h, weight, bias), pull_back


def _affine(h: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    h = h if weight is None else h * weight
    return h if bias is None else h + bias


def _silu_vjp(
    x: Tensor, readout: str, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Callable[[Tensor], ReadoutPullBack]]:
    r = _inverse_rms(x) if readout == "silu_rms" else None
    h = x if r is None else x * r
    a = _affine(h, weight, bias)

    def pull_back(grad: Tensor) -> ReadoutPullBack:
        da = cast(Tensor, _aten.silu_backward(grad, a))
        dh = da if weight is None else da * weight
        dx = dh if r is None else (dh - h * (h * dh).mean(-1, keepdim=True)) * r
        return ReadoutPullBack(dx, None if weight is None else da * h, None if bias is None else da)

    return functional.silu(a), pull_back


def _normaliser(x: Tensor, name: str) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The row-wise functions f(x), as phi or as readout, and g -> J_f(x)^T g."""
    if name == "softmax":
        p = torch.softmax(x, -1)
        return p, lambda grad: cast(Tensor, _aten._softmax_backward_data(grad, p, -1, p.dtype))
    s = functional.silu(x)
    if name == "ln_silu":
        p, mean, rstd = torch.native_layer_norm(s, s.shape[-1:], None, None, LN_EPS)
        return p, lambda grad: cast(Tensor, _aten.silu_backward(_layer_norm_backward(grad, s, mean, rstd), x))
    scale = _inverse_norm(s)
    p = s * scale

    def l2_silu_vjp(grad: Tensor) -> Tensor:
        ds = (grad - p * (p * grad).sum(-1, keepdim=True)) * scale
        return cast(Tensor, _aten.silu_backward(ds, x))

    return p, l2_silu_vjp


def _inverse_rms(x: Tensor) -> Tensor:
    return torch.rsqrt((x * x).mean(-1, keepdim=True) + RMS_EPS)


def _inverse_norm(s: Tensor) -> Tensor:
    return torch.rsqrt((s * s).sum(-1, keepdim=True) + L2_EPS)


def _layer_norm_backward(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    mask = [True, False, False]
    return cast(
        Tensor, _aten.native_layer_norm_backward(grad, x, x.shape[-1:], mean, rstd, None, None, mask)[0]
    )


def _silu_inner_backward(z: Tensor, alpha: Tensor, grad: Tensor, out: tuple[Tensor, Tensor]) -> None:
    sigma = torch.sigmoid(z)
    s = z * sigma
    first = torch.addcmul(sigma + s, sigma, s, value=-1)  # phi' = sigma + s (1 - sigma)
    curvature = _aten.sigmoid_backward(s - alpha, sigma)  # e sigma (1 - sigma)
    slope = torch.sub(z, s, alpha=2).add_(2)  # 2 + z (1 - 2 sigma)
    torch.addcmul(curvature.mul_(slope), first, first, out=out[0]).mul_(grad)
    torch.mul(first.neg_(), grad, out=out[1])


def _softmax_inner_backward(z: Tensor, alpha: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    p = torch.softmax(z, -1)
    e = p - alpha
    gp = (grad * p).sum(-1, keepdim=True)
    t = p * (grad - gp)
    dp = grad * (e - (p * e).sum(-1, keepdim=True)) - e * gp + t
    return p * (dp - (p * dp).sum(-1, keepdim=True)), -t


def _ln_silu_inner_backward(z: Tensor, alpha: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    sigma = torch.sigmoid(z)
    s = z * sigma
    h, mean, rstd = torch.native_layer_norm(s, s.shape[-1:], None, None, LN_EPS)
    e = h - alpha
    t = _layer_norm_backward(e, s, mean, rstd)
    slope = sigma + s * (1 - sigma)  # s'
    big_g = slope * grad
    ag = _layer_norm_backward(big_g, s, mean, rstd)
    dh = ag - rstd * (big_g * (h * e).mean(-1, keepdim=True) + e * (h * big_g).mean(-1, keepdim=True))
    ds = _layer_norm_backward(dh, s, mean, rstd) - rstd * h * (big_g * t).mean(-1, keepdim=True)
    curvature = sigma * (1 - sigma) * (2 + z - 2 * s)  # s''
    return slope * ds + curvature * grad * t, -ag
