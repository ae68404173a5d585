"""Retention: old checkpoints are removed only while a newer one is known to be good."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from checkpoints.commit import CheckpointWarning, list_steps, remove_checkpoint
from checkpoints.config import CheckpointConfig
from checkpoints.pins import clear_marks, clear_pins, mark_removal, pinned_steps
from checkpoints.reader import load_run_state
from checkpoints.verify import quick_problems, verify_checkpoint
from trellis_dist.files import REAL, FileSystem

__all__ = ["Retention", "retain", "retention_of", "select"]


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay; pinned ones always do.

    Attributes:
        last: newest sound ones; 0 keeps all.
        every: steps that are a multiple of this; 0: none for that reason.
        best: this many steps that are best by `metric`; 0: none for that reason.
        metric: a name under "metrics" in the run state of a step.
        lower_is_better: whether the smallest values are best.
    """

    last: int = 3
    every: int = 0
    best: int = 0
    metric: str = "loss/validation"
    lower_is_better: bool = True

    def __post_init__(self) -> None:
        """Refuse negative counts."""
        if min(self.last, self.every, self.best) < 0:
            raise ValueError(f"{self}: use 0 or more for last, every and best")


def retention_of(config: CheckpointConfig) -> Retention:
    """The retention that a recipe's checkpoint section asks for."""
    return Retention(
        config.keep, config.keep_every, config.keep_best, config.best_metric, config.best_mode == "min"
    )


def select(
    steps: Collection[int], policy: Retention, metrics: Mapping[int, float], pins: Collection[int]
) -> set[int]:
    """Those of `steps` that stay.

    Args:
        steps: the sound ones.
        policy: what to keep.
        metrics: step -> value of the policy's metric; steps without one, or with NaN, do not compete. Of two
            equal values the later step is better.
        pins: steps that somebody reads.
    """
    if policy.last == 0:
        return set(steps)
    kept = set(sorted(steps)[-policy.last :]) | (set(steps) & set(pins))
    if policy.every:
        kept |= {step for step in steps if step % policy.every == 0}
    sign = 1 if policy.lower_is_better else -1
    measured = [step for step in steps if not math.isnan(metrics.get(step, math.nan))]
    return kept | set(sorted(measured, key=lambda step: (sign * metrics[step], -step))[: policy.best])


def retain(root: Path, policy: Retention, *, file_system: FileSystem = REAL) -> list[Path]:
    """Remove the steps of `root` that `policy` does not keep and nobody pinned.

    One process calls this, the one that saves. Before anything goes, one of the newest `policy.last` is read
    back and verified byte for byte: the only verified checkpoint is never removed. A damaged step newer than
    those is left for a person to look at; an older damaged one goes. What killed removals left is cleared.

    Returns:
        The directories removed, the newest first.

    Raises:
        OSError: a removal failed.
    """
    clear_marks(root, file_system=file_system)
    clear_pins(root, file_system=file_system)
    steps = list_steps(root)
    if policy.last == 0 or len(steps) <= policy.last:
        return []
    sound = [step for step, path in steps.items() if not quick_problems(path)]
    pins = pinned_steps(root)
    kept = select(sound, policy, _metrics(steps, sound, policy), pins) | pins
    newest = sound[: policy.last]
    doomed = [path for step, path in steps.items() if newest and step < newest[-1] and step not in kept]
    if not doomed:
        return []
    if not any(not verify_checkpoint(steps[step]) for step in newest):
        text = f"none of the newest {len(newest)} checkpoints in {root} verifies: nothing older is removed"
        warnings.warn(text, CheckpointWarning, stacklevel=2)
        return []
    return [path for path in doomed if _remove(path, file_system)]


def _remove(path: Path, file_system: FileSystem) -> bool:
    """Remove `path` unless somebody pinned it since it was chosen."""
    with mark_removal(path, file_system=file_system) as free:
        if free:
            remove_checkpoint(path, file_system=file_system)
    return free


def _metrics(steps: Mapping[int, Path], sound: Collection[int], policy: Retention) -> dict[int, float]:
    """Step -> metric, of the steps at which it was measured; nothing is read unless it is asked for."""
    found = {}
    for step in sound if policy.best else ():
        try:
            value = load_run_state(steps[step]).get("metrics", {}).get(policy.metric)
        except (OSError, ValueError, AttributeError):  # damaged, or no object: it does not compete
            continue
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            found[step] = float(value)
    return found
