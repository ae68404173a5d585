"""Which collective this rank entered last in each process group, from torch's flight recorder.

The recorder is on when the environment variable TORCH_FR_BUFFER_SIZE was set before the first process group
was made; without it, or with a torch that has none, there is nothing to tell and the answer is empty. Its
entries are private to torch (2.13 here), so whatever is missing or odd counts as absent.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from trellis_dist.files import write_json

__all__ = [
    "Collective",
    "Group",
    "dump_flight",
    "flight_path",
    "group_members",
    "groups_from_entries",
    "read_groups",
    "write_flight",
]

# gloo and what is common to all backends, and NCCL's own recorder where torch was built with it.
RECORDERS = ("_dump_fr_trace_json", "_dump_nccl_trace_json")


@dataclass(frozen=True)
class Collective:
    """One collective: its number within the group (all members count alike), name, sizes of its inputs.

    ``started`` is False while a GPU has not come to it yet; gloo starts at once.
    """

    number: int
    name: str
    sizes: str = ""
    started: bool = True


@dataclass(frozen=True)
class Group:
    """A process group as one member sees it: the collective it entered last, the first that is not done."""

    label: str
    last: Collective
    waiting: Collective | None = None


def read_groups() -> dict[str, Group]:
    """The state of every group this process has used, by a key that is the same on all its members."""
    groups: dict[str, Group] = {}
    for name in RECORDERS:
        dump = getattr(_c10d(), name, None)
        if dump is None:
            continue
        try:
            groups |= groups_from_entries(json.loads(dump()).get("entries", ()))
        except (ValueError, TypeError, AttributeError, KeyError, IndexError, RuntimeError):
            continue  # another torch writes it another way: phases then decide alone
    return groups


def flight_path(logs: Path, *, step: int, rank: int) -> Path:
    """Where rank ``rank``, stuck in ``step``, leaves its record below ``logs``."""
    return logs / f"flight-step-{step:08d}" / f"rank-{rank:05d}.json"


def dump_flight(*, rank: int, operation: str) -> dict[str, Any] | None:
    """The last collectives of this rank, as torch recorded them; None where it recorded none.

    {"rank", "operation", "members": group -> ranks, "recorders": recorder -> what it dumped}; a dump has the
    numbers, sizes, states and times of the collectives.
    """
    dumps = {}
    for name in RECORDERS:
        dump = getattr(_c10d(), name, None)
        try:
            found = json.loads(dump()) if dump is not None else {}
        except (ValueError, TypeError, RuntimeError):
            continue
        if found.get("entries"):
            dumps[name.removeprefix("_dump_")] = found
    members = {name: list(ranks) for name, ranks in group_members().items()}
    found = {"rank": rank, "operation": operation, "members": members, "recorders": dumps}
    return found if dumps else None


def write_flight(path: Path, flight: Mapping[str, Any]) -> None:
    """Write what ``dump_flight`` gave. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, dict(flight))


def groups_from_entries(entries: Iterator[Mapping[str, Any]]) -> dict[str, Group]:
    """Fold the recorder's ``entries``, oldest first; point-to-point messages have no common number."""
    groups: dict[str, Group] = {}
    for entry in entries:
        if entry.get("is_p2p"):
            continue
        backend, _, name = str(entry["profiling_name"]).partition(":")
        identity, label = entry["process_group"][:2]
        gloo = backend == "gloo"
        started = gloo or entry.get("state") == "started"
        done = bool(entry.get("retired")) or entry.get("state") == "completed"
        here = Collective(int(entry["collective_seq_id"]), name, str(entry.get("input_sizes", "")), started)
        key = f"{backend}:{identity}"
        before = groups.get(key)
        waiting = before.waiting if before else None
        if waiting is None and not done:
            waiting = here
        title = f"group {identity}" if label in ("", "undefined") else str(label)
        groups[key] = Group(title, here, waiting)
    return groups


def group_members() -> dict[str, tuple[int, ...]]:
    """Global ranks of the groups this process is in, by the second half of their keys; private to torch."""
    world = getattr(dist.distributed_c10d, "_world", None)
    try:
        names = world.pg_names  # type: ignore[union-attr]
        return {str(names[group]): tuple(ranks) for group, ranks in world.pg_group_ranks.items()}  # type: ignore[union-attr]
    except (AttributeError, KeyError, TypeError):
        return {}


def _c10d() -> Any:
    from torch._C import _distributed_c10d

    return _distributed_c10d
