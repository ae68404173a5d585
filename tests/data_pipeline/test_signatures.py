from __future__ import annotations

import argparse
import inspect
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline import words as words_module
from data_pipeline.config import DedupConfig
from data_pipeline.signatures import band_keys, signature_version, signatures, similarity
from tests.data_pipeline.texts import WORDS

CONFIG = DedupConfig(similarity=0.8)
FROZEN = [[383657823, 260182454, 153834077, 325524958], [2653440913, 1922739529, 4151948214, 1065989314]]
FROZEN_KEYS = [[9952706302908770903, 8425229403236184308], [1760530302244016087, 15005791593006268621]]


def words(seed: int, count: int = 800) -> list[str]:
    return random.Random(seed).choices(WORDS, k=count)


def near_copy(given: list[str], changed: int, seed: int = 0) -> list[str]:
    """`given` with that many words changed, each in shingles of its own."""
    copy = list(given)
    for place in range(10, 10 + 12 * changed, 12):
        copy[place] = f"changed{seed}x{place}"
    return copy


def jaccard(a: list[str], b: list[str], size: int) -> float:
    one, two = ({tuple(given[i : i + size]) for i in range(len(given) - size + 1)} for given in (a, b))
    return len(one & two) / len(one | two)


def sketch(*texts: list[str], config: DedupConfig = CONFIG) -> np.ndarray:
    return signatures([" ".join(text) for text in texts], config)


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("changed", [0, 5, 15, 40])
def test_the_estimate_is_near_the_jaccard_similarity(changed: int, size: int) -> None:
    config = DedupConfig(permutations=1024, shingle_words=size)
    errors = []
    real = inspect.getsource(argparse).split()
    for seed in range(8):
        text = words(seed) if seed % 2 else real[1000 * seed : 1000 * seed + 800]
        copy = near_copy(text, changed)
        found = sketch(text, copy, config=config)
        errors.append(float(similarity(found[0], found[1])) - jaccard(text, copy, size))
    assert np.abs(errors).max() < 4 * 0.5 / 1024**0.5
    assert abs(np.mean(errors)) < 3 * 0.5 / (8 * 1024) ** 0.5


def test_near_copies_share_a_band_and_other_texts_do_not() -> None:
    found = 0
    for seed in range(50):
        text = words(seed)
        copy = near_copy(text, 10, seed)
        assert 0.85 <= jaccard(text, copy, CONFIG.shingle_words) <= 0.9
        keys = band_keys(sketch(text, copy, words(seed + 1000)), CONFIG.bands)
        found += bool((keys[0] == keys[1]).any())
        assert not (keys[2] == keys[:2]).any()
    assert found >= 48  # each with probability 0.99


def test_case_and_white_space_make_no_difference() -> None:
    one, two = signatures(["One two  three\nfour FIVE six", " one Two three four\tfive\n\nsix "], CONFIG)
    assert (one == two).all()


def test_a_short_text_is_one_shingle() -> None:
    found = signatures(["One two", "one  TWO", "one", "", " ", "one two three four five"], CONFIG)
    assert (found[0] == found[1]).all()
    assert (found[3] == found[4]).all()
    for a, b in ((0, 2), (2, 3), (0, 5)):
        assert similarity(found[a], found[b]) < 0.1
    five = signatures(["one two three four five"], DedupConfig(shingle_words=6))
    assert (five[0] == found[5]).all()


@given(count=st.integers(0, 30), size=st.integers(1, 6), window=st.integers(1, 40), repeats=st.integers(1, 3))
def test_windows_change_no_signature(count: int, size: int, window: int, repeats: int) -> None:
    config = DedupConfig(shingle_words=size, permutations=16)
    text = "  ".join(words(count, count) * repeats)
    expected = signatures([text], config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(words_module, "WINDOW", window)
        assert (signatures([text], config) == expected).all()


def test_values_are_frozen() -> None:
    """They are stored in data sets: where the library changes them, signature_version must change."""
    config = DedupConfig(permutations=4, bands=2)
    found = signatures(["the quick brown fox jumps over the lazy dog", "w\u00f6rter"], config)
    assert found.dtype == np.uint32
    assert found.tolist() == FROZEN
    keys = band_keys(found, 2)
    assert keys.dtype == np.uint64
    assert keys.tolist() == FROZEN_KEYS
    assert signature_version() == "1 rensa 0.5.0 algorithm 2"


def test_no_texts() -> None:
    found = signatures([], CONFIG)
    assert found.shape == (0, 128)
    assert band_keys(found, 16).shape == (0, 16)


def test_every_value_of_a_band_and_its_place_count() -> None:
    base = np.zeros((1, 8), np.uint32)
    keys = band_keys(base, 2)
    assert keys[0, 0] != keys[0, 1]  # equal values, another band
    for place in range(8):
        changed = base.copy()
        changed[0, place] = 1
        differs = band_keys(changed, 2) != keys
        assert differs.tolist() == [[place < 4, place >= 4]]
    rows = np.array([[1, 2, 3, 4], [2, 1, 3, 4], [1, 2, 4, 3], [4, 3, 2, 1]], np.uint32)
    assert len(np.unique(band_keys(rows, 1))) == 4


def test_keys_are_spread_over_all_bits() -> None:
    values = np.arange(4096 * 8, dtype=np.uint32).reshape(4096, 8)
    keys = band_keys(values, 4)
    assert len(np.unique(keys)) == keys.size
    ones = np.unpackbits(keys.ravel().view(np.uint8)).reshape(-1, 8).mean(axis=0)
    assert np.abs(ones - 0.5).max() < 0.01


def test_similarity_of_many_rows() -> None:
    a = np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.uint32)
    assert similarity(a, a[::-1]).tolist() == [0, 0]
    assert similarity(a, a[0]).tolist() == [1, 0]
    assert float(similarity(a[0], np.array([1, 2, 3, 9], np.uint32))) == 0.75
