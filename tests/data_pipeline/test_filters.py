from __future__ import annotations

import subprocess
import sys
import time
import tomllib
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data_pipeline import filters as filters_module
from data_pipeline import words as words_module
from data_pipeline.config import FilterConfig
from data_pipeline.filters import Filters
from data_pipeline.language import identify, language_version

GOPHER = Path(__file__).parents[2] / "launch/recipes/filters/gopher.toml"
ENGLISH = (
    "It was the best of times and it was the worst of times, so that we had everything before us, and we "
    "had nothing before us; we were all going to be with them, or to have gone the other way."
)
GERMAN = (
    "Wie der Herr am Morgen aus unruhigen Tr\u00e4umen erwachte, fand er sich in seinem Bett zu "
    "einem Ungeziefer verwandelt und konnte nicht mehr aufstehen, so sehr er sich auch darum bem\u00fchte."
)


def different(count: int, length: int = 4) -> list[str]:
    """That many different words of `length` letters."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return ["".join(letters[n // 26**k % 26] for k in range(length)) for n in range(count)]


def text(*parts: str, words: int) -> str:
    """`parts`, then other words up to `words` in all."""
    given = " ".join(parts).split()
    return " ".join([*given, *different(words - len(given))])


def ngrams(repeats: int, size: int, words: int) -> str:
    """A phrase of `size` words `repeats` times, another word after each, in `words` words of 4 letters."""
    others = iter(different(words))
    phrase = [f"W{n:03}" for n in range(size)]
    parts = [word for _ in range(repeats) for word in (*phrase, next(others))]
    return " ".join([*parts, *(next(others) for _ in range(words - len(parts)))])


def lines(*groups: tuple[str, int], total: int) -> str:
    given = [line for line, count in groups for _ in range(count)]
    return "\n".join([*given, *different(total - len(given))])


# Key, threshold, the rule's name, a text at the threshold, a text just past it.
BOUNDS = [
    ("min_words", 50, "min_words", text(words=50), text(words=49)),
    ("max_words", 60, "max_words", text(words=60), text(words=61)),
    ("min_mean_word_length", 3, "min_mean_word_length", "abc ab abcd", "abc ab abc"),
    ("max_mean_word_length", 3, "max_mean_word_length", "abc ab abcd", "abc abc abcd"),
    ("max_symbol_ratio", 0.1, "symbol_ratio", text("#a", "...", words=10), text("#a", "b#", words=10)),
    ("max_symbol_ratio", 0.1, "symbol_ratio", text("a...", words=10), text("a...", "b\u2026", words=10)),
    ("min_alphabetic_words", 0.8, "alphabetic_words", "a 2b \u00e9 \u4e2d 1", "a 2b \u00e9 1 --"),
    (
        "max_bullet_lines",
        0.9,
        "bullet_lines",
        lines(("- a", 9), total=10),
        lines(("\u2022 a", 10), total=11).replace("\n", "\n\n"),
    ),
    (
        "max_ellipsis_lines",
        0.3,
        "ellipsis_lines",
        lines(("a...", 3), total=10),
        lines(("a \u2026 ", 4), total=13),
    ),
    ("min_stop_words", 2, "stop_words", "There, THAT of them", "that, That theory often"),
    ("max_duplicate_lines", 0.3, "duplicate_lines", lines(("a", 4), total=10), lines(("a", 5), total=13)),
    (
        "max_duplicate_line_characters",
        0.2,
        "duplicate_line_characters",
        lines(("abcdefgh", 2), total=8),  # 8 of 16 + 6 * 4
        lines(("abcdefghi", 2), total=8),  # 9 of 18 + 24
    ),
    ("max_duplicate_paragraphs", 0.5, "duplicate_paragraphs", "a\nb\n\na\nb", "a\nb\n\n a\nb\n \na\nb"),
    (
        "max_duplicate_paragraph_characters",
        0.5,
        "duplicate_paragraph_characters",
        "ab\n\nab",
        "ab\n\nab\n\nab",
    ),
    # Characters of the repeated words, of 4 * words.
    ("max_top_ngrams", (0.2, 1, 1), "top_2_grams", ngrams(5, 2, 50), ngrams(5, 2, 49)),
    ("max_top_ngrams", (1, 0.18, 1), "top_3_grams", ngrams(6, 3, 100), ngrams(6, 3, 99)),
    ("max_top_ngrams", (1, 1, 0.16), "top_4_grams", ngrams(4, 4, 100), ngrams(4, 4, 99)),
    ("max_duplicate_ngrams", (0.15, 1, 1, 1, 1, 1), "duplicate_5_grams", ngrams(4, 5, 100), ngrams(4, 5, 99)),
    ("max_duplicate_ngrams", (1, 0.12, 1, 1, 1, 1), "duplicate_6_grams", ngrams(3, 6, 100), ngrams(3, 6, 99)),
    ("max_duplicate_ngrams", (1, 1, 0.14, 1, 1, 1), "duplicate_7_grams", ngrams(3, 7, 100), ngrams(3, 7, 99)),
    ("max_duplicate_ngrams", (1, 1, 1, 0.16, 1, 1), "duplicate_8_grams", ngrams(3, 8, 100), ngrams(3, 8, 99)),
    ("max_duplicate_ngrams", (1, 1, 1, 1, 0.09, 1), "duplicate_9_grams", ngrams(2, 9, 100), ngrams(2, 9, 99)),
    (
        "max_duplicate_ngrams",
        (1, 1, 1, 1, 1, 0.1),
        "duplicate_10_grams",
        ngrams(2, 10, 100),
        ngrams(2, 10, 99),
    ),
]


@pytest.mark.parametrize("key, threshold, rule, kept, dropped", BOUNDS, ids=lambda value: None)
def test_a_rule_keeps_at_its_threshold_and_drops_past_it(key, threshold, rule, kept, dropped) -> None:
    filters = Filters(FilterConfig(**{key: threshold}))
    assert rule in filters.rules
    assert filters.reject(kept) is None
    assert filters.reject(dropped) == rule


def test_every_rule_has_a_bound_tested() -> None:
    every = Filters(_gopher(languages=("en",))).rules
    assert {*every} == {rule for _, _, rule, _, _ in BOUNDS} | {"language"}
    assert every[0] == "min_words"
    assert every[-1] == "language"


def _gopher(**changes: object) -> FilterConfig:
    section = tomllib.loads(GOPHER.read_text())["data"]["filters"]
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in section.items()}
    return FilterConfig(**values | changes)


def test_the_first_rule_that_applies_is_named_and_no_threshold_is_no_rule() -> None:
    assert Filters(FilterConfig()).rules == ()
    assert Filters(FilterConfig()).reject("") is None
    filters = Filters(FilterConfig(min_words=3, max_symbol_ratio=0.1, min_stop_words=0))
    assert filters.rules == ("min_words", "symbol_ratio", "stop_words")
    assert filters.reject("# #") == "min_words"
    assert filters.reject("# # #") == "symbol_ratio"


@pytest.mark.parametrize("empty", ["", "\n \t\n"])
def test_a_text_without_words_breaks_no_rule_by_an_error(empty: str) -> None:
    assert Filters(_gopher()).reject(empty) == "min_words"
    assert (
        Filters(_gopher(min_words=None, min_mean_word_length=None, min_alphabetic_words=None)).reject(empty)
        == "stop_words"
    )
    assert (
        Filters(FilterConfig(max_top_ngrams=(0, 0, 0), max_duplicate_ngrams=(0,) * 6)).reject(empty) is None
    )


def slow_shares(text: str) -> dict[str, float]:
    """The n-gram rules as their definitions read."""
    words = text.split()
    total = sum(map(len, words))
    shares = {}
    for n in range(2, 11):
        found = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        counts = Counter(found)
        most = max(counts.values(), default=0)
        tied = [gram for gram in found if counts[gram] == most > 1]
        top = max(tied, key=lambda gram: sum(map(len, gram)), default=None)  # the first of the longest
        if n < 5:
            at = [i for i, gram in enumerate(found) if gram == top]
        else:
            at = [i for i, gram in enumerate(found) if gram in found[:i]]
        covered = {i + k for i in at for k in range(n)}
        shares[f"top_{n}_grams" if n < 5 else f"duplicate_{n}_grams"] = sum(
            len(words[i]) for i in covered
        ) / (total or 1)
    return shares


@given(words=st.lists(st.sampled_from(["a", "b", "ccc", "dd"]), max_size=60))
@example(words=["b", "ccc", "a", "a", "a", "b", "c", "b", "c"])  # the first of equally long
def test_ngram_shares_match_their_definition(words: list[str]) -> None:
    repeats = filters_module._Measures(" ".join(words)).repeats
    for rule, share in slow_shares(" ".join(words)).items():
        kind, n, _ = rule.split("_")
        assert getattr(repeats, kind)(int(n)) == pytest.approx(share), rule


@given(data=st.data())
def test_windows_change_no_measure(data: st.DataObject) -> None:
    text = data.draw(st.text(alphabet="ab \n\t", max_size=200))
    expected = text.split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(words_module, "WINDOW", data.draw(st.integers(1, 20)))
        parts = list(words_module.windows(text))
        measures = filters_module._Measures(text)
        ids, distinct = measures._numbered
    assert "".join(parts) == text
    assert [distinct[id_] for id_ in ids] == expected


@pytest.mark.parametrize(
    "text",
    [ENGLISH * 15_000, "a b " * 700_000, "x" * 3_000_000, "\n\t" * 1_500_000 + "x", "- ...\n\n" * 400_000],
    ids=["copies", "words", "one word", "white space", "lines"],
)
def test_a_document_of_megabytes_takes_linear_time(text: str) -> None:
    loose = _gopher(
        **dict.fromkeys(
            (key for key in vars(_gopher()) if key.startswith("max_") and "gram" not in key), 10**9
        ),
        **dict.fromkeys((key for key in vars(_gopher()) if key.startswith("min_")), 0),
        max_top_ngrams=(2, 2, 2),
        max_duplicate_ngrams=(2,) * 6,
    )
    start = time.process_time()
    assert Filters(loose).reject(text) is None
    assert time.process_time() - start < 10


def test_gopher_keeps_prose_and_drops_its_copies() -> None:
    filters = Filters(_gopher(languages=("en",)))
    assert filters.reject(ENGLISH + " " + " ".join(different(20))) is None
    assert filters.reject(" ".join([ENGLISH] * 3)) == "duplicate_5_grams"
    assert filters.reject("\n".join([ENGLISH] * 3)) == "duplicate_lines"
    assert filters.reject(GERMAN + GERMAN.upper()) == "stop_words"


def test_languages_and_their_confidence() -> None:
    english, both = (Filters(FilterConfig(languages=codes)) for codes in (("en",), ("de", "en")))
    assert english.rules == ("language",)
    assert english.reject(ENGLISH) is None
    assert english.reject(GERMAN) == "language"
    assert both.reject(GERMAN) is None
    assert both.reject("1 2 3") == "language"
    code, probability = identify(GERMAN[:30])
    assert code == "de"
    assert 0.05 < probability < 0.98
    for confidence, kept in ((probability, True), (probability + 0.001, False)):
        config = FilterConfig(languages=("de",), language_confidence=confidence)
        assert (Filters(config).reject(GERMAN[:30]) is None) == kept


def test_the_language_is_that_of_the_beginning() -> None:
    start = (ENGLISH * 10)[:1000]
    assert identify(start + GERMAN * 100) == identify(start)
    assert language_version().startswith("2 py3langid ")


@pytest.mark.parametrize("space", ["\n" * 1000, " " * 10**6, "\n \u3000\t" * 5000])
def test_white_space_is_no_language(space: str) -> None:
    prose = (ENGLISH + " ") * 20
    expected = identify(prose)
    assert expected == ("en", 1.0)
    assert identify(space + prose) == expected
    assert identify(prose.replace(" ", space[:7])) == expected
    assert identify(f"{prose[:30]}{space[:1000]}{prose[30:]}")[0] == "en"


def test_an_unknown_language_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.filters\.languages: no xx; there are .*\ben\b"):
        Filters(FilterConfig(languages=("en", "xx")))


def test_the_library_is_not_imported_before_it_is_needed() -> None:
    code = "import sys, data_pipeline.filters as f, data_pipeline.config as c; f.Filters(c.FilterConfig()); "
    ran = subprocess.run(
        [sys.executable, "-c", code + "sys.exit('py3langid' in sys.modules)"], cwd=GOPHER.parents[3]
    )
    assert ran.returncode == 0
