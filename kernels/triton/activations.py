# mypy: allow-untyped-defs, allow-incomplete-defs
"""phi, f and their derivatives on tiles; equations in ``kernels.activations``.

Sums and means over slots run along AXIS: 1 for tiles [rows, slots], 0 for [slots, rows]. Tiles are as wide as
the next power of two; ``keep`` marks the real slots of real rows. What is outside enters as zero and leaves
as zero. ``slots`` is M as a float. ``weight`` and ``bias`` are the readout's affine, None where it has none:

    P = weight f(x) + bias
    silu: P = SiLU(weight x + bias);   silu_rms: P = SiLU(weight n + bias), n = x / sqrt(mean x^2 + eps)
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels import activations as portable

__all__ = ["apply_readout", "inner_backward", "inner_gradient", "readout_backward"]

LN_EPS = tl.constexpr(portable.LN_EPS)
L2_EPS = tl.constexpr(portable.L2_EPS)
RMS_EPS = tl.constexpr(portable.RMS_EPS)


@triton.jit
def _sum(x, AXIS: tl.constexpr):
    """Sum over slots, to be broadcast against x."""
    return tl.expand_dims(tl.sum(x, AXIS), AXIS)


@triton.jit
def _tanh(z):
    t = tl.exp(-2.0 * tl.abs(z))
    far = tl.where(z < 0, -1.0, 1.0) * (1.0 - t) / (1.0 + t)
    z2 = z * z
    near = z * (1.0 - z2 * (1.0 / 3.0 - z2 * (2.0 / 15.0 - z2 * (17.0 / 315.0))))
    return tl.where(tl.abs(z) < 0.1, near, far)  # 1 - t cancels near zero


@triton.jit
def _silu_slope(x, sigma):
    return sigma + x * sigma * (1.0 - sigma)


@triton.jit
def _layer_norm(s, keep, slots, AXIS: tl.constexpr):
    """(h, 1 / std)."""
    centred = tl.where(keep, s - _sum(s, AXIS) / slots, 0.0)
    r = tl.rsqrt(_sum(centred * centred, AXIS) / slots + LN_EPS)
    return centred * r, r


@triton.jit
def _layer_norm_backward(x, h, r, keep, slots, AXIS: tl.constexpr):
    """A(x) = r (x - mean x - h mean(h x))."""
    return tl.where(keep, r * (x - _sum(x, AXIS) / slots - h * (_sum(h * x, AXIS) / slots)), 0.0)


@triton.jit
def _softmax(z, keep, AXIS: tl.constexpr):
    z = tl.where(keep, z, -1e30)  # finite: a row may be masked as a whole
    e = tl.exp(z - tl.expand_dims(tl.max(z, AXIS), AXIS))
    return e / _sum(e, AXIS)


@triton.jit
def _slopes(z, alpha, PHI: tl.constexpr):
    """(u, phi', phi'^2 + e phi'') of an elementwise phi, e = phi(z) - alpha; u is 0 where z and alpha are."""
    if PHI == "silu":
        sigma = tl.sigmoid(z)
        rest = 1.0 - sigma
        first = sigma + z * sigma * rest
        second = sigma * rest * (2.0 + z * (rest - sigma))
        e = z * sigma - alpha
        u, curve = e * first, first * first + e * second
    elif PHI == "tanh":
        t = _tanh(z)
        first = 1.0 - t * t
        u = (t - alpha) * first
        curve = first * first - 2.0 * t * u
    else:
        u = z - alpha
        first = tl.full(z.shape, 1.0, tl.float32)
        curve = first
    return u, first, curve


@triton.jit
def inner_gradient(z, alpha, keep, slots, PHI: tl.constexpr, AXIS: tl.constexpr):
    """u = J_phi(z)^T (phi(z) - alpha)."""
    if PHI == "ln_silu" or PHI == "softmax":
        value, _ = _activate(z, keep, slots, PHI, AXIS)
        u = tl.where(keep, _pull_back(z, value - alpha, keep, slots, PHI, AXIS), 0.0)
    else:
        u, _, _ = _slopes(z, alpha, PHI)
    return u


@triton.jit
def inner_backward(z, alpha, grad, keep, slots, PHI: tl.constexpr, AXIS: tl.constexpr):
    """(dz, dalpha) of ``inner_gradient`` for the upstream gradient ``grad``, which is 0 outside ``keep``."""
    if PHI == "ln_silu" or PHI == "softmax":
        dz, dalpha = _rows_backward(z, alpha, grad, keep, slots, PHI, AXIS)
    else:
        _, first, curve = _slopes(z, alpha, PHI)
        dz, dalpha = curve * grad, -first * grad
    return dz, dalpha


@triton.jit
def _rows_backward(z, alpha, grad, keep, slots, PHI: tl.constexpr, AXIS: tl.constexpr):
    """``inner_backward`` of the phi that mix slots."""
    if PHI == "softmax":
        p = _softmax(z, keep, AXIS)
        e = tl.where(keep, p - alpha, 0.0)
        along = _sum(grad * p, AXIS)
        t = p * (grad - along)
        dp = grad * (e - _sum(p * e, AXIS)) - e * along + t
        dz = p * (dp - _sum(p * dp, AXIS))
        dalpha = -t
    else:
        sigma = tl.sigmoid(z)
        s = tl.where(keep, z * sigma, 0.0)
        h, r = _layer_norm(s, keep, slots, AXIS)
        e = tl.where(keep, h - alpha, 0.0)
        t = _layer_norm_backward(e, h, r, keep, slots, AXIS)
        slope = _silu_slope(z, sigma)
        g = tl.where(keep, slope * grad, 0.0)
        ag = _layer_norm_backward(g, h, r, keep, slots, AXIS)
        dh = ag - r * (g * (_sum(h * e, AXIS) / slots) + e * (_sum(h * g, AXIS) / slots))
        ds = _layer_norm_backward(dh, h, r, keep, slots, AXIS) - r * h * (_sum(g * t, AXIS) / slots)
        dz = slope * ds + sigma * (1.0 - sigma) * (2.0 + z - 2.0 * s) * grad * t
        dalpha = -ag
    return tl.where(keep, dz, 0.0), tl.where(keep, dalpha, 0.0)


@triton.jit
def _activate(x, keep, slots, READOUT: tl.constexpr, AXIS: tl.constexpr):
    """f(x) without affine; silu and silu_rms before their SiLU. And the factor that normalised it."""
    if READOUT == "softmax":
        p = _softmax(x, keep, AXIS)
        r = 1.0
    elif READOUT == "silu":
        p = tl.where(keep, x, 0.0)
        r = 1.0
    elif READOUT == "silu_rms":
        x = tl.where(keep, x, 0.0)
        r = tl.rsqrt(_sum(x * x, AXIS) / slots + RMS_EPS)
        p = x * r
    else:
        s = tl.where(keep, x * tl.sigmoid(x), 0.0)
        if READOUT == "ln_silu":
            p, r = _layer_norm(s, keep, slots, AXIS)
        else:
            r = tl.rsqrt(_sum(s * s, AXIS) + L2_EPS)
            p = s * r
    return p, r


@triton.jit
def _pull_back(x, grad, keep, slots, READOUT: tl.constexpr, AXIS: tl.constexpr):
    """J^T grad of ``_activate``."""
    grad = tl.where(keep, grad, 0.0)
    p, r = _activate(x, keep, slots, READOUT, AXIS)
    if READOUT == "softmax":
        dx = p * (grad - _sum(p * grad, AXIS))
    elif READOUT == "silu":
        dx = grad
    elif READOUT == "silu_rms":
        dx = r * (grad - p * (_sum(p * grad, AXIS) / slots))
    else:
        if READOUT == "ln_silu":
            ds = _layer_norm_backward(grad, p, r, keep, slots, AXIS)
        else:
            ds = r * (grad - p * _sum(p * grad, AXIS))
        dx = ds * _silu_slope(x, tl.sigmoid(x))
    return tl.where(keep, dx, 0.0)


@triton.jit
def _affine(p, weight, bias, keep):
    if weight is not None:
        p = p * weight
    if bias is not None:
        p = p + bias
    return tl.where(keep, p, 0.0)


@triton.jit
def apply_readout(x, weight, bias, keep, slots, READOUT: tl.constexpr):
    """P of [rows, slots]."""
    p, _ = _activate(x, keep, slots, READOUT, 1)
    p = _affine(p, weight, bias, keep)
    if READOUT == "silu" or READOUT == "silu_rms":
        p = p * tl.sigmoid(p)
    return p


@triton.jit
def readout_backward(x, weight, bias, grad, keep, slots, READOUT: tl.constexpr):
    """(dx, d affine, n) of ``apply_readout`` at rows x.

    dweight is the sum over rows of d affine * n, dbias that of d affine.
    """
    normal, _ = _activate(x, keep, slots, READOUT, 1)
    grad = tl.where(keep, grad, 0.0)
    if READOUT == "silu" or READOUT == "silu_rms":
        a = _affine(normal, weight, bias, keep)
        grad = grad * _silu_slope(a, tl.sigmoid(a))
    dnormal = grad
    if weight is not None:
        dnormal = grad * weight
    return _pull_back(x, dnormal, keep, slots, READOUT, 1), grad, normal
