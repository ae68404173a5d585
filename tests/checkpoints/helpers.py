"""What the tests of this room share; ranks and file systems that fail are those of the fault table."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from benchmarks.faults.file_systems import DyingFileSystem, FailingFileSystem, Killed, PowerCutFileSystem
from benchmarks.faults.simulated import STATE, Agreement, contents, fragment, raw, save, saved
from checkpoints.reader import CheckpointReader

__all__ = [
    "STATE",
    "Agreement",
    "DyingFileSystem",
    "FailingFileSystem",
    "Killed",
    "PowerCutFileSystem",
    "assert_holds",
    "assert_same",
    "contents",
    "fragment",
    "raw",
    "save",
    "saved",
]


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
