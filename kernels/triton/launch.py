"""Launch parameters of the kernels: a committed table, and a rule for what has no row. Nothing is timed here.

    tokens   rows of a tile (BT): tokens of a chunk that are worked on at once
    slots    memory slots of one program (BM); smaller than M only in the scans with elementwise phi
    warps, stages   Triton's num_warps and num_stages

The same sizes give the same parameters on every run, so runs repeat bitwise. ``launch_table.json`` holds one
row for each (architecture, D, V, M, C, bytes of an operand, update) with the parameters of every kernel and
where they come from: "measured" (by ``python -m benchmarks.tune_kernels``, with device, versions and times)
or "offline" (compiled for the architecture, never timed; registers and spilled bytes are in the row).

Kernels of one call may differ in ``tokens``: what one writes another reads through memory, slot by slot. The
one exception is the inverse of the corrected update, which is stored in tiles of ``tokens`` rows
(``kernels.triton.triangular``): the kernels in INVERSE share theirs.

The rule, from what spills few registers when compiled for sm_90. A tile has at most 64 tokens, and no more
than the chunk; 32 in inputs, in a scan whose phi mixes slots, and in query_backward with heads or memories
wider than 64; 16 in the corrected update's inputs as wide, and for factors of 4 bytes: products of fp32
operands have no tensor cores and are unrolled. It is halved until everything that feeds a product fits the
shared memory of one program at 4 bytes an entry (an upper bound: buffers are re-used, and bf16 takes half):

    scans            X [t, w]; S, dS [s, w]; U, dZ [t, s]; corrected: T and L^{-1} [t, t] each
    readouts         Q, K, V, dY [t, w]; S or R [M, w]; U', P [t, M]; scores [t, t]
    inputs           as the scans, with all slots

where t = tokens, w = the wider head, s = slots, all padded to powers of two. A scan is sequential over
chunks, so it takes 32 slots a program and leaves parallelism to the grid, and loads ahead (two stages) where
a second copy in bf16 fits and no tile has to be solved from others. Four warps: on 64 rows a product has no
work for more. Eight where the tiles of fewer rows do not fit four warps' registers: factors of 4 bytes, a
scan whose phi mixes slots, query_backward and inputs as wide as above, the corrected update's inputs, and its
scans with wide heads. The step of one token holds a head's memories in registers, 16 numbers of each a
thread.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = ["INVERSE", "KERNELS", "SOURCES", "TABLE", "Launch", "Row", "Size", "architecture", "load_table"]
__all__ += ["override", "padded", "parameters", "rule", "shared_memory"]

KERNELS = (
    "scan_forward",
    "scan_backward",
    "readout_forward",
    "query_backward",
    "key_backward",
    "inputs",
    "decode",
)
INVERSE = ("scan_forward", "scan_backward")  # read the diagonal inverses, so they share their tokens
SOURCES = ("measured", "offline")
TABLE = Path(__file__).with_name("launch_table.json")
SHARED_KIB = {"sm_80": 163, "sm_86": 99, "sm_87": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}
SMALLEST_KIB = min(SHARED_KIB.values())  # of an architecture the rule does not know
INTERPRETER = "interpreter"


@dataclass(frozen=True)
class Launch:
    """Parameters of one kernel; see the module's legend."""

    tokens: int
    slots: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        for name, low, high in (("tokens", 16, 256), ("slots", 16, 128), ("warps", 1, 32)):
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high or value & (value - 1):
                raise ValueError(f"{name} = {value!r}: give a power of two in [{low}, {high}]")
        if type(self.stages) is not int or not 1 <= self.stages <= 8:
            raise ValueError(f"stages = {self.stages!r}: give an integer in [1, 8]")


class Size(NamedTuple):
    """What a row of the table is found by.

    Attributes:
        arch: "sm_90", ...; "interpreter" on a CPU.
        d, v, m, c: widths of keys and values, memory slots, chunk size.
        corrected: whether the update is the corrected one.
        itemsize: bytes of one factor of a product: 2 for bf16 operands, 4 for fp16 (tf32) and fp32.
        mixing: whether phi mixes slots, so that a scan's program holds all of them.
    """

    arch: str
    d: int
    v: int
    m: int
    c: int
    corrected: bool
    itemsize: int
    mixing: bool = False


@dataclass(frozen=True)
class Row:
    """One row of the table: parameters by kernel, and their source: a "kind" of SOURCES and details."""

    size: Size
    launches: dict[str, Launch]
    source: dict[str, Any]

    def __post_init__(self) -> None:
        if set(self.launches) != set(KERNELS):
            raise ValueError(f"kernels {sorted(self.launches)}: a row has one entry for each of {KERNELS}")
        if self.source.get("kind") not in SOURCES:
            raise ValueError(f"source kind {self.source.get('kind')!r}: one of {SOURCES}")
        tokens = {self.launches[kernel].tokens for kernel in INVERSE}
        if self.size.corrected and len(tokens) > 1:
            raise ValueError(
                f"tokens {sorted(tokens)} of {INVERSE}: both read the same inverses, so give one"
            )
        for kernel, launch in self.launches.items():
            splits = kernel.startswith("scan") and not self.size.mixing
            if not splits and launch.slots < padded(self.size.m):
                raise ValueError(
                    f"slots = {launch.slots} of {kernel}: only a scan of an elementwise phi splits the "
                    f"{self.size.m} slots"
                )

    def as_json(self) -> dict[str, Any]:
        """The row as it stands in the file."""
        launches = {kernel: asdict(self.launches[kernel]) for kernel in KERNELS}
        return {**self.size._asdict(), "launches": launches, "source": self.source}

    @staticmethod
    def of_json(data: dict[str, Any]) -> Row:
        """Counterpart of ``as_json``; raises ValueError, KeyError or TypeError on anything else."""
        extra = set(data) - {*Size._fields, "launches", "source"}
        if extra:
            raise ValueError(f"unknown entries {sorted(extra)}")
        launches = {kernel: Launch(**given) for kernel, given in data["launches"].items()}
        return Row(Size(**{name: data[name] for name in Size._fields}), launches, dict(data["source"]))


def load_table(path: Path = TABLE) -> dict[Size, Row]:
    """The validated rows of a table file.

    Raises:
        ValueError: the file is not a table, a row is malformed (the message counts it) or stands twice.
    """
    try:
        rows = json.loads(path.read_text(encoding="ascii"))["rows"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a launch table ({error!r}): write it with tune_kernels") from error
    table: dict[Size, Row] = {}
    for i, data in enumerate(rows):
        try:
            row = Row.of_json(data)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: row {i}: {error}") from error
        if row.size in table:
            raise ValueError(f"{path}: row {i}: a second row for {row.size}")
        table[row.size] = row
    return table


def parameters(kernel: str, size: Size) -> Launch:
    """Launch parameters of ``kernel`` (one of KERNELS): an override, else the table's row, else the rule."""
    return _overrides.get(kernel) or _lookup(kernel, size)


_overrides: dict[str, Launch] = {}


@contextmanager
def override(kernel: str, launch: Launch) -> Iterator[None]:
    """Inside it ``parameters(kernel)`` gives ``launch`` for every size; for the tuner and its tests."""
    assert kernel in KERNELS, f"no kernel {kernel!r}"
    before = _overrides.get(kernel)
    _overrides[kernel] = launch
    try:
        yield
    finally:
        del _overrides[kernel]
        if before is not None:
            _overrides[kernel] = before


@functools.lru_cache(maxsize=1024)
def _lookup(kernel: str, size: Size) -> Launch:
    row = _table().get(size)
    return rule(kernel, size) if row is None else row.launches[kernel]


@functools.lru_cache(maxsize=1)
def _table() -> dict[Size, Row]:
    return load_table()


@functools.lru_cache(maxsize=32)
def architecture(device: torch.device) -> str:
    """Name of a device's architecture, as in the table: "sm_90"; "interpreter" where there is no CUDA."""
    if device.type != "cuda":
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def rule(kernel: str, size: Size) -> Launch:
    """Parameters from the sizes alone, for architectures and sizes without a row (the module's legend)."""
    assert kernel in KERNELS, f"no kernel {kernel!r}"
    widths = padded(size.d), padded(size.v), padded(size.m)
    slots = min(32, widths[2]) if kernel.startswith("scan") and not size.mixing else widths[2]
    tokens = min(_most_tokens(kernel, size, max(widths)), padded(size.c))
    room = SHARED_KIB.get(size.arch, SMALLEST_KIB) << 10
    if size.arch == INTERPRETER:
        room = SHARED_KIB["sm_90"] << 10
    sized_by = INVERSE[1] if kernel in INVERSE else kernel  # the larger one: both share their tokens
    while tokens > 16 and shared_memory(sized_by, size, tokens=tokens, slots=slots) > room:
        tokens //= 2
    alone = not size.corrected or tokens >= size.c  # no loop over other tiles in the loop over chunks
    ahead = kernel in INVERSE and alone and not size.mixing and size.itemsize < 4
    ahead = ahead and 3 * shared_memory(sized_by, size, tokens=tokens, slots=slots) <= 2 * room
    return Launch(tokens, slots, _warps(kernel, size, max(widths)), 2 if ahead else 1)


def _most_tokens(kernel: str, size: Size, widest: int) -> int:
    if size.itemsize == 4 and size.arch != INTERPRETER:  # which has no registers, and prefers large tiles
        return 16
    if kernel == "inputs":
        return 16 if size.corrected and widest > 64 else 32
    if (kernel == "query_backward" and widest > 64) or (kernel in INVERSE and size.mixing):
        return 32
    return 64


def _warps(kernel: str, size: Size, widest: int) -> int:
    if kernel == "decode":
        return min(16, max(1, padded(max(size.d, size.v)) * padded(size.m) >> 9))
    if size.itemsize == 4:
        return 8
    crowded = {
        "scan_forward": size.mixing or (size.corrected and widest > 64),
        "scan_backward": size.mixing or (size.corrected and widest > 64),
        "query_backward": widest > 64,
        "inputs": size.corrected or widest > 64,
    }
    return 8 if crowded.get(kernel) else 4


def shared_memory(kernel: str, size: Size, *, tokens: int, slots: int) -> int:
    """Upper bound in bytes on what one program of ``kernel`` keeps in shared memory (the module's legend)."""
    width, t, s = padded(max(size.d, size.v)), tokens, slots
    square = t * t if size.corrected else 0
    entries = {
        "scan_forward": t * width + s * width + t * s + 2 * square,
        "scan_backward": 2 * t * width + 2 * s * width + 2 * t * s + 2 * square,
        "readout_forward": 3 * t * width + s * width + 2 * t * s + t * t,
        "query_backward": 4 * t * width + s * width + 2 * t * s + t * t,
        "key_backward": 4 * t * width + 2 * t * s + t * t,
        "inputs": 2 * t * width + 2 * s * width + 2 * t * s + 2 * square,
        "decode": 0,  # products with one vector: registers
    }
    return 4 * entries[kernel]


def padded(width: int) -> int:
    """Width of a tile: a power of two, and 16 at least, as tl.dot asks."""
    return max(16, 1 << (width - 1).bit_length())
