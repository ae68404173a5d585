"""What a run leaves when it stops over numbers that are not finite: enough to find out where they came from.

rank-00001.json          step, host, data counter, history, and per parameter: how many elements of weight
                         and gradient are not finite, and the largest that is
rank-00001.safetensors   the token ids of the last micro-batches
"""

from __future__ import annotations

import math
import os
import re
import socket
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from trellis_dist.files import atomic_write, read_json, write_json

__all__ = ["Place", "diagnostics_path", "dump", "finite_rows", "first_place", "summary"]

NAME = re.compile(r"rank-([0-9]{5,})\.json")


def diagnostics_path(folder: Path, rank: int) -> Path:
    """Where ``dump`` writes the table of ``rank``."""
    return folder / f"rank-{rank:05d}.json"


def dump(
    folder: Path,
    *,
    rank: int,
    step: int,
    weights: Sequence[Mapping[str, Any]],
    gradients: Sequence[Mapping[str, Any]] = (),
    history: Sequence[Mapping[str, float]] = (),
    tokens: Sequence[Tensor] = (),
    samples: int = 0,
) -> bool:
    """Write this rank's files into ``folder`` (made if missing); False, and one line, when the disk refuses.

    It raises no OSError: the error that stops the run must not be hidden by a full disk.

    Args:
        weights, gradients: ``finite_rows`` of the local tensors, the same parameters on every rank.
        history: rows of the last steps (step, loss, gradient norm).
        tokens: token ids of this rank's last micro-batches.
        samples: the data counter, rows consumed over the whole mesh.
    """
    table = {
        "rank": rank,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "time": time.time(),
        "step": step,
        "samples": samples,
        "history": [dict(row) for row in history],
        "weights": list(weights),
        "gradients": list(gradients),
    }
    path = diagnostics_path(folder, rank)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, _plain(table))
        batches = {f"micro_batch_{i}": part.detach().cpu().contiguous() for i, part in enumerate(tokens)}
        if batches:
            atomic_write(path.with_suffix(".safetensors"), save(batches))
    except OSError as error:
        print(f"no diagnostics in {folder} from rank {rank}: {error}", file=sys.stderr, flush=True)
        return False
    return True


def finite_rows(
    named: Iterable[tuple[str, Tensor]], *, names: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Of each tensor how many elements are not finite, and the largest magnitude among those that are.

    With ``names`` there is one row for each of them in that order: a rank may hold none or several pieces.
    """
    rows = [_row(name, tensor) for name, tensor in named]
    if names is None:
        return rows
    whole = {name: {"name": name, "elements": 0, "nonfinite": 0, "largest": 0.0} for name in names}
    for row in rows:
        sums = whole[row["name"]]
        sums["elements"] += row["elements"]
        sums["nonfinite"] += row["nonfinite"]
        sums["largest"] = max(sums["largest"], row["largest"])
    return list(whole.values())


@torch.no_grad()
def _row(name: str, tensor: Tensor) -> dict[str, Any]:
    values = tensor.detach()
    finite = torch.isfinite(values)
    largest = torch.where(finite, values, torch.zeros_like(values)).abs().max() if values.numel() else 0.0
    return {
        "name": name,
        "elements": values.numel(),
        "nonfinite": values.numel() - int(finite.sum()),
        "largest": float(largest),
    }


def _plain(value: Any) -> Any:
    """``value`` with numbers that JSON cannot hold as strings: "nan", "inf", "-inf"."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Place:
    """Where numbers that are not finite begin: ``kind`` is "gradient" or "weight"."""

    kind: str
    parameter: str
    count: int
    elements: int
    ranks: tuple[int, ...]


def first_place(folder: Path) -> Place | None:
    """The first parameter, in the model's order, that is not finite; weights before gradients.

    A weight that is not finite spoils every gradient, so it comes first. ``count`` is the largest
    of any rank. Files that are missing or damaged are passed over.
    """
    tables = _tables(folder)
    for kind in ("weight", "gradient"):
        for index in range(max((len(table[f"{kind}s"]) for table in tables), default=0)):
            rows = {t["rank"]: t[f"{kind}s"][index] for t in tables if index < len(t[f"{kind}s"])}
            bad = {rank: row for rank, row in rows.items() if row["nonfinite"]}
            if bad:
                worst = max(bad.values(), key=lambda row: int(row["nonfinite"]))
                return Place(kind, worst["name"], worst["nonfinite"], worst["elements"], tuple(sorted(bad)))
    return None


def _tables(folder: Path) -> list[dict[str, Any]]:
    tables = []
    for path in sorted(folder.glob("rank-*.json")):
        if not NAME.fullmatch(path.name):
            continue
        try:
            table = read_json(path)
        except (OSError, ValueError):
            continue
        if isinstance(table, dict) and {"rank", "weights", "gradients"} <= table.keys():
            tables.append(table)
    return tables


def summary(folder: Path) -> str:
    """One line: where the numbers stop being finite, on which ranks."""
    place = first_place(folder)
    if place is None and not any(table["gradients"] for table in _tables(folder)):
        return f"all weights in {folder} are finite; gradients were not looked at in the first bad step"
    if place is None:
        return f"all weights and gradients in {folder} are finite: the loss alone was not"
    ranks = ", ".join(map(str, place.ranks))
    return (
        f"non-finite {place.kind} first in {place.parameter}: {place.count} of {place.elements} elements on "
        f"rank{'s' if len(place.ranks) > 1 else ''} {ranks}"
    )
