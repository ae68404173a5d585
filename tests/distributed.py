"""A pool of gloo ranks for tests: started once per world size, reused by many cases, killed on a hang.

    def case(scale):                      # module level: the ranks import it by name
        return scale * dist.get_rank()

    def test_it():
        assert gloo_pool(2).run(case, 3) == [0, 3]

Starting ranks costs a second, and their first collectives more, so a test module keeps its cases in the pool
and compares what comes back. Between cases the ranks are stopped (SIGSTOP): gloo has threads that look around
a hundred times a second, and those of idle pools took half of the machine.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import gc
import importlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.context
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from benchmarks.local_ranks import torchrun_variables

__all__ = ["CASE_TIMEOUT_S", "GlooPool", "RankError", "close_tired_pools", "fork_server", "gloo_pool"]

CASE_TIMEOUT_S = 40.0
START_TIMEOUT_S = 120.0
# After one rank failed the others are probably waiting for it: they get this long, not the whole timeout.
GRACE_S = 3.0
PR_SET_PDEATHSIG = 1
MANY_THREADS = 500  # a mesh takes some dozens
ROOT = Path(__file__).resolve().parents[1]
# What takes a process seconds to import, and starts no thread.
PRELOADED = [
    "tests.distributed",
    "tests.checkpoints.helpers",
    "trellis_dist.training.engines.factory",
    "megatron.core.tensor_parallel",
    "deepspeed",
]

_pools: dict[int, GlooPool] = {}


class RankError(AssertionError):
    """A rank raised, died or hung; the message holds its traceback or the stacks of the hanging ranks."""


def gloo_pool(world_size: int) -> GlooPool:
    """The session's pool of ``world_size`` ranks, started (or, after a failure, restarted) when needed."""
    pool = _pools.get(world_size)
    if pool is None or not pool.alive:
        pool = _pools[world_size] = GlooPool(world_size)
    return pool


def close_tired_pools() -> None:
    """Close pools whose ranks have gathered many threads; the next test that asks starts new ones.

    gloo keeps threads for every process group that a case made, and they cost while they are idle: four
    ranks of a thousand threads took more than a core.
    """
    for pool in _pools.values():
        if pool.alive and pool.threads > MANY_THREADS:
            pool.close()


def fork_server() -> multiprocessing.context.ForkServerContext:
    """Starts processes as forks of one that has imported what they need, and copies no thread of this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


@atexit.register
def _close_all() -> None:
    for pool in _pools.values():
        pool.close()


class GlooPool:
    """``world_size`` processes that share one gloo process group on this machine."""

    def __init__(self, world_size: int) -> None:
        import torch.distributed as dist

        self.world_size = world_size
        self._used = False
        self._logs = tempfile.TemporaryDirectory(prefix="gloo-pool-")
        # The store lives here on a port the system picks, as torchrun's agent does: no race for a free port.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._start()
        self._collect(time.monotonic() + START_TIMEOUT_S, "the start of the ranks")
        self._send(signal.SIGSTOP)

    def _start(self) -> None:
        context = fork_server()
        pipes = [context.Pipe() for _ in range(self.world_size)]
        self._pipes = [ours for ours, _ in pipes]
        self._ranks = [
            context.Process(
                target=_serve, args=(theirs, str(self._log(rank)), self._variables(rank)), daemon=True
            )
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self._ranks:
            process.start()
        for _, theirs in pipes:
            theirs.close()  # so that a rank that dies is seen as the end of its pipe

    def _variables(self, rank: int) -> dict[str, str]:
        return torchrun_variables(rank, self.world_size, self._store.port)

    @property
    def alive(self) -> bool:
        """False once the pool was closed or killed."""
        return bool(self._ranks)

    @property
    def threads(self) -> int:
        """Threads of rank 0, where the system shows them (/proc); else 0."""
        tasks = Path(f"/proc/{self._ranks[0].pid}/task")
        return len(list(tasks.iterdir())) if tasks.is_dir() else 0

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float | None = None) -> list[Any]:
        """Call the module-level ``function(*args)`` on every rank; returns the results in rank order.

        ``timeout_s`` defaults to CASE_TIMEOUT_S, and to START_TIMEOUT_S for the first case of a pool, which
        may have to import DeepSpeed and megatron-core.

        Raises:
            RankError: a rank raised (its traceback), died (its log) or did not finish in time (all stacks).
        """
        assert self.alive, "this pool was killed by an earlier failure: ask gloo_pool() for a new one"
        order = pickle.dumps((function.__module__, function.__qualname__, args))
        self._send(signal.SIGCONT)
        for pipe in self._pipes:
            pipe.send_bytes(order)
        limit = timeout_s or (CASE_TIMEOUT_S if self._used else START_TIMEOUT_S)
        self._used = True
        try:
            return self._collect(time.monotonic() + limit, f"{function.__module__}.{function.__qualname__}")
        finally:
            self._send(signal.SIGSTOP)

    def _send(self, number: signal.Signals) -> None:
        for process in self._ranks:
            with contextlib.suppress(ProcessLookupError):  # it died; its pipe says so
                os.kill(process.pid, number)

    def close(self) -> None:
        """Stop the ranks."""
        for process in self._ranks:
            process.kill()
        for process in self._ranks:
            process.join(5.0)
        self._ranks = []
        self._logs.cleanup()

    def _collect(self, deadline: float, what: str) -> list[Any]:
        answers: dict[int, tuple[bool, Any]] = {}
        while len(answers) < self.world_size:
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in answers]
            ready = multiprocessing.connection.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                answers[self._pipes.index(pipe)] = _receive(pipe)
            if any(not ok for ok, _ in answers.values()):
                deadline = min(deadline, time.monotonic() + GRACE_S)
        if len(answers) == self.world_size and all(ok for ok, _ in answers.values()):
            return [answers[rank][1] for rank in range(self.world_size)]
        self._ask_for_stacks([rank for rank in range(self.world_size) if rank not in answers])
        message = self._describe(answers, what)
        raised = [value for ok, value in answers.values() if not ok and value is not None]
        if len(raised) < self.world_size:
            self.close()  # a rank is dead or hangs, or they no longer agree on where they are
        raise RankError(message)

    def _ask_for_stacks(self, silent: list[int]) -> None:
        for rank in silent:
            os.kill(self._ranks[rank].pid, signal.SIGUSR1)
        time.sleep(0.5 if silent else 0.0)

    def _describe(self, answers: dict[int, tuple[bool, Any]], what: str) -> str:
        lines = [f"{what} failed on {self.world_size} ranks"]
        for rank in range(self.world_size):
            ok, value = answers.get(rank, (False, None))
            if not ok:
                report = f"did not finish:\n{self._tail(rank)}" if value is None else f"raised:\n{value}"
                lines.append(f"--- rank {rank} {report}")
        return "\n".join(lines)

    def _tail(self, rank: int) -> str:
        return self._log(rank).read_text(errors="replace")[-6000:]

    def _log(self, rank: int) -> Path:
        return Path(self._logs.name) / f"rank-{rank}.log"


def _receive(pipe: multiprocessing.connection.Connection) -> tuple[bool, Any]:
    try:
        ok, value = pickle.loads(pipe.recv_bytes())
    except EOFError:
        return False, None
    return ok, value


def _serve(pipe: multiprocessing.connection.Connection, log: str, variables: dict[str, str]) -> None:
    """A rank: join the group, then run what the pipe asks for until it closes."""
    os.environ.update(variables)
    if sys.platform == "linux":  # a stopped rank would not see that its pipe has closed
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    stream = open(log, "w", buffering=1)  # noqa: SIM115 - lives as long as the process
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    # The parent asks a hanging rank for its stacks; this answers from C code, also while Python waits in a
    # collective.
    faulthandler.register(signal.SIGUSR1, file=stream, all_threads=True)
    sys.path.insert(0, str(ROOT))
    pipe.send_bytes(_answer(_join, ()))
    modules = _freeze_imports(0)
    while True:
        try:
            module, name, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        pipe.send_bytes(_answer(_lookup, (module, name, args)))
        modules = _freeze_imports(modules)


def _freeze_imports(before: int) -> int:
    """Spare the garbage collector what is imported, whenever that is more than ``before`` modules.

    DeepSpeed collects twice for every engine that it makes, dynamo for what it compiles; with all that torch,
    DeepSpeed and megatron-core keep for ever, each time was most of a second and most of a case.
    """
    if len(sys.modules) > before:
        gc.collect()  # what a case left in cycles must not stay
        gc.freeze()
    return len(sys.modules)


def _join() -> None:
    import torch
    from torch.distributed import distributed_c10d

    from trellis_dist.parallel import env

    torch.set_num_threads(1)
    one: Any = _OneDevice(distributed_c10d.ProcessGroupGloo)
    distributed_c10d.ProcessGroupGloo = one
    env.init_distributed("cpu", timeout_s=30.0)


class _OneDevice:
    """Stands where torch makes its gloo groups, and has all of a process send through one device.

    By default each group has its own, with a thread that looks around a hundred times a second: hundreds of
    groups, which the cases of a pool leave behind, kept a core busy.
    """

    def __init__(self, gloo: Any) -> None:
        self._gloo, self._device = gloo, gloo.create_default_device()

    def __call__(self, store: Any, rank: int, size: int, timeout: timedelta) -> Any:
        options = self._gloo._Options()
        options._devices, options._threads, options._timeout = [self._device], 2, timeout
        return self._gloo(store, rank, size, options)

    def __instancecheck__(self, group: object) -> bool:
        return isinstance(group, self._gloo)


def _lookup(module: str, name: str, args: tuple[Any, ...]) -> Any:
    function: Any = importlib.import_module(module)
    for part in name.split("."):
        function = getattr(function, part)
    return function(*args)


def _answer(function: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    try:
        return pickle.dumps((True, function(*args)))
    except BaseException:  # SystemExit too: the test wants to see it
        return pickle.dumps((False, traceback.format_exc()))
