"""A checkpoint made to do harm, with hashes that fit, is refused; nothing is unpickled or read outside it."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpoints.export import export_model, load_exported
from checkpoints.manifest import MAX_MANIFEST, digest_line
from checkpoints.state import CheckpointReader, latest_verified, verify_checkpoint
from checkpoints.tensor_file import MAX_HEADER, read_header
from tests.checkpoints.helpers import contents, saved
from trellis_dist.files import digest, sha256_file


def _edit(path: Path, change: Callable[[Any], None]) -> None:
    """Change the manifest of `path` and give it a digest that fits."""
    manifest = json.loads((path / "manifest.json").read_bytes())
    change(manifest)
    _put_manifest(path, json.dumps(manifest).encode())


def _put_manifest(path: Path, data: bytes) -> None:
    (path / "manifest.json").write_bytes(data)
    (path / "manifest.sha256").write_bytes(digest_line(data))


def _rehash(path: Path, name: str) -> None:
    """Give file `name` of checkpoint `path` a record that fits what it now holds."""
    record = {"bytes": (path / name).stat().st_size, "sha256": sha256_file(path / name)}
    _edit(path, lambda manifest: manifest["files"].update({name: record}))


def _read_all(path: Path) -> None:
    reader = CheckpointReader(path)
    for name in contents(1):
        reader.read(name)
    reader.run_state()


def _assert_refused(path: Path, complaint: str = "") -> None:
    problems = verify_checkpoint(path)
    assert problems
    assert complaint in problems[0]
    with pytest.raises((ValueError, FileNotFoundError)):
        _read_all(path)


WEIGHT = "model/embed.weight"
OUTSIDE = [
    "../secret.safetensors",
    "/etc/passwd",
    "rank-00000.safetensors/../../x",
    "rank-00000.safetensors\n",
    "",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_paths_that_leave_the_checkpoint_are_refused(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path / "root", 1)
    (tmp_path / "root" / "secret.safetensors").write_bytes((path / "rank-00000.safetensors").read_bytes())

    def point_outside(manifest: Any) -> None:
        manifest["files"][name] = manifest["files"]["rank-00000.safetensors"]
        for part in manifest["tensors"][WEIGHT]["slices"]:
            part["file"] = name

    _edit(path, point_outside)
    _assert_refused(path, "manifest.json is malformed and was refused")


def _set(keys: list[Any], value: Any) -> Callable[[Any], None]:
    def change(manifest: Any) -> None:
        for key in keys[:-1]:
            manifest = manifest[key]
        manifest[keys[-1]] = value

    return change


SLICE = ["tensors", WEIGHT, "slices", 0]


@pytest.mark.parametrize(
    "change",
    [
        _set(["format"], "other"),
        _set(["version"], 2),
        _set(["step"], -1),
        _set(["step"], True),
        _set(["step"], "1"),
        _set(["files"], []),
        _set(["files", "state.json"], None),
        _set(["files", "state.json", "bytes"], 1.5),
        _set(["files", "state.json", "sha256"], "0" * 63),
        _set(["files", "state.json", "sha256"], 7),
        _set(["tensors"], None),
        _set(["tensors", "../x"], {"dtype": "F32", "shape": [], "slices": []}),
        _set(["tensors", WEIGHT, "dtype"], "O"),
        _set(["tensors", WEIGHT, "shape"], [7, 6]),
        _set(["tensors", WEIGHT, "shape"], [1 << 40, 1 << 40]),
        _set(["tensors", WEIGHT, "shape"], [1 << 70, 0]),
        _set(["tensors", WEIGHT, "shape"], "75"),
        _set(["tensors", WEIGHT, "slices"], []),
        _set([*SLICE, "offset"], [0]),
        _set([*SLICE, "offset"], [-1, 0]),
        _set([*SLICE, "shape"], [7, 4]),
        _set([*SLICE, "key"], 3),
        _set([*SLICE, "file"], "rank-00007.safetensors"),
        _set([*SLICE, "file"], "state.json"),
        lambda manifest: manifest.pop("world_size"),
        lambda manifest: manifest["files"].pop("state.json"),
        lambda manifest: manifest["tensors"][WEIGHT]["slices"].append(
            dict(manifest["tensors"][WEIGHT]["slices"][0])
        ),
    ],
)
def test_malformed_manifests_are_refused(tmp_path: Path, change: Callable[[Any], None]) -> None:
    path = saved(tmp_path, 1)
    _edit(path, change)
    _assert_refused(path, "manifest.json is malformed and was refused")


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"{}", b"\xff", b"[" * 200_000, b'{"format":'])
def test_manifests_that_are_no_manifest_are_refused(tmp_path: Path, data: bytes) -> None:
    path = saved(tmp_path, 1)
    _put_manifest(path, data)
    _assert_refused(path, "manifest.json is malformed and was refused")


def test_an_enormous_manifest_is_not_read(tmp_path: Path) -> None:
    path = saved(tmp_path, 1)
    with open(path / "manifest.json", "wb") as file:
        file.truncate(MAX_MANIFEST + 1)
    _assert_refused(path, "is the most a manifest may have")


def test_slices_the_file_does_not_hold_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, 1)
    _edit(path, _set([*SLICE, "key"], "model/scale@"))
    _assert_refused(path, "rank-00000.safetensors: model/embed.weight should be F32 (7, 5)")
    huge = {"dtype": "F32", "shape": [1 << 40], "slices": [{"file": "rank-00000.safetensors", "key": "k"}]}
    huge["slices"][0].update(offset=[0], shape=[1 << 40])  # type: ignore[index]
    path = saved(tmp_path, 2)
    _edit(path, _set(["tensors", "model/huge"], huge))
    with pytest.raises(ValueError, match="model/huge"):
        CheckpointReader(path).read("model/huge")  # refused before 4 TiB are asked for


def _tensor_file(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def _header(**fields: Any) -> bytes:
    return json.dumps({"k": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **fields}}).encode()


BAD_TENSOR_FILES = {
    "empty": b"",
    "short": b"\0\0\0",
    "header length zero": _tensor_file(b""),
    "header beyond the file": _tensor_file(_header(), b"abcd", length=1 << 20),
    "header beyond the cap": _tensor_file(b" " * 64, length=MAX_HEADER + 1),
    "header length 2^63": _tensor_file(_header(), b"abcd", length=1 << 63),
    "not JSON": _tensor_file(b"{nonsense}"),
    "deep JSON": _tensor_file(b"[" * 100_000),
    "a list": _tensor_file(b"[1, 2]"),
    "unknown dtype": _tensor_file(_header(dtype="OBJECT"), b"abcd"),
    "unhashable dtype": _tensor_file(_header(dtype=["F32"]), b"abcd"),
    "negative shape": _tensor_file(_header(shape=[-1]), b"abcd"),
    "fractional shape": _tensor_file(_header(shape=[1.0]), b"abcd"),
    "wrong size": _tensor_file(_header(shape=[2]), b"abcd"),
    "offsets outside": _tensor_file(_header(data_offsets=[4, 8]), b"abcd"),
    "offsets reversed": _tensor_file(_header(data_offsets=[4, 0]), b"abcd"),
    "three offsets": _tensor_file(_header(data_offsets=[0, 2, 4]), b"abcd"),
    "trailing data": _tensor_file(_header(), b"abcdefgh"),
    "missing data": _tensor_file(_header(), b"ab"),
}


@pytest.mark.parametrize("kind", BAD_TENSOR_FILES)
def test_malformed_tensor_files_are_refused(tmp_path: Path, kind: str) -> None:
    path = saved(tmp_path, 1)
    shard = path / "rank-00000.safetensors"
    shard.write_bytes(BAD_TENSOR_FILES[kind])
    with pytest.raises(ValueError, match=r"rank-00000\.safetensors"):
        read_header(shard)
    _rehash(path, shard.name)
    _assert_refused(path, "rank-00000.safetensors")


def test_a_header_over_the_cap_is_refused_by_its_length_alone(tmp_path: Path) -> None:
    path = tmp_path / "big.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER + 8))
        file.truncate(MAX_HEADER + 64)
    with pytest.raises(ValueError, match=f"at most {MAX_HEADER} bytes are accepted"):
        read_header(path)


class _Bomb:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> Any:
        return (Path.touch, (self.witness,))


@pytest.mark.parametrize("hashes_fit", [False, True])
def test_a_pickle_in_place_of_any_file_executes_nothing(tmp_path: Path, hashes_fit: bool) -> None:
    witness = tmp_path / "executed"
    bomb = pickle.dumps(_Bomb(witness))
    pickle.loads(bomb)
    assert witness.exists(), "the bomb must work to prove anything"
    witness.unlink()
    names = [path.name for path in saved(tmp_path / "count", 1, world=2).iterdir()]
    assert len(names) == 7
    for name in names:
        root = tmp_path / name
        path = saved(root, 1, world=2)
        (path / name).write_bytes(bomb)
        if hashes_fit and name == "manifest.json":
            _put_manifest(path, bomb)
        elif hashes_fit and name != "manifest.sha256":
            _rehash(path, name)
        verify_checkpoint(path)
        if name.startswith("rank-") and name.endswith(".json"):
            _read_all(path)  # its contents are in the manifest; nobody reads it
        else:
            with pytest.raises(ValueError, match=name):
                _read_all(path)
        if not hashes_fit:
            with pytest.warns(RuntimeWarning, match="damaged"):
                assert latest_verified(root) is None
    assert not witness.exists()


def test_pickles_in_an_exported_folder_execute_nothing(tmp_path: Path) -> None:
    witness = tmp_path / "executed"
    (tmp_path / "tokenizer").write_bytes(b"pieces")
    source = saved(tmp_path / "root", 1)
    for name in ("model.safetensors", "config.json", "export.json"):
        output = export_model(source, tmp_path / name, tokenizer=tmp_path / "tokenizer", model_config={})
        (output / name).write_bytes(pickle.dumps(_Bomb(witness)))
        if name != "export.json":
            about = json.loads((output / "export.json").read_bytes())
            about["files"][name] = {
                "bytes": (output / name).stat().st_size,
                "sha256": sha256_file(output / name),
            }
            about.pop("digest")
            (output / "export.json").write_text(json.dumps({**about, "digest": digest(about)}))
        with pytest.raises(ValueError, match=name):
            load_exported(output)
    assert not witness.exists()
