from __future__ import annotations

import gzip
import json
import random
import re
import time
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline import decontaminate
from data_pipeline import words as words_module
from data_pipeline.config import NormalizeConfig
from data_pipeline.decontaminate import EvaluationNgrams, Match
from data_pipeline.normalize import normalize

REAL = Path(__file__).resolve().parents[3] / "shared/data/evals"
PHRASE = "a meteorite makes the planet rotate faster so that its days become rather shorter than before"
OTHER = "the guinea pig needs a cage with some inches of bedding and a bottle of fresh water"
NUMBERS = " five! six; seven... eight\u2019s nine, ten."
# As in PIQA, ARC and LAMBADA: strings side by side, in a list, with punctuation and lines.
HAND_WRITTEN = [
    {"goal": "How?", "sol1": OTHER, "sol2": "No.", "label": 0},
    {"question": "Why?", "choices": ["Because.", {"text": PHRASE.upper()}], "gold": 1},
    {"text": "\u201cTwo,\u201d she said --\nand\tthen: one-two_three (four)" + NUMBERS},
]


def jsonl(path: Path, records: Iterable[object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def built(paths: Sequence[str | Path], n: int, config: NormalizeConfig | None = None) -> EvaluationNgrams:
    return EvaluationNgrams.build(paths, n, config or NormalizeConfig())


@pytest.fixture
def evals(tmp_path: Path) -> EvaluationNgrams:
    return built([jsonl(tmp_path / "set.jsonl", HAND_WRITTEN)], 13)


def planted(phrase: str) -> str:
    return f"Some words before. {phrase} And words after it, until the end of the document comes."


def test_an_ngram_is_found_with_its_source(evals: EvaluationNgrams) -> None:
    words = PHRASE.split()
    for start in range(len(words) - 12):
        ngram = " ".join(words[start : start + 13])
        assert evals.find(planted(ngram)) == Match(ngram, "set.jsonl:2")
    assert evals.find(planted(OTHER)) == Match(" ".join(OTHER.split()[:13]), "set.jsonl:1")
    assert evals.find(planted(OTHER) + planted(PHRASE)).source == "set.jsonl:1"
    assert len(evals) == (17 - 12) + (16 - 12) + (16 - 12)
    assert evals.skipped == 4


@pytest.mark.parametrize("at", range(12))
def test_twelve_words_or_one_changed_are_no_match(evals: EvaluationNgrams, at: int) -> None:
    words = OTHER.split()[:13]
    assert evals.find(" ".join(words)) is not None
    assert evals.find(" ".join(words[:12])) is None
    assert evals.find(" ".join([*words[:at], "another", *words[at + 1 :]])) is None  # no word of the sets
    assert evals.find(" ".join([*words[:at], "planet", *words[at + 1 :]])) is None
    assert evals.find(" ".join([*words[:at], words[at + 1], words[at], *words[at + 2 :]])) is None


def test_case_punctuation_and_lines_make_no_difference(evals: EvaluationNgrams) -> None:
    loud = re.sub(" ", ",\n-- ", PHRASE.title())
    assert evals.find(planted(loud)) == Match(" ".join(PHRASE.split()[:13]), "set.jsonl:2")
    plain = "two she said and then one two three four five six seven eight s nine ten"
    assert evals.find(plain) == Match(" ".join(plain.split()[:13]), "set.jsonl:3")


@pytest.mark.parametrize(
    "change",
    [
        lambda text: re.sub(r"(\w+)", r"_\1_", text),
        lambda text: text.replace(" ", "_"),
        *(
            lambda text, char=char: re.sub(r"\b(\w)(\w)", rf"\1{char}\2{char}", text)
            for char in "\u00ad\u200b\u200c\u200d\u2060"
        ),
    ],
    ids=["emphasis", "joined", "soft hyphen", "space", "non-joiner", "joiner", "word joiner"],
)
def test_underscores_and_what_nobody_sees_hide_nothing(tmp_path: Path, change: Callable[[str], str]) -> None:
    expected = Match(" ".join(PHRASE.split()[:13]), "set.jsonl:1")
    assert change(PHRASE) != PHRASE
    for there, here in ((PHRASE, change(PHRASE)), (change(PHRASE), PHRASE)):
        evals = built([jsonl(tmp_path / "set.jsonl", [there])], 13)
        assert evals.find(normalize(planted(here))) == expected


FRENCH = (
    "\u00c9t\u00e9 pr\u00e9c\u00e9dent d\u00e9j\u00e0 pass\u00e9 \u00e0 l\u2019\u00e9cole; "
    "\ufb01n \u00e9l\u00e8ve o\u00f9 \u00eatre t\u00f4t ou tard"
)


@pytest.mark.parametrize(
    "form, there, here", [("NFC", "NFD", "NFC"), ("NFC", "NFC", "NFD"), ("NFKC", "NFKC", "NFD")]
)
def test_the_sets_are_normalised_as_documents_are(tmp_path: Path, form: str, there: str, here: str) -> None:
    config, none = NormalizeConfig(form=form), NormalizeConfig(form="none")
    files = [jsonl(tmp_path / "set.jsonl", [unicodedata.normalize(there, FRENCH)])]
    document = planted(unicodedata.normalize(here, FRENCH))
    found = built(files, 13, config).find(normalize(document, config))
    assert found == Match(found.ngram, "set.jsonl:1")
    assert built(files, 13, none).find(normalize(document, none)) is None


def test_mojibake_in_a_set_is_undone_as_in_documents(tmp_path: Path) -> None:
    config = NormalizeConfig(mojibake=True)
    broken = FRENCH.encode().decode("latin-1")
    evals = built([jsonl(tmp_path / "set.jsonl", [broken])], 13, config)
    assert evals.find(normalize(FRENCH, config)) is not None


def test_a_lone_surrogate_in_a_set_is_skipped(tmp_path: Path) -> None:
    evals = built([jsonl(tmp_path / "set.jsonl", [OTHER + "\ud800", {"a": PHRASE, "b": "\udfff"}])], 13)
    assert (evals.skipped, evals.sources) == (2, ["set.jsonl:2"])
    assert evals.find(PHRASE) is not None
    assert evals.find(OTHER) is None
    evals.save(tmp_path / "ngrams.json")


def test_ten_megabytes_take_a_second(evals: EvaluationNgrams) -> None:
    """Three are allowed here, where other tests run."""
    text = (
        "na\u00efve \u00ad"
        + "the planet rotates \u201cfaster\u201d so that its days become rather shorter. " * 40_000
    )
    start = time.process_time()
    assert evals.find(text) is None
    assert time.process_time() - start < 3 * len(text.encode()) / 1e7


def test_strings_are_not_joined(tmp_path: Path) -> None:
    halves = [
        {"a": " ".join(OTHER.split()[:8]), "b": " ".join(OTHER.split()[8:])},
        {"a": OTHER + " x", "b": PHRASE},
    ]
    evals = built([jsonl(tmp_path / "set.jsonl", halves)], 13)
    assert evals.skipped == 2
    assert evals.find(OTHER).source == "set.jsonl:2"
    assert evals.find("water x a meteorite makes the planet rotate faster so that its days become") is None


def test_every_format_and_folder_is_read(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet
    import zstandard

    phrases = {name: " ".join(f"{name}{n}" for n in range(13)) for name in "abcdefg"}
    rows = {
        name: ("\n" + json.dumps({"n": 1, "t": [phrase, None]}) + "\n").encode()
        for name, phrase in phrases.items()
    }
    folder = tmp_path / "sets"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.jsonl").write_bytes(rows["a"])
    (folder / "deep" / "b.jsonl.gz").write_bytes(gzip.compress(rows["b"], mtime=0))
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(b"\n" * 9) + zstandard.compress(rows["c"]))
    (folder / "d.json").write_text(json.dumps([{}, {"t": phrases["d"]}]))
    (folder / "e.json").write_text(json.dumps({"data": [{"t": phrases["e"]}]}))
    (folder / "f.txt").write_text("x\n" + phrases["f"].replace(" ", "\n"))
    table = pyarrow.table({"n": [1, 2], "t": [["x"], ["x", phrases["g"]]]})
    pyarrow.parquet.write_table(table, folder / "g.parquet")
    (folder / "README.md").write_text(OTHER)
    sources = (
        "a.jsonl:2",
        "deep/b.jsonl.gz:2",
        "c.jsonl.zst:11",
        "d.json:2",
        "e.json:1",
        "f.txt:1",
        "g.parquet:2",
    )
    expected = dict(zip("abcdefg", sources))
    evals = built([folder], 13)
    assert {name: evals.find(phrase).source for name, phrase in phrases.items()} == expected
    assert evals.find(OTHER) is None
    alone = built([str(folder / "deep" / "b.jsonl.gz")], 13)
    assert alone.find(phrases["b"]).source == "b.jsonl.gz:2"
    assert alone.find(phrases["a"]) is None


@pytest.mark.parametrize(
    "name, content, message",
    [
        (None, b"", r"there is no .*missing"),
        ("set.csv", b"a,b", r".*set\.csv is none of \.jsonl, "),
        ("folder/set.csv", b"a,b", r".*folder holds none of \.jsonl, "),
        ("set.jsonl", b'{"a": 1}\nno json\n', r"cannot read .*set\.jsonl \(line 2 is no JSON"),
        ("set.jsonl", b'"\xff"', r"cannot read .*set\.jsonl \(.*utf-8"),
        ("set.json", b"[1,", r"cannot read .*set\.json \("),
        ("set.jsonl.gz", gzip.compress(b'"a"' * 99, mtime=0)[:-9], r"cannot read .*set\.jsonl\.gz \("),
        ("set.jsonl.zst", b"no zstd", r"cannot read .*set\.jsonl\.zst \("),
        ("set.parquet", b"no parquet", r"cannot read .*set\.parquet \("),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(tmp_path: Path, name, content, message) -> None:
    path = tmp_path / (name or "missing")
    if name:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    given = path.parent if path.parent != tmp_path else path
    with pytest.raises(ValueError, match=r"^data\.decontaminate\.paths: " + message) as error:
        built([given], 13)
    assert "\n" not in str(error.value)


def test_a_zstd_file_that_ends_early_is_refused(tmp_path: Path) -> None:
    import zstandard

    whole = zstandard.compress(json.dumps(random.Random(0).random()).encode() * 999)
    (tmp_path / "set.jsonl.zst").write_bytes(whole[:-5])
    with pytest.raises(ValueError, match="ends inside a frame"):
        built([tmp_path], 13)


def test_saved_and_loaded_it_finds_the_same(evals: EvaluationNgrams, tmp_path: Path) -> None:
    evals.save(tmp_path / "ngrams.json")
    loaded = EvaluationNgrams.load(tmp_path / "ngrams.json")
    for text in (planted(PHRASE), planted(OTHER), OTHER[:30]):
        assert loaded.find(text) == evals.find(text)
    assert (loaded.sha256, loaded.skipped, len(loaded)) == (evals.sha256, evals.skipped, len(evals))
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "ngrams.json").read_bytes()


def test_the_hash_covers_words_sources_and_n(tmp_path: Path) -> None:
    def sha256(name: str, records: list, n: int = 13) -> str:
        (tmp_path / name).mkdir(exist_ok=True)
        return built([jsonl(tmp_path / name / f"{name[0]}.jsonl", records)], n).sha256

    base = sha256("a1", [OTHER, PHRASE])
    assert base == sha256("a2", [OTHER, PHRASE])  # where the folder lies makes no difference
    others = {sha256("a3", [PHRASE, OTHER]), sha256("b", [OTHER, PHRASE]), sha256("a4", [OTHER, PHRASE], 12)}
    assert len(others | {base, sha256("a5", [OTHER])}) == 5


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"version": 0}'])
def test_another_file_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "ngrams.json").write_text(content)
    with pytest.raises(ValueError, match=r"ngrams\.json .*: remove it"):
        EvaluationNgrams.load(tmp_path / "ngrams.json")


def test_the_first_source_is_named(tmp_path: Path) -> None:
    records = [PHRASE, *[OTHER, PHRASE] * 50]
    evals = built([jsonl(tmp_path / "set.jsonl", records)], 13)
    assert (evals.find(PHRASE).source, evals.find(OTHER).source) == ("set.jsonl:1", "set.jsonl:2")


def test_no_evaluation_text_finds_nothing(tmp_path: Path) -> None:
    evals = built([jsonl(tmp_path / "set.jsonl", ["too short"])], 13)
    assert (len(evals), evals.skipped) == (0, 1)
    assert evals.find(OTHER) is None
    assert evals.find("") is None


small_words = st.lists(st.sampled_from("abc"), max_size=40)


@given(strings=st.lists(small_words, max_size=4), document=small_words, n=st.integers(5, 7), data=st.data())
def test_find_is_exact(strings: list[list[str]], document: list[str], n: int, data: st.DataObject) -> None:
    """Against the definition, with windows of any size and with a hash that tells nothing apart."""
    numbers = {"a": 1, "b": 2, "c": 3}
    texts = [
        (f"s:{row}", [numbers[word] for word in words])
        for row, words in enumerate(strings)
        if len(words) >= n
    ]
    expected = None
    for start in range(len(document) - n + 1):
        ngram = document[start : start + n]
        for row, words in enumerate(strings):
            if any(words[at : at + n] == ngram for at in range(len(words) - n + 1)):
                expected = expected or Match(" ".join(ngram), f"s:{row}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(words_module, "WINDOW", data.draw(st.integers(1, 30)))
        assert EvaluationNgrams(n, "abc", texts, 0).find(" ".join(document)) == expected
        rolling = decontaminate._rolling
        patch.setattr(decontaminate, "_rolling", lambda ids, n: np.zeros_like(rolling(ids, n)))
        assert EvaluationNgrams(n, "abc", texts, 0).find(" ".join(document)) == expected


def _strings(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for part in parts for text in _strings(part)]


def test_every_row_of_real_evaluation_sets_is_found(tmp_path: Path) -> None:
    """All strings of 13 words or more, of the real sets where they are at hand."""
    files = sorted(REAL.glob("*.jsonl")) or [jsonl(tmp_path / "set.jsonl", HAND_WRITTEN)]
    evals = built(files, 13)
    found = 0
    for file in files:
        for line in file.read_text().splitlines():
            for text in _strings(json.loads(line)):
                match = evals.find(f"before it, {text}, and after")
                long = len(re.findall(r"[^\W_]+", text)) >= 13
                assert not long or match is not None
                found += long
    assert found + evals.skipped == sum(len(_strings(json.loads(line))) for f in files for line in f.open())
    assert found == len(evals.sources)
