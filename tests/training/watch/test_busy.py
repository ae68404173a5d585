from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import nn

from trellis_dist.training.watch import busy
from trellis_dist.training.watch.busy import BusyTimer, own_seconds


def test_a_step_is_busy_until_its_last_forward_pass_ends() -> None:
    now = [10.0]
    module = nn.Linear(2, 2)
    timer = BusyTimer(module, device=torch.device("cpu"), clock=lambda: now[0])
    rows = torch.ones(1, 2)
    timer.begin()
    for seconds in (3.0, 4.0):  # forward, backward, forward, then the last backward with its reduction
        now[0] += seconds
        loss = module(rows).sum()
        now[0] += 1.0
        loss.backward()
    now[0] += 100.0
    assert timer.finish() == 8.0
    module(rows)  # a validation pass
    assert timer.finish() == 0.0
    timer.begin()
    assert timer.finish() == 0.0
    timer.begin()
    now[0] += 2.0
    module(rows)
    timer.close()
    now[0] += 2.0
    module(rows)
    assert timer.finish() == 2.0


def test_waiting_for_a_core_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = tmp_path / "schedstat"
    monkeypatch.setattr(busy, "SCHEDULED", str(schedule))
    for text, waited in (("900 3000000000 7", 3.0), ("", 0.0), ("1 x 2", 0.0)):
        schedule.write_text(text)
        before, own, after = time.perf_counter(), own_seconds(), time.perf_counter()
        assert before <= own + waited <= after, text
    schedule.unlink()
    assert time.perf_counter() <= own_seconds() <= time.perf_counter()


def test_sleeping_counts() -> None:
    start = own_seconds()
    time.sleep(0.1)
    assert own_seconds() - start >= 0.05
