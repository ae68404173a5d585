"""Whether ranks that must hold equal weights do: a checksum of every parameter, compared between replicas.

    digest  two wrapping int64 sums over a parameter's bit patterns: plain, and weighted by position
    compare the digests of the ranks that hold copies; the majority is right, two that differ are both named

One flipped bit changes the plain sum, whatever the bit and wherever it is; elements that changed places, the
weighted one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trellis_dist.parallel.mesh import Mesh
from trellis_dist.training.errors import MachineError

__all__ = [
    "Mismatch",
    "ReplicaError",
    "check_replicas",
    "compare",
    "copies",
    "parameter_digests",
    "why_no_copies",
]

PIECE = 1 << 20  # elements that are widened to int64 at a time
# Unsigned words are summed as signed ones: the same bits modulo 2^64 of the sum, a change stays a change.
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ReplicaError(MachineError):
    """Copies of a weight differ: memory or a device is faulty. The last checkpoint was saved before it."""


@dataclass(frozen=True)
class Mismatch:
    """Copies of ``parameter`` that are not equal.

    Attributes:
        ranks: global ranks whose copy differs from the majority's; all holders where there is no majority.
        holders: all ranks that hold the copy.
    """

    parameter: str
    ranks: tuple[int, ...]
    holders: tuple[int, ...]

    @property
    def told(self) -> bool:
        """Whether a majority says who is wrong."""
        return len(self.ranks) < len(self.holders)

    def __str__(self) -> str:
        wrong = ", ".join(map(str, self.ranks))
        if self.told:
            right = len(self.holders) - len(self.ranks)
            return f"{self.parameter} on rank {wrong} differs from its other {right} copies"
        return f"{self.parameter} differs between ranks {wrong} (which is right cannot be told)"


@torch.no_grad()
def parameter_digests(named: Iterable[tuple[str, Tensor]]) -> Tensor:
    """Digests of local tensors of any dtype, on their device: int64 [P, 2], no synchronisation."""
    rows = [_digest(tensor.detach()) for _, tensor in named]
    return torch.stack(rows) if rows else torch.zeros(0, 2, dtype=torch.int64)


def _digest(tensor: Tensor) -> Tensor:
    size = tensor.element_size()
    # A complex element of 16 bytes is two words.
    words = tensor.contiguous().view(-1).view(WORDS[min(size, 8)]) if tensor.numel() else tensor.new_zeros(0)
    sums = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    for first in range(0, words.numel(), PIECE):
        piece = words[first : first + PIECE].long()
        # Odd weights, so that a change of the highest bit is not multiplied away.
        position = torch.arange(first, first + piece.numel(), device=tensor.device, dtype=torch.int64)
        sums += torch.stack([piece.sum(), (piece * (2 * position + 1)).sum()])
    return sums


def compare(gathered: Tensor, parameters: Sequence[tuple[str, Sequence[Sequence[int]]]]) -> list[Mismatch]:
    """Find copies that differ.

    Args:
        gathered: int64 [W, P, 2], every rank's digests.
        parameters: for each of the P parameters its name and the groups of ranks that hold equal copies.
    """
    found = []
    table = gathered.tolist()
    for index, (name, groups) in enumerate(parameters):
        for ranks in groups:
            digests = {rank: tuple(table[rank][index]) for rank in ranks}
            mismatch = _judge(name, digests)
            if mismatch is not None:
                found.append(mismatch)
    return found


def _judge(name: str, digests: Mapping[int, tuple[int, ...]]) -> Mismatch | None:
    counts = Counter(digests.values())
    if len(counts) <= 1:
        return None
    right, most = counts.most_common(1)[0]
    majority = 2 * most > len(digests)
    wrong = tuple(rank for rank, digest in digests.items() if not majority or digest != right)
    return Mismatch(name, wrong, tuple(digests))


def copies(mesh: Mesh, *, divided: Sequence[str], whole_over_tp: bool) -> list[tuple[int, ...]]:
    """Groups of global ranks that hold the same elements of a parameter.

    Args:
        divided: axes of the mesh over which the engine divides it ("dp", "sp"); copies run over the others.
        whole_over_tp: every tensor rank holds the parameter whole.
    """
    apart = set(divided) | (set() if whole_over_tp else {"tp"})
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank in range(mesh.world_size):
        place = {
            "dp": rank // (mesh.sp * mesh.tp),
            "sp": rank // mesh.tp % mesh.sp,
            "tp": rank % mesh.tp,
        }
        groups.setdefault(tuple(place[axis] for axis in sorted(apart)), []).append(rank)
    return [tuple(ranks) for ranks in groups.values() if len(ranks) > 1]


@dataclass(frozen=True)
class _Copy:
    """What this rank holds of a parameter, and the groups of ranks among which it is equal."""

    name: str
    local: Tensor
    groups: list[tuple[int, ...]]


def _held(model: nn.Module, mesh: Mesh) -> list[_Copy]:
    held = []
    for name, parameter in model.named_parameters():
        local, divided = _local(parameter)
        whole = not getattr(parameter, "tensor_model_parallel", False)
        held.append(_Copy(name, local, copies(mesh, divided=divided, whole_over_tp=whole)))
    return held


def _local(parameter: Any) -> tuple[Tensor, tuple[str, ...]]:
    """This rank's part of a parameter, and the axes over which its engine divides it."""
    if hasattr(parameter, "ds_tensor"):  # DeepSpeed's ZeRO 3
        if tuple(parameter.shape) == tuple(parameter.ds_shape):  # small: stays gathered on every rank
            return parameter.detach(), ()
        size = parameter.ds_tensor.numel()
        count = parameter.ds_numel - dist.get_rank(parameter.ds_process_group) * size
        return parameter.ds_tensor.detach().view(-1)[: max(0, count)], ("dp", "sp")  # less the padding
    if hasattr(parameter, "to_local"):  # FSDP's DTensor
        return parameter.detach().to_local(), ("dp",)
    return parameter.detach(), ()


def why_no_copies(model: nn.Module, mesh: Mesh) -> str | None:
    """Why there is nothing to compare, in a sentence; None where some parameter has copies."""
    if any(copy.groups for copy in _held(model, mesh)):
        return None
    if mesh.world_size == 1:
        return "one rank holds everything: no copy to compare with"
    return "weights are divided over every rank: no copy to compare with"


def check_replicas(model: nn.Module, mesh: Mesh, *, step: int) -> None:
    """Compare all copies of the weights of ``model``, an engine's; every rank must call it, between steps.

    One gather of 16 bytes per parameter and rank. Without copies (``why_no_copies``) it does nothing. What
    an engine divides (optimizer state and masters of ZeRO 1 to 3) has no copies and is not looked at.

    Raises:
        ReplicaError: copies differ; the same message on every rank.
    """
    held = [copy for copy in _held(model, mesh) if copy.groups]
    if not held:
        return
    digests = parameter_digests((copy.name, copy.local) for copy in held).cpu()
    gathered = torch.empty(mesh.world_size, *digests.shape, dtype=torch.int64)
    dist.all_gather_into_tensor(gathered.view(-1), digests.view(-1))
    found = compare(gathered, [(copy.name, copy.groups) for copy in held])
    if found:
        raise ReplicaError(_message(found, step))


def _message(found: Sequence[Mismatch], step: int) -> str:
    ranks = sorted({rank for mismatch in found for rank in mismatch.ranks})
    more = f"; and {len(found) - 3} more parameters" if len(found) > 3 else ""
    return (
        f"weights that must be equal differ after step {step}: {'; '.join(map(str, found[:3]))}{more}; "
        f"suspect the memory or device of rank {', '.join(map(str, ranks))} and start again from the last "
        "checkpoint"
    )
