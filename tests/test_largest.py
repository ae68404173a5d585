from __future__ import annotations

from tests.largest import largest


def test_a_nan_is_the_largest_wherever_it_stands() -> None:
    assert largest([1e-14, 3e-13]) == 3e-13
    for errors in ([float("nan"), 1e-14], [1e-14, float("nan")]):
        assert not largest(errors) < 1.0
