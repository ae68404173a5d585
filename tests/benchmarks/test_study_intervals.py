"""The study's intervals and gates: against cases worked by hand, and what they cover when simulated."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.study import intervals
from benchmarks.study.intervals import Draws, Losses, counts, difference, falls

EDGES = (0, 64, 128, 256, 512)


def losses(nats: object, tokens: object = None, *, seeds: tuple[int, ...] | None = None) -> Losses:
    """From [S, B, P, K] sums; a target in every cell unless said otherwise."""
    sums = np.asarray(nats, np.float64)
    targets = np.ones(sums.shape[1:]) if tokens is None else np.asarray(tokens, np.float64)
    names = tuple(f"book {i}" for i in range(sums.shape[1]))
    return Losses(sums, targets, EDGES[: sums.shape[-1]], seeds or tuple(range(len(sums))), names)


def test_means_weigh_books_by_their_targets() -> None:
    found = losses([[[[6.0, 2.0]], [[1.0, 1.0]]]], [[[3.0, 1.0]], [[1.0, 1.0]]])
    assert found.mean == pytest.approx(10 / 6)
    assert found.by_position() == pytest.approx([7 / 4, 3 / 2])


def test_a_constant_difference_has_an_interval_of_no_width() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(4, 1, (3, 2, 8, 4))
    found = difference(losses(base + 0.25), losses(base))
    assert (found.estimate, found.low, found.high) == pytest.approx((0.25, 0.25, 0.25))
    assert found.over == "books x seeds"


def test_two_books_give_the_quarters_that_two_draws_can_give() -> None:
    """Differences 0 and 1 in two books of one part, one seed: means are 0, 1/2, 1 in 1/4, 1/2, 1/4 of the
    resamples, so the percentile interval is [0, 1], widened by sqrt(2) around 1/2."""
    found = difference(losses([[[[0.0]], [[1.0]]]]), losses([[[[0.0]], [[0.0]]]]))
    assert found.estimate == 0.5
    assert (found.low, found.high) == pytest.approx((0.5 - 0.5 * 2**0.5, 0.5 + 0.5 * 2**0.5))
    assert found.over == "books only (one seed)"
    draws = Draws(seeds=1, books=2, parts=1)
    means = draws.total(np.array([[[0.0], [1.0]]])) / draws.total(np.ones((2, 1)))
    shares = [float((means == value).mean()) for value in (0.0, 0.5, 1.0)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.03)


def test_resamples_vary_as_the_theory_says() -> None:
    """With one book, one part and S seeds the variance of a resampled mean is that of the seeds over S."""
    nats = np.array([0.0, 1.0, 5.0]).reshape(3, 1, 1)
    found = Draws(seeds=3, books=1, parts=1, resamples=40_000).total(nats)
    assert found.mean() == pytest.approx(2.0, abs=0.02)
    assert found.var() == pytest.approx(np.var([0.0, 1.0, 5.0]) / 3, rel=0.05)


def test_a_book_drawn_twice_counts_twice_and_draws_its_parts_anew() -> None:
    draws = Draws(seeds=1, books=3, parts=4, resamples=2000)
    targets = draws.total(np.ones((3, 4)))
    assert (targets == 12).all()
    assert (draws.total(np.array([[1.0] * 4, [0.0] * 4, [0.0] * 4])) % 4 == 0).all()


def test_pairs_are_made_of_seeds_that_both_have() -> None:
    rng = np.random.default_rng(0)
    both = rng.normal(4, 1, (3, 2, 4, 2))
    one = losses(both[[2]] + 1.0, seeds=(2,))
    found = difference(one, losses(both))
    assert (found.estimate, found.seeds) == (pytest.approx(1.0), 1)
    with pytest.raises(ValueError, match="cannot be paired"):
        difference(losses(both[[0]], seeds=(7,)), losses(both))
    with pytest.raises(ValueError, match="cannot be paired"):
        difference(losses(both, 2 * np.ones((2, 4, 2))), losses(both))


def flat(early: float, late: float, *, noise: float = 0.0) -> Losses:
    """2 seeds, 3 books, 8 parts of 100 targets at each range."""
    rng = np.random.default_rng(0)
    levels = np.array([early + 1, early, early, late, late])
    nats = 100 * (levels + rng.normal(0, noise, (2, 3, 8, 5)))
    return losses(nats, 100 * np.ones((3, 8, 5)))


def test_gates_need_losses_below_the_bigram_and_lower_late_than_early() -> None:
    good = flat(4.2, 4.0)
    assert falls(good).estimate == pytest.approx(-0.2)
    assert counts(good, bigram=good.mean + 0.2001) == []
    assert "0.20 nats below the bigram's" in counts(good, bigram=good.mean + 0.1999)[0]
    level = flat(4.0, 4.0, noise=0.05)
    assert falls(level).low < 0 < falls(level).high
    (reason,) = counts(level, bigram=9.0)
    assert "from position 512 on" in reason
    assert counts(flat(4.0, 4.1), bigram=9.0)  # worse with more context


def test_positions_that_are_compared_are_64_to_127_and_from_512_on() -> None:
    found = losses([[[[1.0, 2.0, 4.0, 8.0, 16.0]]]])
    early, late = found.at(*intervals.EARLY), found.at(intervals.LATE, np.inf)
    assert (early[0].item(), late[0].item()) == (2.0, 16.0)
    assert (early[1].item(), late[1].item()) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("seeds", "books", "book", "seed", "part", "least", "most"),
    [
        (3, 3, 5, 5, 10, 0.95, 1.0),
        (3, 3, 10, 0, 0, 0.90, 1.0),  # books dominate
        (3, 3, 0, 10, 0, 0.90, 1.0),  # seeds dominate
        (3, 3, 1, 1, 20, 0.95, 1.0),  # parts dominate
        (1, 3, 10, 0, 0, 0.90, 1.0),
        (3, 2, 10, 0, 0, 0.55, 0.70),  # two books: too narrow, as the page says
        (3, 2, 1, 10, 5, 0.75, 0.95),
        (1, 2, 10, 0, 0, 0.55, 0.70),
    ],
)
def test_intervals_cover_what_the_page_says(
    seeds: int, books: int, book: float, seed: float, part: float, least: float, most: float
) -> None:
    """S seeds x B books x 8 parts around a difference of 0, for sources of variation of several sizes."""
    rng, held, times = np.random.default_rng(1), 0, 300
    draws = Draws(seeds=seeds, books=books, parts=8, resamples=400)
    for _ in range(times):
        apart = (
            rng.normal(0, book, (1, books, 1))
            + rng.normal(0, seed, (seeds, 1, 1))
            + rng.normal(0, part, (1, books, 8))
        )
        apart = apart + rng.normal(0, 1, (seeds, books, 1))
        found = draws.interval(float(apart.mean()), draws.total(apart) / draws.total(np.ones((books, 8))))
        held += found.low <= 0 <= found.high
    print(held / times)
    assert least <= held / times <= most
