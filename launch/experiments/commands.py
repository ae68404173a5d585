"""What is missing of an experiment as shell commands, for runs that other machines train."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from launch.experiments.perform import Workshop, trained
from launch.experiments.result import known_result, refuse_another
from launch.experiments.spec import RunSpec
from trellis_dist.files import read_json

__all__ = ["command_lines"]


def command_lines(shop: Workshop, specs: Sequence[RunSpec]) -> list[str]:
    """A `trellis prepare` for each data set that is not there, then a `trellis train` for each run.

    A run whose last checkpoint is there is left out: what is missing of it is scored where results are
    collected. Run folders and shards are where `perform` looks for them.

    Raises:
        ValueError: a folder holds another run of a spec's name.
    """
    missing = [spec for spec in specs if _missing(shop, spec)]
    return [*_prepare(missing), *(_train(shop, spec) for spec in missing)]


def _missing(shop: Workshop, spec: RunSpec) -> bool:
    if known_result(shop.result(spec), spec) is not None:
        return False
    recipe = shop.run_dir(spec) / "recipe.json"
    if not recipe.is_file():
        return True
    refuse_another(read_json(recipe), spec, holder=recipe.parent)
    return not trained(recipe.parent, spec)


def _prepare(specs: Iterable[RunSpec]) -> Iterator[str]:
    first = {spec.resolved.data.directory: spec for spec in reversed(list(specs))}
    for folder, spec in reversed(first.items()):
        if not (Path(folder) / "manifest.json").is_file():
            yield shlex.join(["trellis", "prepare", *spec.arguments])


def _train(shop: Workshop, spec: RunSpec) -> str:
    return shlex.join(["trellis", "train", *spec.arguments, "--run-dir", str(shop.run_dir(spec))])
