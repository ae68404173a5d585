"""Simulated ranks that save together, and what they save. The tests of checkpoints/ use them too."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.faults.file_systems import DyingFileSystem
from checkpoints.logical import LogicalTensor
from checkpoints.reader import CheckpointReader
from checkpoints.state import save_checkpoint
from trellis_dist.files import FileSystem

__all__ = ["STATE", "Agreement", "contents", "fragment", "holds", "raw", "save", "saved"]

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
        """The collective as `rank` calls it."""

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


def holds(path: Path, expected: dict[str, Tensor]) -> bool:
    """Whether the checkpoint has exactly the expected tensors, bit for bit. Raises what a reader raises."""
    reader = CheckpointReader(path)
    if reader.names() != sorted(expected):
        return False
    return all(_same(reader.read(name), tensor) for name, tensor in expected.items())


def _same(actual: Tensor, expected: Tensor) -> bool:
    heads = [(tensor.dtype, tensor.shape) for tensor in (actual, expected)]
    return heads[0] == heads[1] and raw(actual) == raw(expected)


def raw(tensor: Tensor) -> bytes:
    """The bytes of its elements."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
