from __future__ import annotations

import re
import sys
import time
import unicodedata

import pytest
from ftfy import fixes
from hypothesis import example, given
from hypothesis import strategies as st

from data_pipeline.config import NormalizeConfig
from data_pipeline.normalize import CONTROL, LONG_RUN, MARK, RUN, normalize

CONFIGS = [NormalizeConfig(form=form, mojibake=moji) for form in ("NFC", "NFKC", "none") for moji in (0, 1)]
# Line ends, controls, mojibake and its halves, letters that compose.
NASTY = (
    "\r\n\x85\u2028\u2029\0\x0b\x0c\x1f\x7f\ufeff\ufffc"
    + "\u00c3\u00a9\u00e2\u20ac\u2122\u201c A\u0303e\u0301\ufb01\u00a0"
)
KEPT = "tab\tpage\x0cjoiner\u200d mark\u200e soft\u00ad"


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@given(text=st.one_of(st.text(), st.text(alphabet=NASTY)))
@example(text="A\u0303\u00a9")  # composes to mojibake of an e with an accent
@example(text="\u00c3\0\u00a9")  # mojibake around a control character
@example(text="\r\0\n")
def test_normalising_twice_changes_nothing(config: NormalizeConfig, text: str) -> None:
    normal = normalize(text, config)
    assert normalize(normal, config) == normal
    assert not set("\r\x85\u2028\u2029") & set(normal)
    assert not CONTROL.search(normal)
    assert config.form == "none" or unicodedata.is_normalized(config.form, normal)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a\r\nb\rc\x85d\u2028e\u2029f\n\r\n", "a\nb\nc\nd\ne\nf\n\n"),
        ("\ufeffa\0b\x0bc\x1b[0m\x7f\ufffc", "abc[0m"),
        (
            "tab\tpage\x0cjoiner\u200d mark\u200e soft\u00ad",
            "tab\tpage\x0cjoiner\u200d mark\u200e soft\u00ad",
        ),
        ("e\u0301 \ufb01 \uff21", "\u00e9 \ufb01 \uff21"),
        ("caf\u00c3\u00a9 &amp; \u2018x\u2019", "caf\u00c3\u00a9 &amp; \u2018x\u2019"),
    ],
    ids=["lines", "controls", "kept", "accents", "mojibake"],
)
def test_what_the_default_changes(text: str, expected: str) -> None:
    assert normalize(text) == expected


def test_controls_are_what_ftfy_removes() -> None:
    ours = {code for code in range(sys.maxunicode + 1) if CONTROL.match(chr(code))}
    assert ours == {code for code in range(sys.maxunicode + 1) if not fixes.remove_control_chars(chr(code))}


# Marks of several classes, one beyond the BMP, letters with marks, what decomposes to marks alone, starters.
MARKS = "\u0301\u0323\u0345\u05b0\u302a\U0001d165\u0344\u0f73\u0f75\u0f81\uff9e\u0f71"
STARTERS = "e\u00e9\u01d6\u1ea1\u0958\ufb2c\uac00\U00010330"


@pytest.mark.parametrize("form", ["NFC", "NFKC"])
@given(
    text=st.lists(
        st.one_of(
            st.text(alphabet=MARKS, min_size=RUN - 3, max_size=3 * RUN),
            st.text(alphabet=STARTERS, max_size=4),
        ),
        max_size=6,
    ).map("".join)
)
def test_long_runs_of_marks_are_normalised_as_unicode_says(form: str, text: str) -> None:
    normal = normalize(text, NormalizeConfig(form=form))
    assert normal == unicodedata.normalize(form, text)
    assert normalize(normal, NormalizeConfig(form=form)) == normal


def test_every_mark_counts_in_a_run() -> None:
    decomposed = ((chr(code), unicodedata.normalize("NFKD", chr(code))) for code in range(sys.maxunicode + 1))
    marks = "".join(char for char, parts in decomposed if unicodedata.combining(parts[0]))
    assert re.fullmatch(f"{MARK}*", marks)
    assert LONG_RUN.fullmatch(marks)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize(
    "text",
    [
        "e" + "\u0301" * 500_000 + "\u0323" * 500_000,
        "e" + "\u0301\u0323" * 500_000,
        "\u0f71\u0f73" * 500_000,
        ("\u0301" * 29 + "\u0323a") * 50_000,
    ],
    ids=["two", "turns", "decomposed", "short"],
)
def test_megabytes_of_marks_take_linear_time(config: NormalizeConfig, text: str) -> None:
    start = time.process_time()
    normalize(text, config)
    assert time.process_time() - start < 10


def test_forms() -> None:
    text = "e\u0301 \ufb01 \uff21"
    assert normalize(text, NormalizeConfig(form="NFKC")) == "\u00e9 fi A"
    assert normalize(text, NormalizeConfig(form="none")) == text


def test_mojibake_is_undone_line_by_line() -> None:
    config = NormalizeConfig(mojibake=True)
    assert (
        normalize("\u4e2d\u6587\ncaf\u00c3\u00a9 &amp;\nna\u00efve", config)
        == "\u4e2d\u6587\ncaf\u00e9 &amp;\nna\u00efve"
    )
    assert normalize("it\u00e2\u20ac\u2122s", config) == "it\u2019s"


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(ValueError, match="surrogates"):
        normalize("a\ud800")
