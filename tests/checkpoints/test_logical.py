"""Flat ranges of a tensor as boxes: every range of every small shape."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from checkpoints.logical import range_boxes

SHAPES = [(), (5,), (1,), (3, 4), (1, 3), (3, 1), (2, 3, 2), (2, 1, 3), (3, 2, 1), (2, 2, 2, 2), (1, 2, 1, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_boxes_of_a_range_hold_its_elements_in_order(shape: tuple[int, ...]):
    whole = torch.arange(math.prod(shape)).view(shape)
    for start, stop in itertools.combinations_with_replacement(range(whole.numel() + 1), 2):
        boxes = range_boxes(shape, start, stop)
        assert all(box.inside(shape) for box in boxes)
        parts = [whole[box.slices_from((0,) * len(shape))] for box in boxes]
        assert [part.shape for part in parts] == [torch.Size(box.shape) for box in boxes]
        found = torch.cat([part.reshape(-1) for part in parts]) if parts else whole.new_empty(0)
        assert found.tolist() == list(range(start, stop))
        assert len(boxes) <= max(1, 2 * len(shape) - 1)


@pytest.mark.parametrize("start, stop", [(-1, 2), (3, 2), (0, 7)])
def test_a_range_outside_the_tensor_is_a_bug(start: int, stop: int):
    with pytest.raises(AssertionError, match="outside"):
        range_boxes((2, 3), start, stop)
