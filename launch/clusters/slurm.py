"""SLURM: the sbatch command of a run, or of a sweep as an array; launch/slurm/train.sbatch is the job."""

from __future__ import annotations

import math
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from launch.clusters.agent import CHECKOUT, Agents
from launch.clusters.work import Work, node_line

__all__ = ["BATCH_SCRIPT", "Booking", "dry_run", "sbatch_command", "submit"]

BATCH_SCRIPT = CHECKOUT / "launch" / "slurm" / "train.sbatch"
# Between the warning and the end, beside the grace: the step in work, and SLURM, which may be a minute late.
MARGIN_S = 60


@dataclass(frozen=True, kw_only=True)
class Booking:
    """What is asked of SLURM, beside the number of nodes.

    Attributes:
        gpus_per_node: 0 for none.
        cpus_per_node: None leaves them to the cluster, whose default is often one.
        time, partition, account: as sbatch takes them; None leaves them to the cluster.
        parallel: runs of a sweep at the same time; None sets no limit.
        others: any other options of sbatch.
    """

    gpus_per_node: int = 0
    cpus_per_node: int | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    parallel: int | None = None
    others: tuple[str, ...] = ()


def sbatch_command(
    agents: Agents, work: Work, booking: Booking, *, runs: int = 0, script_options: Sequence[str] = ()
) -> list[str]:
    """The command that submits the run, or with ``runs`` an array of so many.

    ``script_options`` stand before the recipe: options of train.sbatch.
    """
    name = f"trellis-{work.loaded.name}"
    line = ["sbatch", f"--job-name={name}", f"--nodes={agents.nodes}", "--ntasks-per-node=1"]
    line += [f"--gpus-per-node={booking.gpus_per_node}"] if booking.gpus_per_node else []
    line += [f"--cpus-per-task={booking.cpus_per_node}"] if booking.cpus_per_node else []
    for option in ("time", "partition", "account"):
        value = getattr(booking, option)
        line += [f"--{option}={value}"] if value else []
    line.append(f"--signal=B:USR1@{math.ceil(agents.grace_s) + MARGIN_S}")
    line += ["--requeue", "--open-mode=append", f"--chdir={work.folder}"]
    line.append(f"--output={name}-{'%A_%a' if runs else '%j'}.log")
    line.append(f"--export=ALL,TRELLIS_ROOT={CHECKOUT}")
    if runs:
        line.append(f"--array=0-{runs - 1}" + (f"%{booking.parallel}" if booking.parallel else ""))
    return [*line, *booking.others, str(BATCH_SCRIPT), *script_options, work.recipe, *work.options]


def dry_run(command: Sequence[str], agents: Agents, tasks: Sequence[Work]) -> str:
    """The submission, and what each node then runs, task by task."""
    lines = ["# submitted from here", shlex.join(command)]
    lines.append(
        "# FIRST_NODE, the port (20000 + job id modulo 10000) and the id are known when the job starts"
    )
    for number, task in enumerate(tasks):
        which = f"task {number}, " if len(tasks) > 1 else ""
        lines += [f"# {which}each of the {agents.nodes} nodes; run folder {task.run_dir}"]
        lines.append(node_line(agents, task))
    return "\n".join(lines)


def submit(command: Sequence[str]) -> int:
    """Hand the job to SLURM; sbatch says its id.

    Raises:
        FileNotFoundError: there is no sbatch here.
    """
    try:
        return subprocess.run(list(command), check=False).returncode
    except FileNotFoundError:
        raise FileNotFoundError(
            "sbatch is not here: run this on a login node of the cluster, or --dry-run"
        ) from None
