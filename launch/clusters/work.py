"""What a cluster is to train, read before anything is booked: recipe, options of `trellis train`, sweeps."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launch.clusters.agent import CHECKOUT, Agents, agent_command, agent_environment, shell_words
from launch.fit import fit_mesh, fit_to_devices
from launch.recipe import Recipe, load_recipe

__all__ = ["Work", "check_size", "node_line", "read_work", "sweep_tasks"]


@dataclass(frozen=True, kw_only=True)
class Work:
    """One run, as every node is to start it.

    Attributes:
        recipe: as it was given: a name, a path, several joined.
        options: of `trellis train`, after the recipe.
        loaded: the recipe with these options.
        run_dir: the run folder, relative to ``folder`` unless absolute.
        folder: the working directory on every node.
        recipe_options: those of ``options`` that change the recipe and that `trellis preflight` takes too.
        preflight: run that on each node before its agent.
        python, checkout: the interpreter and this repository on every node.
    """

    recipe: str
    options: tuple[str, ...] = ()
    loaded: Recipe
    run_dir: Path
    folder: Path
    recipe_options: tuple[str, ...] = ()
    preflight: bool = True
    python: str = sys.executable
    checkout: Path = CHECKOUT

    @property
    def grace_s(self) -> float:
        """Seconds that the ranks have for a save."""
        return self.loaded.checkpoint.grace_s


def read_work(recipe: str, options: Sequence[str], *, preflight: bool = True) -> Work:
    """Parse the options as `trellis train` will, and load the recipe with them.

    Raises:
        ValueError, FileNotFoundError: the recipe does not do.
        click.UsageError: `trellis train` would not take the options.
    """
    given = _train_options([recipe, *options])
    if given["max_restarts"]:
        raise ValueError(
            f"--max-restarts {given['max_restarts']} belongs to the launcher here: give it before the `--`"
        )
    loaded = load_recipe(
        recipe, given["set_"] or (), corpus=given["corpus"], dataset_dir=given["dataset_dir"]
    )
    return Work(
        recipe=recipe,
        options=tuple(options),
        loaded=loaded,
        run_dir=given["run_dir"] or Path("runs") / loaded.name,
        folder=Path.cwd(),
        recipe_options=(
            *(f"--set={assignment}" for assignment in given["set_"] or ()),
            *([f"--dataset-dir={given['dataset_dir']}"] if given["dataset_dir"] else []),
            *([f"--corpus={given['corpus']}"] if given["corpus"] else []),
        ),
        preflight=preflight,
    )


def _train_options(arguments: list[str]) -> dict[str, Any]:
    import typer.main

    from launch.cli import app

    group: Any = typer.main.get_command(app)
    return dict(group.commands["train"].make_context("trellis train", arguments).params)


def check_size(work: Work, *, nodes: int, ranks_per_node: int) -> None:
    """Raise ``ValueError`` if the recipe's mesh or batch does not fit that many ranks."""
    world = nodes * ranks_per_node
    named = work.loaded.mesh.world_size()
    if named and named != world:
        raise ValueError(
            f"the mesh of {work.recipe} has {named} ranks, but {nodes} nodes x {ranks_per_node} are {world}: "
            "change --nodes, --ranks-per-node or the mesh"
        )
    fit_mesh(fit_to_devices(work.loaded, world), world_size=world)


def node_line(
    agents: Agents,
    work: Work,
    *,
    place: int | str | None = None,
    local_address: str | None = None,
    hosts_store: str | None = None,
    follow_stdin: bool = False,
) -> str:
    """What one node runs, for ``bash -c``: its agent, which runs the node's preflight first.

    ``place`` is the node's, where it is known; the others as in `agent.agent_command`.
    """
    environment = agent_environment(agents, checkout=work.checkout)
    known = [] if place is None else [f"--node-rank={place}"]
    preflight = [work.recipe, *work.recipe_options, f"--run-dir={work.run_dir}"]
    preflight += [f"--nodes={agents.nodes}", f"--rdzv={agents.endpoint}"]
    preflight += [f"--ranks-per-node={agents.ranks_per_node}", *known]
    preflight += [] if local_address is None else [f"--local-addr={local_address}"]
    command = agent_command(
        agents,
        ["train", work.recipe, *work.options],
        node_rank=place,
        local_address=local_address,
        hosts_store=hosts_store,
        follow_stdin=follow_stdin,
        preflight=preflight if work.preflight else (),
        python=work.python,
    )
    return f"cd {shlex.quote(str(work.folder))} && exec {shell_words(command, environment)}"


def sweep_tasks(work: Work, sweep: Sequence[str]) -> list[Work]:
    """One run for every combination of ``KEY=V1,V2,...``, the last key changing first, each in a folder.

    Without a sweep it is the run itself.

    Raises:
        ValueError: no key, a key twice, no value, or a value that the recipe does not take.
    """
    axes = [_axis(item) for item in sweep]
    keys = [key for key, _ in axes]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"--sweep {key}: give each key once, with all its values")
    if not axes:
        return [work]
    combinations = itertools.product(*(values for _, values in axes))
    return list(_tasks(work, [dict(zip(keys, values)) for values in combinations]))


def _axis(item: str) -> tuple[str, list[str]]:
    key, _, text = item.partition("=")
    values = [value.strip() for value in _split(text)]
    if not key.strip() or not all(values):
        raise ValueError(f"--sweep {item}: write it as --sweep section.key=value,value")
    if len(set(values)) < len(values):
        raise ValueError(f"--sweep {item}: a value stands there twice")
    return key.strip(), values


def _split(text: str) -> list[str]:
    """At commas, but not inside brackets or quotes: a value may be a list."""
    parts = re.findall(r'(?:"[^"]*"|\[[^\]]*\]|[^,])+', text)
    return parts if len(parts) == len(re.sub(r'"[^"]*"|\[[^\]]*\]', "", text).split(",")) else [""]


def _tasks(work: Work, combinations: Sequence[dict[str, str]]) -> Iterator[Work]:
    parent = f"{work.run_dir}-sweep"
    for number, combination in enumerate(combinations):
        settings = [f"{key}={value}" for key, value in combination.items()]
        # The number keeps two values apart that look alike as a folder's name.
        name = re.sub(r"[^A-Za-z0-9=.+,-]+", "_", ",".join(settings))[:100]
        options = [*work.options, *itertools.chain.from_iterable(("--set", item) for item in settings)]
        run_dir = os.path.join(parent, f"{number:03d}-{name}")
        task = read_work(work.recipe, [*options, "--run-dir", run_dir], preflight=work.preflight)
        yield replace(task, folder=work.folder, python=work.python, checkout=work.checkout)
