"""Learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from trellis_dist.training.config import ScheduleConfig

__all__ = ["learning_rate"]


def learning_rate(step: int, *, peak: float, steps: int, schedule: ScheduleConfig) -> float:
    """Return the learning rate of optimizer step ``step`` (1 .. ``steps``).

    Warm-up is linear, reaching ``peak`` at step ``warmup_steps``. "cosine" then falls to
    ``final_ratio * peak`` at the last step; "wsd" stays at ``peak`` and falls linearly to the same value over
    the last ``decay_fraction`` of all steps.
    """
    assert step >= 1, f"steps are counted from 1, got {step}"
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    if schedule.kind == "cosine":
        progress = _progress(step, first=schedule.warmup_steps, last=steps)
        share = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        decay_start = max(schedule.warmup_steps, steps - round(schedule.decay_fraction * steps))
        share = 1.0 - _progress(step, first=decay_start, last=steps)
    return peak * (schedule.final_ratio + (1.0 - schedule.final_ratio) * share)


def _progress(step: int, *, first: int, last: int) -> float:
    """Share of the way from step ``first`` (0) to step ``last`` (1), clamped."""
    return min(1.0, max(0.0, (step - first) / max(1, last - first)))
