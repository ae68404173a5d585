"""Real SIGKILLs of a process that saves without pause: what it said was saved is there, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from checkpoints.commit import list_steps
from checkpoints.state import latest_verified, load_run_state
from tests.checkpoints.helpers import assert_holds, saved
from tests.distributed import fork_server
from trellis_dist.files import REAL

KILLS = 8


def weights(step: int) -> dict[str, torch.Tensor]:
    """A few hundred kilobytes, so that a save takes a while."""
    return {f"model/layer{i}": torch.full((257, 129), step + i / 8) for i in range(4)}


def save_for_ever(root: Path, first: int, said: Connection) -> None:
    """Save step after step, telling the parent of each one that `save_checkpoint` has returned from."""
    torch.set_num_threads(1)
    for step in range(first, first + 100_000):
        saved(root, step, tensors=weights(step), keep=2, file_systems=REAL)
        said.send(step)


def test_sigkill_at_random_moments(tmp_path: Path) -> None:
    context = fork_server()
    chance = random.Random(7)
    step = 0
    for _ in range(KILLS):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=save_for_ever, args=(tmp_path, step + 1, sender), daemon=True)
        process.start()
        sender.close()
        assert receiver.poll(60), "the first save did not finish"
        time.sleep(chance.uniform(0.0, 0.08))
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join(10)
        assert process.exitcode == -signal.SIGKILL
        step = _check(tmp_path, _last(receiver))
    left = [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert len(left) <= 2, f"what earlier kills left was cleared by later saves: {left}"


def _last(receiver: Connection) -> int:
    step = 0
    try:
        while True:
            step = receiver.recv()
    except EOFError:
        return step


def _check(root: Path, said: int) -> int:
    """The newest step verifies, and is the last one reported or one that was committed just after."""
    found = latest_verified(root)
    assert found is not None
    step = load_run_state(found)["step"]
    assert step in (said, said + 1)
    assert_holds(found, weights(step))
    assert len(list_steps(root)) <= 3
    return step
