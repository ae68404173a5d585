"""What the tests of this room share: simulated ranks, contents by step, file systems that fail."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints.logical import LogicalTensor
from checkpoints.reader import CheckpointReader
from checkpoints.state import save_checkpoint
from trellis_dist.files import FileSystem, Piece

STATE = {"tokens": 123456, "lr": 0.1, "recipe": "quickstart"}


def contents(step: int) -> dict[str, Tensor]:
    """The whole tensors of a run at `step`: several dtypes, a scalar, an empty one, awkward sizes."""
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(7, 5, generator=generator)
    return {
        "model/embed.weight": weight,
        "model/norm.weight": torch.randn(13, generator=generator).bfloat16(),
        "model/scale": torch.randn((), generator=generator),
        "model/empty": torch.zeros(0, 4),
        "optimizer/exp_avg/embed.weight": torch.randn(35, generator=generator),
        "optimizer/exp_avg_sq/embed.weight": torch.rand(35, generator=generator).double(),
        "rng": torch.randint(0, 256, (17,), generator=generator, dtype=torch.uint8),
        "flags": torch.tensor([True, False, True]),
    }


def fragment(name: str, tensor: Tensor, *, rank: int, world: int) -> LogicalTensor:
    """The `rank`-th of `world` slices along the first dimension; uneven, and empty for some ranks."""
    if tensor.dim() == 0:
        return LogicalTensor(name, (), (), tensor)  # replicated: every rank hands it over
    rows = tensor.shape[0]
    start, stop = rows * rank // world, rows * (rank + 1) // world
    offset = (start,) + (0,) * (tensor.dim() - 1)
    return LogicalTensor(name, tuple(tensor.shape), offset, tensor[start:stop])


class Agreement:
    """An `agree` for ranks that are threads; aborting the barrier is what a killed job looks like."""

    def __init__(self, world: int) -> None:
        self.votes = [False] * world
        self.barrier = threading.Barrier(world, timeout=20)

    def for_rank(self, rank: int) -> Callable[[bool], bool]:
        def agree(ok: bool) -> bool:
            self.votes[rank] = ok
            self.barrier.wait()
            result = all(self.votes)
            self.barrier.wait()
            return result

        return agree


def save(
    root: Path,
    step: int,
    *,
    world: int = 1,
    file_systems: Sequence[FileSystem] | FileSystem | None = None,
    keep: int = 0,
    tensors: dict[str, Tensor] | None = None,
    state: dict[str, Any] | None = None,
) -> list[Path | BaseException]:
    """Save `contents(step)` from `world` ranks at once; what each rank returned or raised.

    Unless told otherwise nothing is really fsynced, which most tests need not wait for.
    """
    file_systems = DyingFileSystem() if file_systems is None else file_systems
    whole = contents(step) if tensors is None else tensors
    agreement = Agreement(world)
    results: list[Any] = [None] * world

    def rank_main(rank: int) -> None:
        system = file_systems if isinstance(file_systems, FileSystem) else file_systems[rank]
        try:
            results[rank] = save_checkpoint(
                root,
                step=step,
                tensors=[fragment(name, t, rank=rank, world=world) for name, t in whole.items()],
                run_state={"step": step, **STATE} if state is None else state,
                rank=rank,
                world_size=world,
                agree=agreement.for_rank(rank),
                keep=keep,
                file_system=system,
            )
        except BaseException as error:
            results[rank] = error
            if not isinstance(error, Exception):
                agreement.barrier.abort()

    if world == 1:
        rank_main(0)
        return results
    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a rank hangs"
    return results


def saved(root: Path, step: int, **options: Any) -> Path:
    """Like `save`, for saves that must succeed; the directory."""
    results = save(root, step, **options)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    assert len(set(results)) == 1
    return results[0]  # type: ignore[return-value]


def assert_holds(path: Path, expected: dict[str, Tensor]) -> None:
    """Every tensor of the checkpoint equals the expected one, bit for bit."""
    reader = CheckpointReader(path)
    assert reader.names() == sorted(expected)
    for name, tensor in expected.items():
        assert_same(reader.read(name), tensor)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert raw(actual) == raw(expected)


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


class Killed(BaseException):
    """Stands for SIGKILL: no `except Exception` and no cleanup survives it."""


class DyingFileSystem(FileSystem):
    """Dies just before (or half way into a write) the `stop_at`-th operation and stays dead."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at, self.log = stop_at, []
        self.lock = threading.RLock()

    def _step(self, operation: str, path: Path) -> None:
        with self.lock:
            if self.stop_at is not None and len(self.log) >= self.stop_at:
                raise Killed
            self.log.append((operation, path.name))

    def write(self, path: Path, pieces: Iterable[Piece]) -> None:
        data = b"".join(pieces)
        self._step("create", path)
        path.write_bytes(data[: len(data) // 2])
        self._step("write", path)
        path.write_bytes(data)

    def fsync_file(self, path: Path) -> None:
        self._step("fsync", path)

    def fsync_directory(self, path: Path) -> None:
        self._step("fsync-directory", path)

    def rename(self, source: Path, target: Path) -> None:
        self._step("rename", target)
        super().rename(source, target)

    def unlink(self, path: Path) -> None:
        self._step("unlink", path)
        super().unlink(path)

    def make_directory(self, path: Path) -> None:
        self._step("make-directory", path)
        super().make_directory(path)

    def remove_directory(self, path: Path) -> None:
        self._step("remove-directory", path)
        super().remove_directory(path)


class PowerCutFileSystem(DyingFileSystem):
    """Also forgets, at the cut, what no fsync made durable: contents, new names and renames."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__(stop_at)
        self.dirty: set[Path] = set()
        self.new: set[Path] = set()
        self.renames: list[tuple[Path, Path]] = []

    def write(self, path: Path, pieces: Iterable[Piece]) -> None:
        self.dirty.add(path)
        self.new.add(path)
        super().write(path, pieces)

    def fsync_file(self, path: Path) -> None:
        super().fsync_file(path)
        self.dirty.discard(path)

    def fsync_directory(self, path: Path) -> None:
        super().fsync_directory(path)
        self.new = {item for item in self.new if item.parent != path}
        self.renames = [pair for pair in self.renames if path not in (pair[0].parent, pair[1].parent)]

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        self.dirty, self.new = self._moved(self.dirty, source, target), self._moved(self.new, source, target)
        self.renames.append((source, target))

    def make_directory(self, path: Path) -> None:
        super().make_directory(path)
        self.new.add(path)

    def cut(self) -> None:
        for path in self.dirty:
            if path.exists():
                path.write_bytes(b"")
        for path in self.new:
            if path.is_file():
                path.unlink()
        for source, target in reversed(self.renames):
            if target.exists():
                os.rename(target, source)

    @staticmethod
    def _moved(paths: set[Path], source: Path, target: Path) -> set[Path]:
        return {target / p.relative_to(source) if p.is_relative_to(source) else p for p in paths}


class FailingFileSystem(FileSystem):
    """Raises OSError(code) from `operation` on names with `fragment` in them, after half of a write."""

    def __init__(self, operation: str, fragment: str, code: int = errno.ENOSPC) -> None:
        self.operation, self.fragment, self.code = operation, fragment, code

    def _check(self, operation: str, path: Path) -> None:
        if operation == self.operation and self.fragment in path.name:
            raise OSError(self.code, os.strerror(self.code), str(path))

    def write(self, path: Path, pieces: Iterable[Piece]) -> None:
        data = b"".join(pieces)
        if self.operation == "write" and self.fragment in path.name:
            path.write_bytes(data[: len(data) // 2])
        self._check("write", path)
        super().write(path, [data])

    def fsync_file(self, path: Path) -> None:
        self._check("fsync", path)
        super().fsync_file(path)

    def rename(self, source: Path, target: Path) -> None:
        self._check("rename", target)
        super().rename(source, target)

    def unlink(self, path: Path) -> None:
        self._check("unlink", path)
        super().unlink(path)

    def make_directory(self, path: Path) -> None:
        self._check("make-directory", path)
        super().make_directory(path)
