"""The checkpoint section of a recipe refuses what makes no sense, naming key, value and remedy."""

from __future__ import annotations

import pytest

from checkpoints.config import CheckpointConfig


def test_defaults_and_bounds() -> None:
    assert CheckpointConfig().interval >= 1
    assert CheckpointConfig(keep=0).keep == 0
    with pytest.raises(ValueError, match=r"checkpoint\.interval = 0: use 1"):
        CheckpointConfig(interval=0)
    with pytest.raises(ValueError, match=r"checkpoint\.keep = -1: use 0"):
        CheckpointConfig(keep=-1)
