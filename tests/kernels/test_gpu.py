"""What only a CUDA device can show; skipped elsewhere (tests/skips_allowed.txt)."""

from __future__ import annotations

import pytest

from tests.kernels.helpers import TRITON_CASES, in_own_process


@pytest.mark.gpu
def test_kernels_equal_fp64_on_a_gpu() -> None:
    environment = {
        "TRITON_INTERPRET": "0",
        "KERNEL_TEST_DEVICE": "cuda",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
    in_own_process(["-m", "pytest", str(TRITON_CASES), "-p", "no:cacheprovider"], **environment)
