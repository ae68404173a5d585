"""The five stages of the compress operation in chunkwise form: pure functions on tensors, no process groups.

    scan_forward      states at every chunk's start, sequential over chunks; needs no queries
    readout_forward   outputs, parallel over chunks
    readout_backward  everything the output's gradient touches inside its own chunk, parallel
    scan_backward     adjoints of the states, sequential over chunks in reverse
    input_backward    gradients of keys, values, latent targets and gates, parallel

``kernels.chunkwise`` composes them on one device; a composition across devices puts a transfer of the initial
state before scan_forward and of its adjoint before scan_backward. Every stage works chunk by chunk, so
cutting a sequence at a multiple of the chunk size does not change a bit. (On a CPU, at sizes where H C M and
H C C are multiples of 32 times the threads: PyTorch's elementwise functions round the last few numbers of a
range, those that do not fill a vector, differently.)

Shapes (chunk order, kernels.layout): P chunks, H heads, C slots of a chunk, M memory slots, D and V head
widths, N documents by rank. Per chunk and head, rows are tokens; l = cumsum(log beta) inside the chunk, gamma
= step size, S [M, D] and R [M, V] the memories at the chunk's start, S', R' the stale pair (the same
memories, except in a document that a call enters in the middle of a chunk):

    mu_i = e^{l_i};   tail_j = e^{l_C - l_j};   Omega_ij = e^{l_i - l_j} for i >= j, else 0
    U = J_phi(Z)^T (phi(Z) - A),  Z = K S'^T;         W = J_phi(Z2)^T (phi(Z2) - A),  Z2 = V R'^T
    S+ = e^{l_C} S - (gamma U)^T (tail K);            R+ = e^{l_C} R - (gamma W)^T (tail V)
    Yhat = mu Q S^T - ((Q K^T) o Omega) (gamma U);    Y = mu P R - ((P (gamma W)^T) o Omega) V,  P = f(Yhat)

Writing the step size into the rows (X = gamma U, W' = gamma W: "writes") instead of into Omega leaves one
decay matrix for all products, and the gate gradients become row sums. With dX the gradient of X = gamma U:

    dgamma_j = sum_m (dX o U + dW' o W)_jm
    dl_i     = Q_i . dQ_i + P_i . dP_i - gamma_i dgamma_i,  and at the chunk's end  + <S+, dS+> + <R+, dR+>
    dlogbeta = reverse cumsum of dl inside the chunk

because Yhat is linear in Q, Y in P (for fixed states), so the row sums of math.md's G o E plus the mu terms
are Q.dQ and P.dP, and its column sums plus the tau terms are X.dX = gamma dgamma. The end term is written as
sum_j K_j . dK_j (state part) + e^{l_C} <S, dS+>, which needs no S+.

Pads (slots without a token) have log beta = 0, gamma = 0 and zero rows of mu and Omega: they write nothing,
read nothing and receive no gradient. Exponents are masked before exp, so nothing overflows into NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.activations import apply_readout, inner_backward, inner_gradient, readout_vjp
from kernels.layout import PackedLayout
from kernels.matmul import add_product_, product

__all__ = ["Gates", "InputGradients", "Inputs", "Memories", "ReadoutGradients", "ScanGradients", "ScanResult"]
__all__ += [
    "arrange",
    "derive_gates",
    "input_backward",
    "readout_backward",
    "readout_forward",
    "scan_backward",
    "scan_forward",
]

LOG2_E = 1.4426950408889634  # on a CPU, exp2 is several times faster than exp


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
    """What the stages read, in chunk order.

    Attributes:
        query, key: [P, H, C, D]; the queries may be missing where only the scan runs.
        value: [P, H, C, V].
        alpha: [P, H, C, M].
        gates: decay factors and step sizes.
        layout: the chunk grid.
    """

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
        stale: memories the inner gradient is taken at [P, ...]; the same tensors as ``start`` without a stale
            pair.
    """

    final: Memories
    start: Memories
    stale: Memories


@dataclass(frozen=True)
class ReadoutGradients:
    """What the readout alone contributes to each gradient.

    Attributes:
        query, key, value: [P, H, C, .].
        key_write, value_write: gradients of gamma U and gamma W [P, H, C, M].
        key_z, value_z: recomputed pre-activations K S'^T and V R'^T [P, H, C, M].
        key_gradient, value_gradient: recomputed inner gradients U and W [P, H, C, M].
        start: adjoint of the memories at each chunk's start [P, ...].
        log_decay: Q.dQ + P.dP, gradient of the cumulative l [P, H, C].
    """

    query: Tensor
    key: Tensor
    value: Tensor
    key_write: Tensor
    value_write: Tensor
    key_z: Tensor
    value_z: Tensor
    key_gradient: Tensor
    value_gradient: Tensor
    start: Memories
    log_decay: Tensor


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

    The compute type is fp64 where any operand is, else fp32. ``query`` may be None where only the scan will
    run.
    """
    operands = (key, value, alpha) if query is None else (query, key, value, alpha)
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in operands) else torch.float32
    chunks = [layout.to_chunks(x).to(dtype) for x in operands]
    log_decay, step_size = (layout.to_chunks(x[..., None]).to(dtype) for x in (log_decay, step_size))
    return Inputs(
        query=None if query is None else chunks[0],
        key=chunks[-3],
        value=chunks[-2],
        alpha=chunks[-1],
        gates=derive_gates(log_decay, step_size, layout),
        layout=layout,
    )


def derive_gates(log_decay: Tensor, step: Tensor, layout: PackedLayout) -> Gates:
    """Decay factors from log beta and gamma [P, H, C, 1] in chunk order; silences the pads."""
    pads = None if layout.valid is None else ~layout.valid[:, None, :, None]
    if pads is not None:
        log_decay, step = log_decay.masked_fill(pads, 0), step.masked_fill(pads, 0)
    cumulative = log_decay.cumsum(2)
    end = cumulative[:, :, -1:]
    mu = torch.exp(cumulative)
    return Gates(
        log_decay=cumulative.squeeze(-1),
        mu=mu if pads is None else mu.masked_fill(pads, 0),
        tail=torch.exp(end - cumulative),
        total=torch.exp(end),
        step=step,
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
        z = product(x[a:b], at.mT)
        u = inner_gradient(z, inputs.alpha[a:b], phi)
        gradients[a:b] = u
        now.mul_(gates.total[a:b])
        add_product_(now, u.mT, weighted[a:b], -1)
    if stale is None:
        return state, start, start, gradients
    stale_all = start.clone()
    stale_all[: steps[0][1]] = stale
    return state, start, stale_all, gradients


def readout_forward(inputs: Inputs, states: ScanResult, gradients: Memories, *, readout: str) -> Tensor:
    """Outputs [P, H, C, V] from the states and inner gradients of ``scan_forward``; zero on pads."""
    query, gates, start = _query(inputs), inputs.gates, states.start
    decay = _decay_matrix(inputs)
    scores = product(query, inputs.key.mT).mul_(decay)  # (Q K^T) o Omega [P, H, C, C]
    y_hat = product(query * gates.mu, start.key.mT)
    p = apply_readout(add_product_(y_hat, scores, gradients.key * gates.step, -1), readout)
    scores = product(p, (gradients.value * gates.step).mT).mul_(decay)
    return add_product_(product(p * gates.mu, start.value), scores, inputs.value, -1)


def readout_backward(
    inputs: Inputs, states: ScanResult, dy: Tensor, *, phi: str, readout: str
) -> ReadoutGradients:
    """Gradients of the readout for the upstream ``dy`` [P, H, C, V]; recomputes what forward dropped."""
    start, stale = states.start, states.stale
    query, key, value, gates = _query(inputs), inputs.key, inputs.value, inputs.gates
    key_z, value_z = product(key, stale.key.mT), product(value, stale.value.mT)
    u, w = inner_gradient(key_z, inputs.alpha, phi), inner_gradient(value_z, inputs.alpha, phi)
    key_write, value_write = u * gates.step, w * gates.step
    decay = _decay_matrix(inputs)
    scores = product(query, key.mT).mul_(decay)
    scaled_query = query * gates.mu
    y_hat = add_product_(product(scaled_query, start.key.mT), scores, key_write, -1)
    p, pull_back = readout_vjp(y_hat, readout)

    # Second pass: Y = mu P R - ((P W'^T) o Omega) V.
    value_scores = product(p, value_write.mT).mul_(decay)
    dvalue = product(value_scores.mT, dy, -1)
    dscores = product(dy, value.mT).mul_(decay)
    dvalue_write = product(dscores.mT, p, -1)
    dp = add_product_(product(dy, start.value.mT).mul_(gates.mu), dscores, value_write, -1)
    dvalue_start = product((p * gates.mu).mT, dy)

    # First pass: Yhat = mu Q S^T - ((Q K^T) o Omega) U'.
    dy_hat = pull_back(dp)
    dkey_write = product(scores.mT, dy_hat, -1)
    dscores = product(dy_hat, key_write.mT).mul_(decay)
    dquery = add_product_(product(dy_hat, start.key).mul_(gates.mu), dscores, key, -1)
    dkey = product(dscores.mT, query, -1)
    return ReadoutGradients(
        query=dquery,
        key=dkey,
        value=dvalue,
        key_write=dkey_write,
        value_write=dvalue_write,
        key_z=key_z,
        value_z=value_z,
        key_gradient=u,
        value_gradient=w,
        start=Memories(product(dy_hat.mT, scaled_query), dvalue_start),
        log_decay=_row_dot(query, dquery).add_(_row_dot(p, dp)),
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
        stale_adjoint: adjoint of ``states.stale`` from outside (a returned chunk-start pair) [P, ...]; None
            is zero.
    """
    extra = (None, None) if stale_adjoint is None else (stale_adjoint.key, stale_adjoint.value)
    own_pair = states.stale.key is not states.start.key
    key = (inputs.key, grads.key_z, grads.key_write, grads.start.key, final.key, extra[0])
    value = (inputs.value, grads.value_z, grads.value_write, grads.start.value, final.value, extra[1])
    k = _reverse_scan(*key, inputs=inputs, own_pair=own_pair, phi=phi)
    v = _reverse_scan(*value, inputs=inputs, own_pair=own_pair, phi=phi)
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
    z: Tensor,
    readout_write: Tensor,
    start_adjoint: Tensor,
    final: Tensor,
    extra: Tensor | None,
    *,
    inputs: Inputs,
    own_pair: bool,
    phi: str,
) -> _Reverse:
    """One memory; ``extra`` is the part of the stale pair's adjoint that comes from outside."""
    gates, steps = inputs.gates, inputs.layout.steps
    tail_x = x * gates.tail
    adjoint, stale = final.clone(), None  # dS+ of the running documents
    end, write, dz, dalpha = (torch.empty_like(t) for t in (start_adjoint, z, z, z))
    for i, (a, b) in reversed(list(enumerate(steps))):
        now = adjoint[: b - a]
        end[a:b] = now
        step_write = write[a:b].copy_(readout_write[a:b])
        add_product_(step_write, tail_x[a:b], now.mT, -1)
        grad = step_write * gates.step[a:b]
        dz[a:b], dalpha[a:b] = inner_backward(z[a:b], inputs.alpha[a:b], grad, phi)
        now.mul_(gates.total[a:b]).add_(start_adjoint[a:b])
        if i == 0 and own_pair:
            stale = product(dz[a:b].mT, x[a:b])
        else:
            add_product_(now, dz[a:b].mT, x[a:b], 1)
        if extra is not None:
            (now if stale is None else stale).add_(extra[a:b])
    return _Reverse(adjoint, stale, end, write, dz, dalpha)


def input_backward(
    inputs: Inputs, states: ScanResult, grads: ReadoutGradients, adjoints: ScanGradients
) -> InputGradients:
    """Gradients of everything but the queries, parallel over chunks (theirs are ``grads.query``)."""
    gates = inputs.gates
    # dK and dV through S+ = e^{l_C} S - (gamma U)^T (tail K), then the part through Z = K S'^T.
    key_end = product(grads.key_gradient * gates.step, adjoints.end.key, -1).mul_(gates.tail)
    value_end = product(grads.value_gradient * gates.step, adjoints.end.value, -1).mul_(gates.tail)
    dkey = add_product_(grads.key + key_end, adjoints.key_z, states.stale.key, 1)
    dvalue = add_product_(grads.value + value_end, adjoints.value_z, states.stale.value, 1)
    dstep = _row_dot(adjoints.key_write, grads.key_gradient)
    dstep += _row_dot(adjoints.value_write, grads.value_gradient)
    dlog = torch.addcmul(grads.log_decay, dstep, gates.step.squeeze(-1), value=-1)
    kept = _row_dot(states.start.key, adjoints.end.key) + _row_dot(states.start.value, adjoints.end.value)
    written = _row_dot(key_end, inputs.key) + _row_dot(value_end, inputs.value)
    dlog[..., -1] += written.sum(-1) + kept.sum(-1) * gates.total[..., 0, 0]
    dlog = dlog.flip(-1).cumsum(-1).flip(-1)
    return InputGradients(dkey, dvalue, adjoints.alpha, dlog[..., None], dstep[..., None])


def _decay_matrix(inputs: Inputs) -> Tensor:
    """Omega [P, H, C, C]; rows of pads are zero."""
    columns, valid, c = inputs.gates.log_decay * LOG2_E, inputs.layout.valid, inputs.key.shape[2]
    rows = columns if valid is None else columns.masked_fill(~valid[:, None, :], -torch.inf)
    future = torch.full((c, c), -torch.inf, dtype=rows.dtype, device=rows.device).triu_(1)
    return (rows[..., :, None] - columns[..., None, :]).add_(future).exp2_()


def _query(inputs: Inputs) -> Tensor:
    assert inputs.query is not None, "the readout needs queries: arrange() was called with query=None"
    return inputs.query


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)
