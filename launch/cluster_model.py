"""The machines a plan is made for: nodes, devices, their memory and speed, and the links between them.

Peaks are those of data sheets (`DEVICES`, sources beside them). What a training step reaches of them is
``efficiency``: measured on this project's own processor, assumed for all others, and an option.
"""

from __future__ import annotations

import dataclasses
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
        tflops: of one device, dense, in the precision that trains (bf16; fp32 on a CPU), in 1e12 a second.
        memory_gbps: bandwidth of its memory, GB/s.
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
    memory_gbps: float
    intra_gbps: float
    inter_gbps: float
    intra_latency_us: float = 8.0
    inter_latency_us: float = 15.0
    efficiency: float = 0.4
    cuda: bool = True

    def __post_init__(self) -> None:
        for key in ("nodes", "devices_per_node"):
            require(getattr(self, key) >= 1, f"a cluster with {key} = {getattr(self, key)}: use 1 or more")
        for key in ("tflops", "memory_gbps", "intra_gbps", "inter_gbps"):
            require(getattr(self, key) > 0, f"a cluster with {key} = {getattr(self, key)}: must be positive")
        require(self.memory_gb >= 0, f"a cluster with memory_gb = {self.memory_gb}: use 0 (unknown) or more")
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

    @property
    def flops_per_second(self) -> float:
        """What matrix products of one device reach."""
        return self.tflops * 1e12 * self.efficiency

    def link(self, ranks: int) -> tuple[float, float]:
        """(seconds, bytes a second) of a message between ranks that lie within ``ranks`` consecutive ones."""
        if ranks <= self.devices_per_node:
            return self.intra_latency_us * 1e-6, self.intra_gbps * GB
        return self.inter_latency_us * 1e-6, self.inter_gbps * GB


# Dense bf16 peaks, memory and NVLink (one way: half of what data sheets sum over both) from NVIDIA's data
# sheets: H100 SXM5 (2023), H200 SXM (2024), B200 (DGX B200, 2024), A100 80GB SXM4 (2021), L40S (2023).
# Between nodes: 400 Gb/s a device for H100, H200 and B200 (DGX SuperPOD reference), 200 Gb/s for A100,
# 100 Gb/s for L40S, which talk to each other over PCIe 4.0.
_GPUS = {  # name, memory GB, TFLOP/s, memory GB/s, GB/s inside a node, GB/s between nodes
    "h100": ("H100 80GB", 80, 989, 3350, 450, 50),
    "h200": ("H200 141GB", 141, 989, 4800, 450, 50),
    "b200": ("B200 180GB", 180, 2250, 8000, 900, 50),
    "a100": ("A100 80GB", 80, 312, 2039, 300, 25),
    "l40s": ("L40S 48GB", 48, 362, 864, 32, 12.5),
}
DEVICES: dict[str, Cluster] = {
    key: Cluster(
        name=name, memory_gb=memory, tflops=peak, memory_gbps=speed, intra_gbps=intra, inter_gbps=inter
    )
    for key, (name, memory, peak, speed, intra, inter) in _GPUS.items()
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
    if device is not None:
        return dataclasses.replace(_known(str(device)), **table)
    missing = sorted({"name", "tflops", "memory_gbps", "intra_gbps", "inter_gbps"} - set(table))
    if missing:
        raise ValueError(
            f'--cluster {path}: {missing[0]} is missing: give it, or device = "h100" to begin with'
        )
    try:
        return Cluster(**table)
    except TypeError as error:
        raise ValueError(f"--cluster {path}: {error}") from error
