"""Ray: work units as plain tasks on this machine or on a cluster, nothing more.

Ray knows nothing of what is done: a unit commits itself (unit.py), so a lost worker, a lost driver or a
second run costs only the units in flight.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

__all__ = ["Workers", "check_token", "default_workers", "ray_session", "run_tasks"]

RETRIES = 3
ENDING_S = 10.0
NO_CLUSTER = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def default_workers() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Workers:
    """Ray workers for several stages, started when the first task comes.

    Attributes:
        count: tasks at a time; None as many as there are cores.
        start_seconds: how long Ray took to start; 0 where it was not needed.
    """

    def __init__(self, count: int | None, ray_address: str | None) -> None:
        """`count` workers on this machine, or the cluster at `ray_address`."""
        self.count, self._address = count, ray_address
        self.start_seconds = 0.0
        self._stack = ExitStack()
        self._ray: Any = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def run(
        self, function: Callable[..., Any], calls: Iterable[tuple[Any, ...]]
    ) -> Generator[tuple[int, Any], None, None]:
        """(index, result) of ``function(*call)`` as they finish; no Ray where there is no call."""
        calls = iter(calls)
        for first in calls:
            self.start()
            yield from run_tasks(self._ray, function, chain([first], calls), workers=self.count)

    def start(self) -> None:
        """Start Ray, unless it is started."""
        if self._ray is None:
            start = time.perf_counter()
            session = ray_session(workers=self.count or default_workers(), ray_address=self._address)
            self._ray = self._stack.enter_context(session)
            self.start_seconds = time.perf_counter() - start


def check_token(address: str, *, option: str = "--ray-address") -> None:
    """Refuse a cluster on the network without a token: whoever reaches it runs code on every node.

    Raises:
        ValueError: ``address`` (HOST:PORT or URL), which ``option`` gave, is on the network, without a token.
    """
    host = address.partition("://")[2] or address
    host = host.rstrip("/").rpartition(":")[0]
    given = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
    given = given or (Path.home() / ".ray" / "auth_token").is_file()
    if host in LOOPBACK or (given and os.environ.get("RAY_AUTH_MODE") == "token"):
        return
    raise ValueError(
        f"{option} {address} is not on this machine, and Ray runs what it is sent: start the cluster "
        "with RAY_AUTH_MODE=token, and set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH here too"
    )


@contextmanager
def ray_session(*, workers: int, ray_address: str | None) -> Iterator[Any]:
    """Ray, started on loopback with `workers` cores, or the cluster at `ray_address`; stopped on leaving.

    A session that this process has open already is used and left open.

    Raises:
        ValueError: Ray is not installed, does not start, or the cluster cannot be reached.
    """
    if ray_address is not None:
        check_token(ray_address)
    # No usage statistics over the network, and no dashboard: its job interface runs what it is sent.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ValueError("ray is not installed: pip install 'trellis-dist[data]'") from error
    if ray.is_initialized():
        yield ray
        return
    local: dict[str, Any] = {"num_cpus": workers, "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    with nullcontext() if ray_address else _on_loopback():
        try:
            ray.init(
                address=ray_address or "local",
                log_to_driver=False,
                logging_level=logging.ERROR,
                **({} if ray_address else local),
            )
        except (ConnectionError, RuntimeError, OSError, ValueError) as error:
            where = f"the Ray cluster at {ray_address}" if ray_address else "Ray on this machine"
            raise ValueError(f"cannot start {where}: {error}") from error
        try:
            if ray_address is None:
                _check_loopback(ray)
            yield ray
        finally:
            ray.shutdown()


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Have Ray stay on this machine.

    It takes the machine's address in the network for "127.0.0.1", and then listens on all of them, unless it
    is told that there are no clusters. Its processes read that in the environment (the name is a relic: they
    do on every system), this one read it when ray was imported.
    """
    from ray._private import ray_constants

    given, known = os.environ.get(NO_CLUSTER), getattr(ray_constants, "ENABLE_RAY_CLUSTER", True)
    os.environ[NO_CLUSTER], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        os.environ.pop(NO_CLUSTER, None)
        if given is not None:
            os.environ[NO_CLUSTER] = given
        ray_constants.ENABLE_RAY_CLUSTER = known


def _check_loopback(ray: Any) -> None:
    if any(node["NodeManagerAddress"] != "127.0.0.1" for node in ray.nodes()):
        raise ValueError(
            f"this version of Ray would listen on the network: set {NO_CLUSTER}=0 in the environment, which "
            "keeps it on this machine, or install the version that constraints.txt names"
        )


def run_tasks(
    ray: Any, function: Callable[..., Any], arguments: Iterable[tuple[Any, ...]], *, workers: int | None
) -> Generator[tuple[int, Any], None, None]:
    """(index, result) of ``function(*arguments[index])`` as they finish, `workers` at a time.

    Where `workers` is None, or all the cores there are, as many tasks again wait in Ray, so that no worker
    ever does.
    Closing the iterator waits some seconds for what is in flight, and leaves the rest to itself.

    Raises:
        Exception: what a task raised, as it raised it; RuntimeError when a worker was lost again and again.
    """
    task = ray.remote(num_cpus=1, max_retries=RETRIES)(function)
    waiting = iter(enumerate(arguments))
    running: dict[Any, int] = {}
    cores = int(ray.cluster_resources().get("CPU", 1))
    in_flight = workers if workers is not None and workers < cores else 2 * cores
    try:
        while True:
            while len(running) < in_flight and (following := next(waiting, None)):
                running[task.remote(*following[1])] = following[0]
            if not running:
                return
            done, _ = ray.wait(list(running), num_returns=1)
            yield running.pop(done[0]), _result(ray, done[0])
    finally:
        # Not cancelled: Ray 2.60 aborts the driver where a task ends while it is being cancelled. What is
        # left behind commits itself, or nothing.
        if running:
            ray.wait(list(running), num_returns=len(running), timeout=ENDING_S)


def _result(ray: Any, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        # The worker's own error is the news; Ray's wrapper adds only where it ran.
        raise error.cause from error
    except ray.exceptions.RayError as error:
        reason = str(error).splitlines()[0]
        raise RuntimeError(f"a Ray worker was lost {RETRIES + 1} times on one work unit: {reason}") from error
