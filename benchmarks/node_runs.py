"""Training runs over several hosts on one machine, as users start them, and what becomes of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.faults.rank_job import data_set, recipe_file
from benchmarks.namespaces import Hosts
from launch.failures import log_folder
from trellis_dist.training.watch.status_page import read_status, status_path

__all__ = ["PORT", "TIMEOUT_S", "NodeRun", "preflight_command", "settings"]

ROOT = Path(__file__).resolve().parents[1]
PORT = 29500  # every host has ports of its own
TIMEOUT_S = 10.0  # training.step_timeout_s: within so many seconds, and 5 more, a run that hangs ends
LIMIT_S = 300.0  # for one thing to happen, on a machine that does other things too


def settings(hosts: int, **values: Any) -> list[str]:
    """Options of `trellis train` and `trellis preflight` for one rank on each host."""
    every = {
        "mesh.dp": hosts,
        "training.engine": "local",
        "training.step_timeout_s": TIMEOUT_S,
        "training.first_step_timeout_s": 120.0,
        "checkpoint.interval": 5,
        **values,
    }
    return [part for key, value in every.items() for part in ("--set", f"{key}={json.dumps(value)}")]


def environment() -> dict[str, str]:
    """Variables of every process on a host."""
    return {
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }


def preflight_command(shared: Path, run_dir: Path, hosts: int, *options: str, **values: Any) -> list[str]:
    """`trellis preflight` as each of ``hosts`` starts it."""
    return [
        *(sys.executable, "-m", "launch.cli", "preflight", str(recipe_file(shared))),
        *(f"--run-dir={run_dir}", f"--dataset-dir={data_set(shared)}", f"--nodes={hosts}"),
        *(f"--rdzv=host0:{PORT}", "--ranks-per-node=1", *settings(hosts, **values), *options),
    ]


class NodeRun:
    """`launch/torchrun/train.sh` on every host; leaving the context ends what is left."""

    def __init__(
        self,
        hosts: Hosts,
        run_dir: Path,
        shared: Path,
        values: Mapping[str, Any],
        *options: str,
        static: bool = False,
    ) -> None:
        """Start it.

        Args:
            run_dir: of the run; what each host says goes there too.
            shared: folder of the data set and the recipe.
            values: dotted keys of the recipe.
            options: of train.sh.
            static: places are given out.
        """
        self.hosts, self.run_dir, self.begun = hosts, run_dir, time.time()
        run_dir.mkdir(parents=True, exist_ok=True)
        count = len(hosts.names)
        script = [str(ROOT / "launch/torchrun/train.sh"), "--nodes", str(count), "--master", "host0"]
        script += ["--port", str(PORT), "--ranks-per-node", "1", *options]
        train = [str(recipe_file(shared)), "--run-dir", str(run_dir), "--dataset-dir", str(data_set(shared))]
        self.agents: list[subprocess.Popen[bytes]] = []
        for host in range(count):
            place = ["--rendezvous", "static", "--node-rank", str(host)] if static else []
            with self._said(host).open("wb") as stream:
                line = [*script, *place, *train, *settings(count, **values)]
                self.agents.append(
                    hosts.popen(host, line, env=environment(), stdout=stream, stderr=subprocess.STDOUT)
                )

    def __enter__(self) -> NodeRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for host in range(len(self.agents)):
            self.hosts.kill(host)
        for agent in self.agents:
            agent.wait()

    def said(self, host: int) -> str:
        """What ``host`` has printed so far."""
        return self._said(host).read_text(errors="replace")

    def errors(self, host: int) -> list[str]:
        """Its lines for the user."""
        return [line for line in self.said(host).splitlines() if line.startswith("trellis: ")]

    def step(self) -> int:
        """The step that all ranks have come to in their present start."""
        count = len(self.agents)
        pages = [read_status(status_path(log_folder(self.run_dir), rank)) for rank in range(count)]
        return min(page.step if page and page.since >= self.begun else 0 for page in pages)

    def wait_for_step(self, step: int) -> None:
        """Wait until every rank is there; RuntimeError when the run ends before."""
        self.wait(lambda: self.step() >= step or any(agent.poll() is not None for agent in self.agents))
        if self.step() < step:
            raise RuntimeError(
                "the run ended: " + "; ".join(self.said(host)[-500:] for host in range(len(self.agents)))
            )

    def wait(self, condition: Callable[[], bool], *, limit_s: float = LIMIT_S) -> None:
        """Wait for ``condition``; RuntimeError with what was said after ``limit_s``."""
        deadline = time.monotonic() + limit_s
        while not condition():
            if time.monotonic() > deadline:
                raise RuntimeError("; ".join(self.said(host)[-800:] for host in range(len(self.agents))))
            time.sleep(0.05)

    def end(self, hosts: Sequence[int] | None = None, *, limit_s: float = LIMIT_S) -> list[int | None]:
        """Wait for the agents of ``hosts`` (all); the statuses of all, None for one at work."""
        waited = range(len(self.agents)) if hosts is None else hosts
        self.wait(lambda: all(self.agents[host].poll() is not None for host in waited), limit_s=limit_s)
        return [agent.poll() for agent in self.agents]

    def ranks(self, host: int) -> list[int]:
        """Processes of the ranks on ``host``, by their status pages."""
        pages = [read_status(path) for path in log_folder(self.run_dir).glob("rank-*.status")]
        return [page.pid for page in pages if page and page.host == self.hosts.names[host]]

    def alive(self, hosts: Sequence[int]) -> bool:
        """Whether a rank on one of ``hosts`` still runs."""
        running = {pid for host in hosts for pid in self.hosts.processes(host)}
        return any(pid in running for host in hosts for pid in self.ranks(host))

    def kill_ranks(self, host: int) -> None:
        """SIGKILL the ranks on ``host``."""
        for pid in self.ranks(host):
            os.kill(pid, signal.SIGKILL)

    def kill_agent(self, host: int) -> None:
        """SIGKILL the agent on ``host``."""
        os.kill(self.agents[host].pid, signal.SIGKILL)

    def _said(self, host: int) -> Path:
        return self.run_dir / f"said-{self.hosts.names[host]}.txt"
