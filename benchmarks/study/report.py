"""The study's report: benchmarks/results/study.json, the tables of docs/study.md and its plots."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.study import figures
from benchmarks.study.expected import rehearsed
from benchmarks.study.known import check_results
from benchmarks.study.order import noise_level
from benchmarks.study.plan import HALF, OURS, models, plan, scale
from benchmarks.study.results import Store, folder_of
from benchmarks.study.tables import (
    EMPTY,
    Row,
    ablations,
    bigram_loss,
    interval_text,
    lives_table,
    markdown,
    ranking,
    reach_table,
    recalls,
    short_bigram,
    title_of,
    tried,
    tuned,
)

__all__ = ["fill", "gather", "sections", "write_report"]

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
# Of these runs what is not done is named one by one, of others counted.
_WHOLE = ("full-", "long-")
# Of a page that is not written by hand.
HEADINGS = {
    "full-test": "Test books, T = 1,024",
    "long-test": "Test books, T = 4,096",
    "full-validation": "Validation books, T = 1,024",
    "long-validation": "Validation books, T = 4,096",
    "refused": "What does not count yet",
    "positions": "Loss by position",
    "equal-state": "Equal state bytes",
    "tried": "Tried by hand",
    "ablations": "What helps Trellis",
    "left": "Not done",
    "recall": "Associative recall",
    "places": "Where the stale gradient hurts",
    "reach": "What context is worth",
    "half-lives": "How long gates keep",
}


def gather(store: Store) -> dict[str, Any]:
    """Everything that the tables show, as JSON types."""
    runs, ngrams = store.runs(), store.once("ngrams")
    check_results(runs)
    noise = noise_level(runs)
    test, speeds = store.once("test"), store.once("speed")
    found: dict[str, Any] = {
        "runs": len(runs),
        "left": [task.name for task in rehearsed(runs)],
        "noise": noise,
        "short_bigram": short_bigram(ngrams),
        "core_seconds": round(store.spent(), 1),
        "budget": 3600 * plan()["computes"]["budget_hours"],
        "tuning": tuned(runs),
        "tried": tried(store.tried()),
        "ablations": ablations(runs),
        "recall": recalls(runs),
        "speed": speeds and speeds["lengths"],
        "places": store.once("places"),
        "reach": store.once("reach"),
        "bigram": {},
    }
    for split, scores in (("validation", None), ("test", test["runs"] if test else {})):
        if ngrams is not None:
            found["bigram"][split] = bigram_loss(ngrams, split)
            for kind in ("full", "long"):
                rows = ranking(runs, kind, ngrams, scores=scores, speeds=speeds)
                found[f"{kind}-{split}"] = rows
    return found


def sections(found: Mapping[str, Any]) -> dict[str, str]:
    """Name of a marker in docs/study.md -> what stands between its ends."""
    made = {
        name: _ranking(found.get(name, []), found["bigram"].get(name.partition("-")[2]))
        for name in ("full-test", "full-validation", "long-test", "long-validation")
    }
    whole = found.get("full-test") or found.get("full-validation", [])
    return made | {
        "refused": _refused(found),
        "positions": _positions(whole),
        "cost": _cost(whole),
        "equal-state": _equal_state(whole),
        "tuning": _tuning(found["tuning"], found["short_bigram"]),
        "tried": _tried(found["tried"]),
        "ablations": _ablations(found["ablations"], found["short_bigram"], found["noise"]),
        "left": _left(found["left"]),
        "recall": _recall(found["recall"]),
        "speed": _speed(found["speed"]),
        "places": _places(found["places"]),
        "reach": reach_table(found["reach"]),
        "half-lives": lives_table(found["reach"]),
        "budget": f"{found['runs']} runs, {found['core_seconds'] / 3600:.1f} of "
        f"{found['budget'] / 3600:.0f} core-hours.",
    }


def _tried(rows: Sequence[Row]) -> str:
    heads = ("model", "changed", "learning rate", "tokens", "nats per token", "bits per byte")
    lines = [
        (
            title_of(row["model"]),
            ", ".join(f"{key.removeprefix('model.')} {value}" for key, value in row["set"].items()),
            f"{row['rate']:g}",
            f"{row['tokens']:,}",
            f"{row['loss']:.4f}",
            f"{row['bits_per_byte']:.4f}",
        )
        for row in rows
    ]
    ours = sum(row["model"] in models("ours") for row in rows)
    counted = f"{len(rows)} runs: {ours} of forms of Trellis, {len(rows) - ours} of baselines."
    return f"{markdown(heads, lines)}\n\n{counted}" if lines else EMPTY


def _ranking(rows: Sequence[Row], bigram: float | None) -> str:
    heads = (
        "model",
        "seeds",
        "perplexity",
        "nats per token",
        "bits per byte",
        "less Trellis's, nats",
        "ranks",
    )
    # A difference to Trellis counts where both do.
    ours = any(row["refused"] for row in rows if row["group"] == OURS)
    lines = [
        (
            row["title"],
            str(row["seeds"]),
            f"{row['perplexity']:.2f}",
            f"{row['loss']:.4f}",
            f"{row['bits_per_byte']:.4f}",
            interval_text(row["difference"]),
            "no" if ours or row["refused"] else "yes",
        )
        for row in rows
    ]
    if not lines:
        return EMPTY
    return markdown(heads, lines) + f"\n\nThe interpolated bigram: {bigram:.4f} nats per token."


def _refused(found: Mapping[str, Any]) -> str:
    """Each model and table with the reasons."""
    lines, rows = [], 0
    for kind, split in itertools.product(("full", "long"), ("validation", "test")):
        where = f"{split} books, {'T = 4,096' if kind == 'long' else 'T = 1,024'}"
        for row in found.get(f"{kind}-{split}", []):
            rows += 1
            lines += [f"- {row['title']}, {where}: {reason}" for reason in row["refused"]]
    return ("\n".join(lines) or "Every finished full run passes both gates.") if rows else EMPTY


def _places(found: Mapping[str, Any] | None) -> str:
    """A column per pair of runs."""
    if not found:
        return EMPTY
    heads = ("place in the chunk", *(f"`{pair}`" for pair in found))
    lines = [(f"{rows[0]['from']}-", *(interval_text(row) for row in rows)) for rows in zip(*found.values())]
    return markdown(heads, lines)


def _positions(rows: Sequence[Row]) -> str:
    edges = list(rows[0]["by_position"]) if rows else []
    lines = [
        (
            row["title"],
            *(f"{loss:.3f}" for loss in row["by_position"].values()),
            interval_text(row["fall"]),
        )
        for row in rows
    ]
    return markdown(("model", *(f"{edge}-" for edge in edges), "512- less 64-127"), lines)


def _cost(rows: Sequence[Row]) -> str:
    heads = ("model", "perplexity", "parameters", "state, kB", "MFLOPs per token", "us per token")
    return markdown(heads, [(row["title"], f"{row['perplexity']:.2f}", *_costs(row)) for row in rows])


def _costs(row: Row) -> tuple[str, ...]:
    seconds = row["seconds_per_token"]
    return (
        f"{row['parameters']:,}",
        f"{row['state_bytes'] / 1e3:.1f}",
        f"{row['flops_per_token'] / 1e6:.2f}",
        "-" if seconds is None else f"{1e6 * seconds:.0f}{'' if row['in_turns'] else ' ~'}",
    )


def _equal_state(rows: Sequence[Row]) -> str:
    """Models whose memories have about as many bytes as Gated DeltaNet's."""
    known = {row["group"]: row for row in rows}
    if "gated_deltanet" not in known or HALF not in known:
        return EMPTY
    wanted = known["gated_deltanet"]["memory_bytes"]
    alike = [row for row in rows if abs(row["memory_bytes"] / wanted - 1) < 0.15]
    heads = ("model", "memory, kB", "state, kB", "perplexity", "less Trellis's with half the slots, nats")
    lines = [
        (
            row["title"],
            f"{row['memory_bytes'] / 1e3:.1f}",
            f"{row['state_bytes'] / 1e3:.1f}",
            f"{row['perplexity']:.2f}",
            interval_text(row["difference_half"]),
        )
        for row in alike
    ]
    return markdown(heads, lines)


def _tuning(rows: Sequence[Row], bigram: float | None) -> str:
    lines = [
        (
            row["title"],
            f"`{row['run']}`",
            f"{row['rate']:g}",
            f"{row['loss']:.4f}{_above(row['loss'], bigram)}",
            f"{row['bits_per_byte']:.4f}",
        )
        for row in rows
    ]
    made = markdown(("model", "run", "learning rate", "nats per token", "bits per byte"), lines)
    return made + (_of_bigram(bigram) if rows else "")


def _above(loss: float, bigram: float | None) -> str:
    """The mark of a model that has not learned more than pairs of tokens."""
    return " **^**" if bigram is not None and loss >= bigram else ""


def _of_bigram(bigram: float | None) -> str:
    if bigram is None:
        return "\n\nThe interpolated bigram has not been scored on this text yet."
    return f"\n\nThe interpolated bigram on the same text: {bigram:.4f} nats per token. **^**: not below it."


def _ablations(rows: Sequence[Row], bigram: float | None, noise: float | None) -> str:
    words = {None: "-", True: "within the noise", False: "outside it"}
    lines = [
        (
            f"`{row['of']}`",
            row["title"],
            f"{row['loss']:.4f}{_above(row['loss'], bigram)}",
            interval_text(row),
            words[row["within"]],
        )
        for row in rows
    ]
    heads = ("of", "change", "nats per token", "more (+) or less (-)", "twice the noise")
    if not rows:
        return EMPTY
    known = "not measured yet" if noise is None else f"{noise:.4f} nats per token"
    return markdown(heads, lines) + f"\n\nNoise: {known}." + _of_bigram(bigram)


def _left(names: Sequence[str]) -> str:
    if not names:
        return "Every run of the plan is done."
    short: dict[str, int] = {}
    for kind in (name.partition("-")[0] for name in names if not name.startswith(_WHOLE)):
        short[kind] = short.get(kind, 0) + 1
    listed = [f"{count} of `{kind}-...`" for kind, count in short.items()]
    listed += [f"`{name}`" for name in names if name.startswith(_WHOLE)]
    return f"{len(names)} runs: {', '.join(listed)}."


def _recall(rows: Sequence[Row]) -> str:
    pairs = [str(count) for count in plan()["recall"]["pairs"]]
    lines = [
        (
            row["title"],
            *(f"{row['accuracy'][count]:.2f}" for count in pairs),
            f"{row['mean']:.3f}" + ("" if row["deviation"] is None else f" ({row['deviation']:.3f})"),
            str(row["seeds"]),
            f"{row['rate']:g}, {'the highest ' if row['highest'] else ''}of {row['rates']}",
            f"{row['state_bytes'] / 1e3:.1f}",
        )
        for row in rows
    ]
    heads = ("mean (deviation)", "seeds", "learning rate", "state, kB")
    return markdown(("model", *(f"{count} pairs" for count in pairs), *heads), lines)


def _speed(lengths: Mapping[str, Any] | None) -> str:
    if lengths is None:
        return "not measured yet"
    heads = ("model", "T", "us per token, median", "10% to 90%", "MFLOPs per token", "state, kB")
    lines = [
        (
            title_of(name),
            length,
            f"{1e6 * row['seconds_per_token']:.0f}",
            f"{1e6 * row['low']:.0f} to {1e6 * row['high']:.0f}",
            f"{row['flops_per_token'] / 1e6:.2f}",
            f"{row['state_bytes'] / 1e3:.1f}",
        )
        for length, rows in lengths.items()
        for name, row in rows.items()
    ]
    return markdown(heads, lines)


def fill(page: str, made: Mapping[str, str]) -> str:
    """``page`` with what stands between ``<!-- study:NAME -->`` and ``<!-- /study:NAME -->`` replaced.

    Raises:
        ValueError: a marker is missing.
    """
    for name, text in made.items():
        begin, end = f"<!-- study:{name} -->", f"<!-- /study:{name} -->"
        head, found, rest = page.partition(begin)
        _, also, tail = rest.partition(end)
        if not (found and also):
            raise ValueError(
                f"{name_of_page()} lacks {begin} ... {end}: put the two lines where the table belongs"
            )
        page = f"{head}{begin}\n{text}\n{end}{tail}"
    return page


def name_of_page() -> str:
    """docs/study.md has the tables of the scale "tiny"; others have pages of their own."""
    return f"{folder_of(scale()).name}.md"


def _bare(names: Iterable[str]) -> str:
    """A page of tables alone, for a scale that nobody has written of."""
    about = "What each table is, [the study's page](study.md) says; its numbers are of two CPU cores."
    places = (
        f"## {HEADINGS.get(name, name.capitalize())}\n\n<!-- study:{name} -->\n<!-- /study:{name} -->"
        for name in names
    )
    return "\n\n".join([f"# The study, --scale {scale()}", about, *places]) + "\n"


def write_report(store: Store, *, docs: Path = DOCS, output: Path | None = None) -> list[Path]:
    """Write the JSON, the page's tables and the plots that there is something for; their paths."""
    found = gather(store)
    output = output or folder_of(scale()).with_suffix(".json")
    page, made = docs / name_of_page(), sections(found)
    text = page.read_text(encoding="utf-8") if page.is_file() else _bare(made)
    output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    page.write_text(fill(text, made), encoding="utf-8")
    rows = found.get("full-test") or found.get("full-validation", [])
    noise = found["noise"] and plan()["noise"]["times"] * found["noise"]
    drawn = figures.draw(rows, found["ablations"], begin=page.with_suffix(""), ours=OURS, noise=noise)
    return [output, page, *drawn]
