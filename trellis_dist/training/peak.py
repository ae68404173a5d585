"""What a device can compute at most, for the share of it that training uses."""

from __future__ import annotations

import re

import torch

__all__ = ["PEAK_TFLOPS", "peak_flops"]

# Dense peaks in TFLOP/s of the makers' data sheets, without sparsity: bf16, fp32. The first whose words are
# all in a device's name counts. torch multiplies fp32 in fp32 unless told otherwise, so TF32 is no peak.
PEAK_TFLOPS = {
    "H200 NVL": (835.5, 60.0),
    "H200": (989.4, 66.9),
    "H100 NVL": (835.5, 60.0),
    "H100 PCIe": (756.0, 51.2),
    "H100": (989.4, 66.9),
    "A100": (312.0, 19.5),
    "L40S": (362.0, 91.6),
    "L40": (181.0, 90.5),
    "L4": (121.0, 30.3),
    "A10G": (70.0, 35.0),
    "A10": (125.0, 31.2),
    "RTX 4090": (165.2, 82.6),
    "RTX 3090": (71.0, 35.6),
}
# Words of a name that say it is another device, or a part of one.
_OTHERS = {"Laptop", "Ti", "D", "SUPER", "MIG"}


def peak_flops(device: torch.device, *, bf16: bool, override_tflops: float = 0.0) -> float | None:
    """FLOP/s of one device in the run's precision; None where nobody knows (a CPU, another GPU).

    ``override_tflops`` holds where it is not 0.
    """
    if override_tflops:
        return override_tflops * 1e12
    if device.type != "cuda":
        return None
    words = set(re.findall(r"\w+", torch.cuda.get_device_name(device)))
    found = next((peaks for known, peaks in PEAK_TFLOPS.items() if words.issuperset(known.split())), None)
    return None if found is None or words & _OTHERS else found[0 if bf16 else 1] * 1e12
