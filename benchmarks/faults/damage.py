"""Rows 5 to 8: damaged, missing, swapped and hostile files. Step 2 is hit, step 1 must be found instead."""

from __future__ import annotations

import json
import pickle
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.faults import rank_job, stock
from benchmarks.faults.row import Outcome, Row, Stock
from benchmarks.faults.simulated import saved
from checkpoints.commit import CheckpointWarning
from checkpoints.export import export_model, load_exported
from checkpoints.import_model import import_folder
from checkpoints.manifest import digest_line
from checkpoints.state import CheckpointReader, latest_verified, load_run_state, verify_checkpoint
from trellis_dist.files import digest, sha256_file

__all__ = ["ROWS"]

WORLD = 2
FILES = (
    "manifest.json",
    "manifest.sha256",
    "rank-00000.json",
    "rank-00000.safetensors",
    "rank-00001.json",
    "rank-00001.safetensors",
    "state.json",
)
SHARDS = ("rank-00000.safetensors", "rank-00001.safetensors")
READ_BY_NOBODY = ("rank-00000.json", "rank-00001.json")  # their contents are in the manifest


def two_steps(root: Path) -> Path:
    """Steps 1 and 2 of two ranks, what the stock formats save too; the folder of step 2."""
    for step in (1, 2):
        path = saved(root, step, world=WORLD, tensors=stock.flat(stock.shards(step)))
    assert sorted(item.name for item in path.iterdir()) == sorted(FILES)
    return path


def _read_all(path: Path) -> None:
    reader = CheckpointReader(path)
    for name in reader.names():
        reader.read(name)
    load_run_state(path)


def judge(newest: Path, *names: str) -> Outcome:
    """Whether step 2 is refused by all who read it, each of `names` is named, and step 1 found instead."""
    problems = "; ".join(verify_checkpoint(newest))
    unnamed = [name for name in names if f"{newest.name}/{name}" not in problems and name not in problems]
    if not problems or unnamed:
        return Outcome(False, f"{', '.join(names)}: verification says {problems or 'nothing'}"[:300])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", CheckpointWarning)
        found = latest_verified(newest.parent)
    if found != newest.with_name("step-00000001") or newest.name not in str(said[0].message):
        return Outcome(False, f"{', '.join(names)}: {found} was taken")
    if not set(names) <= set(READ_BY_NOBODY):
        try:
            _read_all(newest)
        except (ValueError, OSError):
            return Outcome(True)
        return Outcome(False, f"{', '.join(names)}: read without an error")
    return Outcome(True)


def _flip(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    bit = chance.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def bit_flip(folder: Path, index: int) -> Outcome:
    """One bit of one file."""
    newest, chance = two_steps(folder), random.Random(index)
    name = chance.choice(FILES)
    _flip(newest / name, chance)
    return judge(newest, name)


def _flip_any(folder: Path, chance: random.Random) -> None:
    _flip(chance.choice(sorted(path for path in folder.rglob("*") if path.is_file())), chance)


def lose(files: list[Path], index: int, chance: random.Random) -> list[Path]:
    """Truncate, delete or swap one or two of `files`, in turns; which."""
    first, second = chance.sample(files, 2)
    if index % 3 == 0:
        with open(first, "r+b") as file:
            file.truncate(chance.randrange(first.stat().st_size))
        return [first]
    if index % 3 == 1:
        first.unlink()
        return [first]
    spare = first.with_name("spare")
    for source, target in ((first, spare), (second, first), (spare, second)):
        source.rename(target)
    return [first, second]


def lost_shard(folder: Path, index: int) -> Outcome:
    """A shard is not what it was."""
    newest = two_steps(folder)
    touched = lose([newest / name for name in SHARDS], index, random.Random(index))
    return judge(newest, *(path.name for path in touched))


def _stock(change: Callable[[Path, random.Random, int], None]) -> dict[str, Stock]:
    def of(name: str) -> Stock:
        return lambda folder, index: stock.damaged(folder, index, name, lambda at, c: change(at, c, index))

    return {name: of(name) for name in stock.FORMATS}


def _lose_any(folder: Path, chance: random.Random, index: int) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".metadata")
    lose(files, index, chance)


# Row 7. Other stacks keep the newest step in a file of this name; here such a file means nothing.
POINTERS = ("latest", "latest_checkpointed_iteration.txt")
WRONG = {"empty": b"", "garbage": b"\xff\x00 step-99999999\n"}


def _emptied(name: str, data: bytes) -> Callable[[Path], Outcome]:
    def trial(folder: Path) -> Outcome:
        newest = two_steps(folder)
        (newest / name).write_bytes(data)
        return judge(newest, name)

    return trial


def _stray(name: str, data: bytes) -> Callable[[Path], Outcome]:
    def trial(folder: Path) -> Outcome:
        newest = two_steps(folder)
        for place in (folder, newest):
            (place / name).write_bytes(data)
        found = latest_verified(folder)
        return Outcome(found == newest, "" if found == newest else f"{found} was taken")

    return trial


def _command(name: str, data: bytes, *, all_steps: bool) -> Callable[[Path], Outcome]:
    """The real command on a run whose newest, or every, checkpoint has lost file `name`."""

    def trial(folder: Path) -> Outcome:
        shared, run_dir = folder.parent, folder / "run"
        values = {"training.engine": "local", "mesh.dp": 1}
        with rank_job.command(run_dir, shared, values, "--stop-at-step=6") as first:
            if first.end() != 0:
                return Outcome(False, f"the first start failed: {first.said[-200:]}")
        steps = sorted((run_dir / "checkpoints").glob("step-*"))
        for path in steps if all_steps else steps[-1:]:
            (path / name).write_bytes(data)
        with rank_job.command(run_dir, shared, values, "--stop-at-step=7") as second:
            status, said = second.end(), second.said
        named = f"{steps[-1].name} is damaged and was passed over" in said
        ok = named and (status != 0 and "is intact" in said if all_steps else status == 0)
        return Outcome(ok, "" if ok else f"exit status {status}: {said[-200:]}")

    return trial


POINTER_CASES = [
    *(_emptied(name, data) for name in ("manifest.json", "manifest.sha256") for data in WRONG.values()),
    *(_stray(name, data) for name in POINTERS for data in (*WRONG.values(), b"1", b"step-00000001")),
    _command("manifest.sha256", b"", all_steps=True),
    _command("manifest.json", WRONG["garbage"], all_steps=True),
    _command("manifest.json", b"", all_steps=False),
]


def pointer(folder: Path, index: int) -> Outcome:
    """One of the cases."""
    return POINTER_CASES[index](folder)


# Row 8.
class Bomb:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, witness: Path) -> None:
        self.witness = str(witness)

    def __reduce__(self) -> Any:
        return (open, (self.witness, "w"))


def _in_checkpoint(name: str, *, hashes_fit: bool) -> Callable[[Path, bytes], list[Callable[[], object]]]:
    def place(folder: Path, bomb: bytes) -> list[Callable[[], object]]:
        newest = two_steps(folder)
        (newest / name).write_bytes(bomb)
        if hashes_fit:
            _fit(newest, name)
        opens = [] if name in READ_BY_NOBODY else [lambda: _read_all(newest)]
        return [*opens, lambda: _refuse(verify_checkpoint(newest))]

    return place


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ValueError(problems[0])


def _fit(path: Path, name: str) -> None:
    """Give file `name` a record that fits, so that the hashes do not keep it from being opened."""
    manifest = path / "manifest.json"
    if name not in ("manifest.json", "manifest.sha256"):
        found = json.loads(manifest.read_bytes())
        found["files"][name] = {"bytes": (path / name).stat().st_size, "sha256": sha256_file(path / name)}
        manifest.write_text(json.dumps(found))
    if name != "manifest.sha256":
        (path / "manifest.sha256").write_bytes(digest_line(manifest.read_bytes()))


def _in_export(name: str) -> Callable[[Path, bytes], list[Callable[[], object]]]:
    def place(folder: Path, bomb: bytes) -> list[Callable[[], object]]:
        (folder / "tokenizer").write_bytes(b"pieces")
        source = saved(folder / "root", 1)
        output = export_model(source, folder / "out", tokenizer=folder / "tokenizer", model_config={})
        (output / name).write_bytes(bomb)
        if name != "export.json":
            about = json.loads((output / "export.json").read_bytes())
            record = {"bytes": (output / name).stat().st_size, "sha256": sha256_file(output / name)}
            about["files"][name] = record
            about.pop("digest")
            (output / "export.json").write_text(json.dumps({**about, "digest": digest(about)}))
        return [lambda: load_exported(output), lambda: import_folder(output)]

    return place


def _in_foreign(name: str) -> Callable[[Path, bytes], list[Callable[[], object]]]:
    def place(folder: Path, bomb: bytes) -> list[Callable[[], object]]:
        (folder / "config.json").write_text('{"model_type": "llama"}')
        (folder / name).write_bytes(bomb)
        return [lambda: import_folder(folder)]

    return place


BOMBS = [
    *(_in_checkpoint(name, hashes_fit=fit) for name in FILES for fit in (False, True)),
    *(_in_export(name) for name in ("config.json", "export.json", "model.safetensors")),
    *(_in_foreign(n) for n in ("config.json", "model.safetensors", "model.safetensors.index.json")),
    *(_in_foreign(n) for n in ("pytorch_model.bin", "model.pt")),
]
NEVER_REFUSED = {
    BOMBS[2 * FILES.index(name) + 1] for name in READ_BY_NOBODY
}  # with hashes that fit nothing is wrong with them, and nobody opens them


def malicious(folder: Path, index: int) -> Outcome:
    """A bomb in one place: everyone who opens it refuses, and it does not go off."""
    witness, inside = folder / "executed", folder / "inside"
    inside.mkdir()
    bomb = pickle.dumps(Bomb(witness))
    pickle.loads(bomb).close()
    assert witness.exists(), "the bomb must work to prove anything"
    witness.unlink()
    opened = 0
    for open_ in BOMBS[index](inside, bomb):
        try:
            open_()
            opened += BOMBS[index] not in NEVER_REFUSED
        except (ValueError, OSError):
            pass
    if witness.exists():
        return Outcome(False, "the code was executed")
    return Outcome(not opened, "opened without an error" if opened else "")


def _bomb_any(name: str) -> Stock:
    def trial(folder: Path, index: int) -> str:
        inside, witness = folder / "inside", folder / "executed"
        inside.mkdir()

        def place(at: Path, _: random.Random) -> None:
            files = sorted(path for path in at.rglob("*") if path.is_file())
            files[index % len(files)].write_bytes(pickle.dumps(Bomb(witness)))

        return stock.damaged(inside, index, name, place, witness=witness)

    return trial


ROWS = {
    5: Row(
        "one bit flipped in a file picked uniformly, manifest and digest included",
        "detected, the error names the file, the step before is found",
        full=200,
        quick=4,
        trial=bit_flip,
        stock=_stock(lambda folder, chance, _: _flip_any(folder, chance)),
    ),
    6: Row(
        "a shard truncated, deleted, or swapped with another",
        "detected, the error names the file, the step before is found",
        full=60,
        quick=3,
        trial=lost_shard,
        stock=_stock(_lose_any),
    ),
    7: Row(
        "manifest or digest empty or garbage; stray pointer files; the command with nothing left",
        "falls back to the step before; exit status not 0 if nothing is left",
        full=len(POINTER_CASES),
        quick=len(POINTER_CASES) - 3,
        trial=pointer,
    ),
    8: Row(
        "a malicious pickle in place of each file of a checkpoint, an export, an import",
        "0 executions, refused",
        full=len(BOMBS),
        quick=len(BOMBS),
        trial=malicious,
        stock={name: _bomb_any(name) for name in stock.FORMATS},
    ),
}
