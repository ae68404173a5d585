"""An exported folder holds the weights bit for bit, verifies itself, and comes back as a checkpoint."""

from __future__ import annotations

import errno
import random
from pathlib import Path

import pytest
from safetensors.torch import load_file

from checkpoints.export import export_model, load_exported
from tests.checkpoints.helpers import (
    DyingFileSystem,
    FailingFileSystem,
    Killed,
    assert_same,
    contents,
    saved,
)
from trellis_dist.files import read_json, sha256_file

CONFIG = {"hidden_size": 5, "pattern": ["trellis"], "gamma_max": 2.0}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "pieces.model").write_bytes(b"\x0a\x07pieces")
    return saved(tmp_path / "checkpoints", 12, world=2)


def _export(checkpoint: Path, name: str = "out", **options: object) -> Path:
    folder = checkpoint.parent.parent
    tokenizer = folder / "pieces.model"
    return export_model(checkpoint, folder / name, tokenizer=tokenizer, model_config=CONFIG, **options)  # type: ignore[arg-type]


def _weights() -> dict[str, object]:
    return {k.removeprefix("model/"): v for k, v in contents(12).items() if k.startswith("model/")}


def test_round_trip(checkpoint: Path) -> None:
    output = _export(checkpoint)
    assert sorted(p.name for p in output.iterdir()) == [
        "config.json",
        "export.json",
        "model.safetensors",
        "tokenizer.model",
    ]
    exported = load_exported(output)
    assert exported.step == 12
    assert exported.model_config == CONFIG
    assert exported.tokenizer.read_bytes() == b"\x0a\x07pieces"
    assert {*exported.tensors} == {*_weights()}
    library = load_file(output / "model.safetensors")
    for name, tensor in _weights().items():
        assert_same(exported.tensors[name], tensor)  # type: ignore[arg-type]
        assert_same(library[name], tensor)  # type: ignore[arg-type]
    source = read_json(output / "export.json")["source"]
    assert source == {"step": 12, "manifest_sha256": sha256_file(checkpoint / "manifest.json")}


def test_the_same_weights_give_the_same_file_from_any_mesh(checkpoint: Path, tmp_path: Path) -> None:
    other = saved(tmp_path / "four" / "checkpoints", 12, world=4)
    (tmp_path / "four" / "pieces.model").write_bytes(b"\x0a\x07pieces")
    first, second = _export(checkpoint), _export(other)
    for name in ("model.safetensors", "config.json", "tokenizer.model"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_bit_flips_are_detected_and_named(checkpoint: Path) -> None:
    output = _export(checkpoint)
    chance = random.Random(3)
    for name in ["model.safetensors", "config.json", "tokenizer.model", "export.json"] * 6:
        good = (output / name).read_bytes()
        bad = bytearray(good)
        if name == "export.json":  # white space is not part of what its digest covers
            position = chance.choice([i for i, byte in enumerate(good) if byte not in b" \n"])
        else:
            position = chance.randrange(len(good))
        bad[position] ^= 1 << chance.randrange(8)
        (output / name).write_bytes(bad)
        with pytest.raises(ValueError, match=name):
            load_exported(output)
        (output / name).write_bytes(good)
    load_exported(output)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.model", "export.json"])
def test_missing_files_are_named(checkpoint: Path, name: str) -> None:
    output = _export(checkpoint)
    (output / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_exported(output)


def test_what_cannot_be_exported(checkpoint: Path, tmp_path: Path) -> None:
    _export(checkpoint)
    with pytest.raises(FileExistsError, match="never overwritten"):
        _export(checkpoint)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        export_model(checkpoint, tmp_path / "b", tokenizer=tmp_path / "nowhere", model_config={})
    with pytest.raises(FileNotFoundError, match="not a checkpoint"):
        _export(tmp_path / "checkpoints" / "step-00000099", "c")
    bare = saved(tmp_path / "bare", 1, tensors={"rng": contents(1)["rng"]})
    with pytest.raises(ValueError, match="no weights"):
        export_model(bare, tmp_path / "d", tokenizer=tmp_path / "pieces.model", model_config={})
    (checkpoint / "rank-00001.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"rank-00001\.safetensors is damaged"):
        _export(checkpoint, "e")
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", "pieces.model", "out", "bare"}


@pytest.mark.parametrize(
    "place",
    [
        "checkpoints/step-00000099",
        "checkpoints/out",
        "checkpoints/step-00000012/out",
        "step-00000099",
        "link/out",
    ],
)
def test_an_export_is_no_checkpoint_of_a_run(checkpoint: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "link").symlink_to(checkpoint.parent)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="choose another") as caught:
        _export(checkpoint, place)
    assert len(str(caught.value).splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("fragment", ["model.safetensors", "config.json", "tokenizer.model", "export.json"])
def test_a_full_disk_leaves_nothing(checkpoint: Path, fragment: str) -> None:
    with pytest.raises(OSError, match=fragment) as caught:
        _export(checkpoint, file_system=FailingFileSystem("write", fragment))
    assert caught.value.errno == errno.ENOSPC
    assert sorted(p.name for p in checkpoint.parent.parent.iterdir()) == ["checkpoints", "pieces.model"]


def test_killed_at_every_boundary_the_folder_is_whole_or_absent(checkpoint: Path) -> None:
    counter = DyingFileSystem()
    _export(checkpoint, "count", file_system=counter)
    for stop_at in range(len(counter.log)):
        with pytest.raises(Killed):
            _export(checkpoint, f"at-{stop_at}", file_system=DyingFileSystem(stop_at))
        output = checkpoint.parent.parent / f"at-{stop_at}"
        assert not output.exists() or load_exported(output).step == 12
