"""Training on a GPU; skipped where there is none."""

from __future__ import annotations

import pytest

from tests.forecasting.test_training import training


@pytest.mark.gpu
def test_a_gpu_trains_what_a_cpu_does_and_goes_on_from_it() -> None:
    """DLinear, which has no dropout: its draws would be others."""
    cpu, gpu = training("dlinear"), training("dlinear", device="cuda")
    cpu.epoch()
    gpu.load(cpu.tensors(), cpu.record())
    cpu.epoch()
    gpu.epoch()
    assert gpu.epochs == pytest.approx(cpu.epochs, rel=1e-4)
    assert all(value.is_cuda for value in gpu.model.state_dict().values())
