"""The stages of the compress operation in chunkwise form: pure functions on tensors, no process groups.

    scan_forward      states at every chunk's start, sequential over chunks; needs no queries
    rescan            the same again in backward, from what scan_forward says to save
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
widths, F either of them, N documents by rank. There are two passes, each with a memory of its own: keys X = K
into S [M, D], values X = V into R [M, V]; the equations of the second are those of the first with R, W, V for
S, U, K. Per chunk and head, rows are tokens; l = cumsum(log beta) inside the chunk, gamma = step size (each
pass has its own where the caller gives them), S the memory at the chunk's start, S' the stale one (the same,
except in a document that a call enters in the middle of a chunk):

    mu_i = e^{l_i};   tail_j = e^{l_C - l_j};   Omega_ij = e^{l_i - l_j} for i >= j, else 0
    stale        Z = X S'^T;        U = J_phi(Z)^T (phi(Z) - A)
    corrected    Z = mu X S'^T;     B = J_phi(Z)^T (phi(Z) - A) + mu X (S - S')^T
                 T = strictlower((X X^T) o Omega);   U = B - T (gamma U) = L^-1 B,  L = I + T diag(gamma)
    S+ = e^{l_C} S - (gamma U)^T (tail X)
    Yhat = mu Q S^T - ((Q K^T) o Omega) (gamma U);    Y = mu P R - ((P (gamma W)^T) o Omega) V,  P = f(Yhat)

Writing the step size into the rows (U' = gamma U: "writes") instead of into Omega leaves one decay matrix for
all products, and the gate gradients become row sums. With dU' the gradient of the writes and dB that of B
(of U under "stale"),

    dU' = dU'_readout - (tail X) dS+^T - T^T dB;   dB = L^-T gamma (dU' + T^T dB);   dgamma_j = U_j . dU'_j
    dl_i = Q_i . dQ_i + X_i . dXq_i - gamma_i dgamma_i        (P . dP for the second pass)
           and at the chunk's end + <S+, dS+>;                dlogbeta = reverse cumsum of dl inside the chunk

where dXq is what X receives as a reader of the decayed memory (Z and T of "corrected"; nothing under
"stale"). It holds because Yhat is linear in Q, Y in P and B - J_phi(..) in the reading X (for fixed states),
so the row sums of math.md's G o E plus the mu terms are Q.dQ and P.dP, and its column sums plus the tau terms
are U'.dU' = gamma dgamma. The end term is written as sum_j X_j . dX_j (state part) + e^{l_C} <S, dS+>, which
needs no S+.

Pads (slots without a token) have log beta = 0, gamma = 0 and zero rows of mu and Omega: they write nothing,
read nothing and receive no gradient. Exponents are masked before exp, so nothing overflows into NaN.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.activations import ReadoutPullBack, apply_readout, inner_backward, inner_gradient, readout_vjp
from kernels.carry import stale_of_chunks
from kernels.layout import PackedLayout
from kernels.matmul import add_product_, faster, product
from kernels.types import Memories, Operands, Rule

__all__ = ["Adjoint", "Gates", "Inputs", "Pass", "PassReadout", "PassStates", "ReadoutGradients"]
__all__ += ["ScanGradients", "States"]
__all__ += ["arrange", "from_tokens", "input_backward", "readout_backward", "readout_forward", "rescan"]
__all__ += ["scan_backward", "scan_forward", "to_tokens"]

LOG2_E = 1.4426950408889634  # on a CPU, exp2 is several times faster than exp


@dataclass(frozen=True)
class Gates:
    """Decay factors and step sizes of every slot.

    Attributes:
        log_decay: l, cumulative inside the chunk [P, H, C]; flat over pads.
        mu: e^l, 0 on pads [P, H, C, 1].
        tail: e^{l_C - l} [P, H, C, 1].
        total: e^{l_C} [P, H, 1, 1].
        step: gamma, 0 on pads [P, H, C, 1].
        valid: which slots hold a token, bool [P, C]; None when all do.
    """

    log_decay: Tensor
    mu: Tensor
    tail: Tensor
    total: Tensor
    step: Tensor
    valid: Tensor | None

    @staticmethod
    def of(log_decay: Tensor, step: Tensor, layout: PackedLayout) -> Gates:
        """From log beta and gamma [P, H, C, 1] in chunk order; silences the pads."""
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
            valid=layout.valid,
        )

    @functools.cached_property
    def minus_omega(self) -> Tensor:
        """-Omega [P, H, C, C]: every product with Omega is subtracted; rows of pads are zero."""
        columns, valid, c = self.log_decay * LOG2_E, self.valid, self.log_decay.shape[-1]
        rows = columns if valid is None else columns.masked_fill(~valid[:, None, :], -torch.inf)
        future = torch.full((c, c), -torch.inf, dtype=rows.dtype, device=rows.device).triu_(1)
        return (rows[..., :, None] - columns[..., None, :]).add_(future).exp2_().neg_()


@dataclass(frozen=True)
class Pass:
    """One of the two passes: what is written, x [P, H, C, F], and when."""

    x: Tensor
    gates: Gates

    @functools.cached_property
    def overlap(self) -> Tensor:
        """-T = -strictlower((X X^T) o Omega) [P, H, C, C]: what a later token reads of a write."""
        return product(self.x, self.x.mT).mul_(self.gates.minus_omega).tril_(-1)

    @functools.cached_property
    def inverse(self) -> Tensor:
        """(I + T diag(gamma))^-1 [P, H, C, C], by forward substitution."""
        lower = self.overlap * -self.gates.step.mT
        eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device).expand_as(lower)
        inverse: Tensor = torch.linalg.solve_triangular(lower, eye, upper=False, unitriangular=True)
        return inverse


@dataclass(frozen=True)
class Inputs:
    """What the stages read, in chunk order.

    Attributes:
        query: [P, H, C, D]; may be missing where only the scan runs.
        key, value: the two passes.
        alpha: [P, H, C, M].
        weight, bias: affine of the readout [H, 1, M] or None.
        own_decay, own_step: whether the value pass has a decay, a step size of its own.
        layout: the chunk grid.
        rule: which function is computed.
    """

    query: Tensor | None
    key: Pass
    value: Pass
    alpha: Tensor
    weight: Tensor | None
    bias: Tensor | None
    own_decay: bool
    own_step: bool
    layout: PackedLayout
    rule: Rule


@dataclass(frozen=True)
class PassStates:
    """One pass of a forward scan.

    Attributes:
        start: memories before each chunk's first slot [P, H, M, F].
        stale: memories the inner gradient is taken at; the same tensor without a stale pair.
        z: pre-activations Z [P, H, C, M].
        u: inner gradients U [P, H, C, M].
        write: gamma U [P, H, C, M].
    """

    start: Tensor
    stale: Tensor
    z: Tensor
    u: Tensor
    write: Tensor


@dataclass(frozen=True)
class States:
    """A forward scan of both memories.

    Attributes:
        key, value: the two passes.
        saved: the memories to keep for ``rescan``: here those before each document's first token [N, ...].
    """

    key: PassStates
    value: PassStates
    saved: Memories


@dataclass(frozen=True)
class PassReadout:
    """What the readout alone contributes to one pass's gradients.

    Attributes:
        x: of keys or values [P, H, C, F].
        write: of the writes gamma U [P, H, C, M].
        start: of the memories at each chunk's start [P, H, M, F].
        rows: Q.dQ or P.dP, of the cumulative l [P, H, C].
    """

    x: Tensor
    write: Tensor
    start: Tensor
    rows: Tensor


@dataclass(frozen=True)
class ReadoutGradients:
    """Readout gradients: query [P, H, C, D], both passes, and the affine's [H, M] or None."""

    query: Tensor
    key: PassReadout
    value: PassReadout
    weight: Tensor | None
    bias: Tensor | None


@dataclass(frozen=True)
class Adjoint:
    """One pass of the reverse scan.

    Attributes:
        initial: of the initial memories, by rank [N, H, M, F].
        stale: of the initial stale pair; None where the call has none.
        end: of the memories after each chunk [P, H, M, F].
        write: of the writes, but for T^T dB [P, H, C, M].
        b: of B [P, H, C, M]; None under "stale", where nothing else needs it.
        z: of the pre-activations [P, H, C, M].
        alpha: of the latent target [P, H, C, M].
        outside: what a returned chunk-start pair added to the stale memories [P, H, M, F] or None.
    """

    initial: Tensor
    stale: Tensor | None
    end: Tensor
    write: Tensor
    b: Tensor | None
    z: Tensor
    alpha: Tensor
    outside: Tensor | None


@dataclass(frozen=True)
class ScanGradients:
    """A reverse scan of both memories."""

    key: Adjoint
    value: Adjoint

    @property
    def initial(self) -> Memories:
        """Adjoints of the initial memories, by rank [N, ...]."""
        return Memories(self.key.initial, self.value.initial)

    @property
    def stale(self) -> Memories | None:
        """Adjoints of the initial stale pair, by rank; None where the call has none."""
        if self.key.stale is None or self.value.stale is None:
            return None
        return Memories(self.key.stale, self.value.stale)


def arrange(operands: Operands, *, layout: PackedLayout, rule: Rule) -> Inputs:
    """Bring operands in token order to chunk order, in the compute type, and derive the decay factors."""
    dtype = operands.compute_dtype
    query, key, value, alpha = (layout.to_chunks(x).to(dtype) for x in operands[:4])
    decay, step, own_decay, own_step = (
        None if x is None else layout.to_chunks(x[..., None]).to(dtype) for x in operands[4:8]
    )
    assert decay is not None, "only the value pass's gates may be missing"
    assert step is not None, "only the value pass's gates may be missing"
    gates = own = Gates.of(decay, step, layout)
    if own_decay is not None or own_step is not None:
        own = Gates.of(
            decay if own_decay is None else own_decay, step if own_step is None else own_step, layout
        )
    weight, bias = (None if x is None else x.to(dtype)[:, None, :] for x in operands[8:])
    return Inputs(
        query=query,
        key=Pass(key, gates),
        value=Pass(value, own),
        alpha=alpha,
        weight=weight,
        bias=bias,
        own_decay=own_decay is not None,
        own_step=own_step is not None,
        layout=layout,
        rule=rule,
    )


def scan_forward(
    inputs: Inputs, initial: Memories, *, stale: Memories | None = None, last: bool = True
) -> tuple[States, Memories]:
    """Run both memories over the chunks.

    Args:
        inputs: chunk order; the queries are not read.
        initial: memories before each document's first token, by rank [N, ...].
        stale: the stale pair [N', ...] of the documents in the first step, where a call enters inside a
            chunk; None takes ``initial``.
        last: whether the memories after the last tokens are wanted; else they are left unset (here only: the
            Triton form always makes them).

    Returns:
        The states, and the memories after each document's last token, by rank [N, ...].
    """
    pair = (None, None) if stale is None else (stale.key, stale.value)
    key, key_final = _scan(inputs.key, inputs, initial.key, pair[0], last)
    value, value_final = _scan(inputs.value, inputs, initial.value, pair[1], last)
    return States(key, value, initial), Memories(key_final, value_final)


def rescan(inputs: Inputs, saved: Memories, *, stale: Memories | None = None) -> States:
    """The states of ``scan_forward`` from what they saved, bitwise; arguments as there."""
    return scan_forward(inputs, saved, stale=stale)[0]


def from_tokens(inputs: Inputs, x: Tensor) -> Tensor:
    """Token order [B, T, H, F] to the stages' own order and type, here chunk order [P, H, C, F]."""
    return inputs.layout.to_chunks(x).to(inputs.alpha.dtype)


def to_tokens(inputs: Inputs, x: Tensor, like: Tensor) -> Tensor:
    """The stages' own order to token order [B, T, H, F], in the shape and type of ``like``."""
    return inputs.layout.from_chunks(x, like.shape[0]).to(like.dtype).view_as(like)


def _scan(
    own: Pass, inputs: Inputs, initial: Tensor, stale: Tensor | None, last: bool
) -> tuple[PassStates, Tensor]:
    """One memory: its states, and the final ones [N, H, M, F]."""
    gates, corrected = own.gates, inputs.rule.corrected
    weighted = own.x * (gates.tail * -gates.step)  # [P, H, C, F]
    reading = own.x * gates.mu if corrected else own.x
    one = len(inputs.layout.steps) == 1
    start = initial if one else initial.new_empty(own.x.shape[0], *initial.shape[1:])
    z, u, final = (
        torch.empty_like(inputs.alpha),
        torch.empty_like(inputs.alpha),
        initial.new_empty(initial.shape),
    )
    every = (start, reading, inputs.alpha, gates.total, weighted, z, u)
    steps = _by_step(inputs.layout, *every, own.inverse if corrected else own.x)
    if not one:
        steps[0][0].copy_(initial.flatten(0, 1))
    ends = final.flatten(0, 1)
    now, x, _, _, write, _, u_now, inverse = steps[0]
    with faster((x, now.mT), (u_now.mT, write), *([(inverse, u_now)] if corrected else [])):
        for i, (now, x, alpha, total, write, z_now, u_now, inverse) in enumerate(steps):
            at = now if i > 0 or stale is None else stale.flatten(0, 1)
            torch.bmm(x, at.mT, out=z_now)
            inner_gradient(z_now, alpha, inputs.rule.phi, out=u_now)
            if corrected:
                if at is not now:
                    u_now.baddbmm_(x, (now - at).mT)
                u_now.copy_(torch.bmm(inverse, u_now))
            rest = steps[i + 1][0] if i + 1 < len(steps) else now[:0]  # a prefix of the documents goes on
            if len(rest) == len(now):
                torch.mul(now, total, out=rest).baddbmm_(u_now.mT, write)
            elif len(rest) == 0 and last:
                torch.mul(now, total, out=ends[: len(now)]).baddbmm_(u_now.mT, write)
            elif len(rest) > 0:
                after = torch.mul(now, total).baddbmm_(u_now.mT, write)
                rest.copy_(after[: len(rest)])
                ends[len(rest) : len(now)] = after[len(rest) :]
    taken = start if stale is None else stale_of_chunks(start, stale)
    return PassStates(start, taken, z, u, u * gates.step), final


def _by_step(layout: PackedLayout, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Each scan step's part of tensors [P, H, ., .], as [documents x H, ., .]: views, all cut at once."""
    sizes = [(b - a) * tensors[0].shape[1] for a, b in layout.steps]
    return list(zip(*(x.flatten(0, 1).split(sizes) for x in tensors), strict=True))


def readout_forward(inputs: Inputs, states: States) -> Tensor:
    """Outputs [P, H, C, V] from the states of ``scan_forward``; zero on pads."""
    query, key, value = _query(inputs), inputs.key, inputs.value
    scores = product(query, key.x.mT).mul_(key.gates.minus_omega)  # -(Q K^T) o Omega [P, H, C, C]
    y_hat = product(query * key.gates.mu, states.key.start.mT)
    add_product_(y_hat, scores, states.key.write)
    p = apply_readout(y_hat, inputs.rule.readout, inputs.weight, inputs.bias)
    scores = product(p, states.value.write.mT, out=scores).mul_(value.gates.minus_omega)
    return add_product_(product(p * value.gates.mu, states.value.start), scores, value.x)


def readout_backward(inputs: Inputs, states: States, dy: Tensor) -> ReadoutGradients:
    """Gradients of the readout for the upstream ``dy`` [P, H, C, V]; recomputes what forward dropped."""
    query, key, value = _query(inputs), inputs.key, inputs.value
    minus_omega, scaled_query = key.gates.minus_omega, query * key.gates.mu
    key_write = states.key.write
    scores = product(query, key.x.mT).mul_(minus_omega)
    y_hat = add_product_(product(scaled_query, states.key.start.mT), scores, key_write)
    p, pull_back = readout_vjp(y_hat, inputs.rule.readout, inputs.weight, inputs.bias)
    second, dp = _second_pass_backward(value, states.value, p, dy)

    # First pass: Yhat = mu Q S^T - ((Q K^T) o Omega) U'.
    readout = pull_back(dp)
    dy_hat = readout.x
    dkey_write = product(scores.mT, dy_hat)
    dscores = product(dy_hat, key_write.mT, out=scores).mul_(minus_omega)
    dquery = product(dy_hat, states.key.start).mul_(key.gates.mu)
    add_product_(dquery, dscores, key.x)
    first = PassReadout(
        x=product(dscores.mT, query),
        write=dkey_write,
        start=product(dy_hat.mT, scaled_query),
        rows=_row_dot(query, dquery),
    )
    weight, bias = _affine_gradients(readout)
    return ReadoutGradients(dquery, first, second, weight, bias)


def _second_pass_backward(own: Pass, states: PassStates, p: Tensor, dy: Tensor) -> tuple[PassReadout, Tensor]:
    """Y = mu P R - ((P W'^T) o Omega) V: the value pass's part, and dP [P, H, C, M]."""
    mu, minus_omega = own.gates.mu, own.gates.minus_omega
    scores = product(p, states.write.mT).mul_(minus_omega)
    dx = product(scores.mT, dy)
    dscores = product(dy, own.x.mT, out=scores).mul_(minus_omega)
    dwrite = product(dscores.mT, p)
    dp = add_product_(product(dy, states.start.mT).mul_(mu), dscores, states.write)
    return PassReadout(dx, dwrite, product((p * mu).mT, dy), _row_dot(p, dp)), dp


def _affine_gradients(readout: ReadoutPullBack) -> tuple[Tensor | None, Tensor | None]:
    weight, bias = (None if x is None else x.sum((0, 2)) for x in (readout.weight, readout.bias))
    return weight, bias


def scan_backward(
    inputs: Inputs,
    states: States,
    grads: ReadoutGradients,
    final: tuple[Tensor | None, Tensor | None],
    *,
    outside: tuple[Tensor | None, Tensor | None] = (None, None),
) -> ScanGradients:
    """Run the adjoints from the last chunk to the first.

    Args:
        inputs, states, grads: of the stages before.
        final: adjoints of the final memories (key, value), by rank [N, ...]; None is zero.
        outside: adjoints of the stale memories (key, value) from outside (a returned chunk-start pair)
            [P, ...]; None is zero.
    """
    return ScanGradients(
        _reverse_scan(inputs.key, inputs, states.key, grads.key, final[0], outside[0]),
        _reverse_scan(inputs.value, inputs, states.value, grads.value, final[1], outside[1]),
    )


def _reverse_scan(
    own: Pass,
    inputs: Inputs,
    states: PassStates,
    grads: PassReadout,
    final: Tensor | None,
    outside: Tensor | None,
) -> Adjoint:
    """One memory."""
    gates, corrected, pair = own.gates, inputs.rule.corrected, states.stale is not states.start
    reading = own.x * gates.mu if corrected else own.x
    end, write = torch.empty_like(grads.start), grads.write.clone()
    db, dz, dalpha = (torch.empty_like(write) for _ in range(3))
    if final is None:
        final = grads.start.new_zeros(inputs.layout.steps[0][1], *grads.start.shape[1:])
    initial, stale = torch.empty_like(final), torch.zeros_like(final) if pair else None
    taken = (end, own.x * -gates.tail, reading, gates.step, gates.total, states.z, inputs.alpha)
    given = (grads.start, write, db, dz, dalpha, own.inverse if corrected else own.x)
    steps = _by_step(inputs.layout, *taken, *given, end if outside is None else outside)
    handed = 0  # adjoints dS+ that the step behind has handed on; the other documents end here
    now, tail_x, x, *_, db_now, dz_now, _, inverse, _ = steps[0]
    with faster((tail_x, now.mT), (dz_now.mT, x), *([(inverse.mT, db_now)] if corrected else [])):
        for i, step in reversed(list(enumerate(steps))):
            now, tail_x, x, gamma, total, z, alpha, start, write_now, db_now, dz_now, dalpha_now = step[:12]
            now[handed:] = final.flatten(0, 1)[handed : len(now)]
            handed = len(now)
            torch.mul(write_now.baddbmm_(tail_x, now.mT), gamma, out=db_now)
            if corrected:
                db_now.copy_(torch.bmm(step[12].mT, db_now))
            inner_backward(z, alpha, db_now, inputs.rule.phi, out=(dz_now, dalpha_now))
            before = steps[i - 1][0][:handed] if i > 0 else initial.flatten(0, 1)
            torch.addcmul(start, now, total, out=before)
            through = before if i > 0 or stale is None else stale.flatten(0, 1)
            if corrected and through is not before:
                direct = torch.bmm(db_now.mT, x)
                before.add_(direct)
                through.sub_(direct)
            through.baddbmm_(dz_now.mT, x)
            if outside is not None:
                through.add_(step[13])
    return Adjoint(initial, stale, end, write, db if corrected else None, dz, dalpha, outside)


def input_backward(
    inputs: Inputs, states: States, grads: ReadoutGradients, adjoints: ScanGradients
) -> Operands:
    """Gradients of all operands, parallel over chunks.

    Returns:
        q, k, v, alpha [P, H, C, .]; gates [P, H, C, 1]; readout affine [H, M]; None for missing operands.
    """
    dkey, key_log, key_step = _input_backward(inputs.key, states.key, grads.key, adjoints.key)
    dvalue, value_log, value_step = _input_backward(inputs.value, states.value, grads.value, adjoints.value)
    return Operands(
        q=grads.query,
        k=dkey,
        v=dvalue,
        alpha=adjoints.key.alpha + adjoints.value.alpha,
        log_decay=key_log if inputs.own_decay else key_log + value_log,
        step_size=key_step if inputs.own_step else key_step + value_step,
        value_log_decay=value_log if inputs.own_decay else None,
        value_step_size=value_step if inputs.own_step else None,
        readout_weight=grads.weight,
        readout_bias=grads.bias,
    )


def _input_backward(
    own: Pass, states: PassStates, grads: PassReadout, adjoint: Adjoint
) -> tuple[Tensor, Tensor, Tensor]:
    """One pass: gradients of x [P, H, C, F], log beta and gamma [P, H, C, 1]."""
    gates, rows, dwrite = own.gates, grads.rows, adjoint.write
    # dX through S+ = e^{l_C} S - (gamma U)^T (tail X), then the part through Z.
    through_end = product(states.write, adjoint.end).mul_(-gates.tail)
    dx = grads.x + through_end
    if adjoint.b is None:
        add_product_(dx, adjoint.z, states.stale)
    else:
        reading, written = _corrected_input_backward(own, states, adjoint.z, adjoint.b)
        dx.add_(reading).add_(written)
        rows = rows + _row_dot(own.x, reading)
        dwrite = add_product_(dwrite.clone(), own.overlap.mT, adjoint.b)
    dstep = _row_dot(dwrite, states.u)
    dlog = torch.addcmul(rows, dstep, gates.step.squeeze(-1), value=-1)
    kept = _row_dot(states.start, adjoint.end).sum(-1) * gates.total[..., 0, 0]
    if adjoint.b is not None and adjoint.outside is not None:  # the pair left as e^{l_C} S'
        kept = kept + _row_dot(states.stale, adjoint.outside).sum(-1)
    dlog[..., -1] += _row_dot(through_end, own.x).sum(-1) + kept
    dlog = dlog.flip(-1).cumsum(-1).flip(-1)
    return dx, dlog[..., None], dstep[..., None]


def _corrected_input_backward(own: Pass, states: PassStates, dz: Tensor, db: Tensor) -> tuple[Tensor, Tensor]:
    """dX as a reader of the decayed memory and of earlier writes, and as what was written [P, H, C, F]."""
    gates = own.gates
    pairs = product(db, states.write.mT).mul_(gates.minus_omega).tril_(-1)
    reading = product(dz, states.stale)
    if states.stale is not states.start:
        add_product_(reading, db, states.start - states.stale)
    add_product_(reading.mul_(gates.mu), pairs, own.x)
    return reading, product(pairs.mT, own.x)


def _query(inputs: Inputs) -> Tensor:
    assert inputs.query is not None, "the readout needs queries"
    return inputs.query


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)
