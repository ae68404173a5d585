"""The compress operation of Trellis: pure functions on tensors; torch and, where installed, triton only."""

from kernels.compress import compress_kv
from kernels.decode import decode_step, prefill
from kernels.layout import PackedLayout
from kernels.types import CompressState

__all__ = ["CompressState", "PackedLayout", "compress_kv", "decode_step", "prefill"]
