"""Pins: a checkpoint that somebody still reads is not removed.

A pin is a small file in ROOT/.pins, so that a committed checkpoint is never written to. Reader and remover
may meet at any moment; neither waits for the other, because each first says what it does and then looks:

    reader:   write the pin; then look for the remover's mark, then for the manifest
    remover:  write the mark .removing-step-N; then look for pins; then remove; then take the mark away

Whichever comes second sees the first: a pin that `pin` returned holds, and a step that is going is never
returned as pinned. A mark left by a killed remover makes a step unpinnable until the next removal.
The order rests on a folder that every node sees alike; where a network file system shows new names late, a
reader may lose the race, and its verification then fails loudly.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from checkpoints.commit import list_steps, step_name, step_of
from checkpoints.manifest import MANIFEST_FILE
from trellis_dist.files import REAL, FileSystem, atomic_write, canonical_json, read_json

__all__ = [
    "EXPIRY",
    "Pin",
    "clear_marks",
    "clear_pins",
    "list_pins",
    "mark_removal",
    "pin",
    "pinned",
    "pinned_steps",
    "removal_mark",
    "unpin",
]

PINS = ".pins"
# Seconds after which a pin that nobody refreshed is taken for a dead one's.
EXPIRY = 7 * 24 * 3600.0
NAME = re.compile(r"(step-[0-9]{8,})-[0-9a-f]{16}\.json")
MARK = re.compile(r"\.removing-step-[0-9]{8,}")


@dataclass(frozen=True)
class Pin:
    """Who keeps a step: ``owner`` is free text, ``time`` is seconds since 1970 of the last refresh."""

    step: int
    owner: str
    host: str
    pid: int
    time: float

    @property
    def expired(self) -> bool:
        """Whether nobody refreshed it for `EXPIRY` seconds."""
        return time.time() - self.time > EXPIRY


def pin(checkpoint: Path, owner: str, *, file_system: FileSystem = REAL) -> Path:
    """Keep the committed `checkpoint` from retention until `unpin`, or for `EXPIRY` seconds.

    The same owner again refreshes its pin. Several owners may pin one step.

    Returns:
        The pin's file.

    Raises:
        FileNotFoundError: the checkpoint is gone or going; no pin is left.
        OSError: the pin could not be written.
    """
    path = _pin_path(checkpoint, owner)
    step = step_of(checkpoint)
    assert step is not None, f"{checkpoint} is no checkpoint's name, {step_name(0)} is"
    gone = f"{checkpoint} is gone or being removed: choose another step"
    if not checkpoint.is_dir():  # no folder for pins is made where no checkpoint is
        raise FileNotFoundError(gone)
    path.parent.mkdir(exist_ok=True)
    value = asdict(Pin(step, owner, socket.gethostname(), os.getpid(), time.time()))
    atomic_write(path, canonical_json(value), file_system=file_system)
    if removal_mark(checkpoint).exists() or not (checkpoint / MANIFEST_FILE).is_file():
        file_system.unlink(path)
        raise FileNotFoundError(gone)
    return path


def unpin(checkpoint: Path, owner: str, *, file_system: FileSystem = REAL) -> None:
    """Take `owner`'s pin away; none there is no error. Raises OSError."""
    file_system.unlink(_pin_path(checkpoint, owner))


@contextmanager
def pinned(checkpoint: Path, owner: str) -> Iterator[Path]:
    """`checkpoint`, pinned while the block runs. Raises what `pin` and `unpin` raise."""
    pin(checkpoint, owner)
    try:
        yield checkpoint
    finally:
        unpin(checkpoint, owner)


def list_pins(root: Path) -> list[Pin]:
    """Every pin in `root`, expired ones too, by step and owner.

    One whose file is damaged still counts, as of its modification time, with the owner "unknown".
    """
    folder = root / PINS
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = NAME.fullmatch(path.name)
        step = step_of(path.with_name(match[1])) if match else None
        if step is not None and (read := _read(path, step)) is not None:
            found.append(read)
    return sorted(found, key=lambda item: (item.step, item.owner))


def pinned_steps(root: Path) -> set[int]:
    """Steps of `root` that a pin keeps: one that is refreshed in time, of a step that is there."""
    present = list_steps(root)
    return {item.step for item in list_pins(root) if not item.expired and item.step in present}


def clear_pins(root: Path, *, file_system: FileSystem = REAL) -> None:
    """Remove pins of steps that are gone; those of steps that are there stay, expired or not. Raises OSError.

    An expired one may be refreshed at this very moment, so it goes only with its step.
    """
    folder, present = root / PINS, list_steps(root)
    for path in folder.iterdir() if folder.is_dir() else ():
        match = NAME.fullmatch(path.name)
        if match and step_of(path.with_name(match[1])) not in present:
            file_system.unlink(path)


def removal_mark(checkpoint: Path) -> Path:
    """The file that says `checkpoint` is being removed."""
    return checkpoint.with_name(f".removing-{checkpoint.name}")


@contextmanager
def mark_removal(checkpoint: Path, *, file_system: FileSystem = REAL) -> Iterator[bool]:
    """Mark `checkpoint` as going while the block runs; False when a pin came first: it must stay then.

    Raises:
        OSError: the mark could not be written or taken away.
    """
    mark = removal_mark(checkpoint)
    file_system.write(mark, [b""])
    try:
        yield step_of(checkpoint) not in pinned_steps(checkpoint.parent)
    finally:
        file_system.unlink(mark)


def clear_marks(root: Path, *, file_system: FileSystem = REAL) -> None:
    """Take away the marks of killed removers; called by the one process that removes. Raises OSError."""
    for path in root.iterdir() if root.is_dir() else ():
        if MARK.fullmatch(path.name):
            file_system.unlink(path)


def _pin_path(checkpoint: Path, owner: str) -> Path:
    key = hashlib.sha256(owner.encode()).hexdigest()[:16]
    return checkpoint.parent / PINS / f"{checkpoint.name}-{key}.json"


def _read(path: Path, step: int) -> Pin | None:
    """The pin in `path`, or None when it was taken away meanwhile."""
    try:
        modified = path.stat().st_mtime
        value = read_json(path)
        return Pin(step, str(value["owner"]), str(value["host"]), int(value["pid"]), float(value["time"]))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return Pin(step, "unknown", "unknown", 0, modified)
