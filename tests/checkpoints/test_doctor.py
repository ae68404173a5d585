"""`trellis doctor CKPT`: everything is verified, exit status 0 or 1, one schema of JSON."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpoints.manifest import digest_line
from checkpoints.pins import pin
from launch.cli import main
from tests.checkpoints.helpers import DyingFileSystem, save, saved

KEYS = ["path", "kind", "examined", "problems", "repaired", "notes"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return saved(tmp_path / "run" / "checkpoints", 5, world=2)


@pytest.fixture
def examine(capsys: pytest.CaptureFixture[str]) -> Callable[[Path], tuple[int, dict[str, Any]]]:
    def run(path: Path) -> tuple[int, dict[str, Any]]:
        status = main(["doctor", str(path), "--json"])
        report = json.loads(capsys.readouterr().out)
        assert list(report) == KEYS
        assert status == (1 if report["problems"] else 0)
        return status, report

    return run


def _flip(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])


def _rewrite(checkpoint: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest and give it a digest that agrees: damage that only the contents show."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    change(manifest)
    data = json.dumps(manifest).encode()
    (checkpoint / "manifest.json").write_bytes(data)
    (checkpoint / "manifest.sha256").write_bytes(digest_line(data))


def _forge(checkpoint: Path, name: str, data: bytes) -> None:
    (checkpoint / name).write_bytes(data)
    record = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    _rewrite(checkpoint, lambda manifest: manifest["files"].update({name: record}))


def _hole(manifest: dict[str, Any]) -> None:
    del manifest["tensors"]["model/embed.weight"]["slices"][0]


def _outside(manifest: dict[str, Any]) -> None:
    manifest["files"]["../../secret"] = manifest["files"]["state.json"]


def _other_type(manifest: dict[str, Any]) -> None:
    manifest["tensors"]["rng"]["dtype"] = "I8"


def test_a_whole_one(
    checkpoint: Path, examine: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    status, report = examine(checkpoint)
    expected = {"path": str(checkpoint), "kind": "checkpoint", "examined": [str(checkpoint)]}
    assert (status, report) == (0, expected | {"problems": [], "repaired": [], "notes": []})
    assert main(["doctor", str(checkpoint)]) == 0
    assert f"checkpoint {checkpoint}: whole (1 examined)" in capsys.readouterr().out


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "manifest": (lambda c: _flip(c / "manifest.json"), "manifest.json and manifest.sha256 disagree"),
    "digest": (lambda c: _flip(c / "manifest.sha256"), "manifest.sha256 is damaged"),
    "no digest": (lambda c: (c / "manifest.sha256").unlink(), "manifest.sha256 is missing"),
    "tensors": (
        lambda c: _flip(c / "rank-00001.safetensors"),
        "rank-00001.safetensors is damaged: its SHA-256",
    ),
    "a size": (
        lambda c: (c / "rank-00000.json").write_text("{}"),
        "rank-00000.json is damaged: 2 bytes where",
    ),
    "a file": (lambda c: (c / "rank-00000.safetensors").unlink(), "rank-00000.safetensors is missing"),
    "the state": (lambda c: _flip(c / "state.json"), "state.json is damaged: its SHA-256"),
    "a state of another kind": (lambda c: _forge(c, "state.json", b"[1]\n"), "state.json holds a list"),
    "a state that is no JSON": (lambda c: _forge(c, "state.json", b"{1}\n"), "state.json is malformed"),
    "cover": (lambda c: _rewrite(c, _hole), "model/embed.weight"),
    "a name": (lambda c: _rewrite(c, _outside), "'../../secret' is not one a checkpoint has"),
    "a header": (lambda c: _rewrite(c, _other_type), "rng should be I8"),
    "the step": (lambda c: _rewrite(c, lambda m: m.update(step=6)), "belongs to another step"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_with_exit_status_1(
    checkpoint: Path, examine: Callable[..., Any], damage: str
) -> None:
    work, said = DAMAGE[damage]
    work(checkpoint)
    status, report = examine(checkpoint)
    assert status == 1
    assert any(said in line for line in report["problems"]), report["problems"]
    assert not any("\n" in line for line in report["problems"])


def test_every_damaged_file_is_named_not_only_the_first(
    checkpoint: Path, examine: Callable[..., Any]
) -> None:
    for name in ("rank-00000.safetensors", "rank-00001.json", "state.json"):
        _flip(checkpoint / name)
    assert len(examine(checkpoint)[1]["problems"]) == 3


def test_stray_files_are_said_and_are_no_damage(checkpoint: Path, examine: Callable[..., Any]) -> None:
    (checkpoint / "rank-00007.safetensors").write_bytes(b"of another save")
    (checkpoint / "notes").mkdir()
    status, report = examine(checkpoint)
    assert status == 0
    assert report["notes"] == [
        f"{checkpoint / name} is not listed in manifest.json: it is no part of the checkpoint"
        for name in ("notes", "rank-00007.safetensors")
    ]
    (checkpoint / "manifest.json").unlink()
    assert examine(checkpoint)[1]["notes"] == []


@pytest.mark.parametrize("stray", ["export.json", "recipe.json", "train-00000.idx", "config.json"])
def test_a_stray_file_does_not_make_it_something_else(
    checkpoint: Path, examine: Callable[..., Any], stray: str
) -> None:
    (checkpoint / stray).write_text("{}")
    _flip(checkpoint / "rank-00000.safetensors")
    status, report = examine(checkpoint)
    assert (status, report["kind"]) == (1, "checkpoint")
    assert "rank-00000.safetensors" in report["problems"][0]


def test_a_run_notes_pins_and_what_was_left(checkpoint: Path, examine: Callable[..., Any]) -> None:
    root = checkpoint.parent
    (root.parent / "recipe.json").write_text("{}")
    save(root, 6, file_systems=DyingFileSystem(5))
    shutil.copytree(checkpoint, root / "damaged-step-00000004-0123abcd")
    (root / ".removed-step-00000001-0123abcd").mkdir()
    (root / ".removing-step-00000002").write_bytes(b"")
    (checkpoint / "stray").write_bytes(b"")
    pin(checkpoint, "evaluation")
    gone = root / "step-00000007"
    shutil.copytree(checkpoint, gone)
    pin(gone, "export")
    shutil.rmtree(gone)
    status, report = examine(root.parent)
    assert (status, report["kind"]) == (1, "run"), "the recipe names no data set"
    assert str(checkpoint) in report["examined"]
    said = "\n".join(report["notes"])
    assert len(report["notes"]) == 7, said
    for part in (
        "stray is not listed",
        ".attempt-step-00000006-",
        "a save that did not finish",
        ".removed-step-00000001-0123abcd is a removal that did not finish",
        ".removing-step-00000002 is the mark",
        "damaged-step-00000004-0123abcd is set aside",
        "step 5 is kept by a pin of 'evaluation'",
        "step 7 was pinned by 'export'",
    ):
        assert part in said
