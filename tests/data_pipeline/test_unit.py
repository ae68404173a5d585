from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from data_pipeline import unit as unit_module
from data_pipeline.config import SourceConfig
from data_pipeline.job import prepare
from data_pipeline.manifest import Manifest
from data_pipeline.sources import Unit, plan_units
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.unit import Stage, process_unit, read_records, read_unit
from tests.data_pipeline.texts import prose, rows, settings

Prepared = tuple[Path, Manifest]


def stage_of(prepared: Prepared, source: SourceConfig) -> tuple[Stage, str]:
    path = prepared[0] / "tokenizer.model"
    return Stage(source, 2**60, Tokenizer.load(path).sha256), str(path)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "work" / "units").mkdir(parents=True)
    return tmp_path / "work"


def edit(path: Path) -> None:
    """Another content of the same size, in the middle of the file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["a/3.txt", "b.jsonl", "c.jsonl.gz", "d.jsonl.zst", "e.parquet"])
def test_an_input_that_changes_while_it_is_read_is_not_committed(
    prepared: Prepared, corpus: Path, tmp_path: Path, work: Path, name: str
) -> None:
    path = tmp_path / Path(name).name
    shutil.copy(corpus / name, path)
    source = SourceConfig(kind="path", path=str(path), max_documents=1)
    units = plan_units(source, 2000)
    stage, tokenizer = stage_of(prepared, source)
    edit(path)
    changed = 0
    for old, new in zip(units, plan_units(source, 2000)):
        if old.inputs == new.inputs:
            process_unit(old, stage, tokenizer, str(work))
            continue
        with pytest.raises(OSError, match=rf"{path.name} changed while the job ran: run prepare again"):
            process_unit(old, stage, tokenizer, str(work))
        changed += 1
    assert changed == 1
    assert len(list((work / "units").iterdir())) == len(units) - 1


def test_lines_added_while_the_job_runs_are_not_read(prepared: Prepared, tmp_path: Path, work: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(rows(range(3))).rstrip())
    source = SourceConfig(kind="path", path=str(path))
    units = plan_units(source, 2**20)
    with open(path, "a") as file:
        file.write(" \n" + rows(range(3, 4))[0])
    stage, tokenizer = stage_of(prepared, source)
    assert process_unit(units[0], stage, tokenizer, str(work))["documents"] == 3


@pytest.mark.parametrize("other", [None, "Another text"])
def test_a_node_with_other_topics_is_named(
    monkeypatch: pytest.MonkeyPatch, prepared: Prepared, tmp_path: Path, other: str | None
) -> None:
    from pydoc_data import topics

    source = SourceConfig()
    item = next(i for unit in plan_units(source, 2**20) for i in unit.items if i.name == "topic compound")
    changed = topics.topics | {"compound": other}
    if other is None:
        del changed["compound"]
    monkeypatch.setattr(topics, "topics", changed)
    stage, tokenizer = stage_of(prepared, source)
    with pytest.raises(OSError, match=r"topic compound changed .*another Python.*run prepare again"):
        process_unit(Unit((item,)), stage, tokenizer, str(tmp_path))


def test_a_text_that_changes_while_the_tokenizer_is_trained_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_pipeline import job

    (tmp_path / "corpus").mkdir()
    for seed in range(4):
        (tmp_path / "corpus" / f"{seed}.txt").write_text(prose(seed))
    train = job.train_tokenizer

    def slow(*arguments: object) -> bytes:
        model = train(*arguments)  # type: ignore[arg-type]
        edit(tmp_path / "corpus" / "2.txt")
        return model

    monkeypatch.setattr(job, "train_tokenizer", slow)
    with pytest.raises(OSError, match=r"2\.txt changed while the job ran"):
        prepare(settings(tmp_path / "out", tmp_path / "corpus"), progress=False)
    assert not list((tmp_path / "out" / "work" / "tokenizers").iterdir())


def test_what_a_driver_holds_of_a_unit_does_not_grow_with_its_documents(
    prepared: Prepared, tmp_path: Path, work: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(rows(range(200))) + "{bad\n" * 50)
    source = SourceConfig(kind="path", path=str(path))
    (found,) = plan_units(source, 2**24)
    stage, tokenizer = stage_of(prepared, source)
    entry = process_unit(found, stage, tokenizer, str(work))
    folder = work / "units" / stage.key(found)
    assert (entry["documents"], entry["quarantined"]) == (200, 50)
    assert len(json.dumps(entry)) < 1000
    assert read_unit(folder) == entry
    records = read_records(folder)
    assert records[:, unit_module.SIZE].tolist() == [len(prose(seed).encode()) for seed in range(200)]
    assert records[:, unit_module.TOKENS].sum() == entry["tokens"]
    assert len((folder / unit_module.QUARANTINE).read_text().splitlines()) == 50


def test_two_workers_may_make_one_unit(
    prepared: Prepared, tmp_path: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text(prose(1))
    source = SourceConfig(kind="path", path=str(tmp_path / "a.txt"))
    (found,) = plan_units(source, 2**20)
    stage, tokenizer = stage_of(prepared, source)
    first = process_unit(found, stage, tokenizer, str(work))
    monkeypatch.setattr("os.path.lexists", lambda path: False)  # both found nothing there
    assert process_unit(found, stage, tokenizer, str(work)) == first
    assert not list((work / "attempts").iterdir())
