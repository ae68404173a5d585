"""Processes on this machine, one thread each: the ranks of one gloo group, or processes that stand alone.

A server process imports torch once and forks the ranks, so that a start costs a second and not ten, and every
process begins with the same fresh memory.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import sys
import time
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from benchmarks.local_ranks import join

__all__ = ["Ranks"]

PRELOADED = "benchmarks.sequence_parallel.preload"
TIMEOUT_S = 900.0


class Ranks:
    """``count`` processes; a context manager that ends them.

    Args:
        count: how many.
        joined: whether they make one process group, or know nothing of each other.
    """

    def __init__(self, count: int, *, joined: bool = True) -> None:
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([PRELOADED])
        # For the server: a library reads it when it is imported.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        self._pipes, self._processes = [], []
        for rank in range(count):
            ours, theirs = context.Pipe()
            place = (rank, count if joined else 0, self._store.port)
            process = context.Process(target=_serve, args=(theirs, place), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._collect("the start of the ranks", TIMEOUT_S)

    def run(self, function: Callable[..., Any], *arguments: Any, timeout_s: float = TIMEOUT_S) -> list[Any]:
        """``function(*arguments)`` on every process at once; the results in order.

        Raises:
            RuntimeError: a process raised (its last line), died, or did not answer in time.
        """
        for pipe in self._pipes:
            pipe.send((function, arguments))
        return self._collect(function.__qualname__, timeout_s)

    def _collect(self, what: str, timeout_s: float) -> list[Any]:
        deadline = time.monotonic() + timeout_s
        answers: dict[Any, Any] = {}
        while len(answers) < len(self._pipes):
            waiting = [pipe for pipe in self._pipes if pipe not in answers]
            ready = multiprocessing.connection.wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RuntimeError(f"{what}: no answer from {len(waiting)} processes in {timeout_s:.0f} s")
            for pipe in ready:
                answers[pipe] = _answer_of(pipe, what)
        return [answers[pipe] for pipe in self._pipes]

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Kill them: after an error the others may wait for ever."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()


def _answer_of(pipe: Any, what: str) -> Any:
    try:
        good, value = pipe.recv()
    except EOFError:
        raise RuntimeError(f"{what}: a process died") from None
    if not good:
        print(value, file=sys.stderr)
        raise RuntimeError(f"{what}: {value.strip().splitlines()[-1]}")
    return value


def _serve(pipe: Any, place: tuple[int, int, int]) -> None:
    """One process: join, then do what the pipe asks for until nobody is at its other end."""
    with contextlib.suppress(EOFError, BrokenPipeError):
        pipe.send(_attempt(_join, place))
        while True:
            function, arguments = pipe.recv()
            pipe.send(_attempt(function, arguments))


def _join(rank: int, count: int, port: int) -> None:
    if count:
        join(rank, count, port, timeout_s=TIMEOUT_S)
        return
    os.environ["DS_ACCELERATOR"] = "cpu"
    import torch

    torch.set_num_threads(1)


def _attempt(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[bool, Any]:
    try:
        return True, function(*arguments)
    except BaseException:
        return False, traceback.format_exc()
