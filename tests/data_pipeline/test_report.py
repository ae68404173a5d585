"""The page of a data set with planted copies, evaluation text, filtered and broken records, two sources."""

from __future__ import annotations

import json
import os
import platform
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.config import DataConfig, DecontaminateConfig, DedupConfig, FilterConfig, SourceConfig
from data_pipeline.filters import Filters
from data_pipeline.job import prepare
from data_pipeline.loader import TokenDataset
from data_pipeline.manifest import Manifest, load_manifest
from data_pipeline.pack import IGNORED
from data_pipeline.report import _packed, _what, write_report
from data_pipeline.report_drops import HISTOGRAM_PAIRS, _threshold
from data_pipeline.shard import Shard
from data_pipeline.sources import describe
from tests.data_pipeline.texts import MARKUP, prose, settings
from tests.data_pipeline.written import VOCAB, write_dataset, write_one

HOSTILE = "<img src=x onerror=alert(2)>"
LATIN = os.fsdecode(b"caf\xe9.txt")
GOPHER = FilterConfig(
    languages=("en", "de"),
    min_words=50,
    max_words=100_000,
    min_mean_word_length=1.0,
    max_symbol_ratio=0.1,
    max_duplicate_line_characters=0.2,
    max_top_ngrams=(0.2, 0.18, 0.16),
    max_duplicate_ngrams=(0.15, 0.14, 0.13, 0.12, 0.11, 0.1),
)
RULES = FilterConfig(min_words=50, max_symbol_ratio=0.3)


class Page(HTMLParser):
    """Tags, the text of each section, and what is preformatted, with its section."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.sections: dict[str, str] = {"": ""}
        self.preformatted: list[tuple[str, str]] = []
        self.heading = ""
        self._in_heading = self._in_pre = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "pre":
            self._in_pre = True
            self.preformatted.append((self.heading, ""))
        if tag == "h2":
            self._in_heading, self.heading = True, ""
        self.sections[self.heading] = self.sections.get(self.heading, "") + "\n"

    def handle_endtag(self, tag: str) -> None:
        self._in_heading = self._in_heading and tag != "h2"
        self._in_pre = self._in_pre and tag != "pre"

    def handle_data(self, data: str) -> None:
        if self._in_heading:
            self.heading += data
        else:
            self.sections[self.heading] = self.sections.get(self.heading, "") + data
        if self._in_pre:
            self.preformatted[-1] = (self.heading, self.preformatted[-1][1] + data)

    @property
    def text(self) -> str:
        return "".join(self.sections.values())


def near(seed: int) -> str:
    return prose(seed).replace("w1", "changed", 1)


@pytest.fixture(scope="module")
def planted(
    ray_cluster: object, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Manifest, DataConfig]:
    root = tmp_path_factory.mktemp("planted")
    (root / "web").mkdir()
    (root / "books").mkdir()
    question = " ".join(f"question{n}" for n in range(20))
    (root / "evaluation.jsonl").write_text(json.dumps({"question": question}) + "\n")
    texts = [prose(seed) for seed in range(40)] + [prose(0), prose(1), prose(2)]
    texts += [near(seed) for seed in range(5, 5 + HISTOGRAM_PAIRS)]
    texts += ["too short " + HOSTILE, MARKUP * 20 + "# " * 300, prose(50) + question, MARKUP + prose(51)]
    records = [json.dumps({"text": text}) + "\n" for text in texts]
    (root / "web" / "a.jsonl").write_text("".join(records) + "{no json\n")
    (root / "web" / f"{HOSTILE}.txt").write_bytes(b"\xff")
    (root / "web" / LATIN).write_bytes(b"\xff")
    for seed in range(60, 90):
        (root / "books" / f"{seed}.txt").write_text(prose(seed))
    web = SourceConfig(kind="path", path=str(root / "web"), licence=HOSTILE, weight=0.25)
    books = SourceConfig(kind="path", path=str(root / "books"), max_documents=20, weight=0.75)
    config = settings(
        root / "out",
        root,
        mixture={"web": web, "books": books},
        filters=RULES,
        dedup=DedupConfig(similarity=0.7),
        decontaminate=DecontaminateConfig(paths=(str(root / "evaluation.jsonl"),)),
    )
    return root / "out", prepare(config, workers=2, progress=False), config


def page_of(directory: Path) -> Page:
    return Page((directory / "report.html").read_text())


def test_the_corpus_is_shown_as_text(planted: tuple[Path, Manifest, DataConfig]) -> None:
    page = page_of(planted[0])
    assert not page.tags & {"script", "img", "iframe", "object", "link"}
    assert "<script>alert('from the corpus')</script>" in page.sections["Filters"]
    assert "20 documents" in page.sections["Sources"]
    assert "0.75" in page.sections["Sources"]
    for heading in ("Filters", "Quarantined", "Sources"):
        assert HOSTILE in page.sections[heading]
    assert not re.search(r'(src|href)\s*=\s*["\']?(https?:)?//', (planted[0] / "report.html").read_text())


def test_a_sample_with_markup_is_shown_as_text(prepared: tuple[Path, Manifest]) -> None:
    directory, made = prepared
    page = page_of(directory)
    assert not page.tags & {"script", "img"}
    for split in made.splits.values():
        assert f"{split.tokens:,}" in page.text
    assert "No filter has a threshold" in page.sections["Filters"]
    assert "SentencePiece bpe" in page.sections["Tokenizer"]
    assert "yes" in page.sections["Tokenizer"]
    assert "Nothing was left out" in page.sections["Quarantined"]


def test_every_section_is_there_in_order(planted: tuple[Path, Manifest, DataConfig]) -> None:
    assert list(page_of(planted[0]).sections) == [
        "",
        "What happened to the documents",
        "Filters",
        "Duplicates",
        "Evaluation text",
        "Quarantined",
        "Document lengths",
        "Packed in rows of 64 tokens",
        "Sample documents",
        "Tokenizer",
        "Sources",
        "Seconds",
    ]


def test_the_flow_ends_in_what_was_taken(planted: tuple[Path, Manifest, DataConfig]) -> None:
    directory, made, _ = planted
    flow = page_of(directory).sections["What happened to the documents"].split("Source: ")
    books, web = (re.sub(r"\n+", " ", part) for part in flow[1:])
    assert "read 67 100.00%" in web
    assert "filter: min_words 1 66 98.51%" in web
    assert "filter: symbol_ratio 1 65 97.01%" in web
    assert "exact duplicates 3 62" in web
    copies = made.stages["web"]["near duplicates"]["documents"]
    assert f"near duplicates {copies} {62 - copies}" in web
    assert f"evaluation text 1 {61 - copies}" in web
    assert f"left {61 - copies}" in web
    assert "beyond the budget" not in web
    over = made.stages["books"]["left"]["documents"] - 20
    assert over > 0
    assert f"beyond the budget {over}" in books


def test_near_duplicates_stand_beside_what_was_kept(planted: tuple[Path, Manifest, DataConfig]) -> None:
    directory, made, _ = planted
    page = page_of(directory)
    section = page.sections["Duplicates"]
    count = made.stages["web"]["near duplicates"]["documents"]
    assert f"3 documents were equal to an earlier one, {count} more were similar" in section
    assert f"Similarity of the first {count} near duplicates" in section
    texts = [text for heading, text in page.preformatted if heading == "Duplicates"]
    assert len(texts) == 10
    for kept, dropped in zip(texts[::2], texts[1::2]):
        assert "changed" not in kept
        assert "changed" in dropped


def test_contamination_and_quarantine_name_the_place(planted: tuple[Path, Manifest, DataConfig]) -> None:
    page = page_of(planted[0])
    assert "1 documents were dropped" in page.sections["Evaluation text"]
    assert "question0 question1" in page.sections["Evaluation text"]
    assert "evaluation.jsonl:1" in page.sections["Evaluation text"]
    assert f"{HOSTILE}.txt" in page.sections["Quarantined"]
    assert r"caf\udce9.txt" in page.sections["Quarantined"]
    assert "not JSON" in page.sections["Quarantined"]


@pytest.mark.parametrize("packing", ["concat", "best_fit", "per_document"])
def test_the_packing_is_the_loaders(prepared: tuple[Path, Manifest], packing: str) -> None:
    directory, _ = prepared
    data = TokenDataset(directory, "train", sequence_length=64, seed=0, packing=packing)
    section = re.sub(r"\n+", " ", page_of(directory).sections["Packed in rows of 64 tokens"])
    assert f"train {packing} {data.num_samples:,} {data.utilisation:.2%}" in section


@pytest.mark.parametrize("seed", range(3))
def test_documents_cut_are_those_that_the_loader_cuts(seed: int, tmp_path: Path) -> None:
    draw = np.random.default_rng(seed)
    ids = iter(range(3, VOCAB))
    lengths = [17, 17, 16, 1, 0, 33, 34, 2, *draw.integers(0, 40, 20).tolist()]
    shard = [[next(ids) for _ in range(length)] for length in lengths]
    write_dataset(tmp_path, {"train": {"corpus": [shard]}})
    data = TokenDataset(tmp_path, "train", sequence_length=16, seed=0)
    rows_of: dict[int, set[int]] = {}
    for row in range(data.num_samples):
        tokens, labels = np.empty((2, 16), np.int64)
        data.read(row, tokens, labels)
        for token in tokens[labels != IGNORED].tolist():
            number = next(i for i, document in enumerate(shard) if token in document)
            rows_of.setdefault(number, set()).add(row)
    cut = sum(len(rows) > 1 for rows in rows_of.values())
    assert _packed(Shard(tmp_path / "train-00000"), "concat", 16)[2] == cut


def test_a_document_of_as_many_positions_as_a_row_lies_in_one(tmp_path: Path) -> None:
    write_one(tmp_path, "a", "corpus", [list(range(3, 20))])
    assert _packed(Shard(tmp_path / "a"), "concat", 16) == (1, 16, 0)


def test_a_page_made_again_is_the_same(planted: tuple[Path, Manifest, DataConfig]) -> None:
    directory, _, config = planted
    before = (directory / "report.html").read_text()
    after = write_report(directory, load_manifest(directory), config).read_text()
    # timings.json is sorted.
    assert after.partition("<h2>Seconds")[0] == before.partition("<h2>Seconds")[0]


def test_every_rule_shows_its_threshold() -> None:
    shown = {rule: _threshold(rule, GOPHER) for rule in Filters(GOPHER).rules}
    assert len(shown) == 15
    assert shown["language"] == "en, de with probability 0.5 or more"
    assert shown["min_words"] == "50 or more"
    assert shown["max_words"] == "100,000 or less"
    assert shown["duplicate_line_characters"] == "0.2 or less"
    assert shown["top_3_grams"] == "0.18 or less"
    assert shown["duplicate_10_grams"] == "0.1 or less"
    assert all(shown.values())


@pytest.mark.parametrize(
    "source, words",
    [
        (SourceConfig(), f"the library of Python {platform.python_version()}"),
        (SourceConfig(kind="path", path="my/books"), "my/books"),
        (SourceConfig(kind="huggingface", name="a/b", revision="c0de"), "a/b@c0de, split train"),
        (
            SourceConfig(kind="huggingface", name="a/b", subset="en", revision="c0de", split="test"),
            "a/b:en@c0de, split test",
        ),
    ],
)
def test_a_source_is_named_as_a_user_would(source: SourceConfig, words: str) -> None:
    assert _what(describe(source)) == words
