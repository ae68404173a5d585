"""What the study found, as data and as Markdown tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.study.books import BASE
from benchmarks.study.intervals import Interval, Losses, counts, difference, falls
from benchmarks.study.order import noise_level
from benchmarks.study.plan import HALF, OURS, STALE, model_keys, models, plan
from benchmarks.study.score import losses_of
from launch.recipe import load_recipe

__all__ = [
    "EMPTY",
    "ablations",
    "base_of",
    "bigram_loss",
    "interval_text",
    "lives_table",
    "markdown",
    "ranking",
    "reach_table",
    "recalls",
    "short_bigram",
    "title_of",
    "tried",
    "tuned",
]

EMPTY = "no run yet"
FP32_BYTES = 4
Results = Mapping[str, Mapping[str, Any]]
Row = dict[str, Any]


def title_of(group: str) -> str:
    """The name of a model in tables."""
    named = {
        OURS: "**Trellis**",
        HALF: "Trellis, half the slots",
        STALE: "Trellis, the stale update alone",
    }
    return named.get(group) or str((models() | plan()["recall"]["forms"])[group]["title"])


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
        apart, half = (_apart(group, losses, name) for name in (OURS, HALF))
        rows.append(
            {
                "group": group,
                "title": title_of(group),
                "seeds": len(own.seeds),
                "loss": own.mean,
                "perplexity": math.exp(own.mean),
                "bits_per_byte": own.mean * own.tokens.sum() / (math.log(2) * sizes),
                "difference": apart,
                "difference_half": half,
                "by_position": dict(zip(map(str, own.edges), own.by_position())),
                "fall": falls(own).row(),
                "parameters": first["model"]["parameters"],
                "state_bytes": first["model"]["state_bytes"],
                "memory_bytes": _memory(first),
                "flops_per_token": first["model"]["flops_per_token"],
                **_seconds(first, speeds),
                "refused": counts(own, bigram),
            }
        )
    return sorted(rows, key=lambda row: row["loss"])


def _apart(group: str, losses: Mapping[str, Losses], other: str) -> Row | None:
    """Nats per token of a model less those of another, over the seeds that both have."""
    if group == other or other not in losses:
        return None
    return difference(losses[group], losses[other]).row()


def _is(found: Mapping[str, Any], kind: str, group: str) -> bool:
    return bool(found["about"]["kind"] == kind and found["about"]["group"] == group)


def _memory(found: Mapping[str, Any]) -> int:
    """State bytes without Trellis's copies from the chunk's start, which it needs between chunks only."""
    total, changed = int(found["model"]["state_bytes"]), found["about"]["settings"]["set"]
    if changed.get("model.pattern", ["trellis"]) != ["trellis"]:
        return total
    model = load_recipe(str(BASE), model_keys(plan()["base"])).model
    slots = int(changed.get("model.trellis.slots", model.trellis.slots))
    return total - 2 * FP32_BYTES * model.num_layers * model.dim * slots


def _seconds(found: Mapping[str, Any], speeds: Mapping[str, Any] | None) -> Row:
    """CPU seconds measured in turns where this very model was, else the run's own, by the clock."""
    wanted = list(model_keys(found["about"]["settings"]["set"]))
    measured = (speeds or {"lengths": {}})["lengths"].get(str(found["about"]["length"]), {})
    for row in measured.values():
        if row["set"] == wanted:
            return {"seconds_per_token": float(row["seconds_per_token"]), "in_turns": True}
    return {"seconds_per_token": found["training"]["seconds_per_token"], "in_turns": False}


def short_bigram(ngrams: Mapping[str, Any] | None) -> float | None:
    """The bigram's loss on what short runs are scored on."""
    split = f"validation-{plan()['sizes']['tuning_characters']}"
    return None if ngrams is None else bigram_loss(ngrams, split)


def tuned(results: Results) -> list[Row]:
    """Every short run that a choice is made from, and those of the noise: model, rate, loss."""
    rows = [
        {
            "run": name,
            "title": title_of(found["about"]["settings"]["model"]),
            "rate": found["about"]["settings"]["rate"],
            "loss": found["validation"]["loss"],
            "bits_per_byte": found["validation"]["bits_per_byte"],
        }
        for name, found in results.items()
        if found["about"]["kind"] in ("tune", "noise", "vary", "search")
    ]
    return sorted(rows, key=lambda row: (row["title"], row["loss"]))


def ablations(results: Results) -> list[Row]:
    """Each change against what it changes, at the same learning rate: the paired difference, the noise."""
    rows, noise = [], noise_level(results)
    for name, found in results.items():
        about = found["about"]
        if about["kind"] != "vary" or (base := base_of(results, name)) is None:
            continue
        apart = difference(_short(found), _short(results[base])).row()
        row = {
            "variant": name.removeprefix("vary-"),
            "of": about["settings"]["model"],
            "title": _change(found),
        }
        within = None if noise is None else abs(apart["estimate"]) <= plan()["noise"]["times"] * noise
        rows.append({**row, **apart, "loss": found["validation"]["loss"], "noise": noise, "within": within})
    return sorted(rows, key=lambda row: (row["of"], row["estimate"]))


def _change(found: Mapping[str, Any]) -> str:
    """In words; of several changes together their keys and values."""
    about = found["about"]
    entry = plan()["variants"].get(about["group"])
    if entry is not None:
        return str(entry["title"])
    base = dict(models()[about["settings"]["model"]].get("set", {}))
    changed = {key: value for key, value in about["settings"]["set"].items() if base.get(key) != value}
    listed = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in changed.items())
    return f"together: {listed}"


def base_of(results: Results, name: str) -> str | None:
    """The run that a change is a change of: its form at its learning rate."""
    changed = results[name]["about"]["settings"]
    for base, found in results.items():
        about = found["about"]
        same = about["group"] == changed["model"] and about["settings"]["rate"] == changed["rate"]
        if about["kind"] == "tune" and same:
            return base
    return None


def _short(found: Mapping[str, Any]) -> Losses:
    about = found["about"]
    return losses_of({about["seed"]: found["validation"]["books"]}, length=about["length"])


def recalls(results: Results) -> list[Row]:
    """Per model the learning rate with the best mean accuracy on the rows to choose by, over its seeds."""
    tried: dict[str, dict[float, list[Mapping[str, Any]]]] = {}
    for found in results.values():
        about = found["about"]
        if about["kind"] == "recall":
            tried.setdefault(about["group"], {}).setdefault(about["settings"]["rate"], []).append(found)
    rows = [_recalled(group, rates) for group, rates in tried.items()]
    return sorted(rows, key=lambda row: -row["mean"])


def _recalled(group: str, rates: Mapping[float, Sequence[Mapping[str, Any]]]) -> Row:
    """The rate is chosen by the first seed, which all rates have."""

    def choosing(rate: float) -> float:
        return float(next(found["choosing"] for found in rates[rate] if found["about"]["seed"] == 0))

    best = max(rates, key=choosing)
    seeds = [found["accuracy"] for found in rates[best]]
    means = [statistics.mean(accuracy.values()) for accuracy in seeds]
    return {
        "title": title_of(group),
        "accuracy": {pairs: statistics.mean(each[pairs] for each in seeds) for pairs in seeds[0]},
        "mean": statistics.mean(means),
        "deviation": statistics.stdev(means) if len(means) > 1 else None,
        "seeds": len(seeds),
        "choosing": choosing(best),
        "rate": best,
        "rates": len(rates),
        "highest": best == max(rates),
        "state_bytes": rates[best][0]["state_bytes"],
    }


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


def reach_table(found: Results | None) -> str:
    """A model's loss with the longest context, and what it loses more with each shorter one."""
    if not found:
        return EMPTY
    contexts = [row["context"] for row in next(iter(found.values()))["contexts"]]
    heads = (
        "model",
        f"{contexts[-1]} to {2 * contexts[-1] - 1}",
        *(f"{context} to {2 * context - 1}" for context in contexts[:-1]),
    )
    lines = [
        (
            _title_of_run(name),
            f"{run['contexts'][-1]['loss']:.4f}",
            *(interval_text(row) for row in run["contexts"][:-1]),
        )
        for name, run in found.items()
    ]
    return markdown(heads, lines)


def lives_table(found: Results | None) -> str:
    """By layer the shortest, the middle and the longest half-life of what the heads keep."""
    rows = [
        (_title_of_run(name), memory, layers)
        for name, run in (found or {}).items()
        for memory, layers in run["half_lives"].items()
        if layers
    ]
    deepest = max((len(layers) for *_, layers in rows), default=0)
    heads = ("model", "what", *(f"layer {layer}" for layer in range(deepest)))
    return markdown(heads, [(title, memory, *map(_lives, layers)) for title, memory, layers in rows])


def _lives(tokens: Sequence[float | None]) -> str:
    """Of ascending half-lives; None is the longest."""
    ends = (tokens[0], tokens[(len(tokens) - 1) // 2], tokens[-1])
    return " / ".join("never" if each is None else f"{each:,.3g}" for each in ends)


def _title_of_run(name: str) -> str:
    """Of full-MODEL-s0."""
    return title_of(name.removeprefix("full-").rpartition("-")[0])


def tried(found: Results) -> list[Row]:
    """Runs by hand: fewest tokens first, then the lowest loss."""
    rows = [
        {
            "name": name,
            **{key: run["tried"][key] for key in ("model", "rate", "tokens", "set")},
            "loss": run["validation"]["loss"],
            "bits_per_byte": run["validation"]["bits_per_byte"],
        }
        for name, run in found.items()
    ]
    return sorted(rows, key=lambda row: (row["tokens"], row["loss"]))
