"""The largest of some errors, in which a NaN counts: Python's own ``max`` passes over it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

__all__ = ["largest"]


def largest(errors: Iterable[float]) -> float:
    """NaN where one of them is, so that a comparison with a bound is false."""
    return float(np.max([*errors]))
