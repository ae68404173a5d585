"""The `trellis` command. Rooms are imported by the command that needs them, so that `--help` is quick."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.eval_commands import eval_service, evaluate, generate
from launch.export_commands import download, export, import_weights
from launch.figures.command import figures
from launch.forecast_command import forecast
from launch.launch_commands import launch
from launch.messages import show_warnings_plainly
from launch.nodes.command import preflight
from launch.planning.command import plan
from launch.reproduce_command import reproduce

if TYPE_CHECKING:
    from launch.recipe import Recipe

__all__ = ["app", "main"]

INTERRUPTED = 130

app = typer.Typer(
    name="trellis",
    help="Train, score and inspect Trellis language models. Add --debug to any command for tracebacks.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="name, path.toml, or several joined: 350m-c4+contexts/16k")
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="a run folder, such as runs/quickstart")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="override a recipe key; repeatable")
]
Corpus = Annotated[
    str | None,
    typer.Option(
        metavar="PATH|NAME@REVISION", help="text to use: a file or folder, or a Hugging Face data set"
    ),
]
DatasetDir = Annotated[Path | None, typer.Option(help="folder of the token shards (data.directory)")]
MovedDataset = Annotated[
    Path | None,
    typer.Option("--dataset-dir", help="where the run's token shards are now, if they were moved"),
]
RunDir = Annotated[Path | None, typer.Option(help="run folder; runs/<recipe name> unless given")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
Profile = Annotated[
    bool,
    typer.Option(
        "--profile", help="a Chrome trace per rank of a few steps ([logging.profile]), in RUN/profile/"
    ),
]
MaxRestarts = Annotated[
    int,
    typer.Option(
        min=0,
        metavar="N",
        help="start failed ranks again, up to N times in a row without a new checkpoint; not after an error "
        "that a restart repeats",
    ),
]
Step = Annotated[int | None, typer.Option(help="a saved step; the newest verified one unless given")]


app.command()(plan)


@app.command()
def prepare(
    recipe: RecipeArgument,
    set_: Overrides = None,
    corpus: Corpus = None,
    dataset_dir: DatasetDir = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Ray workers; one per core unless given")] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="a running Ray cluster; a local one unless given")
    ] = None,
) -> None:
    """Turn the recipe's text into token shards on Ray; shards that are there are re-used."""
    from launch.preflight import check_source

    loaded = _load(recipe, set_, corpus=corpus, dataset_dir=dataset_dir)
    check_source(loaded)
    from data_pipeline.job import prepare as prepare_shards

    manifest = prepare_shards(
        loaded.data,
        workers=workers,
        ray_address=ray_address,
        progress=loaded.logging.progress,
        chunk_size=loaded.model.grain,
    )
    for split, info in manifest.splits.items():
        print(f"{split}: {info.documents:,} documents, {info.tokens:,} tokens, {info.bytes:,} bytes")
    if manifest.quarantined:
        print(f"quarantined: {manifest.quarantined:,}, listed in {loaded.data.directory}/quarantine.jsonl")
    print(f"shards in {loaded.data.directory}, fingerprint {manifest.fingerprint}")


@app.command()
def train(
    recipe: RecipeArgument,
    set_: Overrides = None,
    run_dir: RunDir = None,
    corpus: Corpus = None,
    dataset_dir: DatasetDir = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="fail unless there is a checkpoint to continue from")
    ] = False,
    stop_at_step: Annotated[
        int | None, typer.Option(help="save and stop there; a later start continues")
    ] = None,
    init_from: Annotated[
        Path | None,
        typer.Option(
            metavar="CKPT", help="weights for a new run: a run, a checkpoint, an import (training.init_from)"
        ),
    ] = None,
    max_restarts: MaxRestarts = 0,
    profile: Profile = False,
) -> None:
    """Train on this machine, one process per rank of the mesh; continues from the newest checkpoint.

    SIGTERM or SIGUSR1: the ranks save within checkpoint.grace_s and end; the same command continues.

    Exit status: 0 done, 1 error, 2 misuse, 75 ended by SIGTERM or SIGUSR1 with what it had trained saved,
    130 interrupted.
    """
    from launch.ending import asked_to_end

    with asked_to_end():  # before training can answer: recipe and torch take seconds
        from launch.training_run import train as train_run

        source = [f"training.init_from={os.path.abspath(init_from)}"] if init_from else []
        overrides = [*(set_ or []), *source, *_profiled(profile)]
        loaded = _load(recipe, overrides, corpus=corpus, dataset_dir=dataset_dir)
        folder = _run_folder(loaded, run_dir)
        train_run(
            loaded,
            folder,
            resume="require" if resume else "auto",
            stop_at_step=stop_at_step,
            max_restarts=max_restarts,
        )
    if os.environ.get("RANK", "0") == "0":
        print(f"run folder: {folder}")


@app.command()
def run(
    recipe: RecipeArgument,
    set_: Overrides = None,
    run_dir: RunDir = None,
    corpus: Corpus = None,
    dataset_dir: DatasetDir = None,
    max_restarts: MaxRestarts = 0,
    profile: Profile = False,
) -> None:
    """The whole job: prepare, train (with a stop and a resume), evaluate, report; what is done is re-used."""
    from launch.main_job import main_job, render_summary

    overrides = [*(set_ or []), *_profiled(profile)]
    loaded = _load(recipe, overrides, corpus=corpus, dataset_dir=dataset_dir)
    folder = _run_folder(loaded, run_dir)
    summary = main_job(
        loaded, folder, say=lambda line: print(f"trellis: {line}", flush=True), max_restarts=max_restarts
    )
    print(render_summary(summary, folder))


@app.command()
def report(run: RunArgument) -> None:
    """Write RUN/training.html, how the run went so far, from what its folder holds; also while it trains."""
    from launch.run_report import write_training_report

    print(write_training_report(run))


app.command("eval")(evaluate)


app.command("eval-service")(eval_service)
app.command()(generate)
app.command()(export)
app.command("import")(import_weights)
app.command()(download)
app.command()(preflight)
app.command()(reproduce)
app.command()(forecast)
app.command()(figures)
app.add_typer(launch, name="launch")


@app.command()
def doctor(
    path: Annotated[Path | None, typer.Argument(help="a checkpoint, a run, a data set or an export")] = None,
    cluster: Annotated[
        bool, typer.Option("--cluster", help="test this machine, or under torchrun this job's nodes, instead")
    ] = False,
    ranks: Annotated[
        int | None, typer.Option(help="of --cluster: one per CUDA device, or 2 to 4 on a CPU, unless given")
    ] = None,
    steps: Annotated[int, typer.Option(help="of --cluster: optimizer steps of each case")] = 20,
    case: Annotated[
        list[str] | None, typer.Option(help="of --cluster: only the case of this name; repeatable")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="only look: make no damaged file of a data set again")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Verify a checkpoint, a run, a data set or an export by its hashes; exit status 1 on damage.

    Damaged files of a data set are made again from what is committed, and nothing else is touched.

    With --cluster: train a tiny model on every mesh and engine that fits the ranks, over the job's own nodes
    and backend, and compare each step with one process; then stress the order of point-to-point transfers.
    """
    if cluster == (path is not None):
        raise ValueError("doctor needs a PATH to examine, or --cluster to test machines: give one of the two")
    if path is None:
        healthy = _examine_cluster(ranks=ranks, steps=steps, cases=case or [], as_json=as_json)
    else:
        healthy = _examine_path(path, repair=not check, as_json=as_json)
    if not healthy:
        raise typer.Exit(1)


def _examine_path(path: Path, *, repair: bool, as_json: bool) -> bool:
    from launch.doctor import examine

    report = examine(path, repair=repair)
    if as_json:
        print(json.dumps(report, indent=1))
    else:
        for problem in report["repaired"]:
            print(f"was damaged, made again: {problem}")
        for problem in report["problems"]:
            print(f"damaged: {problem}")
        for note in report["notes"]:
            print(f"note: {note}")
        verdict = "whole" if not report["problems"] else f"{len(report['problems'])} problem(s)"
        print(f"{report['kind']} {path}: {verdict} ({len(report['examined'])} examined)")
    return not report["problems"]


def _examine_cluster(*, ranks: int | None, steps: int, cases: list[str], as_json: bool) -> bool:
    from launch.cluster import check_cluster

    report = check_cluster(ranks=ranks, steps=steps, cases=cases, quiet=as_json)
    if as_json and os.environ.get("RANK", "0") == "0":
        print(json.dumps(report, indent=1))
    return bool(report["passed"])


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status.

    0: done; 1: error; 2: misuse; 75: ended by SIGTERM or SIGUSR1 with what was trained
    saved; 130: interrupted.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [item for item in given if item != "--debug"]
    show_warnings_plainly()
    try:
        status = app(given, prog_name="trellis", standalone_mode=False)
    except KeyboardInterrupt:
        status = INTERRUPTED
    except Exception as error:
        return _fail(error, debug=debug)
    if status == INTERRUPTED:  # typer also turns the interrupt into this status
        print("trellis: interrupted; the same command continues from the newest checkpoint", file=sys.stderr)
    return status if isinstance(status, int) else 0


def _fail(error: Exception, *, debug: bool) -> int:
    """Say what went wrong, one line per problem; with --debug also the traceback, a failed rank's own."""
    from launch.ending import TerminatedError
    from launch.failures import RankError
    from launch.worker import error_line
    from trellis_dist.training.job import EXIT_TERMINATED

    if isinstance(error, TerminatedError):
        print(f"trellis: {error}", file=sys.stderr)
        return EXIT_TERMINATED

    usage = getattr(error, "format_message", None)  # a misused command line, from typer's parser
    if debug:
        detail = error.detail if isinstance(error, RankError) else traceback.format_exc()
        print(detail, file=sys.stderr)
    text = usage() if usage else str(error) if isinstance(error, RankError) else error_line(error)
    for line in text.splitlines():
        print(f"trellis: error: {line}", file=sys.stderr)
    return 2 if usage else 1


def _load(
    reference: str, overrides: list[str] | None, *, corpus: str | None = None, dataset_dir: Path | None = None
) -> Recipe:
    from launch.recipe import load_recipe

    return load_recipe(reference, overrides or (), corpus=corpus, dataset_dir=dataset_dir)


def _profiled(profile: bool) -> list[str]:
    return ["logging.profile.enabled=true"] if profile else []


def _run_folder(recipe: Recipe, given: Path | None) -> Path:
    return given if given is not None else Path("runs") / recipe.name


if __name__ == "__main__":
    sys.exit(main())
