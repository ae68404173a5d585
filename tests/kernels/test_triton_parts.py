"""Parts of the Triton backend (on_triton_parts.py, in a process of its own) and its table of launches."""

from __future__ import annotations

import sys

import pytest

from tests.kernels.helpers import TRITON_CASES, in_own_process


@pytest.mark.skipif(sys.platform != "linux", reason="triton exists for Linux only")
def test_parts_equal_fp64_in_the_interpreter() -> None:
    parts = TRITON_CASES.with_name("on_triton_parts.py")
    in_own_process(["-m", "pytest", str(parts), "-p", "no:cacheprovider"], TRITON_INTERPRET="1")
