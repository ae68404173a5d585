"""What was exported comes back bit for bit, and a folder from outside is read as data from outside."""

from __future__ import annotations

import dataclasses
import json
import pickle
import struct
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints.export import EXPORT, export_model, load_exported
from checkpoints.hf_export import export_for_transformers
from checkpoints.import_model import import_folder, write_import
from checkpoints.reader import CheckpointReader
from checkpoints.source_folder import checked_section
from checkpoints.state import load_run_state, verify_checkpoint
from tests.checkpoints.helpers import DyingFileSystem, FailingFileSystem, Killed, assert_same, saved
from trellis_dist.models.config import ModelConfig, TrellisConfig
from trellis_dist.models.language_model import build_language_model

CONFIG = ModelConfig(
    vocab_size=40,
    num_layers=2,
    dim=16,
    num_heads=2,
    pattern=("trellis", "attention"),
    tie_embeddings=False,
    trellis=TrellisConfig(slots=4, chunk_size=4, step_size_max=1.5),
)
SECTION = json.loads(json.dumps(dataclasses.asdict(CONFIG)))


def weights() -> dict[str, Tensor]:
    model = build_language_model(CONFIG, seed=3)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def exported(folder: Path, *, world: int = 1, form: str = "hf") -> Path:
    tensors = {f"model/{name}": value for name, value in weights().items()}
    checkpoint = saved(folder / f"checkpoints-{world}", 12, world=world, tensors=tensors)
    (folder / "pieces.model").write_bytes(b"\x0a\x07pieces")
    given: dict[str, Any] = {"tokenizer": folder / "pieces.model", "model_config": SECTION}
    if form == "hf":
        return export_for_transformers(checkpoint, folder / f"out-{world}", **given, bos_id=1, eos_id=2)
    return export_model(checkpoint, folder / f"out-{world}", **given)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return exported(tmp_path)


@pytest.mark.parametrize("form", ["hf", "trellis"])
def test_an_export_comes_back_bit_for_bit(tmp_path: Path, form: str) -> None:
    output = write_import(import_folder(exported(tmp_path, form=form)), tmp_path / "start", source=tmp_path)
    assert sorted(path.name for path in output.iterdir()) == ["import.json", "model.toml", "step-00000000"]
    checkpoint = output / "step-00000000"
    assert verify_checkpoint(checkpoint) == []
    reader = CheckpointReader(checkpoint)
    assert reader.names() == sorted(f"model/{name}" for name in weights())
    for name, value in weights().items():
        assert_same(reader.read(f"model/{name}"), value)
    assert load_run_state(checkpoint)["model"] == SECTION
    written = tomllib.loads((output / "model.toml").read_text())
    assert checked_section(written["model"], source="model.toml") == dataclasses.replace(
        CONFIG, mlp_hidden=CONFIG.mlp_width
    )
    assert json.loads((output / "import.json").read_text())["fresh"] == {}


def test_the_same_weights_give_the_same_folder_from_any_mesh(tmp_path: Path) -> None:
    first, second = exported(tmp_path), exported(tmp_path, world=3)
    for path in first.iterdir():
        if path.name != EXPORT:  # it names the checkpoint's own manifest
            assert path.read_bytes() == (second / path.name).read_bytes(), path.name


@pytest.mark.parametrize("kinds", [("bfloat16",), ("bfloat16", "float32")], ids=str)
def test_weights_keep_their_types(tmp_path: Path, kinds: tuple[str, ...]) -> None:
    types = [getattr(torch, kinds[number % len(kinds)]) for number in range(len(weights()))]
    tensors = {name: value.to(kind) for (name, value), kind in zip(weights().items(), types, strict=True)}
    checkpoint = saved(tmp_path / "steps", 1, tensors={f"model/{name}": t for name, t in tensors.items()})
    (tmp_path / "pieces.model").write_bytes(b"pieces")
    output = export_for_transformers(
        checkpoint,
        tmp_path / "out",
        tokenizer=tmp_path / "pieces.model",
        model_config=SECTION,
        bos_id=1,
        eos_id=2,
    )
    assert json.loads((output / "config.json").read_text())["dtype"] == kinds[-1], "opened as the widest"
    for name, value in import_folder(output).tensors.items():
        assert_same(value, tensors[name])


def test_the_exports_own_reader_opens_either_form(tmp_path: Path) -> None:
    found = load_exported(exported(tmp_path))
    assert found.model_config == SECTION
    for name, value in weights().items():
        assert_same(found.tensors[name], value)


def test_a_damaged_export_is_refused_and_the_file_named(source: Path) -> None:
    names = sorted(path.name for path in source.iterdir())
    assert {"config.json", "generation_config.json", "tokenizer_config.json", "trellis_auto.py"} < {*names}
    for name in names:
        good = (source / name).read_bytes()
        (source / name).write_bytes(good.replace(b"i", b"j", 1) if b"i" in good else good[:-1])
        for read in (load_exported, import_folder):
            with pytest.raises(ValueError, match=name):
                read(source)
        (source / name).write_bytes(good)
    import_folder(source)


def bare(source: Path) -> Path:
    """As `save_pretrained` leaves a folder: without our list of hashes."""
    (source / EXPORT).unlink()
    return source


def test_a_folder_of_several_files_comes_back_too(source: Path) -> None:
    tensors = load_file(bare(source) / "model.safetensors")
    (source / "model.safetensors").unlink()
    placed = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in set(placed.values()):
        save_file({name: tensors[name] for name in placed if placed[name] == file}, source / file)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    found = import_folder(source)
    for name, value in weights().items():
        assert_same(found.tensors[name], value)


@pytest.mark.parametrize("listed", [True, False], ids=["with hashes", "without"])
def test_an_index_beside_the_one_file_is_not_read(source: Path, listed: bool) -> None:
    """Its files are in no list of hashes, and transformers reads the one file too."""
    folder = source if listed else bare(source)
    other = {name: value + 1 for name, value in load_file(folder / "model.safetensors").items()}
    save_file(other, folder / "evil.safetensors")
    placed = dict.fromkeys(other, "evil.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    found = import_folder(folder)
    for name, value in weights().items():
        assert_same(found.tensors[name], value)


def test_links_of_a_download_are_refused_with_the_remedy(source: Path) -> None:
    (source / "model.safetensors").rename(source.parent / "blob")
    (source / "model.safetensors").symlink_to(source.parent / "blob")
    for read in (load_exported, import_folder):
        with pytest.raises(ValueError, match=r"model\.safetensors is a link.*--local-dir.*cp -rL"):
            read(source)


class Bomb:
    def __reduce__(self) -> Any:
        return (Path("executed").write_text, ("x",))


def _config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def write(source: Path) -> None:
        table = json.loads((source / "config.json").read_text())
        change(table)
        (source / "config.json").write_text(json.dumps(table))

    return write


def _index(placed: Any) -> Callable[[Path], None]:
    def write(source: Path) -> None:
        (source / "model.safetensors").rename(source / "model-0.safetensors")
        (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))

    return write


def _pickles(source: Path) -> None:
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))


def _tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def write(source: Path) -> None:
        tensors = load_file(source / "model.safetensors")
        change(tensors)
        save_file(tensors, source / "model.safetensors")

    return write


HUGE = struct.pack("<Q", 1 << 40) + b"{}"
NAME = "model.norm.weight"
HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a pickle": (_pickles, "is a pickle, which can run code and is never opened"),
    "a pickle called safetensors": (
        lambda s: (s / "model.safetensors").write_bytes(pickle.dumps(Bomb())),
        "no safetensors file",
    ),
    "a huge header": (lambda s: (s / "model.safetensors").write_bytes(HUGE), "a header of"),
    "a path out of the folder": (
        _index({NAME: "../model.safetensors"}),
        "no .safetensors file of the folder",
    ),
    "an absolute path": (_index({NAME: "/tmp/model.safetensors"}), "no .safetensors file of the folder"),
    "a number for a path": (_index({NAME: 3}), "no .safetensors file of the folder"),
    "an index without a map": (_index([NAME]), "has no weight_map"),
    "a file that is not there": (_index({NAME: "model-7.safetensors"}), "is missing"),
    "an index that disagrees": (_index({NAME: "model-0.safetensors"}), "disagree about"),
    "a list for a configuration": (lambda s: (s / "config.json").write_text("[1]"), "holds a list"),
    "no configuration": (lambda s: (s / "config.json").unlink(), "has no config.json"),
    "a configuration of megabytes": (
        lambda s: (s / "config.json").write_text(" " * (1 << 21)),
        "is the most that is read",
    ),
    "half a configuration": (lambda s: (s / "config.json").write_text("{"), "is not valid JSON"),
    "another model": (_config(lambda t: t.update(model_type="gpt2")), "model_type 'gpt2'"),
    "no section": (_config(lambda t: t.update(model_section=3)), "has no table model_section"),
    "text for a number": (_config(lambda t: t["model_section"].update(dim="wide")), "model.dim = 'wide'"),
    "an unknown key": (_config(lambda t: t["model_section"].update(slotz=1)), "model.slotz"),
    "a billion layers": (
        _config(lambda t: t["model_section"].update(num_layers=10**9)),
        "for 1000000000 layers",
    ),
    "other sizes": (_config(lambda t: t["model_section"].update(dim=32)), "they do not belong together"),
    "a width beyond any memory": (
        _config(lambda t: t["model_section"].update(dim=2**40, vocab_size=2**40)),
        "beyond any memory",
    ),
    "a size beyond 63 bits": (
        _config(lambda t: t["model_section"].update(vocab_size=2**70)),
        "beyond any memory",
    ),
    "a tensor too few": (_tensors(lambda t: t.pop(NAME)), "has no tensor norm.weight"),
    "a tensor too many": (_tensors(lambda t: t.update(extra=torch.ones(2))), "a strange tensor extra"),
    "whole numbers": (_tensors(lambda t: t.update({NAME: torch.ones(16).int()})), "asks for floating-point"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_folders_are_refused_in_one_line(
    source: Path, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, words = HOSTILE[case]
    monkeypatch.chdir(tmp_path)
    damage(bare(source))
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        import_folder(source)
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("place", ["step-00000009", "other/step-00000009", "checkpoints-1/out"])
def test_nothing_is_written_among_checkpoints(source: Path, tmp_path: Path, place: str) -> None:
    with pytest.raises(ValueError, match="choose another") as caught:
        write_import(import_folder(source), tmp_path / place, source=source)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / place).exists()


def test_nothing_is_overwritten(source: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(FileExistsError, match="never overwritten"):
        write_import(import_folder(source), tmp_path / "taken", source=source)
    with pytest.raises(FileExistsError, match="never overwritten"):
        exported(tmp_path)


@pytest.mark.parametrize("fragment", ["model.toml", "import.json", "manifest.json"])
def test_a_full_disk_leaves_nothing(source: Path, tmp_path: Path, fragment: str) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OSError):
        write_import(
            import_folder(source),
            tmp_path / "start",
            source=source,
            file_system=FailingFileSystem("write", fragment),
        )
    assert sorted(tmp_path.iterdir()) == before


def test_killed_at_every_boundary_the_folder_is_whole_or_absent(source: Path, tmp_path: Path) -> None:
    imported, counter = import_folder(source), DyingFileSystem()
    write_import(imported, tmp_path / "count", source=source, file_system=counter)
    for stop_at in range(len(counter.log)):
        output = tmp_path / f"at-{stop_at}"
        with pytest.raises(Killed):
            write_import(imported, output, source=source, file_system=DyingFileSystem(stop_at))
        assert not output.exists() or verify_checkpoint(output / "step-00000000") == []
