"""RUN/training.html: how a run went, on one self-contained page (`trellis report RUN`).

Written at the end of every start, also of one that failed, and whenever somebody asks. It reads what the run
left: rows, starts, events, profiles, records of hangs. The page about scores is RUN/report.html.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.defaults import changed
from launch.recipe import dotted_items
from trellis_dist.charts import Point
from trellis_dist.files import atomic_write, read_json
from trellis_dist.report import Report
from trellis_dist.training.closing import Closing, close_run
from trellis_dist.training.console import short_time
from trellis_dist.training.metrics import read_rows
from trellis_dist.training.starts import StartRecord, read_starts

__all__ = ["write_training_report"]

POINTS = 1000  # of a curve; a row more is not seen on a page
MOST_LINES = 6  # in one chart: more colours cannot be told apart
LISTED = 50  # alerts, records of hangs
EVENT_BYTES = 8 << 20  # of console.jsonl that are read, from its end
MIB = 2**20
CURVES = (
    ("Loss", "nats per token", {"loss/train": "training", "loss/validation": "validation"}, 1.0),
    ("Validation, bits per byte", "bits per byte", {"validation/bits_per_byte": "validation"}, 1.0),
    ("Gradient norm", "L2 norm before clipping", {"optim/gradient_norm": "gradient norm"}, 1.0),
    ("Learning rate", "learning rate", {"optim/lr": "learning rate"}, 1.0),
    ("Speed", "tokens per second", {"perf/tokens_per_second": "tokens per second"}, 1.0),
    ("MFU", "% of the device's peak", {"perf/mfu": "MFU"}, 100.0),
    ("Most memory of a rank", "MiB", {"memory/peak_bytes": "peak", "memory/used_bytes": "used"}, 1 / MIB),
    ("Waiting for rows", "ms per step, slowest rank", {"perf/loader_wait_seconds": "waiting"}, 1000.0),
    ("Goodput", "% of the time since the first start", {"perf/goodput": "goodput"}, 100.0),
)
PARTS = {  # of rank 0, one after the other
    "perf/data_seconds": "data",
    "perf/forward_seconds": "forward",
    "perf/backward_seconds": "backward",
    "perf/reduction_seconds": "waiting for ranks",
    "perf/update_seconds": "update",
    "perf/save_stall_seconds": "waiting for saves",
}

Row = Mapping[str, Any]


def write_training_report(run_dir: Path) -> Path:
    """Write ``RUN/training.html`` and return its path.

    Raises:
        FileNotFoundError: the folder holds no run.
        OSError: it cannot be written.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "recipe.json").is_file():
        raise FileNotFoundError(
            f"{run_dir} is no run folder: it has no recipe.json; give the folder of a run that was started"
        )
    recipe = read_json(run_dir / "recipe.json")
    rows, starts, events = read_rows(run_dir / "metrics.jsonl"), read_starts(run_dir), _events(run_dir)
    report = Report(str(recipe.get("name", run_dir.name)), f"How the run in {run_dir.absolute()} went")
    closing = _closing(run_dir, recipe, rows=rows, starts=starts, events=events)
    report.facts(_summary(closing))
    if closing.facts.get("error"):
        report.preformatted(closing.facts["error"])
    _starts(report, starts, events)
    _alerts(report, events)
    _curves(report, rows)
    _files(report, run_dir)
    _environment(report, events)
    _recipe(report, recipe)
    report.text(f"Written {_when(time.time())}.")
    path = run_dir / "training.html"
    atomic_write(path, report.render())
    return path


def _events(run_dir: Path) -> list[dict[str, Any]]:
    """The newest events of the console; a line that cannot be read is left out."""
    path, found = run_dir / "console.jsonl", []
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - EVENT_BYTES))
        for line in file.read().splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and {"time", "kind", "text"} <= event.keys():
                found.append(event)
    return found


def _closing(
    run_dir: Path,
    recipe: Row,
    *,
    rows: Sequence[Row],
    starts: Sequence[StartRecord],
    events: Sequence[Row],
) -> Closing:
    """Where the run stands: how its newest start ended, or that it has not."""
    training = recipe["training"]
    outcome, error = "at work", ""
    begun = starts[-1].time if starts else 0.0
    for event in events:
        if event["time"] >= begun and event["kind"] in ("end", "failure"):
            outcome = str(event.get("outcome", "failed"))
            error = event["text"] if event["kind"] == "failure" else str(event.get("error", ""))
    return close_run(
        run_dir,
        outcome=outcome,
        steps=int(training["steps"]),
        tokens_per_step=int(training["global_batch_tokens"]),
        error=error,
        rows=rows,
    )


def _summary(closing: Closing) -> dict[str, str]:
    facts = closing.facts
    shown = {
        "State": facts["outcome"],
        "Step": f"{facts['step']:,} of {facts['steps']:,}",
        "Tokens": f"{facts['tokens']:,}",
    }
    forms: tuple[tuple[str, str, Any], ...] = (
        ("Loss", "loss", "{:.4f}".format),
        ("Validation loss", "validation", "{:.4f}".format),
        ("Best validation loss", "best_validation", "{:.4f}".format),
        ("Bits per byte", "bits_per_byte", "{:.4f}".format),
        ("Tokens per second, this start", "mean_tokens_per_second", "{:,.0f}".format),
        ("Tokens per second, last row", "last_tokens_per_second", "{:,.0f}".format),
        ("Goodput", "goodput", "{:.1%}".format),
        ("Since the first start", "wall_seconds", short_time),
        ("Restarts", "restarts", "{:,}".format),
        ("Steps done again", "lost_steps", "{:,}".format),
    )
    shown |= {label: form(facts[key]) for label, key, form in forms if key in facts}
    saved = facts["checkpoints"]
    shown["Checkpoints"] = f"{len(saved)}, the newest of step {saved[-1]:,}" if saved else "none"
    return shown


def _curves(report: Report, rows: Sequence[Row]) -> None:
    report.section("Curves")
    if not rows:
        return report.text("No row of metrics has been written yet.")
    if len(rows) > POINTS:
        report.text(
            f"{len(rows):,} rows; of each curve at most {POINTS:,} points are drawn: of every stretch of "
            "rows the lowest and the highest, so that no spike is lost. All rows are in metrics.jsonl."
        )
    for title, unit, names, scale in CURVES:
        _curve(report, title, unit, {name: _points(rows, key, scale) for key, name in names.items()})
    parts = {name: _points(rows, key, 1000.0) for key, name in PARTS.items()}
    _curve(report, "Parts of a step", "milliseconds", parts)
    return _own_curves(report, rows)


def _own_curves(report: Report, rows: Sequence[Row]) -> None:
    """What only this model has: a chart for each quantity, a line for each layer or stretch of positions."""
    own = sorted({key for row in rows for key in row if key.startswith(("trellis/", "loss/position_"))})
    if not own:
        return
    report.section("What only this model has")
    for title, members in _families(own).items():
        shown = [members[index * len(members) // MOST_LINES] for index in range(MOST_LINES)]
        lines = members if len(members) <= MOST_LINES else [*shown[:-1], members[-1]]
        some = f", {len(lines)} of {len(members)}" if len(lines) < len(members) else ""
        series = {_member(key): _points(rows, key, 1.0) for key in lines}
        _curve(report, title + some, "nats per token" if title.startswith("Validation") else title, series)


def _curve(report: Report, title: str, unit: str, series: Mapping[str, Sequence[Point]]) -> None:
    kept = {name: points for name, points in series.items() if points}
    if kept:
        report.line_chart(title, kept, x_label="step", y_label=unit)


def _families(keys: Sequence[str]) -> dict[str, list[str]]:
    """Title -> keys: ``trellis/layer_03/name`` under its name, ``loss/position_0000_0063`` together."""
    families: dict[str, list[str]] = {}
    for key in keys:
        by_position = key.startswith("loss/position_")
        title = "Validation loss by position" if by_position else key.rpartition("/")[2].replace("_", " ")
        families.setdefault(title, []).append(key)
    return families


def _member(key: str) -> str:
    if key.startswith("loss/position_"):
        return "positions " + " to ".join(str(int(part)) for part in key.split("_")[1:] if part.isdigit())
    return key.split("/")[1].replace("_", " ")


def _points(rows: Sequence[Row], key: str, scale: float) -> list[Point]:
    """(step, value) of the rows that have a finite one, thinned to ``POINTS``."""
    points = [(float(row["step"]), float(row[key]) * scale) for row in rows if _finite(row.get(key))]
    if len(points) <= POINTS:
        return points
    kept, width = [], -(-len(points) // (POINTS // 2))
    for first in range(0, len(points), width):
        stretch = points[first : first + width]
        low, high = min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])
        kept += sorted({low, high})
    return kept


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _starts(report: Report, starts: Sequence[StartRecord], events: Sequence[Row]) -> None:
    if not starts:
        return
    report.section("Starts")
    header = [
        "start",
        "began (UTC)",
        "host",
        "ranks",
        "from step",
        "to step",
        "in steps",
        "done again",
        "ended",
    ]
    rows = []
    for record, after in zip(starts, [*starts[1:], None]):
        rows.append(
            [
                record.start,
                _when(record.time).removesuffix(" UTC"),
                record.host,
                record.world_size,
                f"{record.resumed_step:,}",
                f"{record.step:,}",
                short_time(record.seconds),
                f"{record.lost_steps:,}",
                record.outcome or ("crashed or killed" if after else "at work, or killed"),
            ]
        )
    report.table(header, rows)
    failures = [event for event in events if event["kind"] == "failure"]
    for event in failures[-LISTED:]:
        number = sum(record.time <= event["time"] for record in starts)
        report.text(f"Start {number or 1} failed, {_when(event['time'])}:")
        report.preformatted(event["text"])


def _alerts(report: Report, events: Sequence[Row]) -> None:
    alerts = [event for event in events if event["kind"] == "alert"]
    if not alerts:
        return
    report.section("Alerts")
    if len(alerts) > LISTED:
        report.text(f"The newest {LISTED} of {len(alerts):,}; all are in console.jsonl.")
    said = [[_when(event["time"]), event["text"].removeprefix("alert: ")] for event in alerts[-LISTED:]]
    report.table(["when", "what"], said)


def _files(report: Report, run_dir: Path) -> None:
    """Profiles and records of hangs: where they are, relative to this page."""
    profiles = sorted(run_dir.glob("profile/step-*/*.trace.json.gz"))
    if profiles:
        report.section("Profiles")
        report.text("Chrome traces: open them in https://ui.perfetto.dev or chrome://tracing.")
        report.links({str(path.relative_to(run_dir)): _size(path) for path in profiles[:LISTED]})
        _operators(report, profiles[0])
    flights = sorted(run_dir.glob("logs/flight-step-*/rank-*.json"))
    if flights:
        report.section("Hangs")
        report.text(
            "The last collectives of each rank when a step hung; the stacks of its threads are in logs/ too."
        )
        report.links({str(path.relative_to(run_dir)): _size(path) for path in flights[:LISTED]})


def _operators(report: Report, trace: Path) -> None:
    path = trace.with_name(trace.name.replace(".trace.json.gz", ".operators.json"))
    try:
        top = read_json(path)[:10]
        device = any(row["self_device_us"] for row in top)
        which = "self_device_us" if device else "self_cpu_us"
        found = [(f"{row['name']} x {row['calls']}", float(row[which])) for row in top]
    except (OSError, ValueError, TypeError, LookupError):  # another version's, or cut short
        return
    title = f"Operators of {trace.parent.name}, {trace.name.partition('.')[0]}: own time on the "
    bars = [(name, own, f"{own / 1000:,.2f} ms") for name, own in found]
    report.bar_chart(title + ("device" if device else "CPU"), bars)


def _size(path: Path) -> str:
    return f"{path.stat().st_size / MIB:.2f} MiB"


def _recipe(report: Report, recipe: Row) -> None:
    differing = changed(recipe)
    report.section("Recipe")
    report.text(f"{len(differing)} values differ from their defaults:")
    values = dict(dotted_items(recipe))
    report.table(
        ["key", "value", "default"],
        [[key, _json(values[key]), _json(default)] for key, default in sorted(differing.items())],
    )
    report.subsection("All of it")
    report.preformatted("\n".join(f"{key} = {_json(value)}" for key, value in values.items()))


def _environment(report: Report, events: Sequence[Row]) -> None:
    """Of the newest start: what it said about itself."""
    start = next((event for event in reversed(events) if event["kind"] == "start"), None)
    if start is None:
        return
    report.section("The newest start")
    report.preformatted("\n".join(line for line in start["text"].splitlines() if not line.startswith("  ")))


def _json(value: Any) -> str:
    return json.dumps(value)


def _when(unix: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(unix))
