"""The n-gram baselines against brute force."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evals import ngram
from evals.ngram import InterpolatedBigram, Unigram, count_ngrams

VOCAB = 7
DOCUMENTS = st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=12), min_size=1, max_size=8)


def _arrays(documents):
    return [np.array(d, np.uint16) for d in documents]


def _brute_force(documents, lower):
    """The textbook formula with dictionaries."""
    pairs = Counter((a, b) for d in documents for a, b in itertools.pairwise(d))
    targets = Counter(b for d in documents for b in d[1:])
    once, twice = (sum(c == n for c in pairs.values()) for n in (1, 2))
    discount = min(once / (once + 2 * twice), 0.95) if once else 0.5
    if lower == "unigram":
        base = [(targets[w] + 1) / (sum(targets.values()) + VOCAB) for w in range(VOCAB)]
    else:
        kinds = Counter(b for _, b in pairs)
        base = [(kinds[w] + 1) / (len(pairs) + VOCAB) for w in range(VOCAB)]
    table = np.zeros((VOCAB, VOCAB))
    for v in range(VOCAB):
        total = sum(c for (a, _), c in pairs.items() if a == v)
        types = sum(a == v for a, _ in pairs)
        for w in range(VOCAB):
            own = max(pairs[v, w] - discount, 0) / total if total else 0.0
            table[v, w] = own + (discount * types / total if total else 1.0) * base[w]
    return table


@pytest.mark.parametrize("lower", ["unigram", "kneser_ney"])
@settings(max_examples=40, deadline=None)
@given(documents=DOCUMENTS)
def test_bigram_equals_brute_force_and_sums_to_one(documents, lower):
    bigram = InterpolatedBigram(count_ngrams(_arrays(documents), VOCAB), lower=lower)
    table = np.stack([bigram.distribution(v) for v in range(VOCAB)])
    np.testing.assert_allclose(table.sum(1), 1.0, rtol=1e-12)
    np.testing.assert_allclose(table, _brute_force(documents, lower), rtol=1e-10)


@settings(max_examples=30, deadline=None)
@given(documents=DOCUMENTS, part=st.integers(1, 20))
def test_counting_in_parts_changes_nothing(documents, part):
    whole = count_ngrams(_arrays(documents), VOCAB)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngram, "_PART_TOKENS", part)
        parts = count_ngrams(_arrays(documents), VOCAB)
    np.testing.assert_array_equal(whole.pair_keys, parts.pair_keys)
    np.testing.assert_array_equal(whole.pair_counts, parts.pair_counts)
    np.testing.assert_array_equal(whole.unigram, parts.unigram)


def test_unigram_is_add_one():
    counts = count_ngrams(_arrays([[0, 1, 1, 2]]), VOCAB)
    assert Unigram(counts).distribution().sum() == pytest.approx(1.0)
    assert Unigram(counts).log_prob(np.array([1]))[0] == pytest.approx(math.log(3 / (3 + VOCAB)))


def test_a_token_outside_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="outside the vocabulary of 7"):
        count_ngrams(_arrays([[0, 9]]), VOCAB)


def test_max_tokens_stops_after_a_whole_document():
    assert count_ngrams(_arrays([[0, 1, 2], [0, 1], [3, 4]]), VOCAB, max_tokens=4).tokens == 3
