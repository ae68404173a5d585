"""`trellis launch KIND RECIPE`: a run on several machines; with --dry-run the exact commands alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
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

    fields = {"nodes": _given(nodes, "--nodes", "how many machines?"), "max_restarts": max_restarts}
    fields["master"] = _given(master, "--master", "the address of the first machine")
    with _misuse():
        agents = _agents(ranks=ranks_per_node, port=port, rendezvous=rendezvous, job=job, **fields)
        if not dry_run:
            by_hand.check_place(agents, node_rank)
    work = read_work(recipe, options or (), preflight=not no_preflight)
    if sweep:
        with _misuse():
            work = _task_of(sweep_tasks(work, sweep), task)
    agents = _with_grace(agents, work.grace_s if grace is None else grace)
    if dry_run:
        print(by_hand.dry_run(agents, work, local_address=local_addr))
    else:
        by_hand.start(agents, work, place=node_rank, local_address=local_addr)


def _task_of(tasks: list[Any], task: int | None) -> Any:
    if task is None or task >= len(tasks):
        raise ValueError(f"--task {task}: the sweep has {len(tasks)} runs; give 0 to {len(tasks) - 1}")
    return tasks[task]


def _agents(*, ranks: int | None, rendezvous: str, **fields: Any) -> Agents:
    if rendezvous not in ("c10d", "static"):
        raise ValueError(f"--rendezvous {rendezvous}: use c10d or static")
    # The number of devices last: it takes seconds to learn.
    checked = Agents(ranks_per_node=1 if ranks is None else ranks, rendezvous=rendezvous, **fields)
    return checked if ranks is not None else _replaced(checked, ranks_per_node=_devices())


def _devices() -> int:
    import torch

    return torch.cuda.device_count() or 1


def _with_grace(agents: Agents, grace_s: float) -> Agents:
    return _replaced(agents, grace_s=grace_s)


def _replaced(agents: Agents, **changes: Any) -> Agents:
    import dataclasses

    return dataclasses.replace(agents, **changes)
