"""The Triton backend: its choice, its refusals, and its numbers (on_triton.py, in a process of its own)."""

from __future__ import annotations

import sys

import pytest
import torch

from kernels import compress_kv
from tests.kernels import beside
from tests.kernels.helpers import ROOT, in_own_process, make_operands


@pytest.mark.skipif(sys.platform != "linux", reason="triton exists for Linux only")
def test_kernels_equal_fp64_in_the_interpreter() -> None:
    beside.finish("test_kernels_equal_fp64_in_the_interpreter")


def test_kernels_run_without_triton() -> None:
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "from tests.kernels.helpers import make_operands, run\n"
        "run(make_operands(1, 9), chunk_size=4)\n"
        "assert 'kernels.triton.compress' not in sys.modules\n"
    )
    in_own_process(["-c", script], PYTHONPATH=str(ROOT))


def test_refuses_what_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    operands = {name: x.float() for name, x in make_operands(1, 4).items()}
    with pytest.raises(ValueError, match="operands on cpu: move them to a GPU, or use 'chunkwise'"):
        compress_kv(**operands, chunk_size=4, backend="triton")
    with pytest.raises(ValueError, match="an operand is fp64: use 'chunkwise'"):
        compress_kv(**make_operands(1, 4), chunk_size=4, backend="triton")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="triton is not installed"):
        compress_kv(**operands, chunk_size=4, backend="triton")
    y, _ = compress_kv(**operands, chunk_size=4)  # auto is the portable backend here
    assert torch.equal(y, compress_kv(**operands, chunk_size=4, backend="chunkwise")[0])
