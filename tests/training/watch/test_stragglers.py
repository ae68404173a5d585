from __future__ import annotations

import functools
import itertools
import random

import pytest

from benchmarks.step_times import RESULT, STEPS
from tests.distributed import gloo_pool
from tests.training.watch.straggler_cases import slow_case
from trellis_dist.files import read_json
from trellis_dist.training.watch.stragglers import Straggler, StragglerDetector

WITHIN = 20  # steps, row 14 of the fault table


@functools.cache
def recorded() -> dict[str, list[list[float]]]:
    """[rank][step] busy seconds of real runs, by name."""
    runs = read_json(RESULT)["runs"]
    return {name: [[us / 1e6 for us in rank] for rank in ranks] for name, ranks in runs.items()}


def feed(ranks: list[list[float]], first: int = 0) -> dict[int, list[Straggler]]:
    """Alarms by step of a detector that sees the steps from ``first``."""
    detector = StragglerDetector(len(ranks))
    found = {
        step: detector.note(step, [times[step] for times in ranks]) for step in range(first, len(ranks[0]))
    }
    return {step: alarms for step, alarms in found.items() if alarms}


def test_the_record_is_whole() -> None:
    assert [(len(ranks), {len(times) for times in ranks}) for ranks in recorded().values()] == [
        (2, {STEPS}),
        (4, {STEPS}),
    ]


def test_a_thousand_clean_steps_raise_no_alarm() -> None:
    assert {name: feed(ranks) for name, ranks in recorded().items()} == {name: {} for name in recorded()}


def alarms_after(ranks: list[list[float]], victim: int, start: int) -> list[int]:
    """Ranks named from 30 steps before ``start``, where ``victim`` becomes half as quick, to 20 after."""
    slowed = [times[: start + WITHIN] for times in ranks]
    slowed[victim] = [t * (2 if i >= start else 1) for i, t in enumerate(slowed[victim])]
    return [one.rank for alarms in feed(slowed, start - 30).values() for one in alarms]


def test_a_rank_slowed_twice_is_named_within_twenty_steps() -> None:
    rng = random.Random(0)
    for size in (2, 3, 4, 8):
        for _ in range(40):
            jitter = [
                [rng.lognormvariate(0, 0.15) * (5 if rng.random() < 0.02 else 1) for _ in range(60)]
                for _ in range(size)
            ]
            victim, start = rng.randrange(size), rng.randrange(30, 40)
            assert alarms_after(jitter, victim, start) == [victim]


def test_so_it_is_from_every_step_of_the_record() -> None:
    for ranks in recorded().values():
        for victim, start in itertools.product(range(len(ranks)), range(30, STEPS - WITHIN)):
            assert alarms_after(ranks, victim, start) == [victim], (victim, start)


def test_in_a_real_run_a_slowed_rank_is_named_on_every_rank() -> None:
    start = 20
    answers = gloo_pool(2).run(slow_case, 1, start, start + WITHIN)
    assert answers[0] == answers[1]
    assert [rank for _, rank in answers[0]] == [1]
    assert answers[0][0][0] >= start


def constant(*seconds: float) -> list[list[float]]:
    return [[own] * 30 for own in seconds]


def test_of_two_ranks_the_slow_one_is_named_and_of_many_all_slow_ones() -> None:
    ((step, alarms),) = feed(constant(1.0, 2.0)).items()
    assert step == 9  # the window is full
    assert [(one.rank, round(one.ratio, 6)) for one in alarms] == [(1, 2.0)]
    ((_, alarms),) = feed(constant(2.0, 1.0, 1.0, 0.9, 3.0)).items()
    assert [(one.rank, round(one.ratio, 6)) for one in alarms] == [(0, 2.0), (4, 3.0)]
    assert feed(constant(1.0, 1.4)) == {}
    assert feed(constant(1.0)) == {}
    assert feed(constant(0.0, 0.0)) == {}


def test_steps_that_are_long_for_all_are_no_alarm() -> None:
    rng = random.Random(3)
    lengths = [rng.choice((1.0, 5.0)) for _ in range(200)]
    assert feed([lengths, [1.2 * t for t in lengths], lengths]) == {}


def test_a_rank_is_announced_once_and_again_only_after_it_recovered() -> None:
    # Slow, on the border, slow, well, slow.
    ratios = [2.0] * 30 + [1.4] * 30 + [2.0] * 30 + [1.0] * 30 + [2.0] * 30
    found = feed([[1.0] * len(ratios), ratios, [1.0] * len(ratios)])
    assert [one.rank for alarms in found.values() for one in alarms] == [1, 1]
    first, second = found
    assert first < 20
    assert 120 <= second < 120 + WITHIN


def test_the_report_has_a_line_for_each_slow_rank_the_slowest_first() -> None:
    detector = StragglerDetector(4, hosts=["a", "b", "c", "d"])
    for step in range(1, 31):
        detector.note(step, [1.0, 2.0, 1.0, 3.0])
    assert detector.report() == [
        "rank 3 (d) takes 3.0 times as long as the others, in the last 30 steps",
        "rank 1 (b) takes 2.0 times as long as the others, in the last 30 steps",
    ]
    for step in range(31, 60):
        detector.note(step, [1.0, 1.0, 1.0, 1.0])
    assert detector.report() == []


def test_a_gather_of_another_size_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="3 times of 2 ranks"):
        StragglerDetector(2).note(1, [1.0, 1.0, 1.0])
