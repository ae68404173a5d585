"""The page of `trellis figures`: what `launch.figures.measure.measure` found, as blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from launch.experiments.page import Block, Differences, Lines, Page, Section, Table, Text
from launch.figures.recall import recall_blocks
from launch.figures.steps import steps_blocks
from trellis_dist.charts import Difference, Point

__all__ = ["figures_page"]

_WORDS = {
    "gate": ("Forget gate of the key pass", "beta"),
    "value_gate": ("Forget gate of the value pass", "beta"),
    "step": ("Step size of the key pass", "gamma"),
    "key_norm": ("Norm of the key memory", "|S|"),
    "value_norm": ("Norm of the value memory", "|R|"),
}
_PROBES = {
    "forget_gate": ("Forget gate through training", "beta"),
    "norm_key": ("Norm of the key memory through training", "|S|"),
    "norm_value": ("Norm of the value memory through training", "|R|"),
}
Numbers = Mapping[str, Any]


def figures_page(found: Numbers, *, text: str) -> Page:
    """All blocks; ``text`` says for people which text was read."""
    machine = found["machine"]
    subtitle = (
        f"step {found['step']:,}; {found['tokens']:,} tokens of {text}; {machine['processor']}, "
        f"{machine['cores']} cores, {machine['accelerator'] or 'no accelerator'}"
    )
    return Page(f"Figures of {found['run']}", subtitle, list(_blocks(found)))


def _blocks(found: Numbers) -> Iterator[Block]:
    if not found["layers"]:
        yield Text("No layer of this model is a Trellis layer: it has no gates or memories to show.")
    if "text" in found:
        yield from _on_text(found)
    if found["training"]:
        yield from _through_training(found["training"])
    if found.get("checkpoints"):
        yield Section("Saved checkpoints on the same text")
        yield from steps_blocks(found["checkpoints"], found["layers"])
    if "reasoning" in found:
        yield from _reasoning(found["reasoning"])
    elif found["layers"]:
        yield Text("Reasoning items are left out: name a folder of the suites' rows with --suites.")
    yield from recall_blocks(found["recall"])
    if "held_open" in found:
        yield from _held_open(found["held_open"])
    runs = _named([found, *found["others"]])
    yield from _losses({name: one["losses"] for name, one in runs.items()})
    yield from _speeds({name: one["speeds"] for name, one in runs.items()})


def _named(runs: Sequence[Numbers]) -> dict[str, Numbers]:
    """By name; of equal names by step too, and by place."""
    found: dict[str, Numbers] = {}
    for place, one in enumerate(runs, 1):
        names = (one["run"], f"{one['run']}, step {one['step']:,}", f"{one['run']}, run {place}")
        found[next(name for name in names if name not in found)] = one
    return found


def _on_text(found: Numbers) -> Iterator[Block]:
    """Means over heads by position, and each head's mean over the text."""
    seen, layers = found["text"], found["layers"]
    yield Section("Gates and memories on a long text, by layer and position")
    for name in (name for name in _WORDS if name in seen):
        title, label = _WORDS[name]
        series = {
            f"layer {layer}": _points(seen["ends"], [fmean(part) for part in zip(*heads)])
            for layer, heads in zip(layers, seen[name])
        }
        yield Lines(
            name, f"{title}, mean over heads", series, x_label="tokens read", y_label=label, log_x=False
        )
    heads = range(len(seen["gate"][0]))
    rows = [
        [f"layer {layer}", *(f"{fmean(head):.4f}" for head in of_layer)]
        for layer, of_layer in zip(layers, seen["gate"])
    ]
    yield Table("beta by layer and head, mean over the text", ["", *(f"head {h}" for h in heads)], rows)


def _points(x: Sequence[float], y: Sequence[float]) -> list[Point]:
    return [(float(a), float(b)) for a, b in zip(x, y)]


def _through_training(found: Numbers) -> Iterator[Block]:
    yield Section("Through training")
    for probe in (probe for probe in _PROBES if probe in found):
        title, label = _PROBES[probe]
        series = {f"layer {layer}": [tuple(p) for p in points] for layer, points in found[probe].items()}
        yield Lines(
            f"training-{probe}",
            f"{title}, mean over heads",
            series,
            x_label="step",
            y_label=label,
            log_x=False,
        )


def _reasoning(found: Numbers) -> Iterator[Block]:
    yield Section("Reasoning items against prose")
    yield Text(
        "Each item with its right answer beside as many tokens of the prose, both read from an empty memory; "
        "item minus prose with a 95% bootstrap interval over the pairs. Norms are those at the end. What "
        "differs may be the topic or the words as well as the reasoning."
    )
    header = [
        "",
        *(f"{label}: {part}" for label in ("beta", "|S|", "|R|") for part in ("items", "less prose")),
    ]
    for suite, of_suite in found.items():
        rows = [[f"layer {row['layer']}", *_differences(row)] for row in of_suite["layers"]]
        yield Table(f"{suite}, {of_suite['items']} items", header, rows)
    series = {
        suite: [(row["layer"], row["gate"]["items"] - row["gate"]["prose"]) for row in of_suite["layers"]]
        for suite, of_suite in found.items()
    }
    yield Lines(
        "reasoning", "Gate on items less gate on prose", series, x_label="layer", y_label="beta", log_x=False
    )


def _differences(row: Numbers) -> Iterator[str]:
    for name in ("gate", "key_norm", "value_norm"):
        yield f"{row[name]['items']:.4f}"
        yield _interval(row[name]["difference"], "difference")


def _interval(found: Numbers | None, key: str) -> str:
    return "too few" if found is None else f"{found[key]:+.4f} ({found['low']:+.4f} to {found['high']:+.4f})"


def _held_open(found: Mapping[str, Numbers]) -> Iterator[Block]:
    yield Section("What the gates are worth to this model")
    trained = found["none"]["loss"]
    bars = [_opened(name, one, trained) for name, one in found.items() if name != "none"]
    yield Differences(
        "held-open",
        f"Loss on the text with beta = 1 in a layer, minus that as trained ({trained:.4f} nats per token). "
        "Line: 95% over blocks of 64 tokens",
        bars,
    )
    yield Text(
        "The model was not trained with its gates open: this says what it relies on, not what a model "
        "without gates would reach (trellis reproduce table2 trains those)."
    )


def _opened(name: str, found: Numbers, trained: float) -> Difference:
    apart = found["difference"]
    if apart is None:
        value = found["loss"] - trained
        return Difference(f"{name} open", value, f"{value:+.4f}")
    ends = (apart["low"], apart["high"])
    return Difference(f"{name} open", apart["difference"], _interval(apart, "difference"), *ends)


def _losses(found: Mapping[str, Numbers]) -> Iterator[Block]:
    """Of every run on the same targets."""
    yield Section("Loss by position")
    first = next(iter(found.values()))
    series = {
        name: [(float(max(row["from"], 1)), row["loss"]) for row in one["by_position"]]
        for name, one in found.items()
    }
    yield Lines("loss", f"Loss by tokens before the target, {first['targets']:,} targets", series,
                x_label="tokens of context", y_label="nats per token")  # fmt: skip
    rows = [
        [
            f"{row['from']:,} to {row['to'] - 1:,}",
            f"{row['tokens']:,}",
            *(f"{own['loss']:.4f}" for own in owns),
        ]
        for row, owns in zip(first["by_position"], zip(*(one["by_position"] for one in found.values())))
    ]
    yield Table("nats per token", ["tokens of context", "targets", *found], rows)


def _speeds(found: Mapping[str, Sequence[Numbers]]) -> Iterator[Block]:
    """Of every run the median, and from the slowest to the fastest reading."""
    yield Section("Throughput against length")
    series = {
        name: [(float(row["tokens"]), row["tokens_per_second"]) for row in rows]
        for name, rows in found.items()
    }
    spans = {
        name: [(float(row["tokens"]), row["slowest"], row["fastest"]) for row in rows]
        for name, rows in found.items()
    }
    title = "Reading one prompt: median of three, and from the slowest to the fastest; other work counts"
    yield Lines("speed", title, series, x_label="tokens of the prompt", y_label="tokens per second",
                spans=spans)  # fmt: skip
    rows = [
        [f"{lengths[0]['tokens']:,}", *(_speed(row) for row in lengths)] for lengths in zip(*found.values())
    ]
    yield Table("tokens per second: median (slowest to fastest)", ["tokens", *found], rows)


def _speed(row: Numbers) -> str:
    return f"{row['tokens_per_second']:,.0f} ({row['slowest']:,.0f} to {row['fastest']:,.0f})"
