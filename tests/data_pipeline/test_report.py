from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

from data_pipeline.manifest import Manifest
from data_pipeline.report import write_report
from tests.data_pipeline.texts import settings


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_corpus_is_shown_as_text(prepared: tuple[Path, Manifest], corpus: Path, tmp_path: Path) -> None:
    directory, made = prepared
    hostile = {"file": "<img src=x>.txt", "offset": 3, "reason": "<script>"}
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in directory.iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    (copy / "quarantine.jsonl").write_text(json.dumps(hostile) + "\n")
    page = Tags()
    for html in (
        (directory / "report.html").read_text(),
        write_report(copy, replace(made, quarantined=1), settings(copy, corpus)).read_text(),
    ):
        page.feed(html)
    assert not page.tags & {"script", "img", "iframe", "object"}
    assert "<script>alert('from the corpus')</script>" in page.text
    assert "<img src=x>.txt" in page.text


def test_the_page_has_the_figures(prepared: tuple[Path, Manifest]) -> None:
    directory, made = prepared
    html = (directory / "report.html").read_text()
    for split in made.splits.values():
        assert f"{split.tokens:,}" in html
    for heading in ("Document lengths", "Packed end to end", "Quarantined", "Sample documents", "Source"):
        assert heading in html
    assert "<svg" in html
