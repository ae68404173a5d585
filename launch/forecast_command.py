"""`trellis forecast`: its options, and the table it prints."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["forecast"]

# Channels that the first line names.
NAMED = 12


class Dataset(StrEnum):
    """How the rows of a file are split."""

    ETTH1 = "etth1"
    ETTH2 = "etth2"
    ETTM1 = "ettm1"
    ETTM2 = "ettm2"
    EXCHANGE = "exchange"
    CSV = "csv"


class Device(StrEnum):
    """Where a forecaster trains."""

    CPU = "cpu"
    CUDA = "cuda"


def forecast(
    data: Annotated[
        Path,
        typer.Option(
            "--data", metavar="PATH", help="CSV, also .gz, or a folder of the known series; a date is fine"
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="for models and results")],
    dataset: Annotated[
        Dataset, typer.Option(help="ett...: 12/4/4 months; exchange, csv: --fractions")
    ] = Dataset.CSV,
    horizons: Annotated[str, typer.Option(metavar="N,N", help="steps to forecast")] = "96,192,336,720",
    models: Annotated[
        str, typer.Option(metavar="A,B", help="dlinear, attention, trellis, trellis-corrected, ...")
    ] = "dlinear,attention,trellis",
    seeds: Annotated[str, typer.Option(metavar="N,N", help="of weights and order")] = "0",
    look_back: Annotated[int, typer.Option(min=1, help="steps that are read")] = 336,
    fractions: Annotated[
        str, typer.Option(metavar="A,B,C", help="of training, validation and test  [default: 0.7,0.1,0.2]")
    ] = "",
    rates: Annotated[
        str,
        typer.Option(
            metavar="R,R", help="learning rates: each takes its best on validation; dlinear: of csv"
        ),
    ] = "",
    epochs: Annotated[int | None, typer.Option(min=1, help="at most; each model's own unless given")] = None,
    windows: Annotated[
        int | None, typer.Option(min=0, help="drawn for an epoch, 0 for all; each model's own unless given")
    ] = None,
    device: Annotated[Device, typer.Option(help="where to train")] = Device.CPU,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="stop after an epoch by then; the same command goes on")
    ] = None,
) -> None:
    """Train forecasters on a series and print their test errors; finished runs are read back.

    Errors are on data standardised by the training rows. docs/forecasting.md says how it is split. Each run's
    forecast.csv has the steps after the end of the file. Exit status 75: --minutes were over, and the same
    command goes on.
    """
    from trellis_dist.forecasting.cases import cases_of, open_data
    from trellis_dist.forecasting.runs import run_cases

    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    cases = cases_of(
        models=_parts(models, "--models"),
        horizons=_numbers(horizons, "--horizons"),
        seeds=_numbers(seeds, "--seeds", least=0),
        rates=_rates(rates),
        changed=_changed(epochs, windows),
        dataset=dataset,
    )
    opened = open_data(data, dataset=dataset, look_back=look_back, fractions=_fractions(fractions))
    print(_about(opened), flush=True)
    results = []
    for result in run_cases(cases, opened, out, device=device, deadline=deadline, say=_say):
        results.append(result)
        print(_line(result), flush=True)
    if results:
        print(render(results))
        for line in _about_rates(results):
            print(line)
    if len(results) < len(cases):
        from trellis_dist.training.job import EXIT_TERMINATED

        print(f"stopped with {len(results)} of {len(cases)} runs finished; the same command goes on")
        raise typer.Exit(EXIT_TERMINATED)


def _changed(epochs: int | None, windows: int | None) -> dict[str, int | None]:
    """What of the settings of training was given; 0 windows are all."""
    given = {"epochs": epochs} if epochs is not None else {}
    return given | ({"windows": windows or None} if windows is not None else {})


def _about(data: Any) -> str:
    rows, channels = data.series.values.shape
    names = ", ".join(data.series.names[:NAMED]) + (", ..." if channels > NAMED else "")
    train, validation, test = data.borders
    parts = f"{train} training, {validation} validation, {test} test"
    return f"{rows} rows of {channels} channels ({names}): {parts}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def render(results: Sequence[dict[str, Any]]) -> str:
    """MSE / MAE of every model and horizon, means over seeds, as a Markdown table."""
    horizons = sorted({result["horizon"] for result in results})
    lines = ["| model | " + " | ".join(map(str, horizons)) + " |", "|---|" + "--:|" * len(horizons)]
    for model in dict.fromkeys(result["model"] for result in results):
        of_model = [result for result in results if result["model"] == model]
        cells = [_cell([r for r in of_model if r["horizon"] == horizon]) for horizon in horizons]
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(results: Sequence[dict[str, Any]]) -> str:
    if not results:
        return "-"
    return " / ".join(f"{statistics.fmean(r[key] for r in results):.3f}" for key in ("mse", "mae"))


def _line(result: dict[str, Any]) -> str:
    return (
        f"{result['model']}, horizon {result['horizon']}, seed {result['seed']}: "
        f"MSE {result['mse']:.4f}, MAE {result['mae']:.4f} after {result['epochs']} epochs"
    )


def _about_rates(results: Sequence[dict[str, Any]]) -> list[str]:
    """Under the table: the rates of its mixers, and whether they were chosen for them."""
    # Results that an earlier version wrote do not say it.
    mixers = [r for r in results if r["model"] != "dlinear" and "learning_rate" in r]
    if not mixers:
        return []
    used = ", ".join(f"{rate:g}" for rate in sorted({result["learning_rate"] for result in mixers}))
    if all(len(result["rates"]) > 1 for result in mixers):
        return [f"learning rates {used}: each the best of those tried on validation"]
    if any(len(result["rates"]) > 1 for result in mixers):
        return [f"learning rates {used}: some chosen on validation, some given"]
    return [f"learning rate {used}, not chosen for each mixer: --rates 5e-4,1e-3,2e-3 does, on validation"]


def _rates(text: str) -> list[float]:
    """Of --rates; none of an empty text."""
    try:
        rates = [float(part) for part in text.split(",")] if text else []
    except ValueError as error:
        raise ValueError(f"--rates {text!r}: give learning rates, such as 5e-4,1e-3") from error
    if not all(0 < rate < 1 for rate in rates):
        raise ValueError(f"--rates {text!r}: give learning rates between 0 and 1, such as 5e-4,1e-3")
    return rates


def _parts(text: str, option: str) -> list[str]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise ValueError(f"{option} {text!r} names nothing: give names or numbers with commas between")
    return parts


def _numbers(text: str, option: str, *, least: int = 1) -> list[int]:
    parts = _parts(text, option)
    if not all(part.isdecimal() and int(part) >= least for part in parts):
        raise ValueError(f"{option} {text!r}: give whole numbers from {least} on, with commas between")
    return [int(part) for part in parts]


def _fractions(text: str) -> tuple[float, float, float] | None:
    if not text:
        return None
    try:
        train, validation, test = (float(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"--fractions {text!r}: give three shares of 1, such as 0.7,0.1,0.2") from error
    return train, validation, test
