"""`trellis preflight`: the command that every node runs at the same time, before the ranks."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["preflight"]

FACTS_S = 120.0  # for torch to be imported and to count its devices


def preflight(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="the recipe that will be trained")],
    nodes: Annotated[int, typer.Option(min=1, help="machines of the job")],
    rdzv: Annotated[
        str,
        typer.Option(
            metavar="HOST:PORT",
            help="an address of the first node, on a private network: the port has no password",
        ),
    ],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="override a recipe key; repeatable")
    ] = None,
    corpus: Annotated[
        str | None,
        typer.Option(metavar="PATH|NAME@REVISION", help="the text, as it is given to trellis train"),
    ] = None,
    run_dir: Annotated[Path | None, typer.Option(help="run folder; runs/<recipe name> unless given")] = None,
    dataset_dir: Annotated[
        Path | None, typer.Option(help="folder of the token shards (data.directory)")
    ] = None,
    ranks_per_node: Annotated[
        int | None, typer.Option(help="one per CUDA device, or 1 on a CPU, unless given")
    ] = None,
    node_rank: Annotated[int | None, typer.Option(help="this node's place, if places are given out")] = None,
    local_addr: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="of this node, where its host name leads others elsewhere"),
    ] = None,
    timeout: Annotated[float, typer.Option(min=1.0, help="seconds to wait for the other nodes")] = 120.0,
    bandwidth: Annotated[bool, typer.Option(help="measure all-reduce and every link")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Compare all nodes of a job before it starts; every node runs this at the same time.

    Versions, source, recipe, data set, devices and their health, disk and clock of each node; the port; that
    the run folder is one and the same; how fast the nodes reach each other. All print the same verdict, and
    name the first node that differs, in what, and the remedy. Exit status 1 then.
    """
    from launch.ending import end_process
    from launch.nodes.check import preflight as check
    from launch.nodes.check import render
    from launch.nodes.facts import use_local_address
    from launch.nodes.meet import Call, MeetingError
    from launch.recipe import load_recipe

    if local_addr is not None:
        use_local_address(local_addr)
    loaded = load_recipe(recipe, set_ or (), corpus=corpus, dataset_dir=dataset_dir)
    call = Call(nodes=nodes, ranks=_ranks(ranks_per_node), place=node_rank, host=socket.gethostname())
    folder = run_dir if run_dir is not None else Path("runs") / loaded.name
    try:
        report = check(loaded, folder, call=call, rendezvous=rdzv, seconds=timeout, bandwidth=bandwidth)
    except MeetingError as error:  # a question may hang still, in a thread that would be waited for
        print(f"trellis: error: {error}", file=sys.stderr)
        end_process(1)
    if as_json:
        print(json.dumps(report, indent=1))
    else:
        print("".join(f"preflight: {line}\n" for line in render(report)), end="")
        for problem in report["problems"]:
            print(f"trellis: error: {problem['line']}", file=sys.stderr)
        if report["passed"]:
            print(f"preflight: passed in {report['seconds']:.1f} s")
    end_process(0 if report["passed"] else 1)  # a collective that hangs has threads that would be waited for


def _ranks(given: int | None) -> int:
    if given is not None:
        return given

    def devices() -> int:
        import torch

        return torch.cuda.device_count()

    from launch.nodes.limit import within

    return within(devices, FACTS_S) or 1
