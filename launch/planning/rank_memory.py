"""Memory that one rank on this machine can have: its GPU's, or a share of what the host and limits leave."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

__all__ = ["device_memory", "host_memory", "host_share", "left_in_groups", "rank_memory"]

_PROC, _GROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# What a limit of a control group says where there is none (version 1; version 2 says "max").
_NO_LIMIT = 1 << 60
# Limits of a process that its memory counts towards, and what counts.
_LIMITS = ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData"))
# By version of control groups: the files of limit and use, and the keys of memory.stat that the system takes
# back before it kills anyone.
_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
    2: ("memory.max", "memory.current", ("inactive_file", "active_file")),
}


def rank_memory(ranks: int) -> int:
    """Bytes that one of ``ranks`` on this machine can have, whether they run yet or this process is one."""
    import torch

    return device_memory() if torch.cuda.is_available() else host_share(ranks)


def host_share(ranks: int) -> int:
    """Bytes of the host that one of ``ranks`` can have, as many of them as torchrun says are here."""
    here = min(ranks, int(os.environ.get("LOCAL_WORLD_SIZE", ranks)))
    return host_memory(here, running="RANK" in os.environ)


def device_memory() -> int:
    """Bytes of the smallest visible GPU, asked of the driver.

    Torch's own question makes a context first, or may: that takes memory, and in the compute mode
    EXCLUSIVE_PROCESS the device, from the rank that is to have it.

    Raises:
        OSError: no driver, or one that does not answer.
    """
    driver = ctypes.CDLL("libcuda.so.1")
    count, size = ctypes.c_int(), ctypes.c_size_t()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        raise OSError("the CUDA driver does not start: look at nvidia-smi")
    found = []
    for device in range(count.value):  # numbered as CUDA_VISIBLE_DEVICES says
        if driver.cuDeviceTotalMem_v2(ctypes.byref(size), device):
            raise OSError(f"the CUDA driver does not know the memory of device {device}: look at nvidia-smi")
        found.append(size.value)
    return min(found)


def host_memory(ranks: int, *, running: bool, proc: Path = _PROC, groups: Path = _GROUPS) -> int:
    """Bytes of the host that one of ``ranks`` can have, 0 at the least.

    The share of what the host and this process's control groups leave, and no more than this process's own
    limits allow (`ulimit -v`, `ulimit -d`), which ranks inherit.

    Args:
        running: this process is one of the ranks; what it holds is then no longer left, but its own.
        proc, groups: where the system's files are.
    """
    held = _sizes(proc / "self/status")
    own = held.get("RssAnon", 0)  # not mapped files: the system can drop those, and counts them as left
    left = [_available(proc), *left_in_groups(proc=proc, groups=groups)]
    shares = [min(left) // max(1, ranks) + (own if running else 0)]
    for number, counted in _LIMITS:
        limit, _ = resource.getrlimit(number)
        if limit != resource.RLIM_INFINITY and counted in held:
            shares.append(limit - held[counted] + own)
    return max(0, min(shares))


def _available(proc: Path) -> int:
    """MemAvailable of Linux; elsewhere all memory."""
    found = _sizes(proc / "meminfo").get("MemAvailable")
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if found is None else found


def _sizes(path: Path) -> dict[str, int]:
    """Bytes by name of the lines `Name: 12 kB`; none where there is no such file."""
    found = {}
    with contextlib.suppress(OSError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, rest = line.partition(":")
            if rest.endswith(" kB"):
                found[name] = int(rest.removesuffix(" kB")) * 1024
    return found


def left_in_groups(*, proc: Path = _PROC, groups: Path = _GROUPS) -> list[int]:
    """Bytes left in each limited control group that this process is in: SLURM's --mem, Kubernetes' limits.

    A group is under the limits of those around it. Linux alone has them; elsewhere the list is empty.
    """
    found: list[int] = []
    for folder, version in _memory_groups(proc, groups):
        # Left out where it is not to be seen: in a container the paths are often those of the host.
        with contextlib.suppress(OSError, ValueError, KeyError):
            found.extend(_left(folder, version))
    return found


def _memory_groups(proc: Path, groups: Path) -> Iterator[tuple[Path, int]]:
    """Folders of this process's group and those around it, with the version."""
    try:
        lines = (proc / "self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        inner = PurePosixPath(path.lstrip("/"))
        if not controllers:
            yield from ((groups / each, 2) for each in (inner, *inner.parents))
        elif "memory" in controllers.split(","):
            yield from ((groups / "memory" / each, 1) for each in (inner, *inner.parents))


def _left(folder: Path, version: int) -> Iterator[int]:
    limit_file, use_file, dropped = _FILES[version]
    limit = (folder / limit_file).read_text().strip()
    if limit == "max" or int(limit) >= _NO_LIMIT:
        return
    words = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
    statistics = {name: int(number) for name, number in words}
    used = int((folder / use_file).read_text()) - sum(statistics[name] for name in dropped)
    yield int(limit) - max(0, used)
