"""What a node says about itself before a job: versions, recipe, data, name, disk, devices, their health."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.nodes.ports import is_loopback
from launch.recipe import Recipe, resolve
from trellis_dist.training.watch.links import interface_of, is_own_address

__all__ = ["PACKAGES", "facts", "source_digest", "use_local_address"]

PACKAGES = ("torch", "triton", "numpy", "safetensors", "pydantic", "deepspeed", "megatron-core")
ROOMS = ("kernels", "trellis_dist", "data_pipeline", "checkpoints", "evals", "launch")
ROOT = Path(__file__).resolve().parents[2]
SMI_S = 20.0  # nvidia-smi on a sick driver can hang
SMI_FIELDS = ("driver_version", "temperature.gpu", "ecc.errors.uncorrected.volatile.total")
_SIDE = 256  # of the matrices that each GPU multiplies


def facts(recipe: Recipe, run_dir: Path, *, nodes: int, ranks: int) -> dict[str, Any]:
    """Everything that nodes compare, as JSON; ``problems`` are this node's own, one line each.

    Args:
        recipe: what the job trains.
        run_dir: its folder, made when it is missing.
        nodes, ranks: of the job, and on each node.
    """
    problems: list[str] = []
    devices = _safely(lambda: _devices(problems), problems) or []
    if devices and len(devices) < ranks:
        problems.append(
            f"{ranks} ranks a node, but {len(devices)} CUDA devices here: use --ranks-per-node "
            f"{len(devices)}, leave the node out, or look why it shows fewer (nvidia-smi, "
            "CUDA_VISIBLE_DEVICES)"
        )
    found = {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "packages": _packages(),
        **_cuda(),
        "source": source_digest(),
        "recipe": resolve(recipe),
        "data": _safely(lambda: _fingerprint(recipe), problems),
        "devices": devices,
        "disk_free": _safely(lambda: _disk_free(recipe, run_dir), problems),
        "mesh": _safely(lambda: _mesh(recipe, world_size=nodes * ranks), problems),
    }
    if nodes > 1:
        _safely(_check_name, problems)
    return {**found, "problems": problems}


def use_local_address(address: str) -> None:
    """Have gloo and NCCL meet other nodes by ``address``, as the ranks will, and not by this node's name.

    Interfaces that the user has chosen stay. Raises ValueError for an address that is not this node's.
    """
    if not is_own_address(address):
        raise ValueError(
            f"--local-addr {address} is no address of {socket.gethostname()}: give one that `ip addr` shows "
            "here and the other nodes reach"
        )
    found = str(socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][4][0])
    if name := interface_of(found):  # none off Linux
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, name)


def _safely(work: Callable[[], Any], problems: list[str]) -> Any:
    """What ``work`` returns; None after an error, which is one of the node's ``problems``."""
    try:
        return work()
    except (ValueError, OSError, RuntimeError) as error:
        problems.extend(str(error).splitlines()[:1])
        return None


def source_digest(root: Path = ROOT) -> str:
    """SHA-256 of this project's Python files and their names: equal on nodes with the same commit."""
    digest = hashlib.sha256()
    for room in ROOMS:
        for path in sorted((root / room).rglob("*.py")):
            digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _cuda() -> dict[str, str]:
    """Versions that torch was built with and the driver's; "none" without."""
    import torch
    import torch.distributed as dist

    cuda = torch.version.cuda or "none"
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    version = ".".join(str(part) for part in torch.cuda.nccl.version()) if nccl else "none"
    drivers = {line[0] for line in _smi()}
    return {"cuda": cuda, "nccl": version, "driver": ", ".join(sorted(drivers)) or "none"}


def _smi() -> list[list[str]]:
    """A line of ``SMI_FIELDS`` for each GPU, from nvidia-smi; none without it."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        ran = subprocess.run(query, capture_output=True, text=True, timeout=SMI_S)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = [[field.strip() for field in line.split(",")] for line in ran.stdout.splitlines()]
    return [line for line in lines if len(line) == len(SMI_FIELDS)] if ran.returncode == 0 else []


def _devices(problems: list[str]) -> list[dict[str, Any]]:
    """The CUDA devices that ranks would see; what is wrong with one goes to ``problems``."""
    import torch

    watched, found = _smi(), []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        device: dict[str, Any] = {"name": torch.cuda.get_device_name(index), "memory": total, "free": free}
        if len(watched) == torch.cuda.device_count():  # no device is hidden, so the numbers are the same
            device |= {"temperature": _number(watched[index][1]), "ecc": _number(watched[index][2])}
        found.append(device)
        problems += device_problems(index, device)
        if not _multiplies(index):
            problems.append(f"GPU {index} multiplies wrongly: take the node out of service")
    return found


def device_problems(index: int, device: dict[str, Any]) -> list[str]:
    """What the health of a GPU says against using it."""
    found, (free, total) = [], (device["free"], device["memory"])
    if free < 0.9 * total:
        found.append(
            f"GPU {index} has {free / 2**30:.1f} of {total / 2**30:.1f} GiB free: "
            "end what runs on it (nvidia-smi)"
        )
    if (device.get("ecc") or 0) > 0:
        found.append(
            f"GPU {index} has {device['ecc']:.0f} uncorrected memory errors: reset it or leave it out"
        )
    if (device.get("temperature") or 0) >= 90:
        found.append(f"GPU {index} is at {device['temperature']:.0f} C: look at its cooling")
    return found


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # "[N/A]"
        return None


def _multiplies(index: int) -> bool:
    """Whether a device multiplies two matrices of small whole numbers exactly, as it must."""
    import torch

    rows = torch.arange(_SIDE * _SIDE, device=f"cuda:{index}").reshape(_SIDE, _SIDE) % 7
    product = (rows.float() @ rows.float()).cpu()
    return torch.equal(product.long(), rows.cpu() @ rows.cpu())


def _fingerprint(recipe: Recipe) -> str:
    from data_pipeline.manifest import load_manifest
    from launch.preflight import check_dataset

    check_dataset(recipe)
    return load_manifest(recipe.data.directory).fingerprint


def _disk_free(recipe: Recipe, run_dir: Path) -> int:
    from launch.preflight import check_run_folder

    check_run_folder(recipe, run_dir)
    return shutil.disk_usage(run_dir).free


def _mesh(recipe: Recipe, *, world_size: int) -> list[int | None]:
    """dp, sp, tp on so many ranks; ValueError where they do not fit."""
    from launch.fit import fit_mesh, fit_to_devices

    mesh = fit_mesh(fit_to_devices(recipe, world_size), world_size=world_size)
    return [mesh.dp, mesh.sp, mesh.tp]


def _check_name() -> None:
    """Refuse a node whose own name leads nowhere: gloo and torch's agents tell it to the other nodes."""
    name, chosen = socket.gethostname(), os.environ.get("GLOO_SOCKET_IFNAME")
    if chosen:
        return
    remedy = (
        "give it the node's own address in /etc/hosts, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to "
        "the interface that the nodes share"
    )
    try:
        address = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0]
    except socket.gaierror:
        raise OSError(
            f"its own name {name} is not known to it, so others are told 127.0.0.1: {remedy}"
        ) from None
    if is_loopback(str(address)):
        raise OSError(f"its own name {name} is {address}, where no other node comes: {remedy}")
