from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import workers
from data_pipeline.job import prepare
from data_pipeline.loader import TokenDataset
from data_pipeline.manifest import Manifest, fingerprint_of, load_manifest, verify_dataset, write_manifest
from tests.data_pipeline.texts import hashes, settings

Prepared = tuple[Path, Manifest]
Damage = Callable[[dict[str, Any]], object]


def copied(prepared: Prepared, tmp_path: Path) -> Path:
    shutil.copytree(prepared[0], tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize(
    "damage",
    [
        lambda fields: fields["splits"]["validation"].update(bytes=1),
        lambda fields: fields["splits"]["train"]["shards"][0].update(tokens=1),
        lambda fields: fields["splits"]["train"]["shards"][0].update(sha256_bin="0" * 64),
        lambda fields: fields["tokenizer"].update(eos=7),
        lambda fields: fields["sources"]["text"].update(documents=9999),
        lambda fields: fields.update(quarantined=3),
        lambda fields: fields["logs"].update({"quarantine.jsonl": "0" * 64}),
        lambda fields: fields["stages"]["corpus"]["read"].update(documents=1),
        lambda fields: fields["source"].update(licence="public domain"),
        lambda fields: fields.pop("sha256"),
        lambda fields: fields.clear(),
    ],
)
def test_any_changed_word_is_noticed(prepared: Prepared, tmp_path: Path, damage: Damage) -> None:
    path = copied(prepared, tmp_path) / "manifest.json"
    fields = json.loads(path.read_text())
    damage(fields)
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"manifest\.json is .*delete it and run"):
        TokenDataset(path.parent, "train", sequence_length=64, seed=0)
    assert "manifest.json is" in verify_dataset(path.parent)[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "../../train-00000"}, "is no shard of the train split"),
        ({"name": "validation-00000"}, "is no shard of the train split"),
        ({"name": "train-00000\n"}, "is no shard of the train split"),
        ({"name": 7}, "is no shard of the train split"),
        ({"tokens": -1}, "-1 is no count"),
        ({"bytes": 1.5}, "1.5 is no count"),
        ({"documents": True}, "True is no count"),
    ],
)
def test_a_forged_shard_is_refused(
    prepared: Prepared, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    directory, made = copied(prepared, tmp_path), prepared[1]
    train = made.splits["train"]
    splits = dict(made.splits) | {"train": replace(train, shards=(replace(train.shards[0], **changes),))}
    mark = fingerprint_of(made.config_digest, made.tokenizer["sha256"], splits)
    write_manifest(directory, replace(made, splits=splits, fingerprint=mark))
    with pytest.raises(ValueError, match=rf"manifest\.json is damaged \(.*{message}"):
        load_manifest(directory)


def test_the_fingerprint_covers_the_counts(prepared: Prepared) -> None:
    made = prepared[1]
    fewer = {name: replace(split, bytes=split.bytes - 1) for name, split in made.splits.items()}
    assert fingerprint_of(made.config_digest, made.tokenizer["sha256"], fewer) != made.fingerprint


def test_a_damaged_manifest_is_made_again(
    prepared: Prepared, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise AssertionError("Ray was started")

    directory = copied(prepared, tmp_path)
    (directory / "manifest.json").write_bytes(b"{")
    with pytest.raises(ValueError, match=r"manifest\.json is not valid JSON"):
        load_manifest(directory)
    monkeypatch.setattr(workers, "ray_session", refuse)
    prepare(settings(directory, corpus), progress=False)
    assert hashes(directory) == hashes(prepared[0])


def test_a_forged_log_is_refused(prepared: Prepared, tmp_path: Path) -> None:
    directory = copied(prepared, tmp_path)
    write_manifest(directory, replace(prepared[1], logs={"../../quarantine.jsonl": "0" * 64}))
    with pytest.raises(ValueError, match=r"manifest\.json is damaged \(.* is no log"):
        load_manifest(directory)
