"""The hold-out: no wanted split is ever empty, and else a document's split follows from its hash alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data_pipeline.holdout import SPLITS, Holdout, choose_holdout

hash_sets = st.sets(st.integers(0, 2**64 - 1) | st.integers(0, 9) | st.integers(2**64 - 9, 2**64 - 1))
fractions = st.floats(0, 0.5, exclude_min=True, exclude_max=True)


@given(chosen=hash_sets, validation=fractions, test=st.just(0.0) | fractions)
@example(chosen={0, 1, 2}, validation=0.499, test=0.499)
@example(chosen={2**64 - 1, 2**64 - 2, 2**64 - 3}, validation=1e-300, test=1e-300)
def test_no_wanted_split_is_ever_empty(chosen: set[int], validation: float, test: float) -> None:
    hashes = np.array(sorted(chosen), np.uint64)
    wanted = {0, 1, 2} if test else {0, 1}
    if len(hashes) < len(wanted):
        with pytest.raises(ValueError, match=rf"{len(hashes)} different document.* needs {len(wanted)}"):
            choose_holdout(hashes, validation=validation, test=test)
        return
    holdout = choose_holdout(np.repeat(hashes[::-1], 2), validation=validation, test=test)
    splits = holdout.splits(hashes)
    assert set(splits) == wanted
    by_share = Holdout(first := int(validation * 2**64), first + int(test * 2**64))
    if set(by_share.splits(hashes)) == wanted:
        np.testing.assert_array_equal(splits, by_share.splits(hashes))


def test_a_small_share_of_large_documents_is_not_nothing() -> None:
    """Sixty novels are more than 64 MiB; of a hundred thousand pages a millionth is most often none."""
    draw = np.random.default_rng(0)
    for count, share in ((60, 0.001), (150_000, 1e-7)):
        hashes = draw.integers(2**63, 2**64, count, np.uint64)
        splits = choose_holdout(hashes, validation=share, test=share).splits(hashes)
        assert np.bincount(splits, minlength=len(SPLITS))[1:].tolist() == [1, 1]


def test_in_a_large_corpus_the_thresholds_are_the_shares() -> None:
    hashes = np.random.default_rng(0).integers(0, 2**64, 10_000, np.uint64)
    assert choose_holdout(hashes, validation=0.25, test=0.125) == Holdout(2**62, 2**62 + 2**61)
    assert choose_holdout(hashes[:5000], validation=0.25, test=0.0) == Holdout(2**62, 2**62)
