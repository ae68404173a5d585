"""The command line and the environment of torchrun's agent on each node: the one place that builds them.

Every launcher (torchrun by hand, DeepSpeed's hostfile, SLURM, Ray, Kubernetes) starts one agent per node, and
the agent starts and watches that node's ranks. `launch.clusters.run_agent` is the process itself.
"""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launch.ranks import PASSED_ON, SLACK_S

__all__ = ["CHECKOUT", "Agents", "Rendezvous", "agent_command", "agent_environment", "shell_words"]

Rendezvous = Literal["c10d", "static"]

CHECKOUT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Agents:
    """What the agents of all nodes are told alike.

    Attributes:
        nodes, ranks_per_node: the size of the job.
        master: address of the first node, which all others reach.
        port: on the master. With c10d nodes meet there, and ranks at another, free one; with static both do.
        rendezvous: "c10d": nodes find each other and are dealt places; "static": each is told its place.
        job: what nodes that belong together call themselves at the port (c10d).
        max_restarts: how often ranks are started again after a failure that a restart can cure.
        grace_s: seconds for a save after SIGTERM or SIGUSR1 (checkpoint.grace_s).
    """

    nodes: int
    ranks_per_node: int
    master: str
    port: int = 29500
    rendezvous: Rendezvous = "c10d"
    job: str = "trellis"
    max_restarts: int = 0
    grace_s: float = 30.0

    def __post_init__(self) -> None:
        for name, least in (("nodes", 1), ("ranks_per_node", 1), ("max_restarts", 0), ("port", 1)):
            if getattr(self, name) < least:
                option = name.replace("_", "-")
                raise ValueError(f"--{option} {getattr(self, name)}: use {least} or more")
        if self.port > 65535:
            raise ValueError(f"--port {self.port}: use 1 to 65535")
        if self.grace_s < 0:
            raise ValueError(f"--grace {self.grace_s}: use 0 or more seconds")
        if self.rendezvous == "static" and self.nodes > 1 and self.max_restarts:
            # Each agent starts its own ranks again, in the store where the addresses of the dead ones stand.
            raise ValueError(
                f"--max-restarts {self.max_restarts} with --rendezvous static: ranks of several nodes that "
                "are started again do not find each other; use --rendezvous c10d, or no restarts"
            )

    @property
    def endpoint(self) -> str:
        """Where the nodes meet, HOST:PORT."""
        return f"{self.master}:{self.port}"


def agent_environment(agents: Agents, *, checkout: Path = CHECKOUT) -> dict[str, str]:
    """What an agent needs in its environment beside its node's own; ``checkout`` is this repository there."""
    environment = {
        # Ranks have the grace, and some seconds to be gone. By the variable, because torch 2.11 refuses the
        # option --shutdown-timeout.
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(math.ceil(agents.grace_s) + SLACK_S),
        # `python -m` would look in the caller's folder first, and run whatever is called launch there.
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": str(checkout),
    }
    if agents.rendezvous == "c10d" and agents.nodes > 1:
        # Ranks would find each other in the store where nodes meet, and ranks started again would find the
        # addresses of those that died. With this every start gets a store of its own.
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    return environment


def agent_command(
    agents: Agents,
    arguments: Sequence[str],
    *,
    node_rank: int | str | None = None,
    local_address: str | None = None,
    hosts_store: str | None = None,
    follow_stdin: bool = False,
    preflight: Sequence[str] = (),
    python: str = sys.executable,
    module: str = "launch.cli",
) -> list[str]:
    """The agent's command on one node.

    Args:
        arguments: of ``module``, which each rank runs.
        node_rank: this node's place, which "static" needs and "c10d" does not take.
        local_address: by which other nodes reach this one; what its host name resolves to unless given.
        hosts_store: "1" on the node that is the master, "0" elsewhere (c10d); torch compares addresses
            unless given.
        follow_stdin: take signals from lines on the standard input, and its end for SIGTERM: for a node whose
            launcher is elsewhere.
        preflight: arguments of `trellis preflight`, which the agent runs first; empty for none.
        python: interpreter on the node.

    Raises:
        ValueError: "static" without a place.
    """
    line = [python, "-m", "launch.clusters.run_agent", *(["--follow-stdin"] if follow_stdin else [])]
    line += ["preflight", *preflight, "--then"] if preflight else []
    line += [f"--nnodes={agents.nodes}", f"--nproc-per-node={agents.ranks_per_node}"]
    line.append(f"--max-restarts={agents.max_restarts}")
    line.append(f"--signals-to-handle={','.join(number.name for number in PASSED_ON)}")
    if agents.rendezvous == "static":
        if node_rank is None:
            raise ValueError(
                f"--rendezvous static needs --node-rank: 0 on {agents.master}, then 1, 2, ... on the others"
            )
        line += [f"--node-rank={node_rank}", f"--master-addr={agents.master}", f"--master-port={agents.port}"]
    else:
        line += ["--rdzv-backend=c10d", f"--rdzv-endpoint={agents.endpoint}", f"--rdzv-id={agents.job}"]
        line += [f"--rdzv-conf=is_host={hosts_store}"] if hosts_store is not None else []
    line += [f"--local-addr={local_address}"] if local_address is not None else []
    return [*line, "-m", module, *arguments]


def shell_words(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """The command as a shell would take it, with the variables it is given."""
    variables = [f"{name}={value}" for name, value in (environment or {}).items()]
    return shlex.join([*(["env", *variables] if variables else []), *command])
