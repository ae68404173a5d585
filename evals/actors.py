"""Workers on a Ray cluster: actors that take leases from the server over HTTP.

They read the run folders themselves, so these lie on a file system that all nodes share, under one path. An
actor does one job at a time until the server is gone; Ray ends it with the server's process.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from data_pipeline.workers import ray_session
from evals.baselines import Baselines
from evals.guard import LOOPBACK, is_loopback
from evals.pool import Member, Pool
from evals.queue import Queue
from evals.remote import RefusedError, RemoteJobs
from evals.worker import JOB_SECONDS, LEASE_SECONDS, POLL_SECONDS, Worker, end_process

__all__ = ["RayPool", "public_url", "resolve_address"]

# An actor that its server has not answered for so long ends: another one will be started, or none is needed.
ORPHAN_SECONDS = 120.0
_log = logging.getLogger(__name__)


def check_ray() -> None:
    """Raise ValueError when Ray is not installed, before anything else asks for it."""
    if find_spec("ray") is None:
        raise ValueError(
            "--ray-address needs Ray, which is not installed: pip install 'trellis-dist[data]', or leave the "
            "option out to work in processes of this machine"
        )


def resolve_address(address: str) -> str | None:
    """The cluster that ``--ray-address`` names: None for "local", which is one that is started here.

    Raises:
        ValueError: "auto", and no cluster runs on this machine and RAY_ADDRESS names none; no Ray.
    """
    check_ray()
    if address != "auto":
        return None if address == "local" else address
    from ray._private.services import get_ray_address_from_environment

    try:
        found = get_ray_address_from_environment("auto", None)
    except ConnectionError:
        raise ValueError(
            "--ray-address auto: no Ray cluster runs here; start one, name its address, or use local"
        ) from None
    return str(found)


def _work(
    url: str,
    secret: str,
    owner: str,
    roots: tuple[str, ...],
    baselines: Baselines | None,
    lease_seconds: float,
    job_seconds: float,
) -> None:
    """What an actor runs until its server refuses it or is gone."""
    from evals.folders import Runs

    worker = Worker(
        RemoteJobs(url, secret),
        Runs(*map(Path, roots), baselines=baselines),
        owner,
        lease_seconds=lease_seconds,
        job_seconds=job_seconds,
        lost=end_process,
    )
    answered = time.monotonic()
    while True:
        try:
            if not worker.once():
                time.sleep(POLL_SECONDS)
            answered = time.monotonic()
        except RefusedError:
            return
        except OSError as error:
            if time.monotonic() - answered > ORPHAN_SECONDS:
                return
            _log.warning("%s does not answer (%s); asking again", url, error)
            time.sleep(POLL_SECONDS)


class EvaluationWorker:
    """The actor's class."""

    def work(self, *arguments: Any) -> None:
        """`_work`, for as long as the actor lives."""
        _work(*arguments)


class _Actor:
    """An actor and the call that it is busy with for as long as it lives."""

    def __init__(self, ray: Any, arguments: tuple[object, ...], *, here: bool) -> None:
        self._ray = ray
        options = _on_this_node(ray) if here else {"num_gpus": _gpus(ray.cluster_resources())}
        self._actor = ray.remote(num_cpus=1, **options)(EvaluationWorker).remote()
        self._call = self._actor.work.remote(*arguments)
        self._reason: str | None = None

    def alive(self) -> bool:
        return not self._ray.wait([self._call], timeout=0)[0]

    def kill(self) -> None:
        if self.alive():
            self._ray.kill(self._actor)

    def death(self) -> str | None:
        """Ray tells a process that ended itself from a lost one in words only: every end has a reason."""
        try:
            self._ray.get(self._call, timeout=10)
        except self._ray.exceptions.RayActorError:
            return "its worker died"
        except Exception as error:  # what the actor raised, wrapped
            _log.warning("an actor failed: %s", error)
            return "its worker failed: the log of the service says why"
        return "its worker lost the server"


def _gpus(resources: Mapping[str, float]) -> int:
    return 1 if resources.get("GPU", 0) >= 1 else 0


def _on_this_node(ray: Any) -> dict[str, Any]:
    """Options of an actor that Ray must not put on another node."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    own = ray.get_runtime_context().get_node_id()
    resources = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    strategy = NodeAffinitySchedulingStrategy(own, soft=False)
    return {"num_gpus": _gpus(resources[own]), "scheduling_strategy": strategy}


def _other_nodes(ray: Any) -> list[str]:
    """Addresses of the cluster's nodes beside this one."""
    alive = {str(node["NodeManagerAddress"]) for node in ray.nodes() if node["Alive"]}
    return sorted(alive - {*LOOPBACK, str(ray.util.get_node_ip_address())})


def _check_reach(ray: Any, url: str) -> None:
    """Refuse a loopback address where actors may run on other nodes: each would ask its own for ever."""
    host = urlsplit(url).hostname or ""
    if not is_loopback(host):
        return
    if others := _other_nodes(ray):
        raise ValueError(
            f"host = {host}: the workers on the cluster's other nodes ({', '.join(others[:3])}) cannot reach "
            "it: give --host an address of this machine that they can reach, and set TRELLIS_TOKEN"
        )


class RayPool(Pool):
    """Actors on a Ray cluster, each with one core (and one GPU where the cluster has any).

    Args:
        queue, count: as in `Pool`.
        roots, baselines: as in `evals.folders.Runs`, on every node.
        address: "local" starts Ray here, on loopback; "auto" finds a running cluster; or host:port.
        url, secret: how actors reach the server.
        lease_seconds, job_seconds: as in `Worker`.

    Raises:
        ValueError: Ray is missing, does not start, cannot be reached, the cluster is open to the network, or
            it has other nodes and ``url`` is a loopback address. Nodes that join later get no workers then.
    """

    def __init__(
        self,
        queue: Queue,
        roots: tuple[Path, ...],
        *,
        count: int,
        address: str,
        url: str,
        secret: str,
        baselines: Baselines | None = None,
        lease_seconds: float = LEASE_SECONDS,
        job_seconds: float = JOB_SECONDS,
    ) -> None:
        super().__init__(queue, count=count)
        self._stack, self._warned = ExitStack(), False
        session = ray_session(workers=count, ray_address=resolve_address(address))
        self._ray = self._stack.enter_context(session)
        try:
            _check_reach(self._ray, url)
        except BaseException:
            self._stack.close()
            raise
        self._before, self._after = (
            (url, secret),
            (tuple(map(str, roots)), baselines, lease_seconds, job_seconds),
        )

    def _start(self, owner: str) -> Member:
        here = is_loopback(urlsplit(self._before[0]).hostname or "")
        if here and (others := _other_nodes(self._ray)) and not self._warned:
            self._warned = True
            _log.warning(
                "nodes joined (%s) that cannot reach --host: they get no workers", ", ".join(others[:3])
            )
        return _Actor(self._ray, (*self._before, owner, *self._after), here=here)

    def stop(self) -> None:
        """End all actors, and leave Ray as it was found."""
        super().stop()
        self._stack.close()


def public_url(host: str, port: int) -> str:
    """How actors reach a server that listens on ``host``: its own address, where that is every one.

    Raises:
        ValueError: Ray is not installed.
    """
    check_ray()
    if host in ("0.0.0.0", "::"):
        from ray.util import get_node_ip_address

        host = str(get_node_ip_address())  # type: ignore[no-untyped-call]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
