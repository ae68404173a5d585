"""What the study found, as data and as Markdown tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.study.books import BASE
from benchmarks.study.intervals import Interval, Losses, counts, difference, falls
from benchmarks.study.plan import HALF, OURS, models, plan
from benchmarks.study.score import losses_of
from launch.recipe import load_recipe

__all__ = ["EMPTY", "ablations", "bigram_loss", "markdown", "ranking", "recalls", "title_of", "tuned"]

EMPTY = "no run yet"
FP32_BYTES = 4
Results = Mapping[str, Mapping[str, Any]]
Row = dict[str, Any]


def title_of(group: str) -> str:
    """The name of a model in tables."""
    named = {OURS: "**Trellis**", HALF: "Trellis, half the slots"}
    return named.get(group) or str(models()[group]["title"])


def bigram_loss(ngrams: Mapping[str, Any], split: str) -> float:
    """Nats per token of the interpolated bigram on a split: of the lower order that is better there."""
    books = ngrams[split].values()
    targets = sum(book["targets"] for book in books)
    orders = ("kneser_ney", "unigram_order")
    return float(min(sum(book[order] for book in books) for order in orders) / targets)


def groups(results: Results, kind: str, scores: Mapping[str, Any] | None) -> dict[str, Losses]:
    """Model -> its losses over seeds; on the test books where ``scores`` are given, else on validation."""
    found: dict[str, dict[int, Any]] = {}
    lengths: dict[str, int] = {}
    for name, result in results.items():
        about = result["about"]
        scored = result.get("validation") if scores is None else scores.get(name)
        if about["kind"] == kind and scored is not None:
            found.setdefault(about["group"], {})[about["seed"]] = scored["books"]
            lengths[about["group"]] = about["length"]
    return {name: losses_of(seeds, length=lengths[name]) for name, seeds in found.items()}


def ranking(
    results: Results,
    kind: str,
    ngrams: Mapping[str, Any],
    *,
    scores: Mapping[str, Any] | None = None,
    speeds: Mapping[str, Any] | None = None,
) -> list[Row]:
    """A row per model, the lowest loss first: loss, difference to Trellis, cost, why it does not count."""
    split = "validation" if scores is None else "test"
    losses, bigram = groups(results, kind, scores), bigram_loss(ngrams, split)
    rows = []
    for group, own in losses.items():
        runs = {name: found for name, found in results.items() if _is(found, kind, group)}
        first = next(iter(runs.values()))
        sizes = sum(book["bytes"] for book in ngrams[split].values())
        apart = difference(own, losses[OURS]) if OURS in losses and group != OURS else None
        rows.append(
            {
                "group": group,
                "title": title_of(group),
                "seeds": len(own.seeds),
                "loss": own.mean,
                "perplexity": math.exp(own.mean),
                "bits_per_byte": own.mean * own.tokens.sum() / (math.log(2) * sizes),
                "difference": apart and apart.row(),
                "by_position": dict(zip(map(str, own.edges), own.by_position())),
                "fall": falls(own).row(),
                "parameters": first["model"]["parameters"],
                "state_bytes": first["model"]["state_bytes"],
                "memory_bytes": _memory(first),
                "flops_per_token": first["model"]["flops_per_token"],
                "seconds_per_token": _seconds(group, first, speeds),
                "refused": counts(own, bigram),
            }
        )
    return sorted(rows, key=lambda row: row["loss"])


def _is(found: Mapping[str, Any], kind: str, group: str) -> bool:
    return bool(found["about"]["kind"] == kind and found["about"]["group"] == group)


def _memory(found: Mapping[str, Any]) -> int:
    """State bytes without Trellis's copies from the chunk's start, which it needs between chunks only."""
    total, changed = int(found["model"]["state_bytes"]), found["about"]["settings"]["set"]
    if changed.get("model.pattern", ["trellis"]) != ["trellis"]:
        return total
    model = load_recipe(str(BASE)).model
    slots = int(changed.get("model.trellis.slots", model.trellis.slots))
    return total - 2 * FP32_BYTES * model.num_layers * model.dim * slots


def _seconds(group: str, found: Mapping[str, Any], speeds: Mapping[str, Any] | None) -> float | None:
    """Measured in turns where it was, else in the run itself."""
    name, length = found["about"]["settings"]["model"], str(found["about"]["length"])
    if speeds is not None and group != HALF and name in speeds["lengths"].get(length, {}):
        return float(speeds["lengths"][length][name]["seconds_per_token"])
    own = found["training"]["seconds_per_token"]
    return None if own is None else float(own)


def tuned(results: Results) -> list[Row]:
    """Every short run of learning rates and searches: model, rate, loss."""
    rows = [
        {
            "run": name,
            "title": title_of(found["about"]["group"]),
            "rate": found["about"]["settings"]["rate"],
            "loss": found["validation"]["loss"],
            "bits_per_byte": found["validation"]["bits_per_byte"],
        }
        for name, found in results.items()
        if found["about"]["kind"] in ("tune", "search")
    ]
    return sorted(rows, key=lambda row: (row["title"], row["loss"]))


def ablations(results: Results) -> list[Row]:
    """Each variant against what it changes, at the same learning rate: the paired difference."""
    rows = []
    for name, entry in plan()["variants"].items():
        found = results.get(f"vary-{name}")
        base = found and _base(results, entry["of"], found["about"]["settings"]["rate"])
        if found is None or base is None:
            continue
        apart = difference(_short(found), _short(base))
        rows.append({"variant": name, "of": entry["of"], "title": entry["title"], **apart.row()})
    return sorted(rows, key=lambda row: (row["of"], row["estimate"]))


def _base(results: Results, model: str, rate: float) -> Mapping[str, Any] | None:
    for found in results.values():
        about = found["about"]
        if about["kind"] == "tune" and about["group"] == model and about["settings"]["rate"] == rate:
            return found
    return None


def _short(found: Mapping[str, Any]) -> Losses:
    about = found["about"]
    return losses_of({about["seed"]: found["validation"]["books"]}, length=about["length"])


def recalls(results: Results) -> list[Row]:
    """Per model the learning rate with the best mean accuracy."""
    best: dict[str, Row] = {}
    for found in results.values():
        if found["about"]["kind"] != "recall":
            continue
        group, mean = found["about"]["group"], sum(found["accuracy"].values()) / len(found["accuracy"])
        row = {
            "title": title_of(group),
            "accuracy": found["accuracy"],
            "mean": mean,
            "rate": found["about"]["settings"]["rate"],
            "state_bytes": found["state_bytes"],
        }
        if group not in best or mean > best[group]["mean"]:
            best[group] = row
    return sorted(best.values(), key=lambda row: -row["mean"])


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, or that there is nothing in it."""
    if not rows:
        return EMPTY
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def interval_text(row: Mapping[str, Any] | Interval | None) -> str:
    """+0.012 [+0.004, +0.021], or a dash."""
    if row is None:
        return "-"
    numbers = row.row() if isinstance(row, Interval) else row
    mark = "" if numbers["over"] == "books x seeds" else " *"
    return f"{numbers['estimate']:+.4f} [{numbers['low']:+.4f}, {numbers['high']:+.4f}]{mark}"
