"""A rank that fails as a test says instead of training: everything around it is the real worker.

``RUN/script.json`` holds, by rank, what each start of it does, in order; the last entry holds from then on.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch import cli, training_run, worker
from launch.failures import log_folder
from launch.recipe import load_recipe, resolve
from trellis_dist.files import read_json, write_json
from trellis_dist.training.job import TrainResult
from trellis_dist.training.termination import TerminationRequest
from trellis_dist.training.watch.status_page import StatusPage, status_path

BASE = str(Path(__file__).with_name("base.toml"))
MODULE = "tests.launch.rank_stand_in"
HANG = "no progress on rank 0: rank 1 has not been heard of for 30 s; its last operation: step 9, update"
GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4"


def write_script(run_dir: Path, *ranks: list[str]) -> list[str]:
    """Write the script of a run and its recipe; returns the arguments of its ranks."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(run_dir / "script.json", ranks)
    write_json(run_dir / "recipe.json", resolve(load_recipe(BASE)))
    return [f"--recipe={run_dir / 'recipe.json'}", f"--run-dir={run_dir}"]


def starts(run_dir: Path, rank: int = 0) -> int:
    """How often the script of this rank was begun."""
    path = run_dir / f"starts-{rank}"
    return len(path.read_text()) if path.is_file() else 0


def play(_: Any, run_dir: Path, *, report: Callable[[str, bool], object], **__: Any) -> TrainResult:
    """Do what the script says for this rank and this start."""
    rank = int(os.environ["RANK"])
    scripts = read_json(run_dir / "script.json")
    log_folder(run_dir).mkdir(exist_ok=True)
    page = StatusPage(status_path(log_folder(run_dir), rank), rank=rank)
    page.write(step=12, operation="backward pass")  # before the count, after which tests read the page
    with open(run_dir / f"starts-{rank}", "a", encoding="utf-8") as file:
        file.write("x")
    begun, script = starts(run_dir, rank), scripts[rank]
    wait_until(lambda: all(starts(run_dir, other) >= begun for other in range(len(scripts))))
    outcome = "finished"
    for action in script[min(begun, len(script)) - 1].split(","):
        if action == "hang":  # as the watch does, in its own thread
            report(HANG, rank > 0)
            os._exit(1)
        outcome = act(action, run_dir, run_dir / f"dying-{begun}") or outcome
    return TrainResult(outcome=outcome, step=0, tokens=0, resumed_step=0)  # type: ignore[arg-type]


def wait_until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.02)


def act(action: str, run_dir: Path, dying: Path) -> str | None:
    """Do one thing; ``dying`` is there from the moment at which a rank of this start begins to fail."""
    kind, _, value = action.partition(" ")
    if kind in ("kill", "value", "bug", "full"):
        dying.touch()
    match kind:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "value":
            raise ValueError(f"optimizer.lr = {value}: use less")
        case "bug":
            raise KeyError("x")
        case "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        case "lose":
            wait_until(dying.exists)
            raise RuntimeError(GLOO)
        case "gloo":
            raise RuntimeError(GLOO)
        case "sleep":
            time.sleep(float(value))
        case "commit":
            (run_dir / "checkpoints" / f"step-{int(value):08d}").mkdir(parents=True, exist_ok=True)
        case "asked":
            return wait_for_a_signal(run_dir)
        case "stubborn":
            save_for_ever(run_dir)
    return None


def wait_for_a_signal(run_dir: Path) -> str:
    """As the loop does: a request to end is remembered, and this start ends when it is time."""
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: received.append(number))
    (run_dir / f"listening-{os.environ['RANK']}").write_text(str(os.getpid()))
    wait_until(lambda: bool(received))
    return "terminated"


def save_for_ever(run_dir: Path) -> None:
    """As the loop does whose last save does not end: only a second request ends it."""
    with TerminationRequest() as request:
        (run_dir / f"listening-{os.environ['RANK']}").write_text(str(os.getpid()))
        wait_until(lambda: request.received)
        (run_dir / f"saving-{os.environ['RANK']}").touch()
        wait_until(lambda: False)


if __name__ == "__main__":
    if sys.argv[1] == "train":  # as torchrun starts it on a cluster
        training_run.train_rank = play
        sys.exit(cli.main())
    worker.train_rank = play
    worker.parse_recipe = lambda *_, **__: None  # it imports torch, seconds, and the script is enough
    worker.process()
