from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline import fetch, readers, streams
from data_pipeline.config import SourceConfig
from data_pipeline.fetch import RECORDS, part_key
from data_pipeline.job import prepare
from data_pipeline.readers import Document, Quarantined, read_item
from data_pipeline.sources import Unit, plan_units
from data_pipeline.streams import Archive, plan_source
from tests.data_pipeline.fetched import content, failing, found, take
from tests.data_pipeline.texts import hashes, prose, rows, settings, unit_documents

UNIT = 4000
Pack = Callable[[bytes], bytes]


def zst(data: bytes) -> bytes:
    import zstandard

    return zstandard.compress(data)


PACKS = {"gz": gzip.compress, "zst": zst}


def folder(root: Path) -> SourceConfig:
    """Two archives of several parts between plain files; the texts are those of prose(0) to prose(27)."""
    root.mkdir()
    (root / "a.txt").write_text(prose(0))
    (root / "b.jsonl.gz").write_bytes(gzip.compress("".join(rows(range(1, 13))).encode()))
    (root / "c.jsonl").write_text("".join(rows(range(13, 15))))
    (root / "d.jsonl.gz").write_bytes(gzip.compress("".join(rows(range(15, 16))).encode()))
    (root / "e.jsonl.zst").write_bytes(zst("".join(rows(range(16, 27))).encode()))
    (root / "f.txt").write_text(prose(27))
    return SourceConfig(kind="path", path=str(root))


def archive(path: Path, data: bytes, pack: Pack) -> SourceConfig:
    path.write_bytes(pack(data))
    return SourceConfig(kind="path", path=str(path))


def as_one_unit(source: SourceConfig) -> list[Document | Quarantined]:
    """What the same files hold where none of them is large."""
    return [one for unit in plan_units(source, 1 << 30) for one in unit_documents(unit, source)]


def test_documents_come_in_corpus_order_with_the_bytes_where_they_begin(tmp_path: Path) -> None:
    source = folder(tmp_path / "data")
    plan = plan_source(source, UNIT)
    assert [piece.name for piece in plan if isinstance(piece, Archive)] == ["b.jsonl.gz", "e.jsonl.zst"]
    fetched = take(plan, tmp_path)
    assert [len(entries) for entries in fetched.entries.values()] == [6, 6]
    documents = found(fetched, tmp_path)
    assert documents == as_one_unit(source)
    assert [one.text for one in documents if isinstance(one, Document)] == list(map(prose, range(28)))
    lines = rows(range(1, 13))
    assert [one.offset for one in documents if one.file == "b.jsonl.gz"] == [
        sum(len(line.encode()) for line in lines[:number]) for number in range(12)
    ]


def test_units_before_the_first_archive_need_no_fetch_and_later_ones_are_appended(tmp_path: Path) -> None:
    plan = plan_source(folder(tmp_path / "data"), UNIT)
    fetched = fetch.Fetched(list(plan))
    first = fetched.units(tmp_path)
    assert first == [plan[0]]
    for documents in (1, 3, 12, 13, 99):
        units = take(plan, tmp_path, {"documents": documents}).units(tmp_path)
        assert units[: len(first)] == first
        first = units
    assert len(units) == len(take(plan, tmp_path).units(tmp_path)) == 6 + 6 + len(plan) - 2


def test_what_is_read_of_units_and_parts_is_counted(tmp_path: Path) -> None:
    plan = plan_source(folder(tmp_path / "data"), UNIT)
    cleaned = {0: {"documents": 1, "bytes": 10}, 1: {"documents": 1, "bytes": 5}}
    assert fetch.Fetched(list(plan)).sums(cleaned) == {"documents": 0, "bytes": 0}
    fetched = take(plan, tmp_path, {"documents": 4})
    size = sum(len(prose(seed).encode()) for seed in range(1, 5))
    assert fetched.sums(cleaned) == {"documents": 1 + 4, "bytes": 10 + size}


def test_a_file_no_larger_than_a_unit_stays_one(tmp_path: Path) -> None:
    source = archive(tmp_path / "a.jsonl.gz", "".join(rows(range(5))).encode(), gzip.compress)
    size = (tmp_path / "a.jsonl.gz").stat().st_size
    assert [type(piece) for piece in plan_source(source, size)] == [Unit]
    assert [type(piece) for piece in plan_source(source, size - 1)] == [Archive]


@pytest.mark.parametrize("number", [1, 3, 8])
def test_a_restart_reads_from_the_beginning_and_commits_nothing_twice(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_source(folder(tmp_path / "data"), UNIT)
    with monkeypatch.context() as patch:
        patch.setattr(fetch, "commit_unit", failing(fetch.commit_unit, number))
        with pytest.raises(OSError, match="No space left"):
            take(plan, tmp_path)
    before = content(tmp_path)
    assert len(before) == 2 * (number - 1)
    written, parsed = [], []
    commit, parse = fetch.commit_unit, readers._parse_line
    monkeypatch.setattr(fetch, "commit_unit", lambda *a: written.append(a[2]) or commit(*a))
    monkeypatch.setattr(readers, "_parse_line", lambda *a: parsed.append(a[2]) or parse(*a))
    take(plan, tmp_path)
    assert len(written) == 12 - (number - 1)
    assert len(parsed) == 23 - 2 * (number - 1)  # two documents are a part, and none of them is parsed again
    monkeypatch.setattr(streams, "read_lines", lambda *_: pytest.fail("the file was opened"))
    take(plan, tmp_path)
    monkeypatch.undo()
    take(plan, tmp_path / "whole")
    assert content(tmp_path) == content(tmp_path / "whole")
    assert before.items() <= content(tmp_path).items()


@pytest.mark.parametrize("suffix", PACKS)
@pytest.mark.parametrize("keep", [0.01, 0.6, 0.95])
def test_a_truncated_archive_is_quarantined_as_in_one_unit(tmp_path: Path, suffix: str, keep: float) -> None:
    path = tmp_path / f"a.jsonl.{suffix}"
    lines = [json.dumps({"text": prose(seed) + os.urandom(3000).hex()}) + "\n" for seed in range(60)]
    packed = PACKS[suffix]("".join(lines).encode())
    source = archive(path, packed[: int(len(packed) * keep)], bytes)
    fetched = take(plan_source(source, 1000), tmp_path)
    documents = found(fetched, tmp_path)
    assert documents == as_one_unit(source)
    (bad,) = [one for one in documents if isinstance(one, Quarantined)]
    assert bad == documents[-1]
    assert bad.reason.startswith("damaged compressed file, rest left out")
    assert not fetched.missing
    assert content(tmp_path) == content_again(source, tmp_path)


def content_again(source: SourceConfig, work: Path) -> dict[str, bytes]:
    take(plan_source(source, 1000), work)
    return content(work)


@pytest.mark.parametrize("suffix", PACKS)
def test_a_bomb_is_cut_off_as_in_one_unit(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "EXPANSION_FLOOR", 10_000)
    monkeypatch.setattr(readers, "MAX_EXPANSION", 20)
    line = json.dumps({"text": prose(1)}).encode() + b"\n"
    source = archive(tmp_path / f"a.jsonl.{suffix}", line * 2000, PACKS[suffix])
    documents = found(take(plan_source(source, 500), tmp_path), tmp_path)
    assert documents == as_one_unit(source)
    assert "expands over 20 times" in getattr(documents[-1], "reason", "")
    assert 10 < len(documents) < 2000


def test_records_that_are_no_documents_keep_their_place(tmp_path: Path) -> None:
    lines = [
        b'{"text": "good"}',
        b" ",
        b"{broken",
        b'{"text": "\xff"}',
        b'{"n": 1}',
        b'{"text": "last"}',
        b"",
    ]
    source = archive(tmp_path / "a.jsonl.gz", b"\n".join(lines), gzip.compress)
    fetched = take(plan_source(source, 3), tmp_path)
    documents = found(fetched, tmp_path)
    assert documents == as_one_unit(source)
    assert [one.offset for one in documents] == [0, 19, 27 + 10, 41, 50]
    assert [entry["records"] for entry in fetched.entries[0]] == [1, 4]


def test_addresses_follow_content_and_how_it_is_read(tmp_path: Path) -> None:
    data = "".join(rows(range(5))).encode()
    source = archive(tmp_path / "a.jsonl.gz", data, gzip.compress)

    def key(source: SourceConfig, unit_bytes: int = 1000) -> str:
        (piece,) = plan_source(source, unit_bytes)
        assert isinstance(piece, Archive)
        return part_key(piece.sealed(), 0)

    keys = {key(source), key(source, 1001), key(replace(source, text_column="n"))}
    keys.add(key(replace(source, max_document_bytes=10)))
    os.utime(tmp_path / "a.jsonl.gz", ns=(1, 1))
    (tmp_path / "a.jsonl.gz").rename(tmp_path / "b.jsonl.gz")
    moved = replace(source, path=str(tmp_path / "b.jsonl.gz"))
    assert key(moved) in keys
    archive(tmp_path / "b.jsonl.gz", data[:-1], gzip.compress)
    keys.add(key(moved))
    assert len(keys) == 5
    with pytest.raises(AssertionError, match="is not sealed"):
        part_key(plan_source(moved, 1000)[0], 0)  # type: ignore[arg-type]


def test_a_file_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_source(folder(tmp_path / "data"), UNIT)
    hashed, content_of = [], streams.content_of
    monkeypatch.setattr(streams, "content_of", lambda *a: hashed.append(Path(a[1]).name) or content_of(*a))
    fetched = take(plan, tmp_path, {"documents": 3})
    assert hashed == ["b.jsonl.gz"]  # the budget does not reach the other one
    take(fetched.plan, tmp_path)
    assert hashed == ["b.jsonl.gz", "e.jsonl.zst"]


def test_a_file_that_changes_while_it_is_read_or_hashed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl.gz"
    source = archive(path, "".join(rows(range(12))).encode(), gzip.compress)
    changed = r"^a\.jsonl\.gz changed while the job ran: run prepare again$"

    def touched(function: Callable[..., object]) -> Callable[..., object]:
        def made(*arguments: object) -> object:
            result = function(*arguments)
            os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
            return result

        return made

    for module, name, parts in ((streams, "content_of", 0), (fetch, "commit_unit", 1)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, touched(getattr(module, name)))
            with pytest.raises(OSError, match=changed):
                take(plan_source(source, UNIT), tmp_path)
        assert len(content(tmp_path)) == 2 * parts
    plan = plan_source(source, UNIT)
    archive(path, b"other", gzip.compress)
    with pytest.raises(OSError, match=changed):
        take(plan, tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.jsonl\.gz"):
        take(plan, tmp_path)


def test_a_file_without_records_is_one_empty_part(tmp_path: Path) -> None:
    source = archive(tmp_path / "a.jsonl.gz", b"\n \n", gzip.compress)
    fetched = take(plan_source(source, 1), tmp_path)
    assert [entry["records"] for entry in fetched.entries[0]] == [0]
    assert found(fetched, tmp_path) == []


@pytest.mark.parametrize("budget", [{}, {"max_documents": 6}, {"max_documents": 17}, {"max_tokens": 3000}])
def test_workers_budgets_and_a_cache_change_nothing(
    tmp_path: Path, ray_cluster: object, budget: dict[str, int]
) -> None:
    source = replace(folder(tmp_path / "data"), **budget)
    made = {}
    for name, workers in (("one", 1), ("cached", 2)):
        directory = tmp_path / name
        if name == "cached":
            take(plan_source(source, UNIT), directory / "work")
        made[name] = prepare(
            settings(directory, tmp_path, source=source, unit_bytes=UNIT), workers=workers, progress=False
        )
    assert hashes(tmp_path / "one") == hashes(tmp_path / "cached")
    documents = sum(split.documents for split in made["one"].splits.values())
    assert documents == budget.get("max_documents", documents)
    assert documents == 28 or budget
    parts = sorted((tmp_path / "one" / "work" / "fetch").glob(f"*/{RECORDS}"))
    assert len(parts) == 12 or (budget and len(parts) < 12)
    if "max_tokens" in budget:
        assert 3000 <= made["one"].splits["train"].tokens < 4500


def test_a_budget_that_the_files_before_an_archive_fill_fetches_nothing(
    tmp_path: Path, ray_cluster: object
) -> None:
    folder(tmp_path / "data")
    for seed in range(30, 50):
        (tmp_path / "data" / f"a{seed}.txt").write_text(prose(seed))
    source = SourceConfig(kind="path", path=str(tmp_path / "data"), max_documents=12)
    config = settings(tmp_path / "out", tmp_path, source=source, unit_bytes=UNIT)
    made = prepare(config, workers=1, progress=False)
    assert sum(split.documents for split in made.splits.values()) == 12
    assert not list((tmp_path / "out" / "work" / "fetch").iterdir())


def test_the_reader_of_units_gives_the_same_with_records_left_out(tmp_path: Path) -> None:
    source = archive(tmp_path / "a.jsonl.zst", "".join(rows(range(5))).encode(), zst)
    (unit,) = plan_units(source, 1 << 20)
    whole = list(read_item(unit.items[0], source))
    assert [list(readers.read_lines(unit.items[0], source, skip)) for skip in (0, 2, 5, 9)] == [
        whole,
        whole[2:],
        [],
        [],
    ]
