from __future__ import annotations

import json
import random
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from trellis_dist.training.watch.spikes import Spike, SpikeDetector

RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results"


def falling(seed: int, steps: int, noise: float) -> list[float]:
    """From 9 nats towards 3, quickly at first, with noise."""
    rng = random.Random(seed)
    return [3 + 6 / (1 + step / 60) + rng.gauss(0, noise) for step in range(steps)]


def alarms(losses: list[float], **options: float) -> dict[int, Spike]:
    detector = SpikeDetector(**options)  # type: ignore[arg-type]
    found = {step: detector.note(step, loss) for step, loss in enumerate(losses)}
    return {step: spike for step, spike in found.items() if spike}


@given(seed=st.integers(0, 10**6), noise=st.floats(0.001, 0.3))
@settings(max_examples=40, deadline=None)
def test_a_noisy_falling_loss_gives_no_alarm(seed: int, noise: float) -> None:
    assert alarms(falling(seed, 600, noise)) == {}


@given(seed=st.integers(0, 10**6), noise=st.floats(0.01, 0.1), start=st.integers(60, 500))
@settings(max_examples=40, deadline=None)
def test_a_lasting_spike_is_found_within_the_patience(seed: int, noise: float, start: int) -> None:
    losses = falling(seed, 600, noise)
    # Above all that the window holds, the fall included.
    height = max(losses[start - 50 : start]) - losses[start] + 20 * noise
    found = alarms([*losses[:start], *(loss + height for loss in losses[start:])])
    assert min(found) == start + 2
    assert (found[start + 2].steps, found[start + 2].began) == (3, start)


def test_steps_without_a_loss_in_the_middle_do_not_move_the_beginning() -> None:
    detector = SpikeDetector(window=4, patience=3)
    losses = [1.0] * 4 + [9.0, float("nan"), float("nan"), 9.0, 9.0]
    spikes = [detector.note(step, loss) for step, loss in enumerate(losses, start=1)]
    assert spikes[:-1] == [None] * 8
    assert (spikes[-1].began, spikes[-1].steps) == (5, 3)


def test_one_step_alone_is_no_spike_and_does_not_move_the_level() -> None:
    losses = falling(1, 200, 0.02)
    losses[100] = losses[101] = 30.0
    assert alarms(losses) == {}
    assert list(alarms(losses, patience=2)) == [101]


def test_a_spike_that_stays_is_announced_and_becomes_the_level() -> None:
    rng = random.Random(0)
    losses = [3 + rng.gauss(0, 0.02) for _ in range(100)] + [6 + rng.gauss(0, 0.02) for _ in range(300)]
    found = alarms(losses)
    assert min(found) == 102
    assert max(found) < 102 + 60
    assert str(found[102]).startswith("loss 5.9") or str(found[102]).startswith("loss 6.0")


def test_what_is_not_finite_is_left_out() -> None:
    losses = falling(2, 200, 0.02)
    detector = SpikeDetector()
    other = SpikeDetector()
    for step, loss in enumerate(losses):
        detector.note(step, loss)
        other.note(step, loss)
        assert other.note(step, float("nan")) is None
        assert other.note(step, float("inf")) is None
    assert other.state() == detector.state()


def test_losses_that_never_vary_raise_no_alarm_over_a_rounding_error() -> None:
    assert alarms([2.5] * 100 + [2.5001] * 20) == {}
    assert list(alarms([2.5] * 100 + [2.6] * 3)) == [102]


@given(seed=st.integers(0, 1000), cut=st.integers(0, 300))
@settings(max_examples=30, deadline=None)
def test_a_resumed_run_decides_the_same(seed: int, cut: int) -> None:
    rng = random.Random(seed)
    losses = [loss + (5 if rng.random() < 0.1 else 0) for loss in falling(seed, 300, 0.05)]
    losses[200:210] = [9.0] * 10
    whole = SpikeDetector(window=20, patience=2)
    expected = [whole.note(step, loss) for step, loss in enumerate(losses)]
    for place in (cut, 201):  # anywhere, and in the middle of a spike
        before, after = SpikeDetector(window=20, patience=2), SpikeDetector(window=20, patience=2)
        found = [before.note(step, loss) for step, loss in enumerate(losses[:place])]
        after.load(json.loads(json.dumps(before.state())))
        rest = [after.note(step, loss) for step, loss in enumerate(losses[place:], start=place)]
        assert found + rest == expected
    assert any(expected)


def test_after_forget_the_window_fills_again() -> None:
    detector = SpikeDetector(window=4, patience=1)
    for step in range(4):
        detector.note(step, 1.0)
    detector.forget()
    assert [detector.note(step, 9.0) for step in range(4, 8)] == [None] * 4
    assert detector.note(8, 20.0) is not None
