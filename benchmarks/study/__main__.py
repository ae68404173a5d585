"""The study as a command: python -m benchmarks.study prepare|run|try|score|places|reach|speed|report.

prepare --books DIR                strips the training books, makes tokenizer and shards
run --books DIR --minutes 55       goes on with the plan; --dry-run only prints it
try NAME --books DIR --model M     a run by hand, with --set KEY=VALUE; it chooses nothing
score --books DIR [--test]         the n-grams on all books; with --test the test books, once
places --books DIR                 where in a chunk the stale gradient hurts
reach --books DIR                  what context is worth to the full runs, how long their gates keep
speed                              seconds per token of all models in turns
report                             benchmarks/results/study.json, the tables of docs/study.md, plots

--scale small makes it a study on one GPU, with results, runs and a page of its own (small.toml).
"""

from __future__ import annotations

import argparse
import fcntl
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.study.books import prepare_books
from benchmarks.study.expected import whole_plan
from benchmarks.study.known import check_results
from benchmarks.study.one import do
from benchmarks.study.order import tasks
from benchmarks.study.plan import SCALES, plan, use
from benchmarks.study.pool import Pool, lines_of, pending, spent, unregistered
from benchmarks.study.results import Store, folder_of
from benchmarks.study.tried import adopt


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the commands; the exit status."""
    options = _parser().parse_args(arguments)
    use(options.scale)
    store = Store(options.results or folder_of(options.scale))
    work = (options.work or Path("runs") / folder_of(options.scale).name).resolve()
    reads = options.command in ("prepare", "run", "score", "one", "try", "places", "reach") and not getattr(
        options, "dry_run", False
    )
    if reads and options.books is None:
        print("give --books FOLDER, with the ten novels", file=sys.stderr)
        return 2
    try:
        return _COMMANDS[options.command](options, store, work)
    except (ValueError, OSError) as error:
        print(f"study: {error}", file=sys.stderr)
        return 1


def _prepare(options: argparse.Namespace, store: Store, work: Path) -> int:
    manifest = prepare_books(options.books.resolve(), work)
    counted = {name: split.tokens for name, split in manifest.splits.items()}
    print(f"{work / 'data'}: {counted} tokens, fingerprint {manifest.fingerprint[:12]}")
    return 0


def _run(options: argparse.Namespace, store: Store, work: Path) -> int:
    for line in unregistered():
        print(line)
    for line in [] if options.dry_run else adopt(store):
        print(line)
    results = store.runs()
    budget = 3600 * (options.budget or plan()["computes"]["budget_hours"])
    check_results(results)
    left, used = pending(results, options.only), spent(store, work)
    print("\n".join(lines_of(left, results)) if options.dry_run else f"{len(left)} runs can be named now")
    print(f"{used:,.0f} of {budget:,.0f} core-seconds used")
    if options.dry_run:
        print("\n".join(whole_plan(results, used=used, budget=budget)))
        return 0
    check_device()
    made = prepare_books(options.books.resolve(), work, progress=False)
    check_data(made.fingerprint, results)
    with _alone(work):
        failed = Pool(
            books=options.books.resolve(),
            work=work,
            store=store,
            jobs=options.jobs or plan()["computes"]["jobs"],
            minutes=options.minutes,
            budget=budget,
            only=options.only,
            say=_say,
        ).run()
    return 1 if failed else 0


def check_data(fingerprint: str, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ValueError where a finished run was trained on another data set than the one prepared here."""
    for name, found in results.items():
        if found.get("data", fingerprint) != fingerprint:
            raise ValueError(
                f"{name} was trained on the data set {found['data'][:12]} and the one prepared here is "
                f"{fingerprint[:12]}: its runs could not be compared; use the package versions of its result"
            )


def check_device() -> None:
    """Raise ValueError where a scale computes on a GPU and there is none."""
    import torch

    if plan()["computes"]["device"] == "cuda" and not torch.cuda.is_available():
        raise ValueError("--scale small computes on a GPU and torch finds none: leave --scale out")


def _say(line: str) -> None:
    print(line, flush=True)


@contextmanager
def _alone(work: Path) -> Iterator[None]:
    """One slice at a time in a folder."""
    with (work / ".study.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run command works in {work}: wait for it") from None
        yield


def _one(options: argparse.Namespace, store: Store, work: Path) -> int:
    results = store.runs()
    check_results(results)
    found = {task.name: task for task in tasks(results)}
    if options.only not in found:
        raise ValueError(f"--only {options.only}: no run of that name can be named now; see run --dry-run")
    return do(
        found[options.only], books=options.books.resolve(), work=work, store=store, minutes=options.minutes
    )


def _score(options: argparse.Namespace, store: Store, work: Path) -> int:
    from benchmarks.study.frozen import score_test
    from benchmarks.study.score import bigram_nats

    books = options.books.resolve()
    if options.test:
        check_device()
        score_test(store, books=books, work=work, say=_say)
    splits = [("validation", plan()["sizes"]["tuning_characters"]), ("validation", None), ("test", None)]
    print(store.write("once/ngrams", bigram_nats(work / "data", books, splits)))  # type: ignore[arg-type]
    return 0


def _try(options: argparse.Namespace, store: Store, work: Path) -> int:
    from benchmarks.study.tried import changes_of, try_text

    check_device()
    found = try_text(
        options.name,
        options.model,
        options.rate,
        changes_of(options.set),
        tokens=options.tokens,
        books=options.books.resolve(),
        work=work,
    )
    path = store.write(f"tried/{options.name}", found)
    print(f"{options.name}: {found['validation']['loss']:.4f} nats per token on the validation books; {path}")
    return 0


def _places(options: argparse.Namespace, store: Store, work: Path) -> int:
    from benchmarks.study.places import measure

    check_device()
    print(store.write("once/places", measure(store.runs(), books=options.books.resolve(), work=work)))
    return 0


def _reach(options: argparse.Namespace, store: Store, work: Path) -> int:
    from benchmarks.study.reach import measure

    check_device()
    known, books = store.once("reach"), options.books.resolve()
    print(store.write("once/reach", measure(store.runs(), books=books, work=work, known=known)))
    return 0


def _speed(options: argparse.Namespace, store: Store, work: Path) -> int:
    from benchmarks.study.speed import measure

    check_device()
    print(store.write("once/speed", measure(store.runs())))
    return 0


def _report(options: argparse.Namespace, store: Store, work: Path) -> int:
    from benchmarks.study.report import write_report

    for path in write_report(store):
        print(path)
    return 0


_COMMANDS = {
    "prepare": _prepare,
    "run": _run,
    "one": _one,
    "try": _try,
    "score": _score,
    "places": _places,
    "reach": _reach,
    "speed": _speed,
    "report": _report,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in _COMMANDS:
        command = commands.add_parser(name)
        command.add_argument("--books", type=Path, help="folder of the ten novels")
        command.add_argument("--scale", choices=SCALES, default="tiny", help="two CPU cores, or one GPU")
        command.add_argument("--work", type=Path, help="runs and shards; runs/study unless given")
        command.add_argument("--results", type=Path, help="one JSON per finished run")
        if name in ("run", "one"):
            command.add_argument("--minutes", type=float, help="save and end after so many")
            command.add_argument("--only", default="*", help="shell pattern of the names of runs")
        if name == "run":
            command.add_argument("--jobs", type=int, help="runs at once; two, or one on a GPU")
            command.add_argument("--budget", type=float, help="core-hours of everything, or hours of a GPU")
            command.add_argument("--dry-run", action="store_true", help="print what is left, and end")
        if name == "try":
            command.add_argument("name", help="of its result")
            command.add_argument("--model", required=True, help="of plan.toml")
            command.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
            command.add_argument("--tokens", type=int, default=500_000)
            command.add_argument(
                "--set", action="append", default=[], metavar="KEY=VALUE", help="of a recipe"
            )
        if name == "score":
            command.add_argument("--test", action="store_true", help="score the test books, once")
    return parser


if __name__ == "__main__":
    sys.exit(main())
