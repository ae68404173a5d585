"""From an experiment and a scale to runs: one for each row, run of the scale and seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from launch.experiments.equal import equal_width
from launch.experiments.spec import RunSpec, assignments
from launch.experiments.tables import Experiment, Row, Scale, named, read_experiment, read_scale

__all__ = ["Expansion", "Options", "essay", "essay_needed", "expand", "write_essay"]

# The row that shows the defaults as they are, in every table that does.
DEFAULT = "trellis"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line says of an experiment.

    Attributes:
        only: rows to train and show; all unless given.
        seeds: how many, each a ``training.seed`` (first weights) and a ``data.seed`` (order of the rows).
        overrides: ``--set``, last of all.
        corpus: another text, as ``--corpus``.
        essay: a text file of prose for needles.
        suites: folder of the commonsense suites' rows.
    """

    only: Sequence[str] = ()
    seeds: int = 1
    overrides: Sequence[str] = ()
    corpus: str | None = None
    essay: Path | None = None
    suites: Path | None = None


@dataclass(frozen=True)
class Expansion:
    """An experiment at a scale.

    Attributes:
        name, scale_name: as on the command line.
        experiment, scale: what they mean.
        rows: those that are trained and shown.
        absent: rows that this version cannot train: row -> the layer kind that is missing.
        overrides: what the command line changed.
        specs: (row, run of the scale, seed) -> its run.
    """

    name: str
    scale_name: str
    experiment: Experiment
    scale: Scale
    rows: tuple[Row, ...]
    absent: Mapping[str, str]
    overrides: tuple[str, ...] = ()
    specs: Mapping[tuple[str, str, int], RunSpec] = field(default_factory=dict)

    @cached_property
    def seeds(self) -> list[int]:
        """Of its runs."""
        return sorted({seed for _, _, seed in self.specs})


def expand(name: str, scale_name: str, options: Options) -> Expansion:
    """The runs of an experiment.

    Raises:
        ValueError: no such experiment, scale or row; a row asked for by name whose layer kind is missing; or
            a recipe that its changes do not fit.
    """
    experiment, scale = read_experiment(name), read_scale(scale_name)
    chosen = _chosen(experiment.rows, options.only)
    absent = {row.name: kind for row in chosen for kind in row.trained.pattern if not _registered(kind)}
    if absent and (options.only or len(absent) == len(chosen)):
        listed = ", ".join(f"{row} needs the layer kind {kind!r}" for row, kind in absent.items())
        raise ValueError(f"{name}: {listed}, which this version does not have: leave it out of --only")
    rows = tuple(row for row in chosen if row.name not in absent)
    specs = dict(_specs(experiment, scale, rows, options))
    return Expansion(name, scale_name, experiment, scale, rows, absent, tuple(options.overrides), specs)


def _chosen(rows: Sequence[Row], only: Sequence[str]) -> list[Row]:
    for wanted in only:
        named(wanted, [row.name for row in rows], what="row of this table")
    return [row for row in rows if not only or row.name in only]


def _registered(kind: str) -> bool:
    from trellis_dist.models.config import LayerKind
    from trellis_dist.models.registry import MIXERS

    return kind in MIXERS and kind in get_args(LayerKind)


def _specs(
    experiment: Experiment, scale: Scale, rows: Sequence[Row], options: Options
) -> Iterator[tuple[tuple[str, str, int], RunSpec]]:
    for row in rows:
        settings = [setting for setting in experiment.settings() if setting not in row.without]
        for run in dict.fromkeys(scale.settings[setting] for setting in settings):
            for seed in range(options.seeds):
                yield (row.name, run, seed), _spec(experiment, scale, row, run, seed=seed, options=options)


def _spec(
    experiment: Experiment, scale: Scale, row: Row, run: str, *, seed: int, options: Options
) -> RunSpec:
    entry, base = scale.runs[run], experiment.base_row
    common = assignments(
        {**scale.set, **entry.set, **experiment.set, **_scoring(experiment, scale, options)}
        | {"training.seed": seed, "data.seed": seed}
    )

    def spec(*changes: str) -> RunSpec:
        return RunSpec(
            name=f"{run}-{_name(row, base)}" + (f"-s{seed}" if seed else ""),
            recipe=entry.recipe,
            overrides=(*common, *changes, *options.overrides),
            corpus=options.corpus,
            trace=experiment.trace,
            about={"row": row.name, "run": run, "seed": seed},
        )

    own = _changes(row)
    if row.trained.is_trellis:
        return spec(*own)
    return spec(*own, f"model.mlp_hidden={_width(spec(*own), spec(*_changes(base)))}")


def _name(row: Row, base: Row) -> str:
    """Of its run: a baseline that is as large as another Trellis than the default is another model."""
    if row.trained.is_trellis or base.name == DEFAULT:
        return row.name
    return f"{row.name}-as-{base.name}"


def _changes(row: Row) -> tuple[str, ...]:
    """What a row says of its model."""
    trained = row.trained
    return (
        *assignments({"model.pattern": list(trained.pattern), **trained.set}),
        *(f"{key}=null" for key in trained.unset),
        *assignments(row.set),
        *(f"{key}=null" for key in row.unset),
    )


def _width(baseline: RunSpec, trellis: RunSpec) -> int:
    """The MLP with which a baseline is as large as the table's Trellis on the same run."""
    from trellis_dist.models.counts import parameter_counts

    return equal_width(baseline.resolved.model, parameters=parameter_counts(trellis.resolved.model).total)


def _scoring(experiment: Experiment, scale: Scale, options: Options) -> dict[str, Any]:
    """The evals section's part that the experiment says."""
    found: dict[str, Any] = {"evals.tasks": list(experiment.tasks)}
    if experiment.lengths:
        found["evals.ruler_lengths"] = [scale.prompt(length) for length in experiment.lengths]
    if essay_needed(experiment) and options.essay is not None:
        found["evals.ruler_essay"] = str(options.essay)
    if options.suites is not None:
        found["evals.suites_folder"] = str(options.suites)
    return found


def essay_needed(experiment: Experiment) -> bool:
    """Whether it hides needles in prose."""
    from evals.config import ESSAY_TASKS

    return any(task in ESSAY_TASKS for task in experiment.tasks)


def essay() -> str:
    """Prose that every Python brings along: the language reference of ``help()``, 450 kB of English."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def write_essay(path: Path) -> None:
    """Write `essay` where there is no file yet."""
    from trellis_dist.files import atomic_write, make_directories

    if not path.is_file():
        make_directories(path.parent)
        atomic_write(path, essay())
