"""The five stages of the compress operation in chunkwise form: pure functions on tensors, no process groups.

    scan_forward      states at every chunk's start, sequential over chunks; needs no queries
    readout_forward   outputs, parallel over chunks
    readout_backward  everything the output's gradient touches inside its own chunk, parallel
    scan_backward     adjoints of the states, sequential over chunks in reverse
    input_backward    gradients of keys, values, latent targets and gates, parallel

``kernels.chunkwise`` composes them on one device; a composition across devices puts a transfer of the initial state
before scan_forward and of its adjoint before scan_backward. Every stage works chunk by chunk, so cutting a sequence
at a multiple of the chunk size does not change a bit.

Shapes (chunk order, kernels.layout): P chunks, H heads, C slots of a chunk, M memory slots, D and V head widths,
N documents by rank. Per chunk and head, rows are tokens; l = cumsum(log beta) inside the chunk, gamma = step size,
S [M, D] and R [M, V] the memories at the chunk's start, S', R' the stale pair (the same memories, except in a
document that a call enters in the middle of a chunk):

    mu_i = e^{l_i};   tail_j = e^{l_C - l_j};   Omega_ij = e^{l_i - l_j} for i >= j, else 0
    U = J_phi(Z)^T (phi(Z) - A),  Z = K S'^T;         W = J_phi(Z2)^T (phi(Z2) - A),  Z2 = V R'^T
    S+ = e^{l_C} S - (gamma U)^T (tail K);            R+ = e^{l_C} R - (gamma W)^T (tail V)
    Yhat = mu Q S^T - ((Q K^T) o Omega) (gamma U);    Y = mu P R - ((P W'^T) o Omega) V,  P = f(Yhat), W' = gamma W

Writing the step size into the rows (X = gamma U, W' = gamma W: "writes") instead of into Omega leaves one decay
matrix for all products, and the gate gradients become row sums. With dX the gradient of X = gamma U:

    dgamma_j = sum_m (dX o U + dW' o W)_jm
    dl_i     = Q_i . dQ_i + P_i . dP_i - gamma_i dgamma_i,  and at the chunk's end  + <S+, dS+> + <R+, dR+>
    dlogbeta = reverse cumsum of dl inside the chunk

because Yhat is linear in Q, Y in P (for fixed states), so the row sums of math.md's G o E plus the mu terms are
Q.dQ and P.dP, and its column sums plus the tau terms are X.dX = gamma dgamma. The end term is written as
sum_j K_j . dK_j (state part) + e^{l_C} <S, dS+>, which needs no S+.

Pads (slots without a token) have log beta = 0, gamma = 0 and zero rows of mu and Omega: they write nothing,
read nothing and receive no gradient. Exponents are masked before exp, so nothing overflows into NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.activations import apply_readout, inner_backward, inner_gradient
from kernels.activations import readout_backward as activation_backward
from kernels.layout import PackedLayout

__all__ = ["Gates", "InputGradients", "Inputs", "Memories", "ReadoutGradients", "ScanGradients", "ScanResult"]
__all__ += [
    "arrange",
    "input_backward",
    "readout_backward",
    "readout_forward",
    "scan_backward",
    "scan_forward",
]


@dataclass(frozen=True)
class Memories:
    """A pair of memories, one per document or one per chunk: key [., H, M, D], value [., H, M, V]."""

    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class Gates:
    """Decay factors and step sizes of every slot.

    Attributes:
        log_decay: l, cumulative inside the chunk [P, H, C]; flat over pads.
        mu: e^l, 0 on pads [P, H, C, 1].
        tail: e^{l_C - l} [P, H, C, 1].
        total: e^{l_C} [P, H, 1, 1].
        step: gamma, 0 on pads [P, H, C, 1].
    """

    log_decay: Tensor
    mu: Tensor
    tail: Tensor
    total: Tensor
    step: Tensor


@dataclass(frozen=True)
class Inputs:
    """What the stages read, in chunk order: query and key [P, H, C, D], value [P, H, C, V], alpha [P, H, C, M]."""

    query: Tensor | None
    key: Tensor
    value: Tensor
    alpha: Tensor
    gates: Gates
    layout: PackedLayout


@dataclass(frozen=True)
class ScanResult:
    """States of a forward scan.

    Attributes:
        final: memories after each document's last token, by rank [N, ...].
        start: memories before each chunk's first slot [P, ...].
        stale: memories the inner gradient is taken at [P, ...]; the same tensors as ``start`` without a stale pair.
    """

    final: Memories
    start: Memories
    stale: Memories


@dataclass(frozen=True)
class _Writes:
    """Pre-activation z = x M^T, its inner gradient and gamma times that, each [P, H, C, M]."""

    z: Tensor
    gradient: Tensor
    scaled: Tensor


@dataclass(frozen=True)
class ReadoutGradients:
    """What the readout alone contributes to each gradient.

    Attributes:
        query, key, value: [P, H, C, .].
        key_write, value_write: gradients of gamma U and gamma W [P, H, C, M].
        start: adjoint of the memories at each chunk's start [P, ...].
        log_decay: Q.dQ + P.dP, gradient of the cumulative l [P, H, C].
        key_writes, value_writes: the recomputed writes, handed on to the later stages.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    key_write: Tensor
    value_write: Tensor
    start: Memories
    log_decay: Tensor
    key_writes: _Writes
    value_writes: _Writes


@dataclass(frozen=True)
class ScanGradients:
    """Adjoints left by the reverse scan.

    Attributes:
        initial: of the initial memories, by rank [N, ...].
        initial_stale: of the initial stale pair; None where the call has none.
        end: of the memories after each chunk [P, ...].
        key_write, value_write: complete gradients of gamma U and gamma W [P, H, C, M].
        key_z, value_z: gradients of the pre-activations [P, H, C, M].
        alpha: gradient of the latent target, both passes [P, H, C, M].
    """

    initial: Memories
    initial_stale: Memories | None
    end: Memories
    key_write: Tensor
    value_write: Tensor
    key_z: Tensor
    value_z: Tensor
    alpha: Tensor


@dataclass(frozen=True)
class InputGradients:
    """Gradients in chunk order: key, value, alpha [P, H, C, .]; log_decay, step_size [P, H, C, 1]."""

    key: Tensor
    value: Tensor
    alpha: Tensor
    log_decay: Tensor
    step_size: Tensor


def arrange(
    query: Tensor | None,
    key: Tensor,
    value: Tensor,
    alpha: Tensor,
    log_decay: Tensor,
    step_size: Tensor,
    *,
    layout: PackedLayout,
) -> Inputs:
    """Bring inputs in token order [B, T, H, .] (gates [B, T, H]) to chunk order and derive the decay factors.

    The compute type is fp64 where any operand is, else fp32. ``query`` may be None where only the scan will run.
    """
    operands = (key, value, alpha) if query is None else (query, key, value, alpha)
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in operands) else torch.float32
    chunks = [layout.to_chunks(x).to(dtype) for x in operands]
    gates = layout.to_chunks(torch.stack((log_decay.to(dtype), step_size.to(dtype)), -1))
    return Inputs(
        query=None if query is None else chunks[0],
        key=chunks[-3],
        value=chunks[-2],
        alpha=chunks[-1],
        gates=_gates(gates, layout),
        layout=layout,
    )


def _gates(gates: Tensor, layout: PackedLayout) -> Gates:
    """Derive the factors of [P, H, C, 2] (log beta, gamma)."""
    pads = None if layout.valid is None else ~layout.valid[:, None, :, None]
    if pads is not None:
        gates = gates.masked_fill(pads, 0)
    cumulative = gates[..., :1].cumsum(2)
    end = cumulative[:, :, -1:]
    mu = torch.exp(cumulative)
    return Gates(
        log_decay=cumulative.squeeze(-1),
        mu=mu if pads is None else mu.masked_fill(pads, 0),
        tail=torch.exp(end - cumulative),
        total=torch.exp(end),
        step=gates[..., 1:].contiguous(),
    )


def scan_forward(
    inputs: Inputs, initial: Memories, *, phi: str, stale: Memories | None = None
) -> tuple[ScanResult, Memories]:
    """Run both memories over the chunks.

    Args:
        inputs: chunk order; the queries are not read.
        initial: memories before each document's first token, by rank [N, ...].
        phi: inner nonlinearity.
        stale: the stale pair [N, ...] of documents entered inside a chunk; None takes ``initial``.

    Returns:
        The states, and the inner gradients (U, W) [P, H, C, M] for ``readout_forward``.
    """
    stale_key, stale_value = (None, None) if stale is None else (stale.key, stale.value)
    key = _scan(inputs.key, inputs, initial.key, stale_key, phi)
    value = _scan(inputs.value, inputs, initial.value, stale_value, phi)
    final, start, stale_all, gradients = (Memories(k, v) for k, v in zip(key, value, strict=True))
    return ScanResult(final, start, stale_all), gradients


def _scan(
    x: Tensor, inputs: Inputs, initial: Tensor, stale: Tensor | None, phi: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One memory: (final [N, H, M, F], start and stale [P, H, M, F], inner gradients [P, H, C, M])."""
    gates, steps = inputs.gates, inputs.layout.steps
    weighted = x * (gates.tail * gates.step)  # [P, H, C, F]
    state = initial.clone()
    start = state.new_empty(x.shape[0], *state.shape[1:])
    gradients = torch.empty_like(inputs.alpha)
    for i, (a, b) in enumerate(steps):
        now = state[: b - a]  # the documents still running are a prefix
        start[a:b] = now
        at = stale[: b - a] if i == 0 and stale is not None else now
        z = _bmm(x[a:b], at.mT)
        u = inner_gradient(z, inputs.alpha[a:b], phi)
        gradients[a:b] = u
        now.mul_(gates.total[a:b])
        _baddbmm_(now, u.mT, weighted[a:b], -1)
    if stale is None:
        return state, start, start, gradients
    stale_all = start.clone()
    stale_all[: steps[0][1]] = stale
    return state, start, stale_all, gradients


def readout_forward(inputs: Inputs, states: ScanResult, gradients: Memories, *, readout: str) -> Tensor:
    """Outputs [P, H, C, V] from the states and inner gradients of ``scan_forward``; zero on pads."""
    query, gates = _query(inputs), inputs.gates
    decay = _decay_matrix(inputs)
    scores = _bmm(query, inputs.key.mT).mul_(decay)  # (Q K^T) o Omega [P, H, C, C]
    y_hat = _bmm(query * gates.mu, states.start.key.mT)
    p = apply_readout(_baddbmm_(y_hat, scores, gradients.key * gates.step, -1), readout)
    scores = _bmm(p, (gradients.value * gates.step).mT).mul_(decay)
    y = _bmm(p * gates.mu, states.start.value)
    return _baddbmm_(y, scores, inputs.value, -1)


def readout_backward(
    inputs: Inputs, states: ScanResult, dy: Tensor, *, phi: str, readout: str
) -> ReadoutGradients:
    """Gradients of the readout for the upstream gradient ``dy`` [P, H, C, V]; recomputes what forward dropped."""
    query, key, value, gates = _query(inputs), inputs.key, inputs.value, inputs.gates
    key_writes = _recompute(key, inputs, states.stale.key, phi)
    value_writes = _recompute(value, inputs, states.stale.value, phi)
    decay = _decay_matrix(inputs)
    scores = _bmm(query, key.mT).mul_(decay)
    scaled_query = query * gates.mu
    y_hat = _baddbmm_(_bmm(scaled_query, states.start.key.mT), scores, key_writes.scaled, -1)
    p = apply_readout(y_hat, readout)

    # Second pass: Y = mu P R - ((P W'^T) o Omega) V.
    value_scores = _bmm(p, value_writes.scaled.mT).mul_(decay)
    dvalue = _bmm(value_scores.mT, dy).neg_()
    dscores = torch.bmm(_flat(dy), _flat(value).mT, out=_flat(value_scores)).view_as(decay).mul_(decay)
    dvalue_write = _bmm(dscores.mT, p).neg_()
    dp = _baddbmm_(_bmm(dy, states.start.value.mT).mul_(gates.mu), dscores, value_writes.scaled, -1)
    dvalue_start = _bmm((p * gates.mu).mT, dy)

    # First pass: Yhat = mu Q S^T - ((Q K^T) o Omega) U'.
    dy_hat = activation_backward(y_hat, dp, readout)
    dkey_write = _bmm(scores.mT, dy_hat).neg_()
    dscores = (
        torch.bmm(_flat(dy_hat), _flat(key_writes.scaled).mT, out=_flat(dscores)).view_as(decay).mul_(decay)
    )
    dquery = _baddbmm_(_bmm(dy_hat, states.start.key).mul_(gates.mu), dscores, key, -1)
    return ReadoutGradients(
        query=dquery,
        key=_bmm(dscores.mT, query).neg_(),
        value=dvalue,
        key_write=dkey_write,
        value_write=dvalue_write,
        start=Memories(_bmm(dy_hat.mT, scaled_query), dvalue_start),
        log_decay=_row_dot(query, dquery) + _row_dot(p, dp),
        key_writes=key_writes,
        value_writes=value_writes,
    )


def scan_backward(
    inputs: Inputs,
    states: ScanResult,
    grads: ReadoutGradients,
    final: Memories,
    *,
    phi: str,
    stale_adjoint: Memories | None = None,
) -> ScanGradients:
    """Run the adjoints from the last chunk to the first.

    Args:
        inputs, states, grads: of the stages before.
        final: adjoint of the final memories, by rank [N, ...].
        phi: inner nonlinearity.
        stale_adjoint: adjoint of ``states.stale`` from outside (a returned chunk-start pair) [P, ...]; None is zero.
    """
    extra_key, extra_value = (
        (None, None) if stale_adjoint is None else (stale_adjoint.key, stale_adjoint.value)
    )
    own_pair = states.stale.key is not states.start.key
    k = _reverse_scan(
        inputs.key,
        inputs,
        grads.key_writes,
        grads.key_write,
        grads.start.key,
        final.key,
        extra_key,
        own_pair,
        phi,
    )
    v = _reverse_scan(
        inputs.value,
        inputs,
        grads.value_writes,
        grads.value_write,
        grads.start.value,
        final.value,
        extra_value,
        own_pair,
        phi,
    )
    return ScanGradients(
        initial=Memories(k.initial, v.initial),
        initial_stale=None if k.stale is None or v.stale is None else Memories(k.stale, v.stale),
        end=Memories(k.end, v.end),
        key_write=k.write,
        value_write=v.write,
        key_z=k.z,
        value_z=v.z,
        alpha=k.alpha.add_(v.alpha),
    )


@dataclass(frozen=True)
class _Reverse:
    initial: Tensor
    stale: Tensor | None
    end: Tensor
    write: Tensor
    z: Tensor
    alpha: Tensor


def _reverse_scan(
    x: Tensor,
    inputs: Inputs,
    writes: _Writes,
    readout_write: Tensor,
    start_adjoint: Tensor,
    final: Tensor,
    extra: Tensor | None,
    own_pair: bool,
    phi: str,
) -> _Reverse:
    gates, steps = inputs.gates, inputs.layout.steps
    tail_x = x * gates.tail
    adjoint, stale = final.clone(), None  # dS+ of the running documents
    end, write, dz, dalpha = (torch.empty_like(t) for t in (start_adjoint, writes.z, writes.z, writes.z))
    for i, (a, b) in reversed(list(enumerate(steps))):
        now = adjoint[: b - a]
        end[a:b] = now
        step_write = write[a:b].copy_(readout_write[a:b])
        _baddbmm_(step_write, tail_x[a:b], now.mT, -1)
        grad = step_write * gates.step[a:b]
        dz[a:b], dalpha[a:b] = inner_backward(writes.z[a:b], inputs.alpha[a:b], grad, phi)
        now.mul_(gates.total[a:b]).add_(start_adjoint[a:b])
        if i == 0 and own_pair:
            stale = _bmm(dz[a:b].mT, x[a:b])
        else:
            _baddbmm_(now, dz[a:b].mT, x[a:b], 1)
        if extra is not None:
            (now if stale is None else stale).add_(extra[a:b])
    return _Reverse(adjoint, stale, end, write, dz, dalpha)


def input_backward(
    inputs: Inputs, states: ScanResult, grads: ReadoutGradients, adjoints: ScanGradients
) -> InputGradients:
    """Gradients of everything but the queries, parallel over chunks (theirs are ``grads.query``)."""
    gates = inputs.gates
    # The part of dK, dV that goes through S+ = e^{l_C} S - (gamma U)^T (tail K), and the part through Z = K S'^T.
    key_end = _bmm(grads.key_writes.scaled, adjoints.end.key).mul_(gates.tail).neg_()
    value_end = _bmm(grads.value_writes.scaled, adjoints.end.value).mul_(gates.tail).neg_()
    dkey = _baddbmm_(grads.key + key_end, adjoints.key_z, states.stale.key, 1)
    dvalue = _baddbmm_(grads.value + value_end, adjoints.value_z, states.stale.value, 1)
    dstep = _row_dot(adjoints.key_write, grads.key_writes.gradient)
    dstep += _row_dot(adjoints.value_write, grads.value_writes.gradient)
    dlog = torch.addcmul(grads.log_decay, dstep, gates.step.squeeze(-1), value=-1)
    through_state = _row_dot(states.start.key, adjoints.end.key) + _row_dot(
        states.start.value, adjoints.end.value
    )
    at_end = (_row_dot(key_end, inputs.key) + _row_dot(value_end, inputs.value)).sum(-1)
    dlog[..., -1] += at_end + through_state.sum(-1) * gates.total[..., 0, 0]
    dlog = dlog.flip(-1).cumsum(-1).flip(-1)
    return InputGradients(dkey, dvalue, adjoints.alpha, dlog[..., None], dstep[..., None])


def _recompute(x: Tensor, inputs: Inputs, stale: Tensor, phi: str) -> _Writes:
    z = _bmm(x, stale.mT)
    gradient = inner_gradient(z, inputs.alpha, phi)
    return _Writes(z, gradient, gradient * inputs.gates.step)


def _decay_matrix(inputs: Inputs) -> Tensor:
    """Omega [P, H, C, C]; rows of pads are zero."""
    cumulative, layout = inputs.gates.log_decay, inputs.layout
    rows = cumulative
    if layout.valid is not None:
        rows = cumulative.masked_fill(~layout.valid[:, None, :], -torch.inf)
    c = layout.chunk_size
    future = torch.full((c, c), -torch.inf, dtype=rows.dtype, device=rows.device).triu_(1)
    return (rows[..., :, None] - cumulative[..., None, :]).add_(future).exp_()


def _query(inputs: Inputs) -> Tensor:
    assert inputs.query is not None, "the readout needs queries: arrange() was called with query=None"
    return inputs.query


def _flat(x: Tensor) -> Tensor:
    """[P, H, i, j] to [P * H, i, j]; a view, also of a transposed matrix."""
    return x.flatten(0, 1)


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b per chunk and head."""
    return torch.bmm(_flat(a), _flat(b)).view(*a.shape[:-1], b.shape[-1])


def _baddbmm_(total: Tensor, a: Tensor, b: Tensor, sign: int) -> Tensor:
    """total += sign * a @ b per chunk and head, in place."""
    _flat(total).baddbmm_(_flat(a), _flat(b), alpha=sign)
    return total


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)
