"""One rank of a training run: what torchrun starts (``python -m launch.worker``)."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import cast

from launch.defaults import changed
from launch.ending import (
    end_process,
    end_rank_at_once,
    handlers_kept,
    on_termination,
)
from launch.failures import (
    Failure,
    is_restartable,
    log_folder,
    lost_contact,
    read_failures,
    record_failure,
)
from launch.messages import show_warnings_plainly
from launch.recipe import Recipe, parse_recipe, resolve
from trellis_dist.files import read_json
from trellis_dist.training.errors import EchoError, MachineError
from trellis_dist.training.job import Job, Resume, TrainResult
from trellis_dist.training.termination import SIGNALS

__all__ = [
    "end_with_launcher",
    "error_line",
    "leave_failure",
    "leave_hang",
    "main",
    "process",
    "redirect_output",
    "train_rank",
]

# What a user, or a machine, can cause; anything else is a bug and says so.
USER_ERRORS = (ValueError, OSError, MachineError)

ECHO_SECONDS = 3.0
SAME_SECONDS = 2.0
ECHO_POLL_SECONDS = 0.1

LAUNCHER_POLL_SECONDS = 0.5


def end_with_launcher() -> None:
    """Send this process one SIGTERM when its launcher dies, even of SIGKILL: it then saves and ends.

    Only for a process that our launcher started, with its own Python. Not PR_SET_PDEATHSIG: Linux sends that
    signal once per thread of the dying launcher, and a second SIGTERM means "do not save".
    """
    launcher = os.getppid()
    if _is_adopted():
        signal.raise_signal(signal.SIGTERM)
    threading.Thread(target=_watch, args=(launcher,), daemon=True).start()


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(LAUNCHER_POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


def _is_adopted() -> bool:
    """Tell whether the launcher is gone already: the parent is what adopts orphans, which is no Python.

    Not from a parent id of 1, which the launcher itself has in a container.
    """
    if "PYTHON_EXEC" in os.environ:  # torchrun was told to start ranks with another Python
        return False
    try:
        return not os.path.samefile("/proc/self/exe", f"/proc/{os.getppid()}/exe")
    except OSError:  # no /proc here; or another user's process, which is no launcher
        return os.path.exists("/proc/self/exe")


def train_rank(
    recipe: Recipe,
    run_dir: Path,
    *,
    resume: Resume,
    stop_at_step: int | None,
    report: Callable[[str, bool], None],
) -> TrainResult:
    """Train in this process, as the rank that its environment says, and return the loop's result.

    ``report`` is called with (message, echo) when this process is about to end because the run hangs.
    """
    from trellis_dist.training.loop import run

    resolved = resolve(recipe)
    job = Job(
        model=recipe.model,
        mesh=recipe.mesh,
        tensor=recipe.tensor,
        sequence=recipe.sequence,
        data=recipe.data,
        optimizer=recipe.optimizer,
        schedule=recipe.schedule,
        training=recipe.training,
        checkpoint=recipe.checkpoint,
        logging=recipe.logging,
        recipe=resolved,
        changed=changed(resolved),
    )
    return run(job, run_dir, resume=resume, stop_at_step=stop_at_step, report=report)


def error_line(error: BaseException, recipe: Recipe | None = None) -> str:
    """One line per problem, no traceback: the message of what a user can cause, a named bug otherwise.

    ``recipe`` is what was being trained: where memory ran out, the planner says what to change in it.
    """
    text = str(error).strip() or repr(error)
    if isinstance(error, USER_ERRORS):
        return text
    if _out_of_memory(error, text):
        return f"out of memory ({text.splitlines()[0]}): {_memory_advice(recipe)}"
    if isinstance(error, ModuleNotFoundError) and error.name:
        return (
            f"{error.name} is not installed: run launch/setup.sh train,data,evals and use .venv/bin/trellis"
        )
    from launch.nodes.errors import network_line

    if line := network_line(error):
        return line
    if lost_contact(error):
        return f"lost the connection to another rank ({_gloo_words(text)})"
    return f"{type(error).__name__}: {text.splitlines()[0]} (a bug; run again with --debug for the traceback)"


def _memory_advice(recipe: Recipe | None) -> str:
    """The planner's, or without a recipe (or memory to plan in) what always helps."""
    if recipe is not None:
        with contextlib.suppress(Exception):
            from launch.planning.advice import out_of_memory_advice

            return out_of_memory_advice(recipe, ranks=int(os.environ.get("WORLD_SIZE", "0")) or None)
    return "lower training.micro_batch (the global batch stays) or data.sequence_length"


def _gloo_words(text: str) -> str:
    """The first sentence, without the place in gloo's code."""
    return re.sub(r"^\[\S+:\d+\] ", "", text.splitlines()[0]).partition(". This is typically")[0]


def _out_of_memory(error: BaseException, text: str) -> bool:
    """torch.OutOfMemoryError and cuBLAS and the CPU allocator's words are all RuntimeErrors."""
    words = ("out of memory", "allocate memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in text for word in words)
    )


def main(arguments: list[str] | None = None) -> int:
    """Train, and leave a failure where the launcher finds it; returns the exit status."""
    options = _parser().parse_args(arguments)
    show_warnings_plainly()
    rank = int(os.environ.get("RANK", "0"))
    if rank > 0:
        redirect_output(log_folder(options.run_dir) / f"rank-{rank:05d}.log")

    def report(message: str, echo: bool) -> None:
        leave_hang(options.run_dir, rank, message, echo)

    recipe: Recipe | None = None
    try:
        recipe = parse_recipe(read_json(options.recipe), source=str(options.recipe))
        resume = cast(Resume, options.resume)
        result = train_rank(
            recipe,
            options.run_dir,
            resume=resume,
            stop_at_step=options.stop_at_step,
            report=report,
        )
    except Exception as error:
        failure = leave_failure(error, run_dir=options.run_dir, rank=rank, recipe=recipe)
        if failure.echo:
            _let_the_cause_be_said(options.run_dir)
        elif failure.named:
            _let_the_watch_end_this()
        elif not failure.restartable:
            _let_the_others_speak(options.run_dir)
        return 1
    except KeyboardInterrupt:
        return 130  # every process of the terminal got the signal; the launcher says so once
    return result.exit_status


def leave_failure(error: Exception, *, run_dir: Path, rank: int, recipe: Recipe | None = None) -> Failure:
    """Record what a rank that trains ``recipe`` fails with; for use where ``error`` is handled."""
    return record_failure(
        run_dir,
        rank=rank,
        message=error_line(error, recipe),
        detail="".join(traceback.format_exception(error)),
        echo=isinstance(error, EchoError) or lost_contact(error),
        restartable=is_restartable(error),
    )


def leave_hang(run_dir: Path, rank: int, message: str, echo: bool) -> Failure:
    """Record that this rank ends because the run hangs; with ``echo`` another one says who held it up."""
    logs = log_folder(run_dir)
    stacks = (
        f"the stacks of all ranks are in {logs} and above, their last collectives in {logs}/flight-step-*/"
    )
    return record_failure(run_dir, rank=rank, message=message, detail=stacks, echo=echo, named=True)


def _let_the_cause_be_said(run_dir: Path) -> None:
    """Wait a little: torchrun ends all ranks as soon as one exits, the one that knows the cause too.

    Where that one died without a word, torchrun's SIGTERM ends the wait.
    """
    _wait_while(lambda: all(failure.echo for failure in read_failures(run_dir)), ECHO_SECONDS)


def _let_the_others_speak(run_dir: Path) -> None:
    """Wait a little: what every rank was refused for is said without a rank, if all have recorded it."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    _wait_while(lambda: len(read_failures(run_dir)) < ranks, SAME_SECONDS)


def _wait_while(condition: Callable[[], bool], seconds: float) -> None:
    """Poll, at most ``seconds``; torchrun, which ends all ranks when one has exited, ends this one too."""
    with handlers_kept(SIGNALS):
        on_termination(_end_failed)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and condition():
            time.sleep(ECHO_POLL_SECONDS)


def _let_the_watch_end_this() -> None:
    """It has judged a hang, and may still have to end a process that hears nothing; then it ends this one."""
    from trellis_dist.training.watch.hang import GRACE_S

    with handlers_kept(SIGNALS):
        on_termination(lambda number, frame: None)
        time.sleep(GRACE_S)


def _end_failed(_: int, __: FrameType | None) -> None:
    end_process(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launch.worker", description=__doc__)
    parser.add_argument("--recipe", type=Path, required=True, help="the run's resolved recipe.json")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--resume", choices=("auto", "require"), default="auto")
    parser.add_argument("--stop-at-step", type=int, default=None)
    return parser


def redirect_output(path: Path) -> None:
    """Send what this process prints, C libraries included, to a file: the terminal belongs to rank 0."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)


def process() -> None:
    """Be the process that the launcher starts: end with it, and at once when asked to before training."""
    end_rank_at_once()
    end_with_launcher()
    status = main()
    if status:
        end_process(status)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a terminal that is gone changes no exit status
            stream.flush()


if __name__ == "__main__":
    process()
