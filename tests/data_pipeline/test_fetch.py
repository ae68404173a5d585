from __future__ import annotations

import gzip
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from data_pipeline import fetch, pipeline, readers, streams
from data_pipeline.commit import unit_folder
from data_pipeline.config import FilterConfig, SourceConfig
from data_pipeline.fetch import RECORDS, Fetched, fetch_shard, part_key
from data_pipeline.job import prepare
from data_pipeline.readers import Document, Quarantined
from data_pipeline.streams import RemoteShard, plan_stream
from data_pipeline.workers import Workers
from tests.data_pipeline.fetched import content, failing, found, take
from tests.data_pipeline.texts import hashes, prose, rows, settings

SEEDS = (range(12), range(12, 20))


def data_set(folder: Path, shards: tuple[range, ...] = SEEDS) -> SourceConfig:
    """A data set of one .jsonl file per shard."""
    folder.mkdir()
    for shard, seeds in enumerate(shards):
        (folder / f"part{shard}.jsonl").write_text("".join(rows(seeds)))
    return SourceConfig(kind="huggingface", name=str(folder))


@pytest.mark.parametrize(("unit_bytes", "parts"), [(1, [12, 8]), (4000, [6, 4]), (1 << 30, [1, 1])])
def test_parts_hold_every_record_once_in_order(tmp_path: Path, unit_bytes: int, parts: list[int]) -> None:
    stream = plan_stream(data_set(tmp_path / "data"), unit_bytes)
    fetched = take(stream, tmp_path)
    name = stream[0].source.name
    places = [(f"{name}[0]", row) for row in range(12)] + [(f"{name}[1]", row) for row in range(8)]
    assert found(fetched, tmp_path) == [
        Document(prose(seed), "huggingface", *place) for seed, place in enumerate(places)
    ]
    assert [len(fetched.entries[shard]) for shard in range(2)] == parts
    for entries in fetched.entries.values():
        assert [entry["last"] for entry in entries] == [False] * (len(entries) - 1) + [True]
        assert all(entry["bytes"] >= unit_bytes for entry in entries[:-1])
    again = take(stream, tmp_path / "again")
    assert content(tmp_path / "again") == content(tmp_path)
    assert again.units(tmp_path) == fetched.units(tmp_path)


@pytest.mark.parametrize("number", [1, 4])
def test_a_fetch_that_failed_goes_on_behind_what_it_committed(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = plan_stream(data_set(tmp_path / "data"), 4000)
    with monkeypatch.context() as patch:
        patch.setattr(fetch, "commit_unit", failing(fetch.commit_unit, number))
        with pytest.raises(OSError, match="No space left"):
            take(stream, tmp_path)
    before = content(tmp_path)
    assert len(before) == 2 * (number - 1)
    written, read = [], []
    commit, values = fetch.commit_unit, streams._values
    monkeypatch.setattr(fetch, "commit_unit", lambda *a: written.append(a[2]) or commit(*a))
    monkeypatch.setattr(streams, "_values", lambda *a: read.append((a[0].index, a[1])) or values(*a))
    take(stream, tmp_path)
    assert len(written) == 10 - (number - 1)
    assert read == [(0, 2 * (number - 1)), (1, 0)]  # two documents are a part
    take(stream, tmp_path / "whole")
    assert content(tmp_path) == content(tmp_path / "whole")
    assert before.items() <= content(tmp_path).items()


def test_what_is_committed_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = plan_stream(data_set(tmp_path / "data"), 4000)
    first = take(stream, tmp_path)
    monkeypatch.setattr(streams, "load_streaming", lambda source: pytest.fail("the stream was opened"))
    assert take(stream, tmp_path) == first
    # A task that Ray starts again does not know what its first attempt has committed.
    assert fetch_shard(stream[0], 0, 0, {}, str(tmp_path)) == first.entries[0]


def test_a_damaged_part_alone_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = plan_stream(data_set(tmp_path / "data"), 4000)
    first = take(stream, tmp_path)
    before = content(tmp_path)
    damaged = unit_folder(tmp_path, "fetch", part_key(stream[0], 2)) / RECORDS
    data = damaged.read_bytes()
    for wrong in (data[:-1] + b"!", data[: len(data) // 2], b""):
        damaged.write_bytes(wrong)
        with pytest.raises(OSError, match=r"records\.jsonl\.zst is damaged \(.*\): run prepare again"):
            found(first, tmp_path)
    written, commit = [], fetch.commit_unit
    monkeypatch.setattr(fetch, "commit_unit", lambda *a: written.append(a[2]) or commit(*a))
    take(stream, tmp_path)
    assert written == [part_key(stream[0], 2)]
    assert content(tmp_path) == before


def test_a_limit_stops_after_the_part_that_reaches_it(tmp_path: Path) -> None:
    stream = plan_stream(data_set(tmp_path / "data"), 4000)
    for limits, parts, missing in (
        ({"documents": 5}, [3], [0, 1]),
        ({"bytes": 1}, [1], [0, 1]),
        ({"bytes": 1e9, "documents": 12}, [6], [1]),
        ({"documents": 13}, [6, 1], [1]),
        ({"documents": 99}, [6, 4], []),
    ):
        fetched = take(stream, tmp_path / str(parts), limits)
        assert [len(entries) for entries in fetched.entries.values()] == parts
        assert fetched.missing == missing
        assert len(fetched.units(tmp_path)) == sum(parts)


def test_addresses_follow_the_files_and_how_they_are_read(tmp_path: Path) -> None:
    source = data_set(tmp_path / "data")
    stream = plan_stream(source, 4000)
    keys = {part_key(stream[0], 0), part_key(stream[0], 1), part_key(stream[1], 0)}
    keys.add(part_key(plan_stream(source, 4001)[0], 0))
    keys.add(part_key(plan_stream(replace(source, text_column="n"), 4000)[0], 0))
    keys.add(part_key(plan_stream(replace(source, max_document_bytes=10), 4000)[0], 0))
    assert part_key(plan_stream(replace(source, max_tokens=10, licence="x"), 4000)[0], 0) in keys
    (tmp_path / "data" / "part0.jsonl").write_text("".join(rows(range(11))))
    keys.add(part_key(plan_stream(source, 4000)[0], 0))
    assert len(keys) == 7


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_local_files_are_known_by_what_they_hold(tmp_path: Path, kind: str) -> None:
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "data").mkdir()
    contents = []
    for text in ("one", "two"):
        table = pyarrow.table({"text": [text]})
        if kind == "parquet":
            pyarrow.parquet.write_table(table, tmp_path / "data" / "a.parquet")
        else:
            (tmp_path / "data" / "a.jsonl").write_text(json.dumps({"text": text}))
        source = SourceConfig(kind="huggingface", name=str(tmp_path / "data"))
        contents.append(plan_stream(source, 1)[0].content)
    assert contents[0] != contents[1]


def test_records_that_are_no_documents_are_quarantined_with_their_row(tmp_path: Path) -> None:
    records: list[dict[str, object]] = [{"text": prose(row, words=20)} for row in range(6)]
    records[1], records[2] = {"other": 1}, {"text": None}
    records[3], records[4] = {"text": "x" * 2000}, {"text": " \n"}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    source = SourceConfig(kind="huggingface", name=str(tmp_path / "data"), max_document_bytes=1000)
    stream = plan_stream(source, 1)
    fetched = take(stream, tmp_path)
    name, missing = f"{source.name}[0]", "field 'text' is missing or no text"
    assert found(fetched, tmp_path) == [
        Document(prose(0, words=20), "huggingface", name, 0),
        Quarantined(name, 1, missing),
        Quarantined(name, 2, missing),
        Quarantined(name, 3, "2000 bytes, more than 1000"),
        Quarantined(name, 4, "no text"),
        Document(prose(5, words=20), "huggingface", name, 5),
    ]
    # What is no document counts as no text: it goes into the part of the next that is one.
    assert [(entry["first"], entry["records"]) for entry in fetched.entries[0]] == [(0, 1), (1, 5)]
    stored = sum(len(data) for path, data in content(tmp_path).items() if path.endswith(RECORDS))
    assert stored < 2000


def test_text_that_is_not_utf_8_is_quarantined(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    raw = pyarrow.array([b"good", b"caf\xe9", b"last"])
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, raw.buffers())
    (tmp_path / "data").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), tmp_path / "data" / "a.parquet")
    stream = plan_stream(SourceConfig(kind="huggingface", name=str(tmp_path / "data")), 1)
    documents = found(take(stream, tmp_path), tmp_path)
    assert [getattr(d, "text", None) or getattr(d, "reason") for d in documents] == [  # noqa: B009
        "good",
        "not UTF-8 (unexpected end of data)",
        "last",
    ]


def test_a_json_list_without_known_columns_is_read(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.json").write_text(json.dumps([{"text": prose(seed)} for seed in range(5)]))
    stream = plan_stream(SourceConfig(kind="huggingface", name=str(tmp_path / "data")), 4000)
    assert readers.load_streaming(stream[0].source).features is None
    fetched = take(stream, tmp_path)
    assert [d.text for d in found(fetched, tmp_path) if isinstance(d, Document)] == list(map(prose, range(5)))
    assert len(fetched.entries[0]) == 3


def damaged_parquet(path: Path, good: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    good.unlink()
    table = pyarrow.table({"text": [prose(seed) for seed in range(40)]})
    for file in (good.with_suffix(".parquet"), path.with_suffix(".parquet")):
        pyarrow.parquet.write_table(table, file, row_group_size=20, compression="zstd")
    data = bytearray(file.read_bytes())
    data[200:20_000] = bytes(19_800)
    file.write_bytes(bytes(data))


def truncated_gzip(path: Path, good: Path) -> None:
    for file in (good, path):
        packed = gzip.compress("".join(rows(range(40))).encode())
        file.with_suffix(".jsonl.gz").write_bytes(packed if file == good else packed[: len(packed) // 2])
    good.unlink()


def broken_json(path: Path, good: Path) -> None:
    path.write_text("".join(rows(range(5))) + "{broken\n")


@pytest.mark.parametrize("damage", [damaged_parquet, truncated_gzip, broken_json])
def test_a_damaged_shard_is_one_line_and_what_is_before_stays(
    tmp_path: Path, damage: Callable[[Path, Path], None]
) -> None:
    source = data_set(tmp_path / "data", (range(12),))
    damage(tmp_path / "data" / "part1.jsonl", tmp_path / "data" / "part0.jsonl")
    stream = plan_stream(source, 4000)
    with pytest.raises(OSError, match=rf"^shard 1 of {source.name}: .*: run prepare again$") as error:
        take(stream, tmp_path)
    assert "\n" not in str(error.value)
    assert len(content(tmp_path)) >= 12


def test_a_network_or_folder_that_vanishes_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = data_set(tmp_path / "data")
    stream = plan_stream(source, 4000)
    take(stream, tmp_path, {"documents": 3})
    (tmp_path / "data").rename(tmp_path / "away")
    with pytest.raises(OSError, match=rf"shard 0 of {source.name}: data.source: cannot open data set"):
        take(stream, tmp_path)
    (tmp_path / "away").rename(tmp_path / "data")
    (tmp_path / "data" / "part2.jsonl").write_text("".join(rows(range(3))))
    with pytest.raises(OSError, match="there are 3 shards now, 2 when it was planned: run prepare again"):
        take(stream, tmp_path)
    (tmp_path / "data" / "part2.jsonl").unlink()

    def reset(scalar: object) -> object:
        raise LookupError("connection reset\nby peer")  # of a library, and no OSError

    with monkeypatch.context() as patch:
        patch.setattr(streams, "_value", reset)
        with pytest.raises(OSError, match=r"connection reset by peer: run prepare again"):
            take(stream, tmp_path)
    assert len(found(take(stream, tmp_path), tmp_path)) == 20


def test_a_data_set_without_files_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "load_streaming", lambda source: SimpleNamespace(num_shards=0))
    with pytest.raises(
        ValueError, match=r"the huggingface corpus is empty: choose a data\.source\.name, subset"
    ):
        plan_stream(SourceConfig(kind="huggingface", name="nothing"), 1)


def test_a_data_set_that_cannot_be_opened_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    (tmp_path / "part.jsonl").write_text(json.dumps({"body": "x"}) + "\n")
    source = SourceConfig(kind="huggingface", name=str(tmp_path))
    with pytest.raises(ValueError, match=r"text_column = 'text': .* has body"):
        plan_stream(source, 1)
    with pytest.raises(ValueError, match=r"cannot open data set .*split nothing"):
        plan_stream(replace(source, split="nothing"), 1)

    def truncated(*_: object, **__: object) -> None:
        raise EOFError

    monkeypatch.setattr(datasets, "load_dataset", truncated)
    with pytest.raises(ValueError, match=r"cannot open data set .*: EOFError$"):
        readers.load_streaming(source)


def test_a_repository_with_a_loading_script_is_refused_and_nothing_runs(tmp_path: Path) -> None:
    folder = tmp_path / "scripted"
    folder.mkdir()
    (folder / "scripted.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(
        ValueError, match=r"cannot open data set .*scripts are no longer supported"
    ) as refused:
        plan_stream(SourceConfig(kind="huggingface", name=str(folder)), 1)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "ran").exists()


def test_more_is_fetched_where_much_is_dropped() -> None:
    stream = [RemoteShard(SourceConfig(kind="huggingface", name="a/b"), "", 0, 1, 100)]
    stage = SimpleNamespace()
    feed = pipeline.Feed(
        "a", stream[0].source, [], stage, pipeline.Lead({"bytes": 1000}, pipeline._clean_sums)
    )  # type: ignore[arg-type]
    feed.fetched = Fetched([*stream])
    wants = []
    for kept in (100, 50, 0):
        wants.append(pipeline._wanted(feed, feed.fetched, Path()).limits["bytes"])
        entry = {"first": 0, "records": 1, "bytes": 100, "last": False}
        feed.fetched.entries.setdefault(0, []).append(entry)
        feed.cleaned.put(len(feed.cleaned.entries), {"documents": 1, "bytes": kept})
    wants.append(pipeline._wanted(feed, feed.fetched, Path()).limits["bytes"])
    assert wants == [1200, 400, 800, 1200]


def together(marks: Path, function: Callable[..., object]) -> Callable[..., object]:
    """The function, but it begins when two workers are there to do it."""

    def made(*arguments: object) -> object:
        (marks / str(os.getpid())).touch()
        end = time.monotonic() + 60
        while len(list(marks.iterdir())) < 2:
            assert time.monotonic() < end, "the other worker did not come"
            time.sleep(0.02)
        return function(*arguments)

    return made


def killed_once(marks: Path, function: Callable[..., object]) -> Callable[..., object]:
    """The function, but its first worker dies when it has committed one part."""

    def made(*arguments: object) -> object:
        if not list(marks.iterdir()):
            (marks / "killed").touch()
            *begin, _, work = arguments
            function(*begin, {"bytes": 1}, work)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)

    return made


def test_without_a_limit_shards_are_fetched_in_parallel_and_killed_workers_change_nothing(
    tmp_path: Path, ray_cluster: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = data_set(tmp_path / "data")
    process = fetch.fetch_shard
    made = {}
    for wrap in (together, killed_once):
        marks, directory = tmp_path / f"marks-{wrap.__name__}", tmp_path / wrap.__name__
        marks.mkdir()
        monkeypatch.setattr(fetch, "fetch_shard", wrap(marks, process))
        prepare(settings(directory, tmp_path, source=source), workers=2, progress=False)
        assert list(marks.iterdir())
        made[wrap] = hashes(directory), content(directory / "work")
    assert made[together] == made[killed_once]


@pytest.mark.parametrize(
    ("budget", "bytes_per_token"),
    [({"max_documents": 7}, 4.5), ({"max_tokens": 4000}, 4.5), ({"max_tokens": 4000}, 0.1)],
)
def test_a_budget_fetches_what_it_needs_and_a_cache_changes_nothing(
    tmp_path: Path,
    ray_cluster: object,
    budget: dict[str, int],
    bytes_per_token: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pipeline, "BYTES_PER_TOKEN", bytes_per_token)
    whole = data_set(tmp_path / "data", (range(40), range(40, 60)))
    source = replace(whole, **budget)
    for name, workers in (("one", 1), ("cached", 2)):
        directory = tmp_path / name
        if name == "cached":
            take(plan_stream(whole, 8192), directory / "work")
        config = settings(directory, tmp_path, source=source, unit_bytes=8192)
        made = prepare(config, workers=workers, progress=False)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "cached")
    assert 4 < sum(split.documents for split in made.splits.values()) < 20
    if "max_tokens" in budget:
        assert 4000 <= made.splits["train"].tokens < 5500
    stream = plan_stream(whole, 8192)
    fetched = {path.name for path in (tmp_path / "one" / "work" / "fetch").iterdir()}
    assert fetched == {part_key(stream[0], part) for part in range(len(fetched))}
    assert len(fetched) < 8
    no_task(monkeypatch)
    (tmp_path / "one" / "manifest.json").unlink()
    prepare(settings(tmp_path / "one", tmp_path, source=source, unit_bytes=8192), progress=False)


def no_task(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Workers) -> None:
        raise AssertionError("a worker was asked for")

    monkeypatch.setattr(Workers, "start", refuse)


def test_filters_that_drop_most_make_it_fetch_in_rounds_up_to_the_end(
    tmp_path: Path, ray_cluster: object
) -> None:
    long = [prose(seed, words=60 if seed % 5 else 300) for seed in range(60)]
    (tmp_path / "data").mkdir()
    for shard in range(3):
        lines = [json.dumps({"text": text}) + "\n" for text in long[shard * 20 : shard * 20 + 20]]
        (tmp_path / "data" / f"part{shard}.jsonl").write_text("".join(lines))
    found = {}
    for limit in (5, 11, 12, 1000):
        source = SourceConfig(kind="huggingface", name=str(tmp_path / "data"), max_documents=limit)
        filters = FilterConfig(min_words=100)
        config = settings(tmp_path / str(limit), tmp_path, source=source, filters=filters, unit_bytes=1000)
        made = prepare(config, workers=2, progress=False)
        found[limit] = sum(split.documents for split in made.splits.values())
    assert found == {5: 5, 11: 11, 12: 12, 1000: 12}
    parts = {limit: len(list((tmp_path / str(limit) / "work" / "fetch").iterdir())) for limit in found}
    assert parts[5] < parts[12] <= parts[1000]
