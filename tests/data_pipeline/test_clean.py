from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline import commit, dedup
from data_pipeline.clean import (
    CONTAMINATION,
    DROPPED,
    EXAMPLES,
    QUARANTINE,
    CleanStage,
    clean_unit,
    read_documents,
    read_texts,
)
from data_pipeline.commit import clear_attempts, commit_unit, read_unit, unit_folder
from data_pipeline.config import DedupConfig, FilterConfig, NormalizeConfig, SourceConfig
from data_pipeline.decontaminate import EvaluationNgrams
from data_pipeline.sources import Unit, plan_units
from tests.data_pipeline.texts import prose, rows

NEAR = DedupConfig(similarity=0.8)
KEY = "0" * 64


def stage_of(source: SourceConfig, **changes: Any) -> CleanStage:
    parts = {"normalize": NormalizeConfig(), "filters": FilterConfig(), "dedup": DedupConfig()}
    return CleanStage(source=source, **(parts | changes))


@pytest.fixture
def work(tmp_path: Path) -> Path:
    clear_attempts(tmp_path / "work")
    return tmp_path / "work"


def made(unit: Unit, stage: CleanStage, work: Path) -> dict[str, Any]:
    return clean_unit(unit, stage, stage.key(unit), str(work))


def sealed(source: SourceConfig, unit_bytes: int = 2**24) -> list[Unit]:
    return [unit.sealed() for unit in plan_units(source, unit_bytes)]


def of_lines(path: Path, texts: list[str]) -> SourceConfig:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return SourceConfig(kind="path", path=str(path))


def edit(path: Path) -> None:
    """Another content of the same size, in the middle of the file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["a/3.txt", "b.jsonl", "c.jsonl.gz", "d.jsonl.zst", "e.parquet"])
def test_an_input_that_changes_while_it_is_read_is_not_committed(
    corpus: Path, tmp_path: Path, work: Path, name: str
) -> None:
    path = tmp_path / Path(name).name
    shutil.copy(corpus / name, path)
    source = SourceConfig(kind="path", path=str(path))
    units = sealed(source, 2000)
    edit(path)
    changed = 0
    for old, new in zip(units, sealed(source, 2000)):
        if old.inputs == new.inputs:
            made(old, stage_of(source), work)
            continue
        with pytest.raises(OSError, match=rf"{path.name} changed while the job ran: run prepare again"):
            made(old, stage_of(source), work)
        changed += 1
    assert changed == 1
    assert len(list((work / "clean").iterdir())) == len(units) - 1
    assert not list((work / "attempts").iterdir())


def test_a_source_that_vanishes_is_named_and_nothing_is_committed(tmp_path: Path, work: Path) -> None:
    source = of_lines(tmp_path / "a.jsonl", [prose(1)])
    (unit,) = sealed(source)
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.jsonl"):
        made(unit, stage_of(source), work)
    assert not list((work / "clean").iterdir())


def test_lines_added_while_the_job_runs_are_not_read(tmp_path: Path, work: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(rows(range(3))).rstrip())
    source = SourceConfig(kind="path", path=str(path))
    (unit,) = sealed(source)
    with open(path, "a") as file:
        file.write(" \n" + rows(range(3, 4))[0])
    assert made(unit, stage_of(source), work)["documents"] == 3


@pytest.mark.parametrize("other", [None, "Another text"])
def test_a_node_with_other_topics_is_named(
    monkeypatch: pytest.MonkeyPatch, work: Path, other: str | None
) -> None:
    from pydoc_data import topics

    source = SourceConfig()
    item = next(i for unit in sealed(source) for i in unit.items if i.name == "topic compound")
    changed = topics.topics | {"compound": other}
    if other is None:
        del changed["compound"]
    monkeypatch.setattr(topics, "topics", changed)
    with pytest.raises(OSError, match=r"topic compound changed .*another Python.*run prepare again"):
        made(Unit((item,)), stage_of(source), work)


def test_a_unit_gives_back_its_texts_and_what_a_driver_holds_does_not_grow(
    tmp_path: Path, work: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(rows(range(200))) + "{bad\n" * 50)
    source = SourceConfig(kind="path", path=str(path))
    (unit,) = sealed(source)
    stage = stage_of(source, dedup=NEAR)
    entry = made(unit, stage, work)
    folder = unit_folder(work, "clean", stage.key(unit))
    assert (entry["documents"], entry["quarantined"]) == (200, 50)
    assert len(json.dumps(entry)) < 2000
    assert read_unit(folder) == entry
    texts = [prose(seed) for seed in range(200)]
    assert list(read_texts(folder)) == texts
    wanted = np.arange(200) % 7 == 3
    assert list(read_texts(folder, wanted)) == texts[3::7]
    assert list(read_texts(folder, np.zeros(200, bool))) == []
    assert read_documents(folder)["bytes"].tolist() == [len(text.encode()) for text in texts]
    assert len((folder / QUARANTINE).read_text().splitlines()) == 50
    for name, dtype, count in (("exact", dedup.EXACT, 200), ("bands", dedup.BAND, 200 * NEAR.bands)):
        stored = np.fromfile(folder / name, dtype)
        assert len(stored) == count
        assert (np.diff(stored[dtype.names[0]].astype(object)) >= 0).all()


def test_every_step_is_counted_and_examples_are_kept(tmp_path: Path, work: Path) -> None:
    texts = [prose(seed) for seed in range(20)] + ["short"] * 5 + ["\x00 \x01", "a\r\nb " * 50]
    source = of_lines(tmp_path / "a.jsonl", texts)
    (unit,) = sealed(source)
    stage = stage_of(source, filters=FilterConfig(min_words=10))
    entry = made(unit, stage, work)
    counts = entry["counts"]["jsonl"]
    assert counts["read"] == [27, sum(len(text.encode()) for text in texts)]
    assert counts["filter: min_words"] == [5, 25]
    assert counts["normalised"][0] == 26
    assert counts["kept"] == [21, counts["normalised"][1] - 25]
    assert counts["normalised"][1] == counts["read"][1] - 50 - len(texts[-2])
    assert entry["quarantined"] == 1
    folder = unit_folder(work, "clean", stage.key(unit))
    dropped = [json.loads(line) for line in (folder / DROPPED).read_text().splitlines()]
    assert [record["rule"] for record in dropped] == ["min_words"] * EXAMPLES
    assert dropped[0]["text"] == "short"
    assert (dropped[0]["file"], dropped[0]["offset"]) == ("a.jsonl", sum(map(len, rows_of(texts[:20]))))
    assert "no text once normalised" in (folder / QUARANTINE).read_text()


def rows_of(texts: list[str]) -> list[str]:
    return [json.dumps({"text": text}) + "\n" for text in texts]


def test_evaluation_text_is_flagged_with_its_ngram_and_source(tmp_path: Path, work: Path) -> None:
    question = " ".join(f"q{n}" for n in range(20))
    (tmp_path / "eval.jsonl").write_text(json.dumps({"id": 1, "deep": [{"question": question}]}) + "\n")
    ngrams = EvaluationNgrams.build([str(tmp_path / "eval.jsonl")], 13, NormalizeConfig())
    ngrams.save(tmp_path / "n")
    texts = [prose(1), prose(2) + question.upper().replace(" ", ", ") + prose(3), prose(4)]
    source = of_lines(tmp_path / "a.jsonl", texts)
    (unit,) = sealed(source)
    stage = stage_of(source, ngrams=str(tmp_path / "n"), ngrams_sha256=ngrams.sha256)
    assert made(unit, stage, work)["contaminated"] == 1
    folder = unit_folder(work, "clean", stage.key(unit))
    assert read_documents(folder)["dirty"].tolist() == [0, 1, 0]
    (hit,) = [json.loads(line) for line in (folder / CONTAMINATION).read_text().splitlines()]
    assert hit["evaluation"].startswith("eval.jsonl:1")
    assert hit["ngram"] in question
    assert len(hit["ngram"].split()) == 13


Change = Callable[[CleanStage], CleanStage]


@pytest.mark.parametrize(
    "change",
    [
        lambda stage: replace(stage, normalize=NormalizeConfig(form="NFKC")),
        lambda stage: replace(stage, filters=FilterConfig(min_words=3)),
        lambda stage: replace(stage, dedup=NEAR),
        lambda stage: replace(stage, ngrams="n", ngrams_sha256="0"),
        lambda stage: replace(stage, source=replace(stage.source, max_document_bytes=7)),
        lambda stage: replace(stage, source=replace(stage.source, strip_gutenberg=True)),
    ],
)
def test_what_decides_a_unit_is_in_its_address(tmp_path: Path, change: Change) -> None:
    source = of_lines(tmp_path / "a.jsonl", [prose(1)])
    (unit,) = sealed(source)
    stage = stage_of(source)
    assert change(stage).key(unit) != stage.key(unit)
    free = replace(stage, source=replace(source, licence="x", weight=2.0, max_tokens=9))
    assert free.key(unit) == stage.key(unit)


def test_two_workers_may_make_one_unit(tmp_path: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = of_lines(tmp_path / "a.jsonl", [prose(1)])
    (unit,) = sealed(source)
    first = made(unit, stage_of(source), work)
    monkeypatch.setattr("os.path.lexists", lambda path: False)  # both found nothing there
    assert made(unit, stage_of(source), work) == first
    assert not list((work / "attempts").iterdir())


def test_half_a_unit_of_a_killed_run_does_not_stand_in_for_a_whole_one(work: Path) -> None:
    """Its attempt was cleared while its worker, which outlived the driver, was committing it."""

    def write(folder: Path) -> dict[str, Any]:
        (folder / "data").write_bytes(b"all of it")
        late = unit_folder(work, "clean", KEY)
        late.mkdir()
        (late / "data").write_bytes(b"all of it")  # unit.json is gone
        return {"n": 1}

    assert commit_unit(work, "clean", KEY, write)["n"] == 1
    assert read_unit(unit_folder(work, "clean", KEY)) is not None


def test_a_full_disk_commits_nothing(tmp_path: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = of_lines(tmp_path / "a.jsonl", [prose(1)])
    (unit,) = sealed(source)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(commit, "write_json", full)
        with pytest.raises(OSError, match="No space left"):
            made(unit, stage_of(source), work)
    assert not list((work / "clean").iterdir())
    assert not list((work / "attempts").iterdir())
    assert made(unit, stage_of(source), work)["documents"] == 1


def test_a_books_header_and_licence_are_left_out(tmp_path: Path, work: Path) -> None:
    body = "\n\n".join(prose(seed) for seed in range(40))
    book = f"The Project Gutenberg EBook\n\n*** START OF THIS PROJECT GUTENBERG EBOOK X ***\n\n\n{body}\n"
    (tmp_path / "a.txt").write_text(book + "***END OF THE PROJECT GUTENBERG EBOOK X***\n\nlicence\n" * 2)
    for cut in (None, 2000):
        source = SourceConfig(kind="path", path=str(tmp_path), strip_gutenberg=True, text_document_bytes=cut)
        texts = []
        for unit in sealed(source, 4096):
            made(unit, stage_of(source), work)
            texts += read_texts(unit_folder(work, "clean", stage_of(source).key(unit)))
        assert "".join(texts) == body + "\n"
        assert (len(texts) > 10) == (cut is not None)


def test_a_text_of_many_units_is_cut_at_lines_or_characters(tmp_path: Path, work: Path) -> None:
    text = "".join(prose(seed) for seed in range(60)) + "\u4e2d" * 2_000_000 + "end"
    (tmp_path / "a.txt").write_text(text)
    source = SourceConfig(kind="path", path=str(tmp_path), text_document_bytes=5000)
    units = sealed(source, 20_000)
    texts = []
    for unit in units:
        made(unit, stage_of(source), work)
        texts += read_texts(unit_folder(work, "clean", stage_of(source).key(unit)))
    assert "".join(texts) == text
    assert len(units) > 5
    assert max(unit.size for unit in units) < 4 * 2**20


def test_a_file_that_cannot_be_read_now_costs_no_committed_unit(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit_unit(work, "clean", KEY, lambda folder: {"size": (folder / "data").write_bytes(b"x")})
    folder = unit_folder(work, "clean", KEY)

    def stale(*_: object) -> str:
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(commit, "sha256_file", stale)
        with pytest.raises(OSError, match="Stale file handle"):
            read_unit(folder)
    assert read_unit(folder) == {"size": 1, "sha256": {"data": commit.sha256_file(folder / "data")}}
    (folder / "data").unlink()
    assert read_unit(folder) is None
    assert not folder.exists()


def test_an_attempt_is_cleared_whole_though_its_worker_lives_on(work: Path) -> None:
    def outlives_its_driver(folder: Path) -> dict[str, Any]:
        (folder / "first").write_bytes(b"1")
        clear_attempts(work)
        (folder / "second").write_bytes(b"2")
        return {}

    with pytest.raises(FileNotFoundError):
        commit_unit(work, "clean", KEY, outlives_its_driver)
    assert not unit_folder(work, "clean", KEY).exists()
    clear_attempts(work)
    assert not [path for path in work.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("key", ["../../etc", "/etc", "k", "0" * 63 + "/", ""])
def test_a_key_is_a_hash_and_no_path(work: Path, key: str) -> None:
    with pytest.raises(ValueError, match="is no key of a work unit"):
        unit_folder(work, "clean", key)


def test_a_node_with_other_packages_is_named(tmp_path: Path, work: Path) -> None:
    source = of_lines(tmp_path / "a.jsonl", [prose(1)])
    (unit,) = sealed(source)
    with pytest.raises(RuntimeError, match="other packages or other code than the driver"):
        clean_unit(unit, stage_of(source), "1" * 64, str(work))
