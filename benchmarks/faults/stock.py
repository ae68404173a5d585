"""Stock formats under the same injections: what they do is found out in a process that may die of it.

Two shards as two ranks would write them, with the same names and shapes, 145 KB together.

    torch.distributed.checkpoint   one file per tensor and .metadata, its defaults otherwise
    safetensors                    one file per rank, no digest
    torch.save                     one file per rank, loaded with weights_only, its default
"""

from __future__ import annotations

import contextlib
import io
import logging
import multiprocessing
import os
import random
import resource
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

__all__ = ["DCP", "FORMATS", "Format", "damaged", "flat", "in_child", "kill_while", "load", "shards"]

RANKS, NAMES, SHAPE = 2, ("model/up.weight", "model/down.weight"), (71, 128)
LIMIT_S = 120.0
MOST_MEMORY = 16 << 30  # a flipped bit in a length must not take the machine down
Shards = list[dict[str, Tensor]]


def shards(step: int, shape: tuple[int, ...] = SHAPE) -> Shards:
    """What two ranks save at `step`."""
    draw = torch.Generator().manual_seed(step)
    return [{name: torch.randn(shape, generator=draw) for name in NAMES} for _ in range(RANKS)]


class Format(ABC):
    """Writes and reads the shards of all ranks as a trainer would with this format."""

    @abstractmethod
    def write(self, folder: Path, values: Shards) -> None:
        """Save them."""

    @abstractmethod
    def read(self, folder: Path, like: Shards) -> Shards:
        """Load what has the names and shapes of `like`. Raises what the library raises."""


class FilePerRank(Format):
    """A format of one file per rank."""

    suffix: str

    def write(self, folder: Path, values: Shards) -> None:
        """Save them."""
        for rank, tensors in enumerate(values):
            self.save(folder / f"rank-{rank}{self.suffix}", tensors)

    def read(self, folder: Path, like: Shards) -> Shards:
        """Load what has the names and shapes of `like`. Raises what the library raises."""
        return [self.load(folder / f"rank-{rank}{self.suffix}") for rank in range(len(like))]

    @abstractmethod
    def save(self, path: Path, tensors: dict[str, Tensor]) -> None:
        """One file."""

    @abstractmethod
    def load(self, path: Path) -> dict[str, Tensor]:
        """One file."""


class Safetensors(FilePerRank):
    """The library's own functions."""

    suffix = ".safetensors"

    def save(self, path: Path, tensors: dict[str, Tensor]) -> None:
        """As `safetensors.torch` does."""
        save_file(tensors, path)

    def load(self, path: Path) -> dict[str, Tensor]:
        """As `safetensors.torch` does."""
        return load_file(path)


class TorchSave(FilePerRank):
    """torch.save, torch.load."""

    suffix = ".pt"

    def save(self, path: Path, tensors: dict[str, Tensor]) -> None:
        """As torch does."""
        torch.save(tensors, path)

    def load(self, path: Path) -> dict[str, Tensor]:
        """As torch does by default: weights only."""
        found: dict[str, Tensor] = torch.load(path)
        return found


class Distributed(Format):
    """torch.distributed.checkpoint without a process group: all shards from one process."""

    def write(self, folder: Path, values: Shards) -> None:
        """One file per tensor, as ranks would have files of their own."""
        with _quiet():
            writer = FileSystemWriter(folder, single_file_per_rank=False)
            dcp.save(flat(values), storage_writer=writer, no_dist=True)

    def read(self, folder: Path, like: Shards) -> Shards:
        """Into zeros."""
        state = {name: torch.zeros_like(tensor) for name, tensor in flat(like).items()}
        with _quiet():
            dcp.load(state, storage_reader=FileSystemReader(folder), no_dist=True)
        return [{name: state[f"{rank}/{name}"] for name in tensors} for rank, tensors in enumerate(like)]


DCP = "torch.distributed.checkpoint"
FORMATS: dict[str, Format] = {DCP: Distributed(), "safetensors": Safetensors(), "torch.save": TorchSave()}


def flat(values: Shards) -> dict[str, Tensor]:
    """All shards as one dictionary, rank/name."""
    return {
        f"{rank}/{name}": tensor for rank, tensors in enumerate(values) for name, tensor in tensors.items()
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What it says about one process and about overwriting is known."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


def damaged(
    folder: Path,
    index: int,
    name: str,
    damage: Callable[[Path, random.Random], None],
    *,
    witness: Path | None = None,
) -> str:
    """Save shards in a format, damage the folder, load in another process; what became of it."""
    form, values = FORMATS[name], shards(index)
    form.write(folder, values)
    damage(folder, random.Random(index))
    outcome = in_child(lambda: load(form, folder, [values]))
    return "code executed" if witness is not None and witness.exists() else outcome


def load(form: Format, folder: Path, sound: list[Shards]) -> str:
    """Load in this process: one of `sound` must come out."""
    try:
        found = form.read(folder, sound[0])
        same = any(_equal(found, values) for values in sound)
    except BaseException:  # a CheckpointException is no Exception
        return "detected"
    return "unharmed" if same else "loaded silently wrong"


def _equal(found: Shards, expected: Shards) -> bool:
    for ours, theirs in zip(found, expected, strict=True):
        if ours.keys() != theirs.keys():
            return False
        for name, tensor in theirs.items():
            if ours[name].dtype != tensor.dtype or ours[name].shape != tensor.shape:
                return False
            # As bits: a flip may make a NaN.
            if not torch.equal(ours[name].view(torch.int32), tensor.view(torch.int32)):
                return False
    return True


def in_child(work: Callable[[], str]) -> str:
    """What `work` returns in a forked process; "crashed" when it dies or does not come back."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(work, sender), daemon=True)
    child.start()
    sender.close()
    answer = "crashed"
    if receiver.poll(LIMIT_S):
        with contextlib.suppress(EOFError):
            answer = receiver.recv()
    child.kill()
    child.join()
    return answer


def _answer(work: Callable[[], str], sender: Connection) -> None:
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    with contextlib.redirect_stdout(io.StringIO()):
        sender.send(work())


def kill_while(work: Callable[[], None], seconds: float) -> bool:
    """SIGKILL a forked process `seconds` after it began `work`, over and over; whether it was alive then."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_for_ever, args=(work, sender), daemon=True)
    child.start()
    sender.close()
    begun = receiver.poll(LIMIT_S)
    time.sleep(seconds)
    alive = child.is_alive()
    child.kill()
    child.join()
    return begun and alive


def _for_ever(work: Callable[[], None], sender: Connection) -> None:
    torch.set_num_threads(1)
    sender.send(True)
    while True:
        work()
