"""What a device can compute at most, for the share of it that training uses."""

from __future__ import annotations

import torch

__all__ = ["PEAK_TFLOPS", "peak_flops"]

# Dense peaks in TFLOP/s of the makers' data sheets, without sparsity: bf16, fp32. The first name that a
# device's contains counts. torch multiplies fp32 in fp32 unless told otherwise, so TF32 is no peak of it.
PEAK_TFLOPS = {
    "H200": (989.4, 66.9),
    "H100 NVL": (835.5, 60.0),
    "H100 PCIe": (756.0, 51.2),
    "H100": (989.4, 66.9),
    "A100": (312.0, 19.5),
    "L40S": (362.0, 91.6),
    "L4": (121.0, 30.3),
    "A10G": (70.0, 35.0),
    "A10": (125.0, 31.2),
    "RTX 4090": (165.2, 82.6),
    "RTX 3090": (71.0, 35.6),
}


def peak_flops(device: torch.device, *, bf16: bool, override_tflops: float = 0.0) -> float | None:
    """FLOP/s of one device in the run's precision; None where nobody knows (a CPU, another GPU).

    ``override_tflops`` holds where it is not 0.
    """
    if override_tflops:
        return override_tflops * 1e12
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    found = next((peaks for known, peaks in PEAK_TFLOPS.items() if known in name), None)
    return None if found is None else found[0 if bf16 else 1] * 1e12
