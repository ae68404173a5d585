"""torchrun by hand: the same command on every node, with the c10d or the static rendezvous."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from launch.clusters.agent import Agents
from launch.clusters.work import Work, node_line

__all__ = ["check_place", "dry_run", "start"]


def check_place(agents: Agents, place: int | None) -> None:
    """Raise ``ValueError`` unless ``place`` is what the rendezvous needs: this node's, or none."""
    if agents.rendezvous == "c10d":
        if place is not None:
            raise ValueError(
                "--node-rank belongs to --rendezvous static; c10d deals out the places: leave it out"
            )
    elif place is None:
        raise ValueError(
            f"--rendezvous static needs --node-rank: 0 on {agents.master}, then 1, 2, ... on the others"
        )
    elif place >= agents.nodes:
        raise ValueError(f"--node-rank {place}: with --nodes {agents.nodes} use 0 to {agents.nodes - 1}")


def dry_run(agents: Agents, work: Work, *, local_address: str | None = None) -> str:
    """The exact command of each node, each under a comment that names it."""
    static = agents.rendezvous == "static"
    lines = []
    for place in range(agents.nodes):
        line = node_line(agents, work, place=place if static else None, local_address=local_address)
        lines += [f"# node {place}", line]
    return "\n".join(lines)


def start(agents: Agents, work: Work, *, place: int | None, local_address: str | None = None) -> NoReturn:
    """Become what this node runs."""
    line = node_line(agents, work, place=place, local_address=local_address)
    sys.stdout.flush()
    os.execvp("bash", ["bash", "-c", line])
