"""What ranks hold of parameters and optimizer state: the one form that all engines save, load and show.

A tensor-parallel rank holds a local tensor of each parameter (the whole one where tp does not split it). An
engine divides local tensors further, always into flat ranges: whole, ZeRO's partitions, FSDP's rows. In the
parameter's global shape a flat range is a few boxes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from trellis_dist.models.parallel_kind import Shard, shard_of
from trellis_dist.parallel.mesh import Mesh

if TYPE_CHECKING:
    from checkpoints.logical import LogicalTensor
    from checkpoints.state import CheckpointReader

__all__ = [
    "Fragment",
    "Held",
    "check_names",
    "fragment_tensors",
    "held_parameters",
    "load_moments",
    "load_weights",
    "slices",
    "weight_tensors",
    "whole_fragments",
]


@dataclass(frozen=True)
class Held:
    """A trainable parameter as its tensor-parallel rank holds it, noted before an engine divides it.

    Attributes:
        name: the parameter's name in the model.
        parameter: the parameter.
        shape: of the local tensor.
        shard: the global shape, and where the local tensor starts in it.
    """

    name: str
    parameter: nn.Parameter
    shape: tuple[int, ...]
    shard: Shard

    def written_by(self, mesh: Mesh) -> bool:
        """Whether this tp rank writes its local tensor; of those that all hold, the first does."""
        return mesh.tp_rank == 0 or self.shard.shape != self.shape


def held_parameters(model: nn.Module) -> list[Held]:
    """The trainable parameters of ``model``, in its order."""
    named = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return [Held(name, p, tuple(p.shape), shard_of(p)) for name, p in named]


@dataclass(frozen=True)
class Fragment:
    """The flat range of one local tensor whose optimizer state is on this rank.

    Attributes:
        held: the parameter.
        start: first element of the flattened local tensor.
        master: fp32 weights [n], a view that writes through.
        moments: "exp_avg" and "exp_avg_sq" [n], views; empty before the first step and for SGD.
        gradient: of this step, reduced and not clipped [n]; None outside a step.
        weight: the range of the compute weights [n] where they are divided too and are not the masters.
    """

    held: Held
    start: int
    master: Tensor
    moments: Mapping[str, Tensor]
    gradient: Tensor | None = None
    weight: Tensor | None = None

    @property
    def stop(self) -> int:
        """One past the last element."""
        return self.start + self.master.numel()


def whole_fragments(
    held: Sequence[Held],
    masters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    gradients: Mapping[str, Tensor] | None = None,
) -> Iterator[Fragment]:
    """Yield one fragment per parameter of an optimizer over whole local tensors (keyed by ``masters``)."""
    for item in held:
        master = masters[item.name]
        state = optimizer.state.get(master, {})
        moments = {key: state[key].view(-1) for key in ("exp_avg", "exp_avg_sq") if key in state}
        gradient = None if gradients is None else gradients[item.name].reshape(-1)
        yield Fragment(item, 0, master.detach().view(-1), moments, gradient)


def slices(prefix: str, held: Held, start: int, values: Tensor) -> Iterator[LogicalTensor]:
    """``values`` [n], a flat range of a local tensor from ``start``, as boxes of "``prefix``/<parameter>"."""
    from checkpoints.logical import LogicalTensor, range_boxes

    position = 0
    for box in range_boxes(held.shape, start, start + values.numel()):
        part = values.detach()[position : position + box.volume].view(box.shape)
        offset = tuple(a + b for a, b in zip(box.offset, held.shard.offset, strict=True))
        yield LogicalTensor(f"{prefix}/{held.name}", held.shard.shape, offset, part)
        position += box.volume


def weight_tensors(held: Iterable[Held], mesh: Mesh) -> Iterator[LogicalTensor]:
    """Yield the local tensors whole, on the one replica that writes them."""
    if mesh.dp_rank == 0 and mesh.sp_rank == 0:
        for item in held:
            if item.written_by(mesh):
                yield from slices("model", item, 0, item.parameter.detach().reshape(-1))


def fragment_tensors(
    fragments: Iterable[Fragment], mesh: Mesh, *, weights: bool, masters: bool
) -> Iterator[LogicalTensor]:
    """Yield the state this rank owns.

    Args:
        weights: the fragments hold the weights too; they are on no rank whole.
        masters: weights and fp32 masters differ.
    """
    for part in fragments:
        if not part.held.written_by(mesh):
            continue
        if weights:
            values = part.master if part.weight is None else part.weight
            yield from slices("model", part.held, part.start, values)
        if masters:
            yield from slices("master", part.held, part.start, part.master)
        for key, value in part.moments.items():
            yield from slices(f"optimizer/{key}", part.held, part.start, value)


def check_names(reader: CheckpointReader, names: Sequence[str]) -> None:
    """Check that the checkpoint has no weights but those of ``names``: a larger model is another model.

    Tensor-parallel ranks hold slices of all parameters, so every rank knows all names. Raises ``ValueError``.
    """
    known = {f"model/{name}" for name in names}
    strangers = [name for name in reader.names() if name.startswith("model/") and name not in known]
    if strangers:
        raise ValueError(
            f"{reader.path} has {len(strangers)} weights that the model has not ({strangers[0]}): it was "
            "saved from another model"
        )


@torch.no_grad()
def load_weights(
    reader: CheckpointReader, held: Iterable[Held], fragments: Iterable[Fragment], *, whole: bool
) -> None:
    """Restore weights and masters, from "master/..." where the checkpoint has it (it holds more digits).

    With ``whole`` every rank holds its local tensors whole and reads them; else only its fragments.
    Raises ``ValueError`` when a parameter is missing or has another shape.
    """
    names = set(reader.names())
    parts = {part.held.name: part for part in fragments}
    for item in held:
        _check(reader, names, f"model/{item.name}", item, f"weight {item.name}")
        source = f"master/{item.name}" if f"master/{item.name}" in names else f"model/{item.name}"
        part = parts.get(item.name)
        if whole:
            value = reader.read(source, offset=item.shard.offset, shape=item.shape).reshape(-1)
            item.parameter.copy_(value.view(item.shape))
            if part is not None:
                part.master.copy_(value[part.start : part.stop])
        elif part is not None:
            value = _read(reader, source, part)
            part.master.copy_(value)
            if part.weight is not None:
                part.weight.copy_(value)


@torch.no_grad()
def load_moments(reader: CheckpointReader, fragments: Iterable[Fragment]) -> None:
    """Fill moments from a checkpoint; each rank reads only the elements it holds. Raises ``ValueError``."""
    names = set(reader.names())
    for part in fragments:
        for key, value in part.moments.items():
            name = f"optimizer/{key}/{part.held.name}"
            if name not in names:
                raise ValueError(f"the checkpoint has no {name}: it was trained with another optimizer.kind")
            _check(reader, names, name, part.held, name)
            value.copy_(_read(reader, name, part))


def _check(reader: CheckpointReader, names: set[str], name: str, held: Held, what: str) -> None:
    if name not in names:
        raise ValueError(f"the checkpoint has no {what}: it was saved from another model")
    found, expected = tuple(reader.shape(name)), held.shard.shape
    if found != expected:
        raise ValueError(f"the checkpoint's {what} has shape {found}, the model's has {expected}")


def _read(reader: CheckpointReader, name: str, part: Fragment) -> Tensor:
    """The elements of one fragment [n], in its flat order."""
    boxes = slices("read", part.held, part.start, part.master)
    pieces = [reader.read(name, offset=box.offset, shape=box.box.shape).flatten() for box in boxes]
    return torch.cat(pieces) if pieces else part.master.new_empty(0)
