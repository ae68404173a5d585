from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from data_pipeline import job, merge, pipeline, repair, workers
from data_pipeline.manifest import Manifest
from data_pipeline.repair import examine_dataset, repair_dataset, stored_config
from launch.cli import main
from tests.data_pipeline.texts import hashes, settings

Prepared = tuple[Path, Manifest]


@pytest.fixture
def copy(prepared: Prepared, tmp_path: Path) -> Path:
    shutil.copytree(prepared[0], tmp_path / "copy")
    return tmp_path / "copy"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["train-00000.bin", "train-00000.idx", "validation-00000.bin"])
def test_a_damaged_shard_is_made_again_without_corpus_or_ray(
    copy: Path, prepared: Prepared, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("more was made than the shard")

    monkeypatch.setattr(workers, "ray_session", refuse)
    monkeypatch.setattr(repair, "prepare", refuse)
    others = {path: path.stat().st_mtime_ns for path in copy.iterdir() if not path.name.startswith(name[:5])}
    flip(copy / name)
    assert list(examine_dataset(copy)) == [name]
    (problem,) = repair_dataset(copy).values()
    assert f"{name} is damaged" in problem
    assert hashes(copy) == hashes(prepared[0])
    assert others == {path: path.stat().st_mtime_ns for path in others}


def test_a_shard_whose_tokens_are_damaged_too_is_made_from_the_text(
    copy: Path, prepared: Prepared, ray_cluster: object
) -> None:
    (copy / "train-00000.bin").unlink()
    damaged = sorted((copy / "work" / "tokens").iterdir())[0] / "train.tokens"
    damaged.write_bytes(b"!" + damaged.read_bytes()[1:])
    assert len(repair_dataset(copy)) == 1
    assert hashes(copy) == hashes(prepared[0])


@pytest.mark.parametrize("name", ["tokenizer.model", "manifest.json", "quarantine.jsonl", "duplicates.jsonl"])
def test_every_other_file_is_made_again(
    copy: Path, prepared: Prepared, name: str, monkeypatch: pytest.MonkeyPatch, ray_cluster: object
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a unit was made again")

    for function in ("clean_unit", "token_unit"):
        monkeypatch.setattr(pipeline, function, refuse)
    (copy / name).write_bytes(b"garbage")
    assert list(repair_dataset(copy)) == [name]
    assert hashes(copy) == hashes(prepared[0])


def test_doctor_names_the_file_and_makes_it_again(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(copy / "train-00000.bin")
    assert main(["doctor", str(copy), "--check"]) == 1
    assert "damaged: " in capsys.readouterr().out
    assert main(["doctor", str(copy)]) == 0
    out = capsys.readouterr().out
    assert f"was damaged, made again: {copy / 'train-00000.bin'}" in out
    assert "whole" in out
    assert main(["doctor", str(copy)]) == 0
    assert "made again" not in capsys.readouterr().out


def test_what_cannot_be_made_again_is_said_and_nothing_is_lost(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(copy / "work")
    (copy / "config.json").unlink()
    flip(copy / "train-00000.bin")
    before = hashes(copy)
    assert main(["doctor", str(copy)]) == 1
    out = capsys.readouterr().out
    assert "train-00000.bin is damaged" in out
    assert "config.json is missing or damaged" in out
    assert hashes(copy) == before


def test_the_stored_config_is_the_one_prepared_with(copy: Path, prepared: Prepared, corpus: Path) -> None:
    assert stored_config(prepared[0]) == settings(prepared[0], corpus)
    assert stored_config(copy) == settings(copy, corpus)


@pytest.mark.parametrize("unit", ["../../../victim", "VICTIM"])
def test_a_forged_plan_of_a_shard_touches_nothing(copy: Path, tmp_path: Path, unit: str) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").write_text("kept")
    entry = copy / "work" / "shards" / "train-00000.json"
    fields = json.loads(entry.read_text())
    fields["plan"]["parts"][0]["unit"] = str(victim) if unit == "VICTIM" else unit
    entry.write_text(json.dumps(fields))
    assert not merge.remake_shard(copy, "train-00000")
    fields["plan"]["name"] = "../../../victim/train-00000"
    entry.write_text(json.dumps(fields))
    assert not merge.remake_shard(copy, "train-00000")
    assert [path.name for path in victim.iterdir()] == ["precious"]


def test_doctor_waits_for_no_job_and_disturbs_none(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(copy / "train-00000.bin")
    before = hashes(copy)
    with job.locked(copy):
        assert main(["doctor", str(copy)]) == 1
    assert "another job is preparing" in capsys.readouterr().out
    assert hashes(copy) == before
