"""Ray: the submission of a job whose driver (`launch.clusters.ray_driver`) starts one agent on each node."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from data_pipeline.workers import check_token
from launch.clusters.agent import CHECKOUT, Agents, shell_words
from launch.clusters.ray_driver import ADDRESS, FIRST, MASTER
from launch.clusters.work import Work, node_line
from launch.ranks import SLACK_S

__all__ = ["Workers", "check_ray", "driver_command", "dry_run", "submit", "submit_command"]


@dataclass(frozen=True, kw_only=True)
class Workers:
    """What each node's worker reserves: a bundle of the placement group."""

    cpus: int = 1
    gpus: int = 0


def check_ray() -> None:
    """Raise ``ValueError`` unless the packages that submit jobs are here."""
    try:
        import aiohttp_cors  # noqa: F401 - one of those that ray[default] adds
        import ray  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{error.name} is not installed: Ray jobs need ray[default], here and on the cluster"
        ) from None


def driver_command(agents: Agents, work: Work, workers: Workers) -> list[str]:
    """The job's entry point; it fills in the addresses, which the cluster decides.

    ``agents.master`` must be `ray_driver.MASTER`.
    """
    line = node_line(agents, work, local_address=ADDRESS, hosts_store=FIRST, follow_stdin=True)
    command = [work.python, "-m", "launch.clusters.ray_driver", f"--nodes={agents.nodes}"]
    return [
        *command,
        f"--cpus={workers.cpus}",
        f"--gpus={workers.gpus}",
        f"--grace={agents.grace_s:g}",
        f"--line={line}",
    ]


def submit_command(
    agents: Agents, driver: Sequence[str], *, address: str, python: str, wait: bool
) -> list[str]:
    """The command that submits the job; with ``wait`` it follows the output and ends with the job."""
    variables = {
        "PYTHONPATH": str(CHECKOUT),
        "PYTHONSAFEPATH": "1",
        # `ray job stop` kills after this many seconds; 3 unless told.
        "RAY_JOB_STOP_WAIT_TIME_S": str(math.ceil(agents.grace_s) + 3 * SLACK_S),
    }
    command = [python, "-m", "ray.scripts.scripts", "job", "submit", f"--address={address}"]
    command.append(f"--runtime-env-json={json.dumps({'env_vars': variables})}")
    return [*command, *([] if wait else ["--no-wait"]), "--", *driver]


def dry_run(command: Sequence[str], agents: Agents, driver: Sequence[str]) -> str:
    """The submission, and what each node's worker then runs."""
    line = driver[-1].removeprefix("--line=")
    words = f"{MASTER}, {ADDRESS} and {FIRST} become the first node's address, the node's own, and 1 or 0"
    nodes = [f"# node {place}" + (f": {words}" if place == 0 else "") for place in range(agents.nodes)]
    lines = [text for node in nodes for text in (node, line)]
    return "\n".join(["# submitted from here", shell_words(command), *lines])


def submit(command: Sequence[str], *, address: str) -> NoReturn:
    """Become the submission.

    Raises:
        ValueError: ray[default] is not here, or the cluster is on the network and has no token.
    """
    check_ray()
    check_token(address, option="--address")
    sys.stdout.flush()
    os.execv(command[0], list(command))
