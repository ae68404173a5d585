"""Run one contender's forward and backward once on each shape, so that its kernels are compiled and on disk.

python -m benchmarks.kernels.warm CONTENDER B,T,H,D,M,C,UPDATE ...      (compress, decode or a rival)
"""

from __future__ import annotations

import sys

import torch

from benchmarks.kernels.contenders import compress_call, decode_layers, rival_call
from benchmarks.kernels.sizes import Shape

__all__ = ["run"]


def run(contender: str, shapes: list[Shape], *, device: str = "cuda", backend: str = "triton") -> None:
    """Forward and backward (decode: a step) of the contender in bf16."""
    how = {"dtype": torch.bfloat16, "device": device}
    for shape in shapes:
        if contender == "decode":
            decode_layers(shape, layers=1, backend=backend, **how)()
            continue
        if contender == "compress":
            call = compress_call(shape, backend=backend, **how)
        else:
            call = rival_call(contender, shape, **how)
        y = call.forward(call.operands)
        call.gradients(y, torch.ones_like(y))
        del call, y


def main() -> None:
    """Entry."""
    shapes = []
    for text in sys.argv[2:]:
        *sizes, update = text.split(",")
        batch, length, heads, width, slots, chunk = map(int, sizes)
        shapes.append(Shape(batch, length, heads, width, slots, chunk, update))
    run(sys.argv[1], shapes)


if __name__ == "__main__":
    main()
