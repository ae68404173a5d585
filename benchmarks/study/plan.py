"""What a run of the study is: ``plan.toml``'s models and variants, and the recipe of each with its changes.

The study has two scales: "tiny", plan.toml and base.toml as they are, for two CPU cores; "small", the same
with what small.toml changes, for one GPU. A process works at one of them (`use`).

Which runs there are and in what order, benchmarks/study/order.py says.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from benchmarks.study.books import BASE
from launch.experiments.runs import RunSpec, assignments

__all__ = [
    "HALF",
    "OURS",
    "PAPER",
    "SCALES",
    "STALE",
    "Scale",
    "Settings",
    "Task",
    "model_keys",
    "models",
    "number",
    "plan",
    "registered",
    "scale",
    "table",
    "task_of",
    "use",
]

FOLDER = Path(__file__).parent
# The name under which the best form of Trellis is trained in full; with half the slots, so that its memories
# have the numbers of one matrix state of the same heads; with the paper's update and nothing else of it.
OURS, HALF, STALE = "trellis", "trellis-half", "trellis-stale"
PAPER = "trellis-paper"

Kind = Literal["tune", "noise", "vary", "search", "full", "long", "recall"]
Table = Mapping[str, Any]
Scale = Literal["tiny", "small"]
SCALES: tuple[Scale, ...] = ("tiny", "small")


@dataclass(frozen=True)
class Settings:
    """What a model is trained with.

    Attributes:
        model: a name of ``plan.toml``'s models; "trellis" for the best of ours.
        rate: peak learning rate.
        set: recipe keys and values beyond the base.
    """

    model: str
    rate: float
    set: Mapping[str, Any] = field(default_factory=dict)

    def table(self) -> dict[str, Any]:
        """JSON types."""
        return {"model": self.model, "rate": self.rate, "set": dict(self.set)}


@dataclass(frozen=True)
class Task:
    """One run.

    Attributes:
        name: of its result file.
        characters: of each validation book that it is scored on; None for whole books.
    """

    name: str
    kind: Kind
    settings: Settings
    seed: int = 0
    length: int = 1024
    tokens: int = 0
    characters: int | None = None
    group: str = ""

    @property
    def step_tokens(self) -> int:
        """Tokens of an update; a longer row is one of its own."""
        return max(int(plan()["sizes"]["step_tokens"]), self.length)

    @property
    def steps(self) -> int:
        """Updates."""
        return self.tokens // self.step_tokens

    def spec(self, work: Path) -> RunSpec:
        """The run as ``launch.experiments`` takes it, of the same size as every other (within 2%)."""
        changed = {
            "name": self.name,
            "data.source.path": str(work / "train"),
            "data.sequence_length": self.length,
            "data.seed": self.seed,
            "training.seed": self.seed,
            "training.steps": self.steps,
            "training.global_batch_tokens": self.step_tokens,
            "training.micro_batch": self.step_tokens // self.length,
            "schedule.warmup_steps": round(plan()["sizes"]["warmup"] * self.steps),
            "optimizer.lr": self.settings.rate,
            **plan()["base"],
            **self.settings.set,
        }
        changed["model.mlp_hidden"] = _equal_width(model_keys(self.settings.set), model_keys(plan()["base"]))
        return RunSpec(
            name=self.name,
            recipe=str(BASE),
            overrides=assignments(changed),
            dataset_dir=str(work / "data"),
            about=self.about(),
        )

    def about(self) -> dict[str, Any]:
        """What the result says of itself."""
        return {
            "kind": self.kind,
            "group": self.group or self.settings.model,
            "seed": self.seed,
            "length": self.length,
            "tokens": self.steps * self.step_tokens,
            "settings": self.settings.table(),
        }


_at: list[Scale] = ["tiny"]


def use(scale: Scale) -> None:
    """Work at a scale from here on, in this process."""
    _at[0] = scale


def scale() -> Scale:
    """The one that this process works at."""
    return _at[0]


def plan() -> dict[str, Any]:
    """``plan.toml``, at another scale than "tiny" with what that scale's file changes."""
    return _read(scale(), FOLDER)


@cache
def _read(at: Scale, folder: Path) -> dict[str, Any]:
    whole = tomllib.loads((folder / "plan.toml").read_text(encoding="utf-8"))
    return whole if at == "tiny" else _merged(whole, tomllib.loads((folder / f"{at}.toml").read_text()))


def _merged(whole: Table, changed: Table) -> dict[str, Any]:
    """``whole`` with the keys of ``changed``; a table that both have is merged."""
    both = {
        key: _merged(whole[key], value) for key, value in changed.items() if _tables(whole.get(key), value)
    }
    return {**whole, **changed, **both}


def _tables(one: Any, other: Any) -> bool:
    return isinstance(one, Mapping) and isinstance(other, Mapping)


def models(*roles: str) -> dict[str, Table]:
    """The models of these roles, all without any."""
    found: dict[str, Table] = plan()["models"]
    return {name: entry for name, entry in found.items() if not roles or entry["role"] in roles}


def registered(name: str) -> bool:
    """Whether this checkout has the layers of a model."""
    from trellis_dist.models.registry import MIXERS

    return all(kind in MIXERS for kind in _changes(models()[name]).get("model.pattern", ["trellis"]))


def table(name: str) -> dict[str, Any]:
    """Recipe keys of a model, or of a variant over those of what it changes."""
    if name in plan()["variants"]:
        entry = plan()["variants"][name]
        return _changes(models()[entry["of"]]) | _changes(entry)
    return _changes(models()[name])


def _changes(entry: Table) -> dict[str, Any]:
    return dict(entry.get("set", {}))


def task_of(name: str, found: Mapping[str, Any]) -> Task:
    """The task that a result says it is of."""
    about = found["about"]
    return Task(
        name,
        about["kind"],
        Settings(**about["settings"]),
        seed=about["seed"],
        length=about["length"],
        tokens=about["tokens"],
        group=about["group"],
    )


def number(rate: float) -> str:
    """4e-3, 2.5e-3."""
    digits, exponent = f"{rate:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


def model_keys(changed: Mapping[str, Any]) -> tuple[str, ...]:
    """The model's part of a table of recipe keys, hashable."""
    return assignments({key: value for key, value in changed.items() if key.startswith("model.")})


@cache
def _equal_width(changed: tuple[str, ...], base: tuple[str, ...]) -> int:
    """The MLP's width with which a model has the parameters of the paper's Trellis of the same ``base``."""
    from launch.experiments.equal import equal_width
    from launch.recipe import load_recipe
    from trellis_dist.models.counts import parameter_counts

    wanted = parameter_counts(load_recipe(str(BASE), base).model).total
    return equal_width(load_recipe(str(BASE), (*base, *changed)).model, parameters=wanted)
