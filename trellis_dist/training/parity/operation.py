"""State passing alone, bit by bit: outputs, input gradients and memory adjoints are those of one process."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels import CompressState, compress_kv
from trellis_dist.parallel.mesh import Mesh
from trellis_dist.parallel.segments import Segments
from trellis_dist.parallel.sequence import StatePassing
from trellis_dist.parallel.transfers import Transfers
from trellis_dist.training.parity.compare import Failure, Findings

__all__ = ["compare_operation"]

# Every rank's B L H is a multiple of 32 and every width a multiple of 8: at other sizes CPU routines treat
# what is left over after whole vectors differently (see ``parallel.sequence``).
_ROWS, _HEADS, _WIDTH, _SLOTS, _CHUNK = 2, 4, 16, 24, 8

Memories = tuple[Tensor, Tensor]


def compare_operation(name: str, mesh: Mesh) -> Findings:
    """What this rank of ``mesh`` finds of case ``name``; every sp rank calls it."""
    inputs = _Inputs.draw(mesh.device, length=max(64, _CHUNK * mesh.sp))
    expected = _one_process(inputs, pieces=mesh.sp)
    found = _segment(inputs, mesh)
    findings = Findings(worst={"bits": 0.0})
    for quantity, tensor in found.items():
        want = expected[quantity]
        if quantity in _ALONG_TOKENS:
            want = want.chunk(mesh.sp, dim=1)[mesh.sp_rank]
        elif quantity in _ADJOINTS:
            want = want[mesh.sp_rank - 1]
        if not torch.equal(tensor, want):
            error = float((tensor.double() - want.double()).abs().max())
            findings.worst["bits"] = max(findings.worst["bits"], error if math.isfinite(error) else math.inf)
            findings.failures.append(
                Failure(
                    case=name, quantity=quantity, expected="equal bits", found=f"off by up to {error:.2g}"
                )
            )
    return findings


_NAMES = ("q", "k", "v", "alpha", "log_decay", "step_size")
_ADJOINTS = ("adjoint of key memory", "adjoint of value memory")
_ALONG_TOKENS = {"y", *(f"gradient of {name}" for name in _NAMES)}


@dataclass(frozen=True)
class _Inputs:
    """Operands [B, T, H, .], initial memories, and upstream gradients of y and of the final memories."""

    operands: dict[str, Tensor]
    memories: Memories
    dy: Tensor
    dmemories: Memories

    @classmethod
    def draw(cls, device: torch.device, *, length: int) -> _Inputs:
        generator = torch.Generator().manual_seed(11)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        tokens = (_ROWS, length, _HEADS)
        q, k, v = (torch.nn.functional.normalize(normal(*tokens, _WIDTH), dim=-1) for _ in range(3))
        gates = torch.nn.functional.logsigmoid(normal(*tokens) + 3), torch.sigmoid(normal(*tokens)) / _CHUNK
        operands = dict(zip(_NAMES, (q, k, v, normal(*tokens, _SLOTS), *gates), strict=True))
        shape = (_ROWS, _HEADS, _SLOTS, _WIDTH)
        drawn = [normal(*shape).to(device) for _ in range(4)]
        return cls(
            operands={name: x.to(device) for name, x in operands.items()},
            memories=(drawn[0], drawn[1]),
            dy=normal(*tokens, _WIDTH).to(device),
            dmemories=(drawn[2], drawn[3]),
        )


def _one_process(inputs: _Inputs, *, pieces: int) -> dict[str, Tensor]:
    """Everything of the whole sequence, and the adjoints [pieces - 1, ...] of the memories between pieces."""
    return _run(compress_kv, inputs, piece=0, pieces=1) | _adjoints_between(inputs, pieces)


def _run(operation: Callable[..., Any], inputs: _Inputs, *, piece: int, pieces: int) -> dict[str, Tensor]:
    """Outputs and gradients by name of one of ``pieces`` segments; of memories, those that end there."""
    first, last = piece == 0, piece == pieces - 1
    local = _leaves(x.chunk(pieces, dim=1)[piece] for x in inputs.operands.values())
    initial = _leaves(inputs.memories)
    start = CompressState(initial[0], initial[1])
    y, state = operation(*local, chunk_size=_CHUNK, initial_state=start, output_final_state=True)
    final = (state.key_memory, state.value_memory)
    loss = (y * inputs.dy.chunk(pieces, dim=1)[piece]).sum()
    if last:
        loss = loss + _dot(final, inputs.dmemories)
    gradients = torch.autograd.grad(loss, [*local, *initial])
    found = {"y": y.detach()}
    found |= {f"gradient of {name}": gradient for name, gradient in zip(_NAMES, gradients, strict=False)}
    if first:
        found["gradient of first key memory"], found["gradient of first value memory"] = gradients[-2:]
    if last:
        found["final key memory"], found["final value memory"] = (memory.detach() for memory in final)
    return found


def _adjoints_between(inputs: _Inputs, pieces: int) -> dict[str, Tensor]:
    """What the gradient of the memories between consecutive calls is, [pieces - 1, ...] by name."""
    leaves, outputs, between = _leaves(inputs.operands.values()), [], []
    state: CompressState | None = CompressState(*inputs.memories)
    for part in zip(*(x.chunk(pieces, dim=1) for x in leaves), strict=True):
        y, state = compress_kv(*part, chunk_size=_CHUNK, initial_state=state, output_final_state=True)
        assert state is not None, "the final state was asked for"
        outputs.append(y)
        between.append((state.key_memory, state.value_memory))
    loss = (torch.cat(outputs, dim=1) * inputs.dy).sum() + _dot(between.pop(), inputs.dmemories)
    keys, values = zip(*between, strict=True)
    adjoints = torch.autograd.grad(loss, [*keys, *values])
    key, value = torch.stack(adjoints[: len(keys)]), torch.stack(adjoints[len(keys) :])
    return dict(zip(_ADJOINTS, (key, value), strict=True))


def _segment(inputs: _Inputs, mesh: Mesh) -> dict[str, Tensor]:
    """What this rank computes of its segment, and the adjoints it sends left."""
    transfers = _Recording(mesh)
    operation = StatePassing(transfers, Segments(mesh, chunk_size=_CHUNK))
    found = _run(operation, inputs, piece=mesh.sp_rank, pieces=mesh.sp)
    return found | dict(zip(_ADJOINTS, transfers.sent_left, strict=False))


def _dot(xs: Memories, ys: Memories) -> Tensor:
    return (xs[0] * ys[0]).sum() + (xs[1] * ys[1]).sum()


def _leaves(xs: Iterable[Tensor]) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in xs]


class _Recording(Transfers):
    """Keeps a copy of the last message sent left; the first segment has nobody to send it to."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__(mesh)
        self.sent_left: list[Tensor] = []

    def send_left(self, *tensors: Tensor) -> None:
        """As ``Transfers`` does."""
        if self.mesh.left is not None:
            self.sent_left = [tensor.detach().clone() for tensor in tensors]
        super().send_left(*tensors)
