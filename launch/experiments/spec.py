"""One run of an experiment: a recipe with its changes, and what fixes the result that it leads to."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from launch.recipe import Recipe, differences, dotted_items, load_recipe, parse_recipe, resolve
from launch.run_folder import free_to_change
from trellis_dist.files import digest
from trellis_dist.validation import require

__all__ = ["RunSpec", "assignments", "changes", "recipe_of_spec", "what_fixes"]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# Where the text lies is no part of a run: what it is, the data set's fingerprint says.
_FOLDER = re.compile(r"data\.(source|mixture\.[^.]+)\.path|data\.tokenizer\.path")


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """One run.

    Attributes:
        name: of its folder and its result, such as "trellis-s0".
        recipe: a recipe as every command takes it: "quickstart", "my.toml", "350m-c4+contexts/16k".
        overrides: ``section.key=value`` as ``--set`` takes them (`assignments` writes them for a table).
            What is scored afterwards is the recipe's evals section.
        corpus: as ``--corpus``: another text than the recipe's.
        dataset_dir: as ``--dataset-dir``: where the token shards are or will be.
        trace: whether the result holds gates and norms at the checkpoints that are kept.
        about: labels for whoever collects results (JSON types): model, context, seed. They fix nothing.
    """

    name: str
    recipe: str
    overrides: tuple[str, ...] = ()
    corpus: str | None = None
    dataset_dir: str | None = None
    trace: bool = False
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(
            NAME.fullmatch(self.name) is not None,
            f"{self.name!r} names no run: use letters, digits, '.', '_' and '-'",
        )

    @cached_property
    def resolved(self) -> Recipe:
        """The recipe as it will be trained. Raises what ``load_recipe`` raises."""
        return recipe_of_spec(self)

    @property
    def digest(self) -> str:
        """SHA-256 of what fixes the trained weights: the resolved recipe without folders and machinery."""
        return digest(what_fixes(resolve(self.resolved)))

    @property
    def arguments(self) -> list[str]:
        """The recipe as `trellis` takes it; ``--set`` in one word, for values that begin with a dash."""
        found = [self.recipe, *(f"--set={line}" for line in self.overrides)]
        if self.corpus is not None:
            found += ["--corpus", self.corpus]
        if self.dataset_dir is not None:
            found += ["--dataset-dir", self.dataset_dir]
        return found

    @property
    def scoring(self) -> dict[str, Any]:
        """What is scored afterwards: the evals section."""
        scoring: dict[str, Any] = resolve(self.resolved)["evals"]
        return scoring


def recipe_of_spec(spec: RunSpec) -> Recipe:
    """The recipe of a spec; raises what `load_recipe` raises."""
    folder = Path(spec.dataset_dir) if spec.dataset_dir is not None else None
    return load_recipe(spec.recipe, spec.overrides, corpus=spec.corpus, dataset_dir=folder)


def assignments(table: Mapping[str, Any], prefix: str = "") -> tuple[str, ...]:
    """``a.b=c`` for every leaf of a nested table (or one with dotted keys); None means the default."""
    return tuple(_assignments(table, prefix))


def _assignments(table: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _assignments(value, f"{prefix}{key}.")
        else:  # a JSON scalar or array is TOML too
            yield f"{prefix}{key}={'' if value is None else json.dumps(value)}"


def what_fixes(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys of a resolved recipe that decide which weights come out."""
    return {key: value for key, value in dotted_items(resolved) if _fixes(key)}


def changes(before: Mapping[str, Any], after: Recipe, *, source: str) -> dict[str, tuple[Any, Any]]:
    """Keys that fix a result and differ between a stored resolved recipe and ``after``: key -> both values.

    The stored one is parsed first, so that a key which a later version added counts with its default.

    Raises:
        ValueError: the stored recipe, in ``source``, is not valid any more.
    """
    old = resolve(parse_recipe(before, source=source))
    return {key: pair for key, pair in differences(old, resolve(after)).items() if _fixes(key)}


def _fixes(key: str) -> bool:
    """Where a run resumes, where its first weights came from is past; where it begins, they count."""
    return key == "training.init_from" or (not free_to_change(key) and _FOLDER.fullmatch(key) is None)
