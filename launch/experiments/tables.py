"""The experiments as data: tables/*.toml read into typed, checked values.

A table says what the paper shows and which runs and scores stand for it; ``scales.toml`` says how large those
runs are, ``models.toml`` what a row's model is. Nothing here knows a number.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from trellis_dist.validation import STRICT

__all__ = [
    "Chart",
    "Column",
    "Experiment",
    "Group",
    "Point",
    "Row",
    "RunEntry",
    "Scale",
    "experiment_names",
    "models",
    "named",
    "read_experiment",
    "read_scale",
]

T = TypeVar("T")
TABLES = Path(__file__).parent / "tables"
_SHARED = ("models", "scales")


@dataclass(frozen=True, kw_only=True)
class Model:
    """What a row trains.

    Attributes:
        label: shown.
        pattern: layer kinds, cycled over the layers.
        set: keys of the recipe.
        unset: keys that it leaves without a value, whatever their default is: TOML has no null.
    """

    __pydantic_config__ = STRICT

    label: str
    pattern: tuple[str, ...]
    set: Mapping[str, Any] = field(default_factory=dict)
    unset: tuple[str, ...] = ()

    @property
    def is_trellis(self) -> bool:
        """Every layer is one: it keeps the width of its recipe."""
        return all(kind == "trellis" for kind in self.pattern)


@dataclass(frozen=True, kw_only=True)
class RunEntry:
    """A run of a scale: a recipe and the keys it changes."""

    __pydantic_config__ = STRICT

    recipe: str
    set: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large an experiment is.

    Attributes:
        about, hardware: for people.
        runs: by name.
        settings: what the paper trained on -> the run that stands for it.
        lengths: a length of the paper, such as "2k" -> tokens here.
        prompts: the same for prompts, where theirs are others: a needle's question needs room.
        set: keys for every run.
    """

    __pydantic_config__ = STRICT

    about: str
    hardware: str
    runs: Mapping[str, RunEntry]
    settings: Mapping[str, str]
    lengths: Mapping[str, int]
    prompts: Mapping[str, int] = field(default_factory=dict)
    set: Mapping[str, Any] = field(default_factory=dict)

    def prompt(self, length: str) -> int:
        """Tokens of a prompt of that length here."""
        return self.prompts.get(length, self.lengths[length])

    def expand(self, value: str) -> str:
        """A value's name with ``{2k}`` replaced by the tokens of a prompt of that length here."""
        for length in self.lengths:
            value = value.replace(f"{{{length}}}", str(self.prompt(length)))
        return value


@dataclass(frozen=True, kw_only=True)
class Column:
    """A number of each row: which run, and what of its result (`launch.experiments.values`)."""

    __pydantic_config__ = STRICT

    label: str
    setting: str
    value: str


@dataclass(frozen=True, kw_only=True)
class Group:
    """Columns that are shown as one table; with ``paper`` they are those of a row's ``paper`` numbers."""

    __pydantic_config__ = STRICT

    title: str
    columns: tuple[Column, ...]
    paper: bool = False


@dataclass(frozen=True, kw_only=True)
class Row:
    """A model of a table.

    Attributes:
        name: in commands and file names; the same name is the same run in every experiment.
        label: shown; that of the model unless given.
        model: a name of models.toml; the row's own unless given.
        set, unset: keys of the recipe, over those of the model.
        paper: the paper's numbers, one for each column of the group that has them; fewer where it has fewer.
        without: settings that it is not trained on.
        x: its place on a chart of kind "by_row".
    """

    __pydantic_config__ = STRICT

    name: str
    label: str = ""
    model: str = ""
    set: Mapping[str, Any] = field(default_factory=dict)
    unset: tuple[str, ...] = ()
    paper: tuple[float, ...] = ()
    without: tuple[str, ...] = ()
    x: float | None = None

    @property
    def trained(self) -> Model:
        """Its model."""
        return models()[self.model or self.name]

    @property
    def title(self) -> str:
        """Its label."""
        return self.label or self.trained.label


@dataclass(frozen=True, kw_only=True)
class Point:
    """A number of a chart: at ``x`` (a length), or the series ``label``."""

    __pydantic_config__ = STRICT

    setting: str
    value: str
    x: str = ""
    label: str = ""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A picture.

    Attributes:
        kind: "lines" (a line per row over lengths), "paper" (the same of the paper's numbers), "by_row" (a
            line per point over the rows' ``x``), "pareto" (two points: every row's x, less is better, and y,
            more is better, with the frontier), "bars" (one point: a bar per row of its difference to the
            experiment's ``base``).
        better: of "by_row": the page says from which ``x`` on rows are level with the best.
    """

    __pydantic_config__ = STRICT

    title: str
    kind: Literal["lines", "paper", "by_row", "pareto", "bars"]
    points: tuple[Point, ...]
    x_label: str = ""
    y_label: str = ""
    better: Literal["", "less", "more"] = ""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A table or figure.

    Attributes:
        title: of the page.
        setting: what the paper did, in a sentence.
        base: the row that all others are made as large as, but for forms of Trellis, which keep its width;
            bars are of differences to it.
        groups, rows, charts: what is shown.
        tasks: what every run is scored on.
        lengths: prompt lengths of RULER's tasks, of the paper.
        trace: whether gates and norms at the kept checkpoints are shown, which takes ``checkpoint.keep``.
        set: keys for every run.
    """

    __pydantic_config__ = STRICT

    title: str
    setting: str
    groups: tuple[Group, ...]
    rows: tuple[Row, ...]
    base: str = "trellis"
    charts: tuple[Chart, ...] = ()
    tasks: tuple[str, ...] = ("perplexity",)
    lengths: tuple[str, ...] = ()
    trace: bool = False
    set: Mapping[str, Any] = field(default_factory=dict)

    @property
    def base_row(self) -> Row:
        """The row named ``base``. Raises ValueError where there is none."""
        named(self.base, [row.name for row in self.rows], what="row of this table")
        return next(row for row in self.rows if row.name == self.base)

    def settings(self) -> list[str]:
        """Everything that its rows are trained on, in the order it is shown."""
        columns = [column.setting for group in self.groups for column in group.columns]
        return list(dict.fromkeys([*columns, *(p.setting for chart in self.charts for p in chart.points)]))


def experiment_names() -> list[str]:
    """Of every table in the folder."""
    return sorted(path.stem for path in TABLES.glob("*.toml") if path.stem not in _SHARED)


def read_experiment(name: str) -> Experiment:
    """The experiment of that name. Raises ValueError with the closest names."""
    named(name, experiment_names(), what="experiment")
    return _read(Experiment, _table(name), name)


@cache
def models() -> Mapping[str, Model]:
    """Every model that a row may train."""
    return {name: _read(Model, entry, f"models.{name}") for name, entry in _table("models").items()}


def read_scale(name: str) -> Scale:
    """The scale of that name. Raises ValueError with the closest names."""
    found = _table("scales")
    named(name, found, what="scale")
    return _read(Scale, found[name], f"scales.{name}")


def named(name: str, known: Iterable[str], *, what: str) -> None:
    """Raise ValueError, naming the closest, unless ``name`` is known."""
    known = list(known)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or known
        raise ValueError(f"no {what} is called {name!r}: use {', '.join(close)}")


def _table(name: str) -> dict[str, Any]:
    return tomllib.loads((TABLES / f"{name}.toml").read_text(encoding="utf-8"))


def _read(kind: type[T], table: Mapping[str, Any], source: str) -> T:
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_json(json.dumps(table), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ValueError(f"{TABLES / source}: {key}: {first['msg']}") from None
