"""Optimizer state as flat fragments: the one form that whole tensors and ZeRO partitions share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from checkpoints.logical import LogicalTensor
    from checkpoints.state import CheckpointReader

__all__ = [
    "Fragment",
    "fragment_tensors",
    "load_moments",
    "load_weights",
    "weight_tensors",
    "whole_fragments",
]


@dataclass(frozen=True)
class Fragment:
    """The part of one parameter's optimizer state that this rank holds.

    Attributes:
        name: the parameter's name in the model.
        numel: elements of the whole parameter.
        start: first element (of the flattened parameter) that this rank holds.
        master: fp32 weights [n], a view that writes through.
        moments: "exp_avg" and "exp_avg_sq" [n], views; empty before the first step and for SGD.
    """

    name: str
    numel: int
    start: int
    master: Tensor
    moments: Mapping[str, Tensor]


def whole_fragments(
    named: Sequence[tuple[str, nn.Parameter]], masters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> Iterator[Fragment]:
    """Yield one fragment per parameter of an optimizer that holds whole tensors (keyed by ``masters``)."""
    for name, parameter in named:
        master = masters[name]
        state = optimizer.state.get(master, {})
        moments = {key: state[key].view(-1) for key in ("exp_avg", "exp_avg_sq") if key in state}
        yield Fragment(name, parameter.numel(), 0, master.detach().view(-1), moments)


def weight_tensors(named: Sequence[tuple[str, nn.Parameter]]) -> Iterator[LogicalTensor]:
    """Yield every weight whole, in its own shape; one rank of the mesh writes them."""
    from checkpoints.logical import LogicalTensor

    for name, parameter in named:
        shape = tuple(parameter.shape)
        yield LogicalTensor(f"model/{name}", shape, (0,) * len(shape), parameter.detach())


def fragment_tensors(fragments: Iterator[Fragment], *, masters: bool) -> Iterator[LogicalTensor]:
    """Yield the flat state this rank owns; ``masters`` where weights and fp32 masters differ."""
    from checkpoints.logical import LogicalTensor

    for fragment in fragments:
        shape, offset = (fragment.numel,), (fragment.start,)
        if masters:
            yield LogicalTensor(f"master/{fragment.name}", shape, offset, fragment.master)
        for key, value in fragment.moments.items():
            yield LogicalTensor(f"optimizer/{key}/{fragment.name}", shape, offset, value)


@torch.no_grad()
def load_weights(
    reader: CheckpointReader, named: Sequence[tuple[str, nn.Parameter]], fragments: Iterator[Fragment]
) -> None:
    """Restore weights and masters, from "master/..." where the checkpoint has it (it holds more digits).

    Raises ``ValueError`` when a parameter is missing or has another shape.
    """
    names = set(reader.names())
    held = {fragment.name: fragment for fragment in fragments}
    for name, parameter in named:
        if f"model/{name}" not in names:
            raise ValueError(f"the checkpoint has no weight {name}: it was saved from another model")
        if tuple(reader.shape(f"model/{name}")) != tuple(parameter.shape):
            found, expected = tuple(reader.shape(f"model/{name}")), tuple(parameter.shape)
            raise ValueError(f"the checkpoint's weight {name} has shape {found}, the model's has {expected}")
        source = f"master/{name}" if f"master/{name}" in names else f"model/{name}"
        value = reader.read(source).reshape(-1)
        parameter.copy_(value.view(parameter.shape))
        if name in held:
            fragment = held[name]
            fragment.master.copy_(value[fragment.start : fragment.start + fragment.master.numel()])


@torch.no_grad()
def load_moments(reader: CheckpointReader, fragments: Iterator[Fragment]) -> None:
    """Fill moments from a checkpoint; each rank reads only the elements it holds."""
    names = set(reader.names())
    for fragment in fragments:
        for key, value in fragment.moments.items():
            name = f"optimizer/{key}/{fragment.name}"
            if name not in names:
                raise ValueError(f"the checkpoint has no {name}: it was trained with another optimizer.kind")
            value.copy_(reader.read(name, offset=(fragment.start,), shape=(value.numel(),)))
