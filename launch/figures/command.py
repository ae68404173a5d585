"""`trellis figures`: gates, memories, recall, losses and speed of a trained run as a page."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["figures"]

NAME = "figures"


def figures(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="a run folder, such as runs/quickstart; of further ones loss and throughput beside it",
        ),
    ],
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="a long text, .txt or .jsonl; Python's own language reference"),
    ] = None,
    suites: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="rows of the commonsense suites; left out unless given"),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="figures/ in the first RUN unless given")
    ] = None,
    tokens: Annotated[int, typer.Option(min=512, help="of the text that are read in one go")] = 16384,
    items: Annotated[int, typer.Option(min=3, help="needles of each length, questions of each suite")] = 40,
    step: Annotated[
        int | None, typer.Option(help="a saved step of the first RUN; the newest verified one unless given")
    ] = None,
    dataset_dir: Annotated[
        Path | None, typer.Option(help="where the run's token shards are now, if moved")
    ] = None,
) -> None:
    """Draw what a run's gates and memories do: figures.html, .md, .json, and PNG and SVG with matplotlib."""
    from evals.runs import load_run
    from launch.experiments.render import write_page
    from launch.figures.measure import Extent, measure
    from launch.figures.page import figures_page
    from trellis_dist.files import make_directories, write_json

    if suites is not None and not suites.is_dir():
        raise ValueError(f"--suites {suites}: no such folder; name one with the suites' rows")
    run, *rest = runs
    folder = run / "figures" if output is None else output
    read = _read(text)
    loaded = load_run(run, step=step, dataset_dir=dataset_dir)
    others = [load_run(other, dataset_dir=dataset_dir) for other in rest]
    extent = Extent(tokens=tokens, items=items, suites=suites)
    say = partial(print, flush=True)
    found = measure(loaded, read, extent, others=others, say=lambda line: say(f"trellis: {line}"))
    name = "Python's language reference" if text is None else text.name
    make_directories(folder)
    write_json(folder / f"{NAME}.json", {**found, "text_name": name})
    files = write_page(figures_page(found, text=name), folder, NAME)
    print(f"page: {files[0]}; {len(files) - 2} pictures; numbers in {folder / f'{NAME}.json'}")


def _read(text: Path | None) -> str:
    """All documents of a text end to end."""
    if text is None:
        from launch.experiments.expand import essay

        return essay()
    from evals.texts import read_documents

    if not text.is_file():
        raise ValueError(f"--text {text}: no such file; name a .txt or .jsonl file")
    return "\n\n".join(read_documents(text))
