"""Forecasting: the mixers behind one patch forecaster, beside DLinear, on ETTh1 and Exchange.

    python -m benchmarks.forecast --data DIR    writes benchmarks/results/forecast.json and the tables of
                                                docs/forecasting.md
    python -m benchmarks.forecast --show        prints those tables

DIR holds ETTh1.csv and exchange_rate.txt.gz. Each run takes minutes on one core; --minutes N ends after the
epoch that is running by then, with exit status 75, and the same command goes on. Runs that the JSON holds
with today's settings are not run again. --rates R R tries each learning rate and keeps the best on
validation; without it every mixer has the same one, and the tables say so. Results are published here, the
series (ETTh1: CC BY-ND) are not.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine, versions
from trellis_dist.files import atomic_write, read_json, write_json
from trellis_dist.forecasting import cases as known
from trellis_dist.forecasting.cases import Case, Data, cases_of, identity_of, open_data
from trellis_dist.forecasting.models import known_models, settings_of
from trellis_dist.forecasting.runs import run_case
from trellis_dist.forecasting.training import usable_device

RESULT = Path(__file__).parent / "results" / "forecast.json"
PAGE = Path(__file__).parents[1] / "docs" / "forecasting.md"
FILES = {name: known.FILES[name] for name in ("etth1", "exchange")}
HORIZONS = (96, 192, 336, 720)
# As of `trellis`: cut short, the same command goes on.
EXIT_CUT = 75
MODELS = ("dlinear", "attention", "trellis", "trellis-corrected", "gated_deltanet", "gsa", "mamba2")
# (MSE, MAE) of DLinear as published: Zeng et al., AAAI 2023, table 2, look-back 336. Their repository,
# cure-lab/LTSF-Linear, has these rows in LTSF-Benchmark.md, with the names of DLinear and NLinear exchanged.
PUBLISHED = {
    "etth1": {96: (0.375, 0.399), 192: (0.405, 0.416), 336: (0.439, 0.443), 720: (0.472, 0.490)},
    "exchange": {96: (0.081, 0.203), 192: (0.157, 0.293), 336: (0.305, 0.414), 720: (0.643, 0.601)},
}


def measure(
    datasets: dict[str, Data],
    cases: Sequence[Case],
    *,
    work: Path,
    output: Path,
    device: str = "cpu",
    deadline: float | None = None,
) -> bool:
    """Run what ``output`` does not hold yet, writing it after every run; whether all is there.

    Runs of other settings than today's are taken out at once.

    Raises:
        ValueError: a series is another file than the one that runs of ``output`` are of.
    """
    report = read_json(output) if output.is_file() else {"data": {}, "models": {}, "runs": []}
    for name, data in datasets.items():
        if report["data"].get(name, data.record())["sha256"] != data.sha256:
            raise ValueError(f"{FILES[name]} is another file than {output} is of: give another --output")
    runs = [run for run in report["runs"] if _holds(run, datasets)]
    if len(runs) < len(report["runs"]):  # a table of today's models has no runs of others
        write_json(output, _report(report, datasets, runs))
    complete = True
    for case, (name, data) in product(cases, datasets.items()):
        if any(_answers(run, case, data) for run in runs if run["dataset"] == name):
            continue
        result = run_case(case, data, work / name, device=device, deadline=deadline)
        if result is None:  # later cases may have finished before
            complete = False
            continue
        settings = settings_of(case.model, data.shape(case.horizon), dataset=name)
        training = settings["training"] | {"learning_rate": result["learning_rate"]}
        runs = [run for run in runs if run["dataset"] != name or not _same(run, case)]
        runs.append({"dataset": name, **result, "training": training})
        report["models"][case.model] = settings["model"]
        write_json(output, _report(report, datasets, runs))
        print(f"{name} {case.model} {case.horizon} seed {case.seed}: MSE {result['mse']:.4f}", flush=True)
    return complete


def _holds(run: dict[str, Any], datasets: dict[str, Data]) -> bool:
    """Whether a run was made with today's settings and data; of a data set not given, it is kept."""
    data = datasets.get(run["dataset"])
    return data is None or run["identity"] == _identity(_case(run), data, run)


def _identity(case: Case, data: Data, run: dict[str, Any]) -> str:
    return identity_of(case, data.record(), device=run.get("device", "cpu"))


def _answers(run: dict[str, Any], case: Case, data: Data) -> bool:
    """Whether a run that holds makes ``case`` needless: one whose rate was chosen does for one with none."""
    return _same(run, case) and (not case.rates or run["identity"] == _identity(case, data, run))


def _same(run: dict[str, Any], case: Case) -> bool:
    """Of the same cell and seed, whatever rates were tried."""
    return (run["model"], run["horizon"], run["seed"]) == (case.model, case.horizon, case.seed)


def _case(run: dict[str, Any]) -> Case:
    rates = tuple(rate for rate, _ in run.get("rates", []))
    return Case(run["model"], run["horizon"], run["seed"], rates)


def _report(report: dict[str, Any], datasets: dict[str, Data], runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "machine": machine(),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "data": report["data"] | {name: data.record() for name, data in datasets.items()},
        "models": {name: report["models"][name] for name in sorted({run["model"] for run in runs})},
        "runs": sorted(runs, key=lambda run: (run["dataset"], run["horizon"], run["model"], run["seed"])),
    }


def render(report: dict[str, Any]) -> str:
    """A table for each data set: MSE / MAE, the mean over seeds, beside what was published of DLinear."""
    return "\n\n".join(_table(name, report["runs"]) for name in FILES)


def _table(dataset: str, runs: Iterable[dict[str, Any]]) -> str:
    runs = [run for run in runs if run["dataset"] == dataset]
    columns = [dataset, *map(str, HORIZONS), "parameters at 96", "learning rate", "CPU minutes a run"]
    head = ["| " + " | ".join(columns) + " |", "|---|" + "--:|" * (len(columns) - 1)]
    cells = [f"{mse:.3f} / {mae:.3f}" for mse, mae in PUBLISHED[dataset].values()]
    lines = [f"| DLinear as published | {' | '.join(cells)} | | | |"]
    for model in (name for name in MODELS if any(run["model"] == name for run in runs)):
        lines.append(_row(model, [run for run in runs if run["model"] == model]))
    return "\n".join(head + lines)


def _row(model: str, runs: list[dict[str, Any]]) -> str:
    cells = [_cell([run for run in runs if run["horizon"] == horizon]) for horizon in HORIZONS]
    sizes = {run["parameters"] for run in runs if run["horizon"] == HORIZONS[0]}
    size = f"{sizes.pop():,}" if sizes else ""
    minutes = statistics.fmean(run["cpu_seconds"] for run in runs) / 60
    where = " (cuda)" if any(run.get("device") == "cuda" for run in runs) else ""
    return f"| {model} | {' | '.join(cells)} | {size} | {_rate(model, runs)} | {minutes:.1f}{where} |"


def _rate(model: str, runs: list[dict[str, Any]]) -> str:
    """The learning rates of a row, and who chose them."""
    if model == "dlinear":
        return "its authors'"
    kinds: dict[str, set[float]] = {}
    for run in runs:
        kinds.setdefault(_chosen(model, run), set()).add(run["training"]["learning_rate"])
    return "; ".join(
        f"{', '.join(f'{rate:g}' for rate in sorted(kinds[kind]))}, {kind}" for kind in sorted(kinds)
    )


def _chosen(model: str, run: dict[str, Any]) -> str:
    """How a run came to its learning rate."""
    tried = len(run.get("rates", []))
    if tried > 1:
        return f"best of {tried} on validation"
    if tried == 1:
        return "given"
    return "chosen with it" if model == "attention" else "attention's"


def _cell(runs: list[dict[str, Any]]) -> str:
    """MSE / MAE; with several seeds, how many and the largest distance of an MSE from the mean."""
    if not runs:
        return "-"
    mse, mae = (statistics.fmean(run[key] for run in runs) for key in ("mse", "mae"))
    if len(runs) == 1:
        return f"{mse:.3f} / {mae:.3f}"
    spread = max(abs(run["mse"] - mse) for run in runs)
    return f"{mse:.3f} / {mae:.3f} ({len(runs)} seeds, {spread:.3f})"


def update_page(report: dict[str, Any], page: Path) -> None:
    """Put the tables between the marks of ``page``."""
    text = page.read_text(encoding="utf-8")
    block = f"<!-- forecast tables -->\n{render(report)}\n<!-- end -->"
    changed, count = re.subn(
        r"<!-- forecast tables -->\n.*?<!-- end -->", lambda _: block, text, flags=re.DOTALL
    )
    if count != 1:
        raise ValueError(
            f"{page} has {count} places for the tables: keep one '<!-- forecast tables -->' block"
        )
    atomic_write(page, changed)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or show what was measured; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.forecast", description=__doc__)
    parser.add_argument("--show", action="store_true", help="print the tables of the last result")
    parser.add_argument("--data", type=Path, help="folder of ETTh1.csv and exchange_rate.txt.gz")
    parser.add_argument("--work", type=Path, default=Path("runs/forecast"), help="for checkpoints")
    parser.add_argument("--datasets", nargs="+", choices=list(FILES), default=list(FILES))
    parser.add_argument("--models", nargs="+", help="those of the page that are registered unless given")
    parser.add_argument("--horizons", type=int, nargs="+", choices=HORIZONS, default=list(HORIZONS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[], help="learning rates that each mixer chooses from"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--minutes", type=float, help="end after the epoch that runs by then")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    if not options.show and options.data is None:
        parser.error("--data DIR is needed to measure")
    try:
        complete = options.show or _measure_all(options)
        report = read_json(options.output)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(render(report))
    if not options.show:
        update_page(report, options.page)
    if not complete:
        print("time is up; the same command goes on")
    return 0 if complete else EXIT_CUT


def _measure_all(options: argparse.Namespace) -> bool:
    usable_device(options.device)
    if not all(0 < rate < 1 for rate in options.rates):
        raise ValueError(f"--rates {options.rates}: give learning rates between 0 and 1")
    torch.set_num_threads(1)
    deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    datasets = {name: open_data(options.data / FILES[name], dataset=name) for name in options.datasets}
    models = options.models or [name for name in MODELS if name in known_models()]
    cases = cases_of(
        models=models,
        horizons=options.horizons,
        seeds=options.seeds,
        rates=options.rates,
        dataset=next(iter(FILES)),  # a known series: DLinear keeps its authors' rates
    )
    places = {"work": options.work, "output": options.output}
    return measure(datasets, cases, **places, device=options.device, deadline=deadline)


if __name__ == "__main__":
    sys.exit(main())
