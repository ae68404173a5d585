"""Learning rates at the points that fix each schedule."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trellis_dist.training.config import ScheduleConfig
from trellis_dist.training.schedule import learning_rate


def rates(steps: int, *points: int, **options: object) -> list[float]:
    schedule = ScheduleConfig(**options)
    return [learning_rate(step, peak=2.0, steps=steps, schedule=schedule) for step in points]


def test_cosine_warms_up_halves_and_ends_at_the_final_ratio():
    got = rates(110, 1, 5, 10, 60, 110, kind="cosine", warmup_steps=10, final_ratio=0.1)
    assert got == pytest.approx([0.2, 1.0, 2.0, 2.0 * (0.1 + 0.9 * 0.5), 0.2])


def test_wsd_is_flat_then_linear():
    got = rates(100, 5, 10, 50, 80, 90, 100, kind="wsd", warmup_steps=10, decay_fraction=0.2, final_ratio=0.1)
    assert got == pytest.approx([1.0, 2.0, 2.0, 2.0, 2.0 * 0.55, 0.2])


def test_no_warmup_and_a_warmup_longer_than_the_run():
    assert rates(10, 1, warmup_steps=0)[0] == pytest.approx(2.0 * (0.1 + 0.45 * (1 + math.cos(math.pi / 10))))
    assert rates(10, 10, warmup_steps=100) == pytest.approx([0.2])


@given(
    kind=st.sampled_from(["cosine", "wsd"]),
    steps=st.integers(1, 300),
    warmup=st.integers(0, 400),
    fraction=st.floats(0.01, 1.0),
    final=st.floats(0.0, 1.0),
)
def test_rates_stay_within_bounds_and_never_rise_after_warmup(kind, steps, warmup, fraction, final):
    got = rates(
        steps,
        *range(1, steps + 1),
        kind=kind,
        warmup_steps=warmup,
        decay_fraction=fraction,
        final_ratio=final,
    )
    assert all(0 <= rate <= 2.0 + 1e-12 for rate in got)
    after = got[warmup:]
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(after))
