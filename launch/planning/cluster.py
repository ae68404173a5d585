"""The machines a plan is made for: nodes, devices, their memory and speed, and the links between them.

Peaks are those of data sheets (`DEVICES`, sources beside them). What a training step reaches of them is
``efficiency``: measured on this project's own processor, assumed for all others, and an option.
"""

from __future__ import annotations

import dataclasses
import math
import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trellis_dist.validation import require

__all__ = ["CPU_CORE", "DEVICES", "Cluster", "cluster_from", "read_cluster", "this_machine"]

GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Equal nodes of equal devices, one rank on each device.

    Attributes:
        name: of the device, for people.
        nodes, devices_per_node: how many.
        memory_gb: of one device, in GB (1e9 bytes); 0: unknown, so that everything fits.
        tflops: of one device, dense, in bf16 (on a CPU in fp32), in 1e12 a second.
        tflops_fp32: the same of a GPU in fp32, without TF32, which this project leaves off; 0: not known, so
            that fp32 takes ``tflops``, and the plan says so.
        memory_gbps: bandwidth of its memory, GB/s.
        host_gbps: of host memory and the way there, as much as one GPU has of it, GB/s: where an offloaded
            optimizer is. Assumed.
        intra_gbps, inter_gbps: of one device to others of its node and to other nodes, GB/s, one way.
        intra_latency_us, inter_latency_us: of a message, in microseconds.
        efficiency: share of ``tflops`` that matrix products reach in a step.
        cuda: whether the devices are GPUs.
    """

    name: str
    nodes: int = 1
    devices_per_node: int = 1
    memory_gb: float = 0.0
    tflops: float
    tflops_fp32: float = 0.0
    memory_gbps: float
    host_gbps: float = 20.0
    intra_gbps: float
    inter_gbps: float
    intra_latency_us: float = 8.0
    inter_latency_us: float = 15.0
    efficiency: float = 0.4
    cuda: bool = True

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            _check_kind(item.name, getattr(self, item.name), kind=str(item.type))
        for key in ("nodes", "devices_per_node"):
            require(getattr(self, key) >= 1, f"a cluster with {key} = {getattr(self, key)}: use 1 or more")
        for key in ("tflops", "memory_gbps", "host_gbps", "intra_gbps", "inter_gbps"):
            require(getattr(self, key) > 0, f"a cluster with {key} = {getattr(self, key)}: must be positive")
        for key in ("memory_gb", "tflops_fp32"):
            value = getattr(self, key)
            require(value >= 0, f"a cluster with {key} = {value}: use 0 (unknown) or more")
        for key in ("intra_latency_us", "inter_latency_us"):
            require(getattr(self, key) >= 0, f"a cluster with {key} = {getattr(self, key)}: use 0 or more")
        require(
            0 < self.efficiency <= 1,
            f"a cluster with efficiency = {self.efficiency}: use a share above 0 and up to 1",
        )

    @property
    def devices(self) -> int:
        """In all."""
        return self.nodes * self.devices_per_node

    @property
    def memory_bytes(self) -> int:
        """Of one device."""
        return int(self.memory_gb * GB)

    def peak_tflops(self, precision: str) -> float:
        """Of one device in "bf16" or "fp32"; a CPU computes in fp32 whatever is asked for."""
        return self.tflops_fp32 if self.cuda and precision == "fp32" and self.tflops_fp32 else self.tflops

    def flops_per_second(self, precision: str) -> float:
        """What matrix products of one device reach."""
        return self.peak_tflops(precision) * 1e12 * self.efficiency

    def holds_groups(self, size: int, *, ranks: int) -> bool:
        """Whether no group of ``size`` consecutive ones of ``ranks`` ranks lies on two nodes."""
        return ranks <= self.devices_per_node or self.devices_per_node % size == 0

    def link(self, size: int, *, ranks: int) -> tuple[float, float]:
        """(seconds, bytes a second) of a message in the slowest group of ``size`` of ``ranks`` ranks."""
        if self.holds_groups(size, ranks=ranks):
            return self.intra_latency_us * 1e-6, self.intra_gbps * GB
        return self.inter_latency_us * 1e-6, self.inter_gbps * GB


_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "str": ((str,), "text"),
    "bool": ((bool,), "true or false"),
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a finite number"),
}


def _check_kind(key: str, value: Any, *, kind: str) -> None:
    """Raise ``ValueError`` for a value of another type: a TOML file may hold anything."""
    types, words = _KINDS[kind]
    right = isinstance(value, types) and (kind == "bool" or not isinstance(value, bool))
    finite = not isinstance(value, float) or math.isfinite(value)
    require(right and finite, f"a cluster with {key} = {value!r}: use {words}")


# Dense bf16 peaks, memory and NVLink (one way: half of what data sheets sum over both) from NVIDIA's data
# sheets: H100 SXM5 (2023), H200 SXM (2024), B200 (DGX B200, 2024), A100 80GB SXM4 (2021), L40S (2023).
# Between nodes: 400 Gb/s a device for H100, H200 and B200 (DGX SuperPOD reference), 200 Gb/s for A100,
# 100 Gb/s for L40S, which talk to each other over PCIe 4.0.
_GPUS = {  # name, memory GB, TFLOP/s in bf16 and fp32, memory GB/s, GB/s inside a node, GB/s between nodes
    "h100": ("H100 80GB", 80, 989, 66.9, 3350, 450, 50),
    "h200": ("H200 141GB", 141, 989, 66.9, 4800, 450, 50),
    "b200": ("B200 180GB", 180, 2250, 75, 8000, 900, 50),
    "a100": ("A100 80GB", 80, 312, 19.5, 2039, 300, 25),
    "l40s": ("L40S 48GB", 48, 362, 91.6, 864, 32, 12.5),
}
DEVICES: dict[str, Cluster] = {
    key: Cluster(
        name=name,
        memory_gb=memory,
        tflops=peak,
        tflops_fp32=fp32,
        memory_gbps=speed,
        intra_gbps=intra,
        inter_gbps=inter,
    )
    for key, (name, memory, peak, fp32, speed, intra, inter) in _GPUS.items()
}
# One core of an AMD EPYC: oneDNN's fp32 matrix products (models/linear.py), the share of them that a layer
# reaches, and the link between two gloo ranks of one machine (benchmarks/results/sequence_parallel.json).
CPU_CORE = Cluster(
    name="CPU core",
    tflops=0.2,
    efficiency=0.35,
    memory_gbps=8,
    intra_gbps=5,
    inter_gbps=1,
    intra_latency_us=120,
    inter_latency_us=200,
    cuda=False,
)


def this_machine(*, ranks: int) -> Cluster:
    """The CUDA devices of this machine; without any, ``ranks`` CPU cores."""
    import torch

    if not torch.cuda.is_available():
        return dataclasses.replace(CPU_CORE, devices_per_node=ranks, memory_gb=_host_gb() / ranks)
    found = torch.cuda.get_device_properties(0)
    known = next((it for key, it in DEVICES.items() if key in found.name.lower()), DEVICES["a100"])
    return dataclasses.replace(
        known, name=found.name, devices_per_node=torch.cuda.device_count(), memory_gb=found.total_memory / GB
    )


def _host_gb() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB


def cluster_from(
    *, device: str | None = None, file: Path | None = None, **given: float | None
) -> Cluster | None:
    """The cluster that options name: a file's or a known device's, changed by what is ``given``.

    Returns None where nothing is asked for.

    Raises:
        ValueError: an unknown device, both a file and a device, or a number that makes no sense.
        FileNotFoundError: no such file.
    """
    changes = {name: value for name, value in given.items() if value is not None}
    if device is None and file is None and not changes:
        return None
    if device is not None and file is not None:
        raise ValueError(f"--device {device} and --cluster {file} are both given: give one of them")
    base = read_cluster(file) if file is not None else _known(device or "h100")
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def _known(device: str) -> Cluster:
    found = DEVICES.get(device.lower()) or {"cpu": CPU_CORE}.get(device.lower())
    if found is None:
        raise ValueError(
            f"--device {device}: use one of {', '.join(DEVICES)}, cpu, or give --cluster FILE.toml"
        )
    return found


def read_cluster(path: Path) -> Cluster:
    """A cluster from a TOML file with the keys of `Cluster`; ``device`` names what it begins with.

    Raises:
        ValueError: not TOML, an unknown key, or a number that makes no sense; the file is named.
        FileNotFoundError: no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--cluster {path}: no such file")
    try:
        table: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--cluster {path}: not valid TOML: {error}") from error
    keys = {item.name for item in dataclasses.fields(Cluster)}
    unknown = sorted(set(table) - keys - {"device"})
    if unknown:
        raise ValueError(
            f"--cluster {path}: unknown key {unknown[0]}; valid: device, {', '.join(sorted(keys))}"
        )
    device = table.pop("device", None)
    missing = sorted({"name", "tflops", "memory_gbps", "intra_gbps", "inter_gbps"} - set(table))
    if device is None and missing:
        raise ValueError(
            f'--cluster {path}: {missing[0]} is missing: give it, or device = "h100" to begin with'
        )
    try:
        return Cluster(**table) if device is None else dataclasses.replace(_known(str(device)), **table)
    except ValueError as error:
        raise ValueError(f"--cluster {path}: {error}") from error
