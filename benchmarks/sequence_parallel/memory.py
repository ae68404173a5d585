"""Peak memory of a rank in a training step, and the longest rows whose step fits a budget.

Peak is what the process had resident at most during a step, over what it had before with weights and
optimizer state in place (Linux: VmHWM after a reset). So it counts activations, gradients, temporaries and
the libraries' own scratch, and leaves out what does not depend on the length. Every length has processes of
its own, in which a short step ran before, so that lazily allocated buffers are there. Of sp ranks the one
with the highest peak counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.kernels.memory import _reset_peak, _status
from benchmarks.sequence_parallel.ranks import Ranks
from benchmarks.sequence_parallel.subject import Subject, make_batches

__all__ = ["fit_line", "longest_fitting", "measure_memory"]


def measure_memory(
    subject: Subject, *, lengths: tuple[int, ...], budget: int, tries: int = 4
) -> dict[str, Any]:
    """Peak bytes by length, the line through them, and the longest T within ``budget`` bytes, verified."""
    unit = subject.sp * subject.model.trellis.chunk_size

    def peak(length: int) -> int:
        with Ranks(subject.sp) as ranks:
            return int(max(ranks.run(_peak, subject, length)))

    found = {length: peak(length) for length in lengths}
    longest = longest_fitting(found, peak, budget=budget, unit=unit, tries=tries)
    constant, slope = fit_line(found)
    return {
        "sp": subject.sp,
        "budget": budget,
        "peak": {str(length): found[length] for length in sorted(found)},
        "constant": constant,
        "bytes_per_token": slope,
        "bytes_per_token_of_a_rank": slope * subject.sp,
        "longest": longest,
    }


def fit_line(points: dict[int, int]) -> tuple[float, float]:
    """Least squares: (value at 0, slope)."""
    x = torch.tensor(list(points), dtype=torch.float64)
    y = torch.tensor(list(points.values()), dtype=torch.float64)
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    return float(y.mean() - slope * x.mean()), float(slope)


def longest_fitting(
    points: dict[int, int], peak: Callable[[int], int], *, budget: int, unit: int, tries: int
) -> dict[str, int | None]:
    """The longest multiple of ``unit`` measured within ``budget`` and the shortest measured above it.

    Goes to where the line through ``points`` reaches the budget, then to where the line through the two ends
    of the gap does, and adds what it measures to ``points``; ends after ``tries`` measurements, or when the
    gap is at most a twentieth.
    """
    for _ in range(tries):
        fits, above = _gap(points, budget)
        if above is not None and above - fits <= max(unit, above // 20):
            break
        ends = {n: points[n] for n in (fits, above) if n in points}
        constant, slope = fit_line(ends if len(ends) == 2 else points)
        guess = int((budget - constant) / slope) // unit * unit
        highest = (above or 2 * guess + 2 * unit) - unit
        guess = min(max(guess, fits + unit), highest)
        points[guess] = peak(guess)
    fits, above = _gap(points, budget)
    return {"fits": fits, "too_long": above}


def _gap(points: dict[int, int], budget: int) -> tuple[int, int | None]:
    fits = max((length for length, size in points.items() if size <= budget), default=0)
    return fits, min((length for length, size in points.items() if size > budget), default=None)


def _peak(subject: Subject, length: int) -> int:
    """On one rank: bytes of a step over those before it."""
    engine, vocabulary = subject.build(), subject.model.vocab_size
    short = make_batches(vocabulary, rows=1, length=2 * subject.sp * subject.model.trellis.chunk_size)
    engine.train_step(short, lr=1e-4, valid_tokens=short[0].valid_tokens)
    batches = make_batches(vocabulary, rows=1, length=length)
    before = _reset_peak()
    engine.train_step(batches, lr=1e-4, valid_tokens=length)
    return _status("VmHWM") - before
