"""The driver of a Ray job: one worker on each of N nodes runs that node's agent and hands its output back."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launch.clusters.patience import Patience
from launch.clusters.run_agent import status_of
from launch.ending import handlers_kept, on_termination
from trellis_dist.training.termination import SIGNALS

__all__ = ["ADDRESS", "FIRST", "MASTER", "Node", "main"]

# What stands in a node's line for what is known when Ray has placed the workers.
MASTER, ADDRESS, FIRST = "FIRST_NODE", "THIS_NODE", "IS_FIRST"

_POLL_S = 0.5


class Node:
    """The worker of one node: it starts a command there, and tells how it goes when asked."""

    def __init__(self) -> None:
        self._child: Any = None
        self._reader: Any = None
        self._said: list[str] = []

    def where(self) -> tuple[str, str]:
        """Address and host name."""
        import ray

        context: Any = ray.util
        return context.get_node_ip_address(), socket.gethostname()

    def start(self, line: str) -> None:
        """Start ``line`` with bash."""
        self._child = subprocess.Popen(
            ["bash", "-c", line],
            # Ray sets as many threads as the worker has CPUs, for each of the ranks that share them.
            env={name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for row in self._child.stdout:
            self._said.append(row.decode(errors="replace"))

    def poll(self) -> tuple[str, int | None]:
        """What it printed since the last call, and its exit status once it has ended and said all."""
        done = self._child.poll() is not None and not self._reader.is_alive()
        count = len(self._said)
        text, self._said[:count] = "".join(self._said[:count]), []
        return text, self._child.returncode if done else None

    def tell(self, name: str) -> None:
        """Hand the agent a signal as a line on its standard input, which it follows."""
        with contextlib.suppress(OSError):
            self._child.stdin.write(f"{name}\n".encode())
            self._child.stdin.flush()


@dataclass
class _Worker:
    """One node as the driver sees it; ``ended`` is the status of its agent, 1 where the node is gone."""

    actor: Any
    name: str
    ended: int | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Place the workers, run the line on each, and return the status of the run."""
    parser = argparse.ArgumentParser(prog="python -m launch.clusters.ray_driver", description=__doc__)
    for option, default in (("--nodes", None), ("--cpus", 1), ("--gpus", 0)):
        parser.add_argument(option, type=int, default=default, required=default is None)
    parser.add_argument("--line", required=True, help=f"of a node, with {MASTER}, {ADDRESS} and {FIRST}")
    parser.add_argument("--patience", type=float, default=120.0, help="seconds to wait for free nodes")
    parser.add_argument(
        "--settle",
        type=float,
        default=60.0,
        help="after a failure, seconds for the other nodes to say theirs",
    )
    parser.add_argument("--grace", type=float, default=30.0, help="seconds that ranks have for a save")
    options = parser.parse_args(arguments)
    import ray

    asked: list[str] = []
    ray.init(log_to_driver=True)
    with handlers_kept(SIGNALS):  # after Ray, which takes SIGTERM for a crash
        on_termination(lambda number, _: asked.append(signal.Signals(number).name))
        try:
            bundle = {"CPU": options.cpus, **({"GPU": options.gpus} if options.gpus else {})}
            workers = _place(options.nodes, bundle, seconds=options.patience)
            _start(workers, options.line)
            return _follow(workers, asked, Patience(settle_s=options.settle, grace_s=options.grace))
        except ValueError as error:
            _say(str(error))
            return 1


def _place(nodes: int, bundle: Mapping[str, float], *, seconds: float) -> list[_Worker]:
    """One actor on each of ``nodes`` different nodes.

    Raises:
        ValueError: the cluster has not that many nodes with so much free, in time.
    """
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = ray.util.placement_group([dict(bundle)] * nodes, strategy="STRICT_SPREAD")
    if not group.wait(seconds):
        cluster: Any = ray
        alive = [node for node in cluster.nodes() if node["Alive"]]
        have = ", ".join(f"{node['NodeManagerAddress']} {_counts(node['Resources'])}" for node in alive)
        raise ValueError(
            f"no {nodes} nodes with {_counts(bundle)} free within {seconds:.0f} s; the cluster has {have}: "
            "add nodes, or lower --nodes, --cpus-per-node, --gpus-per-node"
        )
    kind = ray.remote(Node)
    workers = []
    for index in range(nodes):
        place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
        actor = kind.options(
            num_cpus=bundle["CPU"], num_gpus=bundle.get("GPU", 0), scheduling_strategy=place
        ).remote()
        workers.append(_Worker(actor, f"node {index}"))
    return workers


def _counts(resources: Mapping[str, float]) -> str:
    return " ".join(f"{kind} {resources[kind]:g}" for kind in ("CPU", "GPU") if kind in resources)


def _start(workers: Sequence[_Worker], line: str) -> None:
    import ray

    places = ray.get([worker.actor.where.remote() for worker in workers])
    master = places[0][0]
    for index, (worker, (address, host)) in enumerate(zip(workers, places)):
        worker.name = f"node {index} ({host}, {address})"
        own = line.replace(MASTER, master).replace(ADDRESS, address).replace(FIRST, str(int(index == 0)))
        ray.get(worker.actor.start.remote(own))


def _follow(workers: Sequence[_Worker], asked: list[str], patience: Patience) -> int:
    """Print what the workers print, hand signals on, until all have ended.

    Some time after the first failure the others are asked to end.
    """
    while running := [worker for worker in workers if worker.ended is None]:
        time.sleep(_POLL_S)
        while asked:
            _tell(running, asked.pop(0))
            patience.asked()
        for worker in running:
            _poll(worker)
        if patience.is_over([worker.ended for worker in workers]):
            _tell(running, "SIGTERM")
    return status_of([worker.ended or 0 for worker in workers])


def _poll(worker: _Worker) -> None:
    import ray

    try:
        text, worker.ended = ray.get(worker.actor.poll.remote())
    except ray.exceptions.RayActorError:
        worker.ended = 1
        _say(
            f"{worker.name} died, or the cluster lost it; submit the same job again to go on from the newest "
            "checkpoint"
        )
        return
    sys.stdout.write(text)
    sys.stdout.flush()


def _tell(workers: Sequence[_Worker], name: str) -> None:
    for worker in workers:
        worker.actor.tell.remote(name)


def _say(line: str) -> None:
    print(f"trellis: error: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
