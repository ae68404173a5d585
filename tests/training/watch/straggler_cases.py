"""What the straggler test runs on the ranks of a pool."""

from __future__ import annotations

import time

import torch

from tests.training import engine_cases
from tests.training.stand_in import global_rows, split
from trellis_dist.parallel import env
from trellis_dist.training.collectives import sum_scalars
from trellis_dist.training.watch.busy import BusyTimer
from trellis_dist.training.watch.stragglers import StragglerDetector


def slow_case(victim: int, start: int, steps: int) -> list[tuple[int, int]]:
    """(step, rank) of every alarm; a forward pass takes 10 ms, on the victim 20 ms from ``start`` on."""
    engine, ranks, rank = engine_cases.build("local", engine_cases.SGD), env.world_size(), env.rank()
    timer = BusyTimer(engine.forward_module, device=torch.device("cpu"))
    detector, alarms = StragglerDetector(ranks), []
    seconds = [0.01]
    engine.model.register_forward_pre_hook(lambda *_: time.sleep(seconds[0]))
    for step in range(steps):
        seconds[0] = 0.02 if rank == victim and step >= start else 0.01
        tokens, labels = global_rows(step)
        batches = split(tokens, labels, micro_batch=1, rank=rank, ranks=ranks)
        timer.begin()
        engine.train_step(batches, lr=0.01, valid_tokens=10)
        mine = timer.finish()
        busy = sum_scalars([mine if other == rank else 0.0 for other in range(ranks)])
        alarms += [(step, one.rank) for one in detector.note(step, busy)]
    return alarms
