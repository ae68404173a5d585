"""Memory of a call: bytes held for backward, and peak memory in a process of its own.

Held for backward is exact: the distinct storages that autograd saves between forward and backward.

Peak memory is what the process had resident at most during forward + backward, over what it had before with
the operands in place (Linux: /proc/self/status, VmHWM after a reset through /proc/self/clear_refs). So it
counts the output, all gradients, everything saved, every temporary and the libraries' own scratch, and leaves
out the operands. One process a contender, with a small call first, so that threads, loaded code and lazily
allocated buffers are there before; freed memory is handed back to the system before the count starts.

    python -m benchmarks.kernels.memory CONTENDER B T H D M C     (see CPU_CONTENDERS)
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.kernels.contenders import cpu_call
from benchmarks.kernels.sizes import Shape
from benchmarks.kernels.timing import Call

__all__ = ["measured_in_own_process", "peak_of_pass", "saved_bytes"]

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
SLACK = 4 << 20  # by how much the peak may exceed the resident size right after a reset


def saved_bytes(call: Call) -> dict[str, int]:
    """Bytes of the storages saved for backward: operands, and what the call itself added."""
    kept: dict[int, Tensor] = {}  # also keeps the storages alive, so that none is counted under two addresses

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.detach()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = call.forward(call.operands)
    inputs = {x.untyped_storage().data_ptr() for x in call.operands.values()}
    sizes = {at: x.untyped_storage().nbytes() for at, x in kept.items()}
    del y
    operands = sum(size for at, size in sizes.items() if at in inputs)
    return {"operands": operands, "own": sum(sizes.values()) - operands}


def peak_of_pass(name: str, shape: Shape) -> dict[str, int]:
    """Peak resident bytes of one forward + backward over those before it, fp32, one thread, this process.

    Raises:
        RuntimeError: the system does not let a process reset its own peak.
    """
    torch.set_num_threads(1)
    _pass(cpu_call(name, dataclasses.replace(shape, length=2 * shape.chunk), dtype=torch.float32))
    call = cpu_call(name, shape, dtype=torch.float32)
    dy = torch.randn(*call.operands["v"].shape)
    before = _reset_peak()
    y = call.forward(call.operands)
    held = _status("VmRSS") - before
    gradients = call.gradients(y, dy)
    peak = _status("VmHWM") - before
    assert len(gradients) == 6, f"{len(gradients)} gradients of 6 operands"
    return {"after_forward": held, "peak": peak}


def measured_in_own_process(name: str, shape: Shape, *, times: int = 3) -> dict[str, list[int]]:
    """``peak_of_pass`` in fresh processes. Raises RuntimeError, with the last line of one that fails."""
    sizes = [shape.batch, shape.length, shape.heads, shape.width, shape.slots, shape.chunk]
    command = [sys.executable, "-m", "benchmarks.kernels.memory", name, *map(str, sizes)]
    found: dict[str, list[int]] = {"after_forward": [], "peak": []}
    for _ in range(times):
        ran = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        if ran.returncode:
            last = (ran.stderr.strip().splitlines() or ["no message"])[-1]
            raise RuntimeError(f"the process that measures {name} failed: {last}")
        for key, value in json.loads(ran.stdout).items():
            found[key].append(value)
    return found


def _pass(call: Call) -> None:
    y = call.forward(call.operands)
    call.gradients(y, torch.ones_like(y))


def _reset_peak() -> int:
    """Resident bytes now, after handing free memory back and setting the peak down to them."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    try:
        CLEAR.write_text("5")
        resident, peak = _status("VmRSS"), _status("VmHWM")
    except OSError as error:
        raise RuntimeError(f"this system does not let a process reset its peak memory ({error})") from error
    if peak > resident + SLACK:
        raise RuntimeError(f"the peak stayed at {peak} bytes over {resident} resident after its reset")
    return resident


def _status(key: str) -> int:
    lines = [line for line in STATUS.read_text().splitlines() if line.startswith(f"{key}:")]
    return int(lines[0].split()[1]) * 1024


def main() -> None:
    """Print the JSON of one contender."""
    name, *sizes = sys.argv[1:]
    batch, length, heads, width, slots, chunk = map(int, sizes)
    print(json.dumps(peak_of_pass(name, Shape(batch, length, heads, width, slots, chunk))))


if __name__ == "__main__":
    main()
