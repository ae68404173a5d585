"""Reading a checkpoint: any box of any logical tensor, whatever mesh wrote it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from checkpoints.logical import Box
from checkpoints.manifest import STATE_FILE, TensorRecord, TensorSlice, load_manifest
from checkpoints.tensor_file import DTYPES
from checkpoints.verify import check_file, check_header

__all__ = ["CheckpointReader", "load_run_state"]


class CheckpointReader:
    """Opens a checkpoint directory; reads tensors whole or in part, assembled from the slices that hold them.

    The manifest is verified here. A tensor file is verified (size, SHA-256, header) when the first slice of
    it is needed, so a rank hashes only the files it reads.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: a damaged or malformed file; the message names it.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.manifest = load_manifest(self.path)
        self._open_files: dict[str, Any] = {}

    @property
    def step(self) -> int:
        """The optimizer step after which the state was saved."""
        return self.manifest.step

    def names(self) -> list[str]:
        """Names of the logical tensors, sorted."""
        return sorted(self.manifest.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Global shape of tensor `name`. Raises ValueError when the checkpoint has none of that name."""
        return self._record(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Type of the elements of tensor `name`. Raises ValueError as `shape` does."""
        return DTYPES[self._record(name).dtype]

    def read(
        self, name: str, *, offset: Sequence[int] | None = None, shape: Sequence[int] | None = None
    ) -> Tensor:
        """The box `[offset, offset + shape)` of tensor `name` on the CPU, by default all of it, bit for bit.

        Args:
            name: a logical tensor, "model/..." for instance.
            offset: first element of the box, one coordinate per dimension; zeros by default.
            shape: extent of the box; by default up to the end of the tensor.

        Raises:
            ValueError: no such tensor, a box outside it, or a damaged file (named).
        """
        record = self._record(name)
        start = tuple(offset) if offset is not None else (0,) * len(record.shape)
        rest = tuple(whole - first for whole, first in zip(record.shape, start, strict=False))
        box = Box(start, tuple(shape) if shape is not None else rest)
        if not box.inside(record.shape):
            raise ValueError(f"tensor {name}: the box {box} lies outside its shape {record.shape}")
        pieces = [(part, common) for part in record.slices if (common := part.box.intersect(box))]
        # Files are verified before anything of the wanted size is allocated.
        handles = {part.file: self._handle(part.file) for part, _ in pieces}
        result = torch.empty(box.shape, dtype=DTYPES[record.dtype])
        for part, common in pieces:
            result[common.slices_from(box.offset)] = self._stored(handles[part.file], part, common)
        return result

    def run_state(self) -> dict[str, Any]:
        """The JSON state saved beside the tensors. Raises ValueError naming state.json when it is damaged."""
        path = self.path / STATE_FILE
        check_file(path, self.manifest.files[STATE_FILE], hashed=True)
        try:
            state = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is malformed ({error})") from error
        if not isinstance(state, dict):
            raise ValueError(f"{path} holds a {type(state).__name__}, not an object")
        return state

    def _record(self, name: str) -> TensorRecord:
        record = self.manifest.tensors.get(name)
        if record is None:
            held = self.names()
            near = ", ".join(held[:3]) + (", ..." if len(held) > 3 else "")
            raise ValueError(f"{self.path} has no tensor {name!r}; it has {len(held)} ({near})")
        return record

    def _handle(self, file: str) -> Any:
        if file not in self._open_files:
            check_file(self.path / file, self.manifest.files[file], hashed=True)
            check_header(self.path, file, self.manifest)
            try:
                self._open_files[file] = safe_open(self.path / file, framework="pt", device="cpu")
            except SafetensorError as error:
                raise ValueError(f"{self.path / file} cannot be opened: {error}") from error
        return self._open_files[file]

    @staticmethod
    def _stored(handle: Any, part: TensorSlice, common: Box) -> Tensor:
        if common == part.box:
            whole: Tensor = handle.get_tensor(part.key)
            return whole
        cut: Tensor = handle.get_slice(part.key)[common.slices_from(part.box.offset)]
        return cut


def load_run_state(path: Path) -> dict[str, Any]:
    """The run state of checkpoint `path`, verified. Raises as `CheckpointReader` and `run_state` do."""
    return CheckpointReader(path).run_state()
