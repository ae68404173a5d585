"""Numbers of the samples that a look took, per head; all in fp64, on tensors alone.

Shapes: H heads (of all layers that are measured together), c tokens of the chunk, M slots, D and V head
widths, F either of them. x_t stands for k_t with the key memory S and for v_t with the value memory R.

    norm          |S|, |R|                                                   Frobenius
    rank          exp(-sum p_i log p_i), p = sigma / sum sigma, of the singular values sigma of S, R: the
                  effective rank of Roy and Vetterli (EUSIPCO 2007, equations 3-5); 1 .. min(M, F)
    slots_used    share of the slots m with usage_m >= 0.1 / M, usage_m = sum_t |p_tm| / sum_tm |p_tm|,
                  p_t = f(S_t q_t) what the chunk's tokens read the slots with; 1 / M .. 1
    slot_entropy  -sum usage log usage / log M; 1 where all slots are read alike
    inner_loss    mean over t and m of (phi(S+ x_t) - alpha_t)^2, S+ the memory at the chunk's end: equation
                  (4) of the paper; what predicts nothing has mean alpha^2, about 1 where alpha is normalised
    stale_error   |U - U*| / |U*|: U the inner gradients of the chunk as they are taken, all at its start,
                  U* those of the token recurrence (chunks of 1) from the same start, each at the memory that
                  the tokens before it have made
    stale_cosine  <U, U*> / (|U| |U*|)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import stages
from kernels.activations import apply_readout, inner_gradient
from kernels.layout import PackedLayout
from kernels.types import Memories, Operands, Rule
from trellis_dist.training.probes_sample import LayerSample

__all__ = ["USED", "effective_rank", "measure", "token_gradients"]

USED = 0.1  # of an equal share, from which a slot counts as used
_PHI: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "tanh": torch.tanh,
    "identity": torch.clone,
    "ln_silu": lambda z: apply_readout(z, "ln_silu"),
    "softmax": lambda z: torch.softmax(z, -1),
}
Numbers = dict[str, Tensor]


@torch.no_grad()
def measure(samples: Sequence[LayerSample]) -> list[Numbers]:
    """Numbers [H] of each sample by name, on the CPU; the samples are of one model and micro-batch."""
    heads = [sample.chunk.q.shape[2] for sample in samples]
    found = _of_chunk(_joined(samples))
    for name in ("key", "value"):
        memory = torch.cat([getattr(sample.final, name) for sample in samples]).cpu().double()
        found[f"norm_{name}"] = memory.flatten(1).norm(dim=1)
        found[f"rank_{name}"] = effective_rank(memory)
    parts = {name: x.cpu().split(heads) for name, x in found.items()}
    return [{name: part[i] for name, part in parts.items()} for i in range(len(samples))]


@dataclass(frozen=True)
class _Chunk:
    """One chunk of all layers, their heads side by side; see ``LayerSample``."""

    operands: Operands
    start: Memories
    stale: Memories | None
    rule: Rule


def _joined(samples: Sequence[LayerSample]) -> _Chunk:
    def cat(tensors: Sequence[Tensor | None], dim: int) -> Tensor | None:
        present = [x for x in tensors if x is not None]
        assert len(present) in (0, len(tensors)), "the layers of a model have the same operands"
        return torch.cat(present, dim) if present else None

    columns = list(zip(*(sample.chunk for sample in samples), strict=True))
    operands = Operands(*(cat(x, 2) for x in columns[:8]), *(cat(x, 0) for x in columns[8:]))  # type: ignore[arg-type]
    start = _side_by_side([sample.start for sample in samples])
    stale = [sample.stale for sample in samples if sample.stale is not None]
    return _Chunk(operands, start, _side_by_side(stale) if stale else None, samples[0].rule)


def _side_by_side(pairs: Sequence[Memories]) -> Memories:
    return Memories(torch.cat([pair.key for pair in pairs], 1), torch.cat([pair.value for pair in pairs], 1))


def effective_rank(matrices: Tensor) -> Tensor:
    """Of [H, M, F], fp64 [H]; 0 of a zero matrix, NaN of one that is not finite."""
    finite = matrices.isfinite().flatten(1).all(1)
    x = matrices.masked_fill(~finite[:, None, None], 0.0)
    gram = x @ x.mT if x.shape[1] <= x.shape[2] else x.mT @ x  # several times quicker than singular values
    sigma = torch.linalg.eigvalsh(gram).clamp_min(0.0).sqrt()
    total = sigma.sum(-1, keepdim=True)
    p = sigma / total.clamp_min(torch.finfo(sigma.dtype).tiny)
    rank = torch.exp(torch.special.entr(p).sum(-1)).where(total.squeeze(-1) > 0, 0.0)
    return rank.masked_fill(~finite, math.nan)


def _of_chunk(chunk: _Chunk) -> Numbers:
    size = chunk.operands.q.shape[1]
    layout = PackedLayout.uniform(1, size, size).to(chunk.operands.q.device)
    inputs = stages.arrange(chunk.operands, layout=layout, rule=chunk.rule)
    states, final = stages.scan_forward(inputs, chunk.start, stale=chunk.stale)
    found = _slots(_read_weights(inputs, states).squeeze(0))
    own = token_gradients(inputs, chunk.start, chunk.rule)
    passes = (
        ("key", inputs.key, states.key, final.key),
        ("value", inputs.value, states.value, final.value),
    )
    for (name, one, state, end), true in zip(passes, own, strict=True):
        z = one.x @ end.mT  # [1, H, c, M]
        error = _PHI[chunk.rule.phi](z) - inputs.alpha
        found[f"inner_loss_{name}"] = error.square().mean((-2, -1)).squeeze(0)
        stale = state.u.squeeze(0)
        length = true.flatten(1).norm(dim=1)
        found[f"stale_error_{name}"] = (stale - true).flatten(1).norm(dim=1) / length
        found[f"stale_cosine_{name}"] = F.cosine_similarity(stale.flatten(1), true.flatten(1), eps=1e-300)
    return found


def _read_weights(inputs: stages.Inputs, states: stages.States) -> Tensor:
    """P = f(Yhat) [1, H, c, M], as ``stages.readout_forward`` has it."""
    assert inputs.query is not None, "a sample has queries"
    gates = inputs.key.gates
    scores = (inputs.query @ inputs.key.x.mT) * gates.minus_omega
    y_hat = (inputs.query * gates.mu) @ states.key.start.mT + scores @ states.key.write
    return apply_readout(y_hat, inputs.rule.readout, inputs.weight, inputs.bias)


def _slots(p: Tensor) -> Numbers:
    """Of read weights [H, c, M]."""
    slots = p.shape[-1]
    usage = p.abs().sum(-2)
    usage = usage / usage.sum(-1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)
    entropy = torch.special.entr(usage).sum(-1) / max(math.log(slots), torch.finfo(p.dtype).tiny)
    return {"slots_used": (usage >= USED / slots).double().mean(-1), "slot_entropy": entropy}


def token_gradients(inputs: stages.Inputs, start: Memories, rule: Rule) -> list[Tensor]:
    """Inner gradients of both passes [H, c, M], each token's at the memory that those before it made.

    One chunk per call. This is the recurrence with chunks of 1: z_t = S_{t-1} x_t, under "corrected" of the
    decayed memory, and S_t = beta_t S_{t-1} - gamma_t u_t x_t^T.
    """
    found = []
    for one, memory in ((inputs.key, start.key[0]), (inputs.value, start.value[0])):
        x, alpha, step = one.x[0], inputs.alpha[0], one.gates.step[0]  # [H, c, .]
        decay = one.gates.log_decay[0].diff(dim=-1, prepend=x.new_zeros(len(x), 1)).exp()[..., None, None]
        rows = []
        for t in range(x.shape[1]):
            decayed = decay[:, t] * memory
            z = (decayed if rule.corrected else memory) @ x[:, t, :, None]
            u = inner_gradient(z.squeeze(-1), alpha[:, t], rule.phi)
            memory = torch.baddbmm(decayed, (step[:, t] * u).unsqueeze(-1), x[:, t, None, :], alpha=-1)
            rows.append(u)
        found.append(torch.stack(rows, 1))
    return found
