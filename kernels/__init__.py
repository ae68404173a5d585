"""The compress operation of Trellis: pure functions on tensors; torch and, where installed, triton only."""

from kernels.compress import CompressState, compress_kv
from kernels.decode import decode_step
from kernels.layout import PackedLayout

__all__ = ["CompressState", "PackedLayout", "compress_kv", "decode_step"]
