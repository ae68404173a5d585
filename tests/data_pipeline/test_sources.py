from __future__ import annotations

import gzip
import os
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline import readers, sources
from data_pipeline.config import SourceConfig
from data_pipeline.content import check_unchanged
from data_pipeline.readers import Document, Quarantined
from data_pipeline.sources import Unit, describe, listing, plan_units
from tests.data_pipeline.texts import MARKUP, prose, rows, unit_documents

Found = list[Document | Quarantined]


def read(path: Path, unit_bytes: int = 1 << 20, **options: object) -> Found:
    source = SourceConfig(kind="path", path=str(path), **options)  # type: ignore[arg-type]
    return [found for unit in plan_units(source, unit_bytes) for found in unit_documents(unit, source)]


def addresses_of(units: list[Unit]) -> list[str]:
    return [unit.sealed().inputs for unit in units]


def texts(found: Found) -> list[str]:
    return [document.text for document in found if isinstance(document, Document)]


def reasons(found: Found) -> list[tuple[str, int, str]]:
    return [(q.file, q.offset, q.reason) for q in found if isinstance(q, Quarantined)]


def test_the_standard_library_is_a_corpus_of_modules_and_topics() -> None:
    source = SourceConfig()
    units = plan_units(source, 2 * 2**20)
    names = [item.name for unit in units for item in unit.items]
    assert len(names) == len(set(names)) > 300
    assert {"argparse.py", "json/decoder.py", "topic compound"} <= set(names)
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idlelib", "lib2to3", "encodings", "site-packages", "pydoc_data"}
    assert sum(unit.size for unit in units) > 5e6
    assert addresses_of(units) == addresses_of(plan_units(source, 2 * 2**20))
    first = next(unit_documents(units[0], source))
    assert isinstance(first, Document)
    assert describe(source)["licence"] == "PSF-2.0"


def test_no_topic_lies_in_another_document() -> None:
    source = SourceConfig()
    units = plan_units(source, 2 * 2**20)
    found = [found for unit in units for found in unit_documents(unit, source)]
    documents = [document for document in found if isinstance(document, Document)]
    topics = [document.text for document in documents if document.source == "topics"]
    assert len(topics) > 50
    modules = [document.text for document in documents if document.source != "topics"]
    for index, text in enumerate(topics):
        body = sources.TITLE.sub("", text, count=1).strip()
        assert not any(body in other for other in modules), text[:60]
        assert not any(body in other for other in topics[:index] + topics[index + 1 :]), text[:60]


def test_of_equal_topics_one_is_kept() -> None:
    topics = {
        "b": "Two\n===\n\nsame",
        "a": "One\n***\n\nsame\n",
        "all": "All\n---\n\nFirst\n=====\n\nmore",
        "c": "First\n***\n\nmore",
    }
    assert list(sources._distinct(topics)) == ["a", "all"]


def test_what_the_build_of_python_wrote_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "json/decoder.py",
        "config-3.11-x86_64-linux-gnu/python-config.py",
        "_sysconfigdata__linux.py",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    names = [item.name for unit in plan_units(SourceConfig(), 2**20) for item in unit.items]
    assert [name for name in names if not name.startswith("topic ")] == ["json/decoder.py"]


def test_every_kind_of_file_is_read_in_one_order(corpus: Path) -> None:
    found = read(corpus)
    expected = [prose(seed) for seed in range(60)]
    expected[9] = MARKUP + expected[9]
    # Files of a folder before its folders: b.jsonl ... e.parquet, then a/*.txt.
    assert texts(found) == expected[10:] + expected[:10]
    assert not reasons(found)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(unit_bytes=st.integers(1, 60_000))
def test_units_of_any_size_hold_the_same_documents(corpus: Path, unit_bytes: int) -> None:
    for name in ("b.jsonl", "e.parquet"):
        assert texts(read(corpus / name, unit_bytes)) == texts(read(corpus / name))


def test_a_file_that_grows_keeps_the_units_before(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    addresses = []
    for count in (20, 30):
        path.write_text("".join(rows(range(count))))
        units = plan_units(SourceConfig(kind="path", path=str(path)), 8192)
        addresses.append(addresses_of(units))
    assert addresses[1][: len(addresses[0]) - 1] == addresses[0][:-1] != []


def test_a_units_address_follows_content_not_place(tmp_path: Path) -> None:
    addresses = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(prose(1))
        source = SourceConfig(kind="path", path=str(tmp_path / folder))
        addresses.append(addresses_of(plan_units(source, 100)))
        (tmp_path / folder / "a.txt").write_text(prose(2))
        assert addresses_of(plan_units(source, 100)) != addresses[-1]
    assert addresses[0] == addresses[1]


@pytest.mark.parametrize("mark", ["START", "END"])
def test_marks_elsewhere_in_a_book_are_in_its_units_addresses(tmp_path: Path, mark: str) -> None:
    text = "".join(f"line {number} of the book\n" for number in range(400))
    path, addresses, found = tmp_path / "a.txt", [], []
    path.write_text(
        "header\n*** START OF THIS PROJECT GUTENBERG EBOOK A ***\n"
        + text
        + "*** END OF THIS PROJECT GUTENBERG EBOOK A ***\nlicence\n"
    )
    options = {"strip_gutenberg": True, "text_document_bytes": 1000}
    source = SourceConfig(kind="path", path=str(path), **options)  # type: ignore[arg-type]
    for _ in range(2):
        units = plan_units(source, 1000)
        addresses.append(addresses_of(units))
        found.append([list(unit_documents(unit, source)) for unit in units])
        for unit in units:
            check_unchanged(unit.sealed().items)
        path.write_text(path.read_text().replace(f"*** {mark} OF", f"... {mark} OF"))
    assert len(addresses[0]) == len(addresses[1]) > 5
    # The one unit whose bytes changed, or no longer end where the book does.
    same = [one == two for one, two in zip(*found)]
    assert same == [one == two for one, two in zip(*addresses)]
    assert same.count(False) == 1


def test_a_mark_in_another_units_bytes_changes_the_address(tmp_path: Path) -> None:
    path, addresses = tmp_path / "a.txt", []
    source = SourceConfig(kind="path", path=str(path), strip_gutenberg=True, text_document_bytes=100)
    mark = "*** END OF THIS PROJECT GUTENBERG EBOOK A ***"
    for first in (mark, mark.replace("*", ".")):
        path.write_text(first + "\n" + "a line\n" * 100)
        addresses.append(addresses_of(plan_units(source, 100)))
    assert len(addresses[0]) == len(addresses[1]) > 5
    assert all(one != two for one, two in zip(*addresses))


def test_bad_records_are_quarantined_and_reading_goes_on(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 latin-1")
    (tmp_path / "b.txt").write_text("\n \n")
    (tmp_path / "c.txt").write_text("x" * 2000)
    lines = [
        b'{"text": "good"}',
        b"",
        b"{broken",
        b'{"text": "\xff"}',
        b'{"other": 1}',
        b'["text"]',
        b'{"text": "\\ud800"}',
        b'{"text": "' + b"y" * 20_000 + b'"}',
        b'{"text": "' + b"[" * 1500 + b'"}',
        b"[" * 11_000,
        b'{"text": "last"}',
    ]
    (tmp_path / "d.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "e.parquet").write_bytes(b"PAR1 is not enough")
    found = read(tmp_path, max_document_bytes=1000)
    assert texts(found) == ["good", "last"]
    offsets = [sum(len(line) + 1 for line in lines[:i]) for i in range(len(lines))]
    files = reasons(found)
    assert [(file, offset) for file, offset, _ in files[:2]] == [("a.txt", 3), ("b.txt", 0)]
    assert "not UTF-8" in files[0][2]
    assert files[1][2] == "no text"
    assert files[2] == ("c.txt", 0, "2000 bytes, more than 1000")
    inside = [reason for file, _, reason in files if file == "d.jsonl"]
    for reason, word in zip(
        inside,
        [
            "not JSON",
            "not UTF-8",
            "missing",
            "missing",
            "surrogate",
            "longer than",
            "more than 1000",
            "not JSON",
        ],
        strict=True,
    ):
        assert word in reason
    assert [offset for file, offset, _ in files if file == "d.jsonl"] == [
        offsets[2],
        offsets[3] + 10,
        *offsets[4:10],
    ]
    assert files[-1][0] == "e.parquet"


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("keep", [0.5, 0.9])
def test_a_truncated_archive_gives_what_it_holds_and_is_named(
    tmp_path: Path, suffix: str, keep: float
) -> None:
    import zstandard

    data = "".join(rows(range(200))).encode()
    packed = gzip.compress(data) if suffix == "gz" else zstandard.compress(data)
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(packed[: int(len(packed) * keep)])
    (tmp_path / "b.jsonl").write_text(rows(range(1))[0])
    found = read(tmp_path)
    whole = [prose(seed) for seed in range(200)]
    assert texts(found)[:-1] == whole[: len(texts(found)) - 1]
    assert texts(found)[-1] == prose(0)
    assert [file for file, _, reason in reasons(found) if "damaged compressed file" in reason] == [
        f"a.jsonl.{suffix}"
    ]


def test_several_zst_frames_are_one_file(tmp_path: Path) -> None:
    import zstandard

    lines = rows(range(3))
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(zstandard.compress(line.encode()) for line in lines))
    assert texts(read(tmp_path)) == [prose(seed) for seed in range(3)]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_decompression_bomb_is_cut_off(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import zstandard

    monkeypatch.setattr(readers, "EXPANSION_FLOOR", 10_000)
    data = rows(range(1))[0].encode() + b'{"text": "a"}\n' * 200_000
    packed = gzip.compress(data) if suffix == "gz" else zstandard.compress(data)
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(packed)
    found = read(tmp_path)
    assert texts(found)[0] == prose(0)
    assert len(texts(found)) < 200_000
    assert "expands over 200 times" in reasons(found)[-1][2]


@given(text=st.text(min_size=1, max_size=300), limit=st.integers(4, 80))
def test_cutting_a_text_loses_nothing(text: str, limit: int) -> None:
    parts = list(readers._cut(text.encode(), limit))
    assert b"".join(parts) == text.encode()
    assert all(len(part) <= limit for part in parts)
    assert "".join(part.decode() for part in parts) == text


def test_one_long_text_file_can_be_cut(tmp_path: Path) -> None:
    text = "\n\n".join(prose(seed, words=20) for seed in range(50))
    (tmp_path / "book.txt").write_text(text)
    parts = texts(read(tmp_path / "book.txt", text_document_bytes=1000))
    assert "".join(parts) == text
    assert len(parts) > 5
    assert all(part.endswith("\n\n") for part in parts[:-1])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "does not exist: name a folder or file"),
        ("empty", "holds no text: it needs files ending in"),
    ],
)
def test_a_missing_or_empty_corpus_is_one_line_with_the_remedy(
    tmp_path: Path, name: str, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "readme.md").write_text("no text file")
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)


def test_hidden_files_and_pipes_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(prose(1))
    (tmp_path / ".b.txt").write_text(prose(2))
    os.mkfifo(tmp_path / "c.txt")
    (tmp_path / "d.txt").symlink_to(tmp_path / "nowhere")
    assert texts(read(tmp_path)) == [prose(1)]


def test_the_listing_follows_names_sizes_and_times(tmp_path: Path) -> None:
    source = SourceConfig(kind="path", path=str(tmp_path))
    (tmp_path / "a.txt").write_text("one")
    first = listing(source)
    os.utime(tmp_path / "a.txt", ns=(0, 1))
    second = listing(source)
    (tmp_path / "b.txt").write_text("two")
    assert len({first, second, listing(source)}) == 3
    assert listing(replace(source, path=str(tmp_path / "gone"))) is None
