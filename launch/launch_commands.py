"""`trellis launch KIND RECIPE`: a run on several machines; with --dry-run the exact commands alone."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from launch.clusters.agent import Agents

__all__ = ["launch"]

launch = typer.Typer(
    help="Train on several machines. Options of `trellis train` stand after `--`.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def _whole(given: str | int) -> int:
    """A number of something, or the default; typer's own message would name a type of Python."""
    text = str(given)
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise typer.BadParameter(f"{text}: give a whole number")
    return int(text)


RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="as of `trellis train`")]
TrainOptions = Annotated[
    list[str] | None, typer.Argument(metavar="[-- OPTIONS]...", help="of `trellis train`, as it takes them")
]
Nodes = Annotated[int | None, typer.Option(parser=_whole, metavar="N", help="machines")]
Ranks = Annotated[
    int | None,
    typer.Option(parser=_whole, metavar="R", help="processes per machine; its CUDA devices, or 1"),
]
Port = Annotated[int, typer.Option(parser=_whole, metavar="PORT", help="where nodes meet, on the master")]
MaxRestarts = Annotated[
    int,
    typer.Option(
        parser=_whole, metavar="N", help="start all ranks again after a failure; not what a restart repeats"
    ),
]
Grace = Annotated[
    int | None,
    typer.Option(parser=_whole, metavar="S", help="seconds for a save; the recipe's checkpoint.grace_s"),
]
NoPreflight = Annotated[bool, typer.Option("--no-preflight", help="do not compare the nodes first")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print the exact commands and start nothing")]
RendezvousOption = Annotated[
    str, typer.Option(metavar="c10d|static", help="nodes find each other, or each is told its place")
]


@contextlib.contextmanager
def _misuse() -> Iterator[None]:
    """Options that cannot be are misuse (exit status 2), unlike a recipe that does not do (1)."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _given(value: Any, option: str, what: str) -> Any:
    if value is None:
        raise typer.BadParameter(f"{option} is missing: {what}")
    return value


@launch.command()
def torchrun(
    recipe: RecipeArgument,
    options: TrainOptions = None,
    nodes: Nodes = None,
    master: Annotated[
        str | None, typer.Option(metavar="HOST", help="address of the first machine, on a private network")
    ] = None,
    port: Port = 29500,
    ranks_per_node: Ranks = None,
    rendezvous: RendezvousOption = "c10d",
    node_rank: Annotated[
        int | None, typer.Option(parser=_whole, metavar="I", help="this machine's place (static only)")
    ] = None,
    local_addr: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="of this machine, where its host name leads elsewhere"),
    ] = None,
    job: Annotated[str, typer.Option(metavar="ID", help="name of the job at the port (c10d)")] = "trellis",
    max_restarts: MaxRestarts = 0,
    grace: Grace = None,
    sweep: Annotated[
        list[str] | None, typer.Option(metavar="KEY=V1,V2", help="of an array, as of `launch slurm`")
    ] = None,
    task: Annotated[
        int | None, typer.Option(parser=_whole, metavar="I", help="which run of the sweep this is")
    ] = None,
    no_preflight: NoPreflight = False,
    dry_run: DryRun = False,
) -> None:
    """torchrun by hand: run the same command on every machine.

    --dry-run prints what each machine runs. The ports are not protected: private networks only.
    """
    from launch.clusters import torchrun as by_hand
    from launch.clusters.work import read_work, sweep_tasks

    fields: dict[str, Any] = {"nodes": _given(nodes, "--nodes", "how many machines?")}
    fields["max_restarts"] = max_restarts
    fields["master"] = _given(master, "--master", "the address of the first machine")
    with _misuse():
        agents = _agents(ranks=ranks_per_node, port=port, rendezvous=rendezvous, job=job, **fields)
        if not dry_run:
            by_hand.check_place(agents, node_rank)
    work = read_work(recipe, options or (), preflight=not no_preflight)
    if sweep:
        with _misuse():
            work = _task_of(sweep_tasks(work, sweep), task)
    agents = _with_grace(agents, work, grace)
    if dry_run:
        print(by_hand.dry_run(agents, work, local_address=local_addr))
    else:
        by_hand.start(agents, work, place=node_rank, local_address=local_addr)


def _task_of(tasks: list[Any], task: int | None) -> Any:
    if task is None or task >= len(tasks):
        raise ValueError(f"--task {task}: the sweep has {len(tasks)} runs; give 0 to {len(tasks) - 1}")
    return tasks[task]


def _agents(*, ranks: int | None, **fields: Any) -> Agents:
    _check_rendezvous(fields["rendezvous"])
    # The number of devices last: it takes seconds to learn.
    checked = Agents(ranks_per_node=1 if ranks is None else ranks, **fields)
    return checked if ranks is not None else dataclasses.replace(checked, ranks_per_node=_devices())


def _check_rendezvous(kind: str) -> None:
    if kind not in ("c10d", "static"):
        raise ValueError(f"--rendezvous {kind}: use c10d or static")


def _devices() -> int:
    import torch

    return torch.cuda.device_count() or 1


def _with_grace(agents: Agents, work: Any, grace: int | None) -> Agents:
    return dataclasses.replace(agents, grace_s=work.grace_s if grace is None else grace)


def _booked(
    work: Any, *, nodes: int | None, ranks: int | None, gpus: int, grace: int | None, **fields: Any
) -> Agents:
    """The agents of a job on booked machines, one rank per GPU asked for; the recipe has to fit them."""
    from launch.clusters.work import check_size

    with _misuse():
        per_node = ranks if ranks is not None else gpus or 1
        count = _given(nodes, "--nodes", "how many machines?")
        agents = Agents(nodes=count, ranks_per_node=per_node, **fields)
    check_size(work, nodes=agents.nodes, ranks_per_node=agents.ranks_per_node)
    return _with_grace(agents, work, grace)


@launch.command()
def deepspeed(
    recipe: RecipeArgument,
    options: TrainOptions = None,
    hostfile: Annotated[
        Path | None, typer.Option(metavar="FILE", help="lines `HOST slots=N`; the first is the master")
    ] = None,
    master: Annotated[
        str | None, typer.Option(metavar="HOST", help="address of the first machine, if not its ssh name")
    ] = None,
    port: Port = 29500,
    ssh_port: Annotated[int | None, typer.Option(parser=_whole, metavar="PORT", help="of ssh")] = None,
    max_restarts: MaxRestarts = 0,
    grace: Grace = None,
    no_preflight: NoPreflight = False,
    dry_run: DryRun = False,
) -> None:
    """Start the machines of a DeepSpeed hostfile over ssh, from here, and wait for them."""
    from launch.clusters import deepspeed as by_hostfile
    from launch.clusters.work import read_work

    with _misuse():
        path = _given(hostfile, "--hostfile", "the file with a line `HOST slots=N` for each machine")
        hosts = by_hostfile.read_hostfile(path)
    work = read_work(recipe, options or (), preflight=not no_preflight)
    sizes: dict[str, Any] = {"nodes": len(hosts), "ranks": hosts[0].slots, "gpus": 0, "grace": grace}
    fields: dict[str, Any] = {"master": master or hosts[0].name, "port": port, "max_restarts": max_restarts}
    agents = _booked(work, **sizes, **fields)
    commands = by_hostfile.host_commands(agents, work, hosts, ssh_port=ssh_port)
    if dry_run:
        print(by_hostfile.dry_run(commands, hosts))
    elif status := by_hostfile.run_hosts(commands, hosts, grace_s=agents.grace_s):
        raise typer.Exit(status)


Gpus = Annotated[int, typer.Option(parser=_whole, metavar="G", help="GPUs asked for on each; 0: CPUs only")]
BookedRanks = Annotated[
    int | None, typer.Option(parser=_whole, metavar="R", help="processes per machine; one per GPU, or 1")
]


@launch.command()
def slurm(
    recipe: RecipeArgument,
    options: TrainOptions = None,
    nodes: Nodes = None,
    gpus_per_node: Gpus = 0,
    cpus_per_node: Annotated[
        int | None, typer.Option(parser=_whole, metavar="C", help="CPUs asked for on each; SLURM's default")
    ] = None,
    ranks_per_node: BookedRanks = None,
    time: Annotated[str | None, typer.Option(metavar="T", help="as of sbatch")] = None,
    partition: Annotated[str | None, typer.Option(metavar="P", help="as of sbatch")] = None,
    account: Annotated[str | None, typer.Option(metavar="A", help="as of sbatch")] = None,
    sbatch: Annotated[
        list[str] | None, typer.Option(metavar="OPTION", help="any other option of sbatch; repeatable")
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=V1,V2", help="a run for each combination, as an array; repeatable"),
    ] = None,
    parallel: Annotated[
        int | None, typer.Option(parser=_whole, metavar="N", help="runs of a sweep at the same time")
    ] = None,
    port: Annotated[
        int | None, typer.Option(parser=_whole, metavar="PORT", help="20000 + job id modulo 10000")
    ] = None,
    max_restarts: MaxRestarts = 0,
    grace: Grace = None,
    no_preflight: NoPreflight = False,
    dry_run: DryRun = False,
) -> None:
    """Submit the run, or a sweep, to SLURM; what is preempted saves, is requeued and goes on."""
    from launch.clusters import slurm as scheduler
    from launch.clusters.work import read_work, sweep_tasks

    work = read_work(recipe, options or (), preflight=not no_preflight)
    with _misuse():
        tasks = sweep_tasks(work, sweep or ())
    sizes: dict[str, Any] = {"nodes": nodes, "ranks": ranks_per_node, "gpus": gpus_per_node, "grace": grace}
    known: dict[str, Any] = {"master": "FIRST_NODE", "port": 20000 if port is None else port, "job": "JOB_ID"}
    agents, *_ = [_booked(task, **sizes, **known, max_restarts=max_restarts) for task in tasks]
    booking = scheduler.Booking(
        gpus_per_node=gpus_per_node,
        cpus_per_node=cpus_per_node,
        time=time,
        partition=partition,
        account=account,
        parallel=parallel,
        others=tuple(sbatch or ()),
    )
    given = [f"--ranks-per-node={agents.ranks_per_node}", f"--max-restarts={max_restarts}"]
    given += [f"--port={port}"] if port is not None else []
    given += [f"--grace={grace}"] if grace is not None else []
    given += ["--no-preflight"] if no_preflight else []
    given += [f"--sweep={item}" for item in sweep or ()]
    command = scheduler.sbatch_command(
        agents, work, booking, runs=len(tasks) if sweep else 0, script_options=given
    )
    if cpus_per_node is None:
        typer.echo(
            "trellis: warning: without --cpus-per-node SLURM gives each node as many CPUs as its default is, "
            "often one for all ranks",
            err=True,
        )
    if dry_run:
        print(scheduler.dry_run(command, agents, tasks))
    elif status := scheduler.submit(command):
        raise typer.Exit(status)


@launch.command()
def ray(
    recipe: RecipeArgument,
    options: TrainOptions = None,
    nodes: Nodes = None,
    address: Annotated[
        str, typer.Option(metavar="URL", help="of the cluster's dashboard")
    ] = "http://127.0.0.1:8265",
    gpus_per_node: Gpus = 0,
    cpus_per_node: Annotated[
        int, typer.Option(parser=_whole, metavar="C", help="CPUs asked for on each")
    ] = 1,
    ranks_per_node: BookedRanks = None,
    port: Port = 29500,
    max_restarts: MaxRestarts = 0,
    grace: Grace = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="submit, and do not follow the output")] = False,
    no_preflight: NoPreflight = False,
    dry_run: DryRun = False,
) -> None:
    """Submit the run as a Ray job: a placement group of one worker per node, on N different nodes."""
    from launch.clusters import ray as jobs
    from launch.clusters.ray_driver import MASTER
    from launch.clusters.work import read_work

    work = read_work(recipe, options or (), preflight=not no_preflight)
    sizes: dict[str, Any] = {"nodes": nodes, "ranks": ranks_per_node, "gpus": gpus_per_node, "grace": grace}
    agents = _booked(work, **sizes, master=MASTER, port=port, max_restarts=max_restarts)
    driver = jobs.driver_command(agents, work, jobs.Workers(cpus=cpus_per_node, gpus=gpus_per_node))
    command = jobs.submit_command(agents, driver, address=address, python=work.python, wait=not no_wait)
    if dry_run:
        print(jobs.dry_run(command, agents, driver))
    else:
        jobs.submit(command, address=address)


@launch.command()
def kubernetes(
    recipe: RecipeArgument,
    options: TrainOptions = None,
    nodes: Nodes = None,
    image: Annotated[
        str | None, typer.Option(metavar="IMAGE", help="with the checkout and its packages")
    ] = None,
    claim: Annotated[
        str | None, typer.Option(metavar="CLAIM", help="PersistentVolumeClaim of run folder and data set")
    ] = None,
    mount: Annotated[Path, typer.Option(metavar="PATH", help="where pods see it, and work")] = Path("/work"),
    checkout: Annotated[Path, typer.Option(metavar="PATH", help="in the image")] = Path("/opt/trellis-dist"),
    python: Annotated[str, typer.Option(metavar="PATH", help="in the image")] = "python3",
    name: Annotated[str | None, typer.Option(help="of the JobSet; trellis-<recipe> unless given")] = None,
    namespace: Annotated[str | None, typer.Option(help="of the JobSet")] = None,
    gpus_per_node: Gpus = 0,
    cpus: Annotated[str | None, typer.Option(help="of a pod, as Kubernetes takes it")] = None,
    memory: Annotated[str | None, typer.Option(help="of a pod, as Kubernetes takes it")] = None,
    ranks_per_node: BookedRanks = None,
    node_selector: Annotated[
        list[str] | None, typer.Option(metavar="LABEL=VALUE", help="of the nodes; repeatable")
    ] = None,
    toleration: Annotated[
        list[str] | None, typer.Option(metavar="KEY[=VALUE][:EFFECT]", help="repeatable")
    ] = None,
    max_job_restarts: Annotated[
        int, typer.Option(parser=_whole, metavar="N", help="of the JobSet after failures, not preemptions")
    ] = 3,
    rendezvous: RendezvousOption = "c10d",
    port: Port = 29500,
    max_restarts: MaxRestarts = 0,
    grace: Grace = None,
    no_preflight: NoPreflight = False,
    apply: Annotated[bool, typer.Option("--apply", help="hand it to kubectl at once")] = False,
    dry_run: DryRun = False,
) -> None:
    """Print the JobSet of the run as YAML, or hand it to kubectl with --apply."""
    from launch.clusters import kubernetes as manifests
    from launch.clusters.work import read_work

    read = read_work(recipe, options or (), preflight=not no_preflight)
    work = dataclasses.replace(read, folder=mount, python=python, checkout=checkout)
    sizes: dict[str, Any] = {"nodes": nodes, "ranks": ranks_per_node, "gpus": gpus_per_node, "grace": grace}
    with _misuse():
        called = manifests.name_of(work, name)
        _check_rendezvous(rendezvous)
        pods = manifests.Pods(
            image=_given(image, "--image", "a container image with the checkout and its packages"),
            claim=_given(claim, "--claim", "a PersistentVolumeClaim for the run folder and the data set"),
            mount=str(mount),
            gpus=gpus_per_node,
            cpus=cpus,
            memory=memory,
            node_selector=tuple(manifests.parse_label(item) for item in node_selector or ()),
            tolerations=tuple(manifests.parse_toleration(item) for item in toleration or ()),
            job_restarts=max_job_restarts,
        )
    where: dict[str, Any] = {
        "master": manifests.master_of(called),
        "port": port,
        "rendezvous": rendezvous,
        "job": called,
    }
    agents = _booked(work, **sizes, **where, max_restarts=max_restarts)
    text = manifests.render(manifests.job_set(agents, work, pods, name=called, namespace=namespace))
    if dry_run or not apply:
        print(text, end="")
    elif status := manifests.apply(text):
        raise typer.Exit(status)
