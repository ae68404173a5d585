"""`trellis reproduce`: the paper's tables and figures, and the questions behind them, as runs."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from launch.experiments.expand import Expansion
    from launch.experiments.perform import Workshop
    from launch.experiments.pool import Outcome

__all__ = ["reproduce"]


class ScaleName(StrEnum):
    """How large."""

    PAPER = "paper"
    SMALL = "small"
    TINY = "tiny"


def reproduce(
    experiment: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="table1 to table4, figure2, figure3, baselines, slots, chunks, gates, retention",
        ),
    ],
    scale: Annotated[
        ScaleName,
        typer.Option(help="the paper's sizes, one GPU (not measured), two CPU cores for a night"),
    ] = ScaleName.TINY,
    only: Annotated[
        list[str] | None, typer.Option(metavar="ROW", help="rows to train and show, a,b or repeated")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list runs and costs, start nothing")] = False,
    commands: Annotated[
        bool,
        typer.Option("--commands", help="print what to run elsewhere for what is missing, start nothing"),
    ] = False,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="runs at once; one per core, or one with a GPU, unless given")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="save and end after so many; the same command continues")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="runs of each model, equal but for the seed")] = 1,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=C", help="override a recipe key of every run; repeatable"),
    ] = None,
    root: Annotated[
        Path | None, typer.Option(help="for runs, results and page; runs/reproduce/SCALE unless given")
    ] = None,
    corpus: Annotated[
        str | None,
        typer.Option(metavar="PATH|NAME@REVISION", help="text instead of the scale's: as for trellis train"),
    ] = None,
    essay: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="prose that hides needles; Python's own language reference"),
    ] = None,
    suites: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="rows of the commonsense suites; the Hugging Face Hub unless given"),
    ] = None,
    render_only: Annotated[
        bool, typer.Option("--render-only", help="write the page of what is there")
    ] = False,
) -> None:
    """Train what is missing of a table, score it, and show ours beside the paper's: HTML, Markdown, plots.

    Exit status: 0 all runs are there, 1 one failed, 75 the time was over or a signal came: the same command
    continues.
    """
    from launch.experiments.expand import Options, essay_needed, expand, write_essay
    from launch.experiments.tables import read_experiment

    _check_files(essay, suites)
    folder = root if root is not None else default_root(scale.value, corpus)
    prose = essay if essay is not None else folder / "essay.txt"
    options = Options(
        only=_names(only),
        seeds=seeds,
        overrides=tuple(set_ or ()),
        corpus=corpus,
        essay=prose.absolute() if essay_needed(read_experiment(experiment)) else None,
        suites=suites and suites.absolute(),
    )
    expansion = expand(experiment, scale.value, options)
    if commands:
        _print_commands(expansion, folder)
        return
    if not (dry_run or render_only) and options.essay is not None and essay is None:
        write_essay(options.essay)
    _say_what(expansion, folder, jobs=jobs, dry_run=dry_run)
    if render_only and not dry_run:
        _write(expansion, folder, _known(expansion, folder))
    elif not dry_run:
        _train(expansion, folder, jobs=jobs, minutes=minutes)


def _names(only: list[str] | None) -> list[str]:
    return [name.strip() for item in only or () for name in item.split(",") if name.strip()]


def _train(expansion: Expansion, folder: Path, *, jobs: int | None, minutes: float | None) -> None:
    _check_rows(expansion, folder)
    outcome = _perform(expansion, folder, jobs=jobs, minutes=minutes)
    _write(expansion, folder, outcome.results)
    _end(outcome)


def _check_files(essay: Path | None, suites: Path | None) -> None:
    if essay is not None and not essay.is_file():
        raise ValueError(f"--essay {essay}: no such file; name a text file of prose")
    if suites is not None and not suites.is_dir():
        raise ValueError(f"--suites {suites}: no such folder; name one with the suites' rows")


def default_root(scale: str, corpus: str | None) -> Path:
    """Where a scale's runs are: for each corpus a folder of its own."""
    from launch.corpus import corpus_layer

    name = scale if corpus is None else corpus_layer(corpus, recipe_name=scale)["name"]
    return Path("runs") / "reproduce" / str(name)


def _results(expansion: Expansion, folder: Path) -> Path:
    """Of each experiment its own: two of them may score one run on different tasks."""
    return folder / "results" / expansion.name


def _shop(expansion: Expansion, folder: Path) -> Workshop:
    from launch.experiments.children import Slice
    from launch.experiments.perform import Workshop

    return Workshop(root=folder, results=_results(expansion, folder), slice_=Slice())


def _check_rows(expansion: Expansion, folder: Path) -> None:
    """Raise before anything is trained where what is missing could not be scored."""
    from launch.experiments.rows import check_suites

    known = _known(expansion, folder)
    check_suites(spec for spec in expansion.specs.values() if spec.name not in known)


def _print_commands(expansion: Expansion, folder: Path) -> None:
    """Nothing else on standard output: the lines are a script."""
    from launch.experiments.commands import command_lines

    _check_rows(expansion, folder)
    for line in command_lines(_shop(expansion, folder), list(expansion.specs.values())):
        print(line)


def _say_what(expansion: Expansion, folder: Path, *, jobs: int | None, dry_run: bool) -> None:
    from launch.experiments.costs import cost_lines, costs
    from launch.experiments.pool import default_jobs
    from launch.experiments.text import repeats

    specs = list(expansion.specs.values())
    print(f"{expansion.experiment.title}: scale {expansion.scale_name}, {expansion.scale.about}")
    print(f"meant for {expansion.scale.hardware}; runs in {folder}")
    for row, kind in expansion.absent.items():
        print(f"left out: {row}: this version has no layer kind {kind!r}")
    for line in cost_lines(costs(_shop(expansion, folder), specs), jobs=jobs or default_jobs()):
        print(line, flush=True)
    if dry_run:  # runs say it when they begin, once there are shards
        for line in repeats(specs):
            print(line)


def _perform(expansion: Expansion, folder: Path, *, jobs: int | None, minutes: float | None) -> Outcome:
    from launch.experiments.pool import perform_all

    return perform_all(
        list(expansion.specs.values()),
        folder,
        results=_results(expansion, folder),
        jobs=jobs,
        minutes=minutes,
        say=lambda line: print(f"trellis: {line}", flush=True),
    )


def _known(expansion: Expansion, folder: Path) -> dict[str, dict[str, Any]]:
    from launch.experiments.result import known_result

    found = {
        spec.name: known_result(_results(expansion, folder) / f"{spec.name}.json", spec)
        for spec in expansion.specs.values()
    }
    return {name: result for name, result in found.items() if result is not None}


def _write(expansion: Expansion, folder: Path, results: Mapping[str, Mapping[str, Any]]) -> None:
    from launch.experiments.pictures import can_draw
    from launch.experiments.render import make_page, write_page
    from launch.experiments.text import with_notes

    page = with_notes(make_page(expansion, results), expansion)
    files = write_page(page, folder, expansion.name)
    print(f"page: {files[0]}, {files[1]}" + ("" if can_draw() else "; no PNG: matplotlib is not installed"))


def _end(outcome: Outcome) -> None:
    """Raise as the command's exit status says; quiet when everything is there."""
    from trellis_dist.training.job import EXIT_TERMINATED

    if outcome.failed:
        listed = "\n".join(f"{name}: {line}" for name, line in outcome.failed.items())
        raise ValueError(listed)
    if outcome.left:
        print(f"{len(outcome.left)} runs are left; the same command continues")
        raise typer.Exit(EXIT_TERMINATED)
