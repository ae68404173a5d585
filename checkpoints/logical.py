"""Logical tensors: what an engine hands over to be saved, whatever mesh it runs on.

A logical tensor has a name and a global shape; a rank holds boxes of it (offset and shape). Whole tensors and
tensor-parallel slices are boxes, ZeRO's flat fragments a few of them (`range_boxes`), so one format serves
every engine and mesh.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Box", "LogicalTensor", "check_cover", "check_name", "range_boxes"]

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-/]{0,499}")


@dataclass(frozen=True, order=True)
class Box:
    """The part of a tensor from `offset` (inclusive) to `offset + shape` (exclusive), in elements."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def volume(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def inside(self, global_shape: Sequence[int]) -> bool:
        """Whether the box has the dimensions of a tensor of `global_shape` and lies within it."""
        return len(self.offset) == len(self.shape) == len(global_shape) and all(
            start >= 0 and size >= 0 and start + size <= whole
            for start, size, whole in zip(self.offset, self.shape, global_shape, strict=True)
        )

    def intersect(self, other: Box) -> Box | None:
        """The common part of two boxes of one tensor, or None when they share no element."""
        start = tuple(max(a, b) for a, b in zip(self.offset, other.offset, strict=True))
        pairs = zip(self.offset, self.shape, other.offset, other.shape, strict=True)
        stop = tuple(min(a + n, b + m) for a, n, b, m in pairs)
        if any(high <= low for low, high in zip(start, stop, strict=True)):
            return None
        return Box(start, tuple(high - low for low, high in zip(start, stop, strict=True)))

    def slices_from(self, origin: Sequence[int]) -> tuple[slice, ...]:
        """Indices that pick this box out of an array whose first element has the coordinates `origin`."""
        spans = zip(self.offset, self.shape, origin, strict=True)
        return tuple(slice(start - zero, start - zero + size) for start, size, zero in spans)


def check_name(name: str) -> str:
    """`name` if it may name a logical tensor: 1 to 500 letters, digits, `_.-/`. Raises ValueError."""
    if not NAME.fullmatch(name):
        raise ValueError(f"tensor name {name!r}: use 1 to 500 letters, digits, '_', '.', '-', '/'")
    return name


def check_cover(name: str, shape: tuple[int, ...], boxes: Iterable[Box]) -> None:
    """Check that `boxes` tile a tensor of `shape`: each inside, no two overlapping, none missing.

    Disjoint boxes inside the tensor whose volumes add up to its volume cover it.

    Raises:
        ValueError: a box outside, an overlap or a hole; the message names tensor and boxes.
    """
    ordered = sorted(boxes)
    for index, box in enumerate(ordered):
        if not box.inside(shape):
            raise ValueError(f"tensor {name}: slice {box} lies outside the shape {shape}")
        for other in ordered[index + 1 :]:
            if shape and other.offset[0] >= box.offset[0] + box.shape[0]:
                break  # sorted by the first offset: no later box can touch this one
            if box.intersect(other):
                raise ValueError(f"tensor {name}: slices {box} and {other} overlap")
    held, whole = sum(box.volume for box in ordered), math.prod(shape)
    if held != whole:
        raise ValueError(f"tensor {name}: its slices hold {held} of {whole} elements")


def range_boxes(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """Elements [start, stop) of a tensor of `shape`, flattened row by row, as boxes in the same order.

    A flat range cuts the first and the last row it touches, and so in every dimension but the last: at most
    2 * ndim - 1 boxes. A box is contiguous in the flattened tensor, so a view of the range's values holds it.
    """
    assert 0 <= start <= stop <= math.prod(shape), (
        f"[{start}, {stop}) lies outside a tensor of {tuple(shape)}"
    )
    if start == stop:
        return []
    if len(shape) <= 1:
        return [Box((start,) * len(shape), (stop - start,) * len(shape))]
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # the whole rows are [first, last)
    if first > last:
        return _in_row(shape, last, start, stop)
    boxes = _in_row(shape, first - 1, start, first * row) if start % row else []
    if first < last:
        boxes.append(Box((first,) + (0,) * (len(shape) - 1), (last - first, *shape[1:])))
    return boxes + (_in_row(shape, last, last * row, stop) if stop % row else [])


def _in_row(shape: Sequence[int], index: int, start: int, stop: int) -> list[Box]:
    """The boxes of a flat range that lies inside row `index`."""
    begin = index * math.prod(shape[1:])
    inner = range_boxes(shape[1:], start - begin, stop - begin)
    return [Box((index, *box.offset), (1, *box.shape)) for box in inner]


@dataclass(frozen=True)
class LogicalTensor:
    """The box of a logical tensor that this rank owns and will write.

    Attributes:
        name: "model/<parameter>", "master/<parameter>" or "optimizer/<key>/<parameter>".
        global_shape: shape of the whole tensor, the parameter's for everything that belongs to a parameter.
        offset: coordinates of the first element of `local`, one per dimension.
        local: the values, any device; its shape is the box's.
    """

    name: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    local: Tensor

    def __post_init__(self) -> None:
        check_name(self.name)
        if not self.box.inside(self.global_shape):
            raise ValueError(f"tensor {self.name}: slice {self.box} lies outside {tuple(self.global_shape)}")

    @property
    def box(self) -> Box:
        """Where `local` lies in the whole tensor."""
        return Box(tuple(self.offset), tuple(self.local.shape))

    @classmethod
    def whole(cls, name: str, tensor: Tensor) -> LogicalTensor:
        """A tensor that this rank owns entirely."""
        return cls(name, tuple(tensor.shape), (0,) * tensor.dim(), tensor)
