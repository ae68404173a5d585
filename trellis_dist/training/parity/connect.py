"""Before any case: do all ranks reach each other, and do they run the same libraries?"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from trellis_dist.parallel import env
from trellis_dist.training.collectives import PeerFailedError
from trellis_dist.training.errors import EchoError

__all__ = [
    "CONNECT_SECONDS",
    "LostContactError",
    "LostRanksError",
    "Place",
    "check_sums",
    "connect",
    "lost",
    "remedy",
]

CONNECT_SECONDS = 120.0
_LIBRARIES = ("triton", "deepspeed")


class LostRanksError(ConnectionError):
    """The connection between ranks broke, so no further case can run."""


class LostContactError(EchoError, LostRanksError):
    """A rank left the others; why is what itself says."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a rank runs, on what ("cpu" or the GPU's name), and the versions of what it runs."""

    host: str
    device: str
    versions: Mapping[str, str]


def connect(device: torch.device, *, timeout_s: float) -> list[Place]:
    """Join the process group, sum once in host memory and once on the device; every rank's place, by rank.

    Raises:
        LostRanksError: the ranks do not reach each other; the line says what to set.
        ValueError: ranks run different versions, or the environment names no place in the job.
    """
    try:
        env.init_distributed(device, timeout_s=timeout_s)
        check_sums(device)
        places = _gather(_place(device))
    except RuntimeError as error:
        raise lost(f"connecting: {_cause(error)}{remedy()}") from error
    _check_versions(places)
    return places


def check_sums(device: torch.device) -> None:
    """Add up ones over all ranks, in host memory and on the device.

    Raises:
        RuntimeError: it failed, or the sum is another one: some rank was in another collective.
    """
    if not dist.is_initialized():
        return
    for where in dict.fromkeys((torch.device("cpu"), device)):
        total = torch.ones(1, device=where)
        dist.all_reduce(total)
        if where.type == "cuda":
            torch.cuda.synchronize(where)  # also what earlier work left on other streams
        if total.item() != env.world_size():
            raise RuntimeError(f"{env.world_size()} ranks sum to {total.item():g} on {where}: out of step")


def lost(message: str) -> LostRanksError:
    """For what every rank raises in the same words: rank 0 speaks for all."""
    return LostRanksError(message) if env.is_main() else LostContactError(message)


def remedy() -> str:
    """What to do when ranks do not meet."""
    store = " ".join(f"{name}={os.environ.get(name, '')}" for name in ("MASTER_ADDR", "MASTER_PORT"))
    return (
        f"; the ranks meet at {store}; where a machine's name resolves to 127.0.1.1, or it has several "
        "networks, set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface that the machines share"
    )


def _cause(error: RuntimeError) -> str:
    """The line of ``error`` that says most: NCCL's comes after the place in its code."""
    lines = (str(error).strip() or repr(error)).splitlines()
    after = [index + 1 for index, line in enumerate(lines[:-1]) if line.startswith("Last error")]
    return lines[after[0] if after else 0].strip()


def _place(device: torch.device) -> Place:
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else device.type
    return Place(host=socket.gethostname(), device=name, versions=_versions(cuda=cuda))


def _versions(*, cuda: bool) -> dict[str, str]:
    found = {"torch": str(torch.__version__)}
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if cuda and dist.is_nccl_available():
        found["nccl"] = ".".join(str(part) for part in torch.cuda.nccl.version())
    return found


def _gather(mine: Place) -> list[Place]:
    if not dist.is_initialized():
        return [mine]
    found = [mine] * env.world_size()
    dist.all_gather_object(found, mine)
    return found


def _check_versions(places: Sequence[Place]) -> None:
    first = places[0]
    for rank, place in enumerate(places):
        names = [
            name
            for name in sorted({*first.versions, *place.versions})
            if first.versions.get(name) != place.versions.get(name)
        ]
        if names:
            ours, theirs = (
                f"rank {index} on {of.host} has {_listed(of, names)}"
                for index, of in ((0, first), (rank, place))
            )
            kind = ValueError if env.is_main() else PeerFailedError
            raise kind(f"ranks run different versions: {ours}; {theirs}; install the same on every machine")


def _listed(place: Place, names: Sequence[str]) -> str:
    return ", ".join(f"{name} {place.versions.get(name, 'not installed')}" for name in names)
