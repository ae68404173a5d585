"""`trellis plan`: its options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["plan"]


def plan(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="name, path.toml, or several joined: 350m-c4+contexts/16k")
    ],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="override a recipe key; repeatable")
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="machines of the cluster to plan for")] = None,
    devices: Annotated[int | None, typer.Option(min=1, help="devices of one node")] = None,
    device: Annotated[
        str | None, typer.Option(help="h100, h200, b200, a100, l40s or cpu; h100 unless given")
    ] = None,
    memory_gb: Annotated[float | None, typer.Option(help="of one device, instead of the known")] = None,
    tflops: Annotated[float | None, typer.Option(help="of one device, dense bf16 (on a CPU fp32)")] = None,
    intra_gbps: Annotated[
        float | None, typer.Option(help="GB/s of one device to others of its node, one way")
    ] = None,
    inter_gbps: Annotated[
        float | None, typer.Option(help="GB/s of one device to other nodes, one way")
    ] = None,
    efficiency: Annotated[
        float | None, typer.Option(help="share of --tflops that training reaches: assumed unless given")
    ] = None,
    cluster: Annotated[
        Path | None, typer.Option(metavar="FILE.toml", help="the cluster's numbers: docs/planning.md")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Print what a recipe means: counts, batch, memory, predicted time, disk; start nothing.

    With --nodes, --devices, --device or --cluster: for that cluster, with the ways to run there ranked.
    """
    from launch.planning.cluster import cluster_from
    from launch.planning.plan import make_plan, render_plan
    from launch.recipe import load_recipe

    where = cluster_from(
        device=device,
        file=cluster,
        nodes=nodes,
        devices_per_node=devices,
        memory_gb=memory_gb,
        tflops=tflops,
        intra_gbps=intra_gbps,
        inter_gbps=inter_gbps,
        efficiency=efficiency,
    )
    made = make_plan(load_recipe(recipe, set_ or ()), where)
    print(json.dumps(made, indent=1) if as_json else render_plan(made))
