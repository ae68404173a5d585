# mypy: allow-untyped-defs, allow-incomplete-defs
"""phi, f and their derivatives on tiles [rows, slots]; equations in ``kernels.activations``.

Tiles are as wide as the next power of two; ``keep`` marks the M real slots. Padded slots enter as zero and
leave as zero. ``slots`` is M as a float.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["apply_readout", "inner_backward", "inner_gradient", "readout_backward"]

LN_EPS = tl.constexpr(1e-5)
L2_EPS = tl.constexpr(1e-6)


@triton.jit
def _tanh(z):
    t = tl.exp(-2.0 * tl.abs(z))
    far = tl.where(z < 0, -1.0, 1.0) * (1.0 - t) / (1.0 + t)
    z2 = z * z
    near = z * (1.0 - z2 * (1.0 / 3.0 - z2 * (2.0 / 15.0 - z2 * (17.0 / 315.0))))
    return tl.where(tl.abs(z) < 0.1, near, far)  # 1 - t cancels near zero


@triton.jit
def _layer_norm(s, keep, slots):
    """(h, 1 / std) of rows."""
    centred = tl.where(keep, s - (tl.sum(s, 1) / slots)[:, None], 0.0)
    r = tl.rsqrt(tl.sum(centred * centred, 1) / slots + LN_EPS)[:, None]
    return centred * r, r


@triton.jit
def _layer_norm_backward(x, h, r, keep, slots):
    """A(x) = r (x - mean x - h mean(h x))."""
    mean, along = tl.sum(x, 1) / slots, tl.sum(h * x, 1) / slots
    return tl.where(keep, r * (x - mean[:, None] - h * along[:, None]), 0.0)


@triton.jit
def _softmax(z, keep):
    z = tl.where(keep, z, -1e30)  # finite: a row may be masked as a whole
    e = tl.exp(z - tl.max(z, 1)[:, None])
    return e / tl.sum(e, 1)[:, None]


@triton.jit
def inner_gradient(z, alpha, keep, slots, PHI: tl.constexpr):
    """u = J_phi(z)^T (phi(z) - alpha)."""
    if PHI == "silu":
        sigma = tl.sigmoid(z)
        s = z * sigma
        u = (s - alpha) * (sigma + s * (1.0 - sigma))
    elif PHI == "tanh":
        t = _tanh(z)
        u = (t - alpha) * (1.0 - t * t)
    elif PHI == "identity":
        u = z - alpha
    else:
        u = readout_backward(z, apply_readout(z, keep, slots, PHI) - alpha, keep, slots, PHI)
    return tl.where(keep, u, 0.0)


@triton.jit
def inner_backward(z, alpha, grad, keep, slots, PHI: tl.constexpr):
    """(dz, dalpha) of ``inner_gradient`` for the upstream gradient ``grad``."""
    if PHI == "silu":
        sigma = tl.sigmoid(z)
        s = z * sigma
        first = sigma + s * (1.0 - sigma)
        second = sigma * (1.0 - sigma) * (2.0 + z - 2.0 * s)
        dz = (first * first + (s - alpha) * second) * grad
        dalpha = -first * grad
    elif PHI == "tanh":
        t = _tanh(z)
        first = 1.0 - t * t
        dz = (first * first - 2.0 * (t - alpha) * t * first) * grad
        dalpha = -first * grad
    elif PHI == "identity":
        dz = grad
        dalpha = -grad
    elif PHI == "softmax":
        p = _softmax(z, keep)
        e = tl.where(keep, p - alpha, 0.0)
        along = tl.sum(grad * p, 1)[:, None]
        t = p * (grad - along)
        dp = grad * (e - tl.sum(p * e, 1)[:, None]) - e * along + t
        dz = p * (dp - tl.sum(p * dp, 1)[:, None])
        dalpha = -t
    else:
        sigma = tl.sigmoid(z)
        s = z * sigma
        h, r = _layer_norm(s, keep, slots)
        e = tl.where(keep, h - alpha, 0.0)
        t = _layer_norm_backward(e, h, r, keep, slots)
        slope = sigma + s * (1.0 - sigma)
        g = slope * grad
        ag = _layer_norm_backward(g, h, r, keep, slots)
        he, hg = (tl.sum(h * e, 1) / slots)[:, None], (tl.sum(h * g, 1) / slots)[:, None]
        dh = ag - r * (g * he + e * hg)
        gt = (tl.sum(g * t, 1) / slots)[:, None]
        ds = _layer_norm_backward(dh, h, r, keep, slots) - r * h * gt
        dz = slope * ds + sigma * (1.0 - sigma) * (2.0 + z - 2.0 * s) * grad * t
        dalpha = -ag
    return tl.where(keep, dz, 0.0), tl.where(keep, dalpha, 0.0)


@triton.jit
def apply_readout(x, keep, slots, READOUT: tl.constexpr):
    """f(x)."""
    if READOUT == "softmax":
        p = _softmax(x, keep)
    else:
        s = tl.where(keep, x * tl.sigmoid(x), 0.0)
        if READOUT == "ln_silu":
            p, _ = _layer_norm(s, keep, slots)
        else:
            p = s * tl.rsqrt(tl.sum(s * s, 1) + L2_EPS)[:, None]
    return p


@triton.jit
def readout_backward(x, grad, keep, slots, READOUT: tl.constexpr):
    """J_f(x)^T grad."""
    grad = tl.where(keep, grad, 0.0)
    if READOUT == "softmax":
        p = _softmax(x, keep)
        dx = p * (grad - tl.sum(p * grad, 1)[:, None])
    else:
        sigma = tl.sigmoid(x)
        s = tl.where(keep, x * sigma, 0.0)
        if READOUT == "ln_silu":
            h, r = _layer_norm(s, keep, slots)
            ds = _layer_norm_backward(grad, h, r, keep, slots)
        else:
            scale = tl.rsqrt(tl.sum(s * s, 1) + L2_EPS)[:, None]
            ds = scale * (grad - s * scale * tl.sum(s * scale * grad, 1)[:, None])
        dx = ds * (sigma + s * (1.0 - sigma))
    return tl.where(keep, dx, 0.0)
