"""The runs of the study, in the order of their worth: ``plan.toml`` expanded by what earlier runs have shown.

    tune-MODEL-lr4e-3     a learning rate, at 2M tokens; where the best is the last of the grid, the next too
    noise-MODEL-s1        the best of these with another seed
    vary-VARIANT          one change to a form of Trellis; vary-combined-1, -2: the best changes together
    search-MODEL-3        further settings of the two strongest baselines, as many as Trellis has had
    recall-MODEL-lr3e-3   associative recall, in small models of their own; -s1: again with another seed
    full-MODEL-s0         9M tokens with the best settings found: seed by seed
    long-MODEL-s0         9M tokens in rows of 4,096

A run that needs a choice appears once the runs that it is chosen from are finished. Settings that one
finished full run of a model was trained with stay that model's.
"""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.study.plan import (
    HALF,
    OURS,
    PAPER,
    STALE,
    Scale,
    Settings,
    Task,
    models,
    number,
    plan,
    registered,
    scale,
    table,
)
from benchmarks.study.recall_plan import recall_again, recall_forms, recall_tasks
from trellis_dist.models.baseline_config import BASELINES, READERS

__all__ = ["chosen", "loss_of", "noise_level", "tasks"]

Results = Mapping[str, Mapping[str, Any]]
SLOTS, TARGETS = "model.trellis.slots", "model.trellis.targets"
CONVOLVED = "model.trellis.conv_values"


def tasks(results: Results) -> list[Task]:
    """All runs that can be named now, the most valuable first; ``results``: finished ones by name."""
    first = [name for name in models("ours", "main") if registered(name)]
    rest = [name for name in models("rest") if registered(name)]
    found = [task for name in first for task in _tuning(name, results)]
    found += [*_noise(results), *_variants(results), *_combined(results)]
    found += [task for name in _strongest(results) for task in _search(name, results)]
    found += recall_forms()
    found += [task for name in [OURS, *first, *rest] for task in _recall(name, results)]
    whole = _full(plan()["full"]["seeds"], results)
    found += [task for task in whole if task.seed == 0]
    found += [task for name in plan()["recall"]["again"] for task in _recall_again(name, results)]
    found += _long(results)
    found += [task for task in whole if task.seed != 0]
    found += _full({name: [0] for name in rest}, results)
    found += _full(plan()["full"]["late"], results)
    return found


def loss_of(result: Mapping[str, Any]) -> float:
    """Nats per token on the validation books (of a short run: on their beginnings)."""
    return float(result["validation"]["loss"])


def _finished(found: list[Task], results: Results) -> bool:
    return bool(found) and all(task.name in results for task in found)


def _lowest(found: list[Task], results: Results) -> Task | None:
    """The one with the lowest loss, once all are finished."""
    if not _finished(found, results):
        return None
    return min(found, key=lambda task: loss_of(results[task.name]))


def _lowest_rate(found: list[Task], results: Results) -> Task | None:
    """Of those within the noise of the lowest loss that of the lowest rate: longer runs want lower ones."""
    best, noise = _lowest(found, results), noise_level(results)
    if best is None or noise is None:
        return None
    level = [task for task in found if loss_of(results[task.name]) <= loss_of(results[best.name]) + noise]
    return min(level, key=lambda task: (task.settings.rate, loss_of(results[task.name])))


def _short(name: str, kind: Any, settings: Settings, *, group: str = "", seed: int = 0) -> Task:
    sizes = plan()["sizes"]
    return Task(
        name,
        kind,
        settings,
        seed=seed,
        tokens=sizes["tuning_tokens"],
        characters=sizes["tuning_characters"],
        group=group,
    )


# Learning rates


def _tuning(name: str, results: Results) -> list[Task]:
    """The grid, and beyond its end while the best of what is finished lies there; or a model's own rates."""
    options, rates = plan()["rates"], list(plan()["rates"]["grid"])
    if (own := models()[name].get("rates")) is not None:
        return [_tune(name, rate) for rate in own]
    while all(_tune(name, rate).name in results for rate in rates):
        best = min(rates, key=lambda rate: loss_of(results[_tune(name, rate).name]))
        low, high = min(rates), max(rates)
        beyond = low / options["next"] if best == low else high * options["next"] if best == high else best
        if beyond in rates or not options["least"] <= beyond <= options["most"]:
            break
        rates.append(beyond)
    return [_tune(name, rate) for rate in rates]


def _tune(name: str, rate: float) -> Task:
    return _short(f"tune-{name}-lr{number(rate)}", "tune", Settings(name, rate, table(name)))


def _noise(results: Results) -> list[Task]:
    name = plan()["noise"]["model"]
    base = _lowest(_tuning(name, results), results)
    seeds = plan()["noise"]["seeds"] if base is not None else []
    return [_short(f"noise-{name}-s{seed}", "noise", base.settings, seed=seed) for seed in seeds]  # type: ignore[union-attr]


def noise_level(results: Results) -> float | None:
    """Standard deviation of the loss over seeds, of a short run of one form of Trellis."""
    again = _noise(results)
    base = _lowest(_tuning(plan()["noise"]["model"], results), results)
    if base is None or not _finished(again, results):
        return None
    return statistics.stdev(loss_of(results[task.name]) for task in [base, *again])


# Changes to Trellis


def _variants(results: Results) -> list[Task]:
    """At the learning rate of the form that they change, once that is known."""
    found = []
    for name, entry in plan()["variants"].items():
        base = _lowest(_tuning(entry["of"], results), results)
        if base is not None:
            settings = Settings(entry["of"], base.settings.rate, table(name))
            found.append(_short(f"vary-{name}", "vary", settings, group=name))
    return found


def _own(settings: Settings) -> dict[str, Any]:
    """What it changes of its form."""
    base = table(settings.model)
    return {key: value for key, value in settings.set.items() if base.get(key) != value}


def _combined(results: Results) -> list[Task]:
    """The best changes of the better form together: added one by one, the most helpful first."""
    variants = _variants(results)
    if len(variants) < len(plan()["variants"]) or not _finished(variants, results):
        return []
    bases = [_lowest(_tuning(name, results), results) for name in models("ours")]
    base = _lowest([task for task in bases if task is not None], results)
    assert base is not None, "the variants are named once their forms are tuned"
    helping = [
        task
        for task in variants
        if task.settings.model == base.settings.model
        and loss_of(results[task.name]) < loss_of(results[base.name])
    ]
    seen = [_own(task.settings) for task in variants]
    return [
        _short(
            f"vary-combined-{place}",
            "vary",
            Settings(base.settings.model, base.settings.rate, base.settings.set | together),  # type: ignore[operator]
            group=f"combined-{place}",
        )
        for place, together in enumerate(_added_up(helping, results, seen), 1)
    ]


def _added_up(helping: list[Task], results: Results, seen: list[dict[str, Any]]) -> list[dict[str, Any]]:
    together: dict[str, Any] = {}
    found: list[dict[str, Any]] = []
    for task in sorted(helping, key=lambda task: loss_of(results[task.name])):
        own = _own(task.settings)
        if all(together.get(key, value) == value for key, value in own.items()):
            together = together | own
            if together not in [*seen, *found]:
                found.append(together)
    return found[: plan()["combined"]["most"]]


def _ours(results: Results) -> list[Task]:
    """Every short run of Trellis that a choice is made from; empty until all of them can be named."""
    variants = _variants(results)
    if len(variants) < len(plan()["variants"]) or not _finished(variants, results):
        return []
    tuned = [task for name in models("ours") for task in _tuning(name, results)]
    return [*tuned, *variants, *_combined(results)]


def _best_of_ours(results: Results) -> Settings | None:
    """The best of the tuned forms; a change of one only where it is better by more than the noise."""
    ours, noise = _ours(results), noise_level(results)
    if noise is None or not _finished(ours, results):
        return None
    base = _lowest_rate([task for task in ours if task.kind == "tune"], results)
    best = _lowest([task for task in ours if task.kind == "vary"], results)
    assert base is not None, "a form is always tuned"
    assert best is not None, "some changes are always planned"
    least = loss_of(results[base.name]) - plan()["noise"]["times"] * noise
    better = best.settings if loss_of(results[best.name]) < least else base.settings
    return Settings(better.model, base.settings.rate, better.set)


# The strongest baselines


def _strongest(results: Results) -> list[str]:
    """The two baselines with the lowest loss, once every one of them is tuned."""
    best: dict[str, float] = {}
    for name in models("main"):
        task = _lowest(_tuning(name, results), results)
        if task is None:
            return []
        best[name] = loss_of(results[task.name])
    return sorted(best, key=best.__getitem__)[:2]


def _search(name: str, results: Results) -> list[Task]:
    """As many more as bring a baseline's runs to Trellis's number: drawn from ``search``, always the same.

    Settings that would be trained like others of this model are not counted: another is drawn.
    """
    tuned, ours = _tuning(name, results), _ours(results)
    base = _lowest(tuned, results)
    if base is None:
        return []
    options = dict(plan()["search"])
    factors = options.pop("rate")
    options = {key: values for key, values in options.items() if _reads(name, key)}
    draw = random.Random(name)
    found: list[Task] = []
    known = {_digest(task) for task in tuned}
    while len(tuned) + len(found) < len(ours):
        drawn = {key: draw.choice(values) for key, values in options.items()}
        rate = round(base.settings.rate * draw.choice(factors), 6)
        task = _short(f"search-{name}-{len(found) + 1}", "search", Settings(name, rate, table(name) | drawn))
        if _digest(task) not in known:
            known.add(_digest(task))
            found.append(task)
    return found


def _reads(name: str, key: str) -> bool:
    """Whether a baseline's layers read a key: one that they do not would train the same model again."""
    section, _, option = key.removeprefix("model.").partition(".")
    kinds = READERS.get(option, BASELINES)
    return section != "baselines" or table(name)["model.pattern"][0] in kinds


def _digest(task: Task) -> str:
    return _digest_of(json.dumps(task.settings.table()), task.tokens, scale())


@cache
def _digest_of(settings: str, tokens: int, at: Scale) -> str:
    """Of the recipe at this scale; a JSON text can be cached."""
    return Task("x", "search", Settings(**json.loads(settings)), tokens=tokens).spec(Path("x")).digest


# Full runs


def _full(seeds: Mapping[str, list[int]], results: Results) -> list[Task]:
    """Seed by seed, in the order of the names."""
    found = []
    for place in range(max(map(len, seeds.values()), default=0)):
        for name, own in seeds.items():
            settings = chosen(name, results) if place < len(own) else None
            if settings is not None:
                found.append(_whole(name, settings, seed=own[place]))
    return found


def _whole(name: str, settings: Settings, *, seed: int, length: int = 1024) -> Task:
    tokens = plan()["sizes"]["full_tokens"]
    kind: Any = "full" if length == 1024 else "long"
    return Task(f"{kind}-{name}-s{seed}", kind, settings, seed=seed, length=length, tokens=tokens, group=name)


def chosen(name: str, results: Results) -> Settings | None:
    """What a model is trained with in full: as before where it was, else the best of its short runs.

    None where that is not known yet, or where it would be the chosen Trellis again.
    """
    for seed in range(3):
        if (earlier := results.get(f"full-{name}-s{seed}")) is not None:
            return Settings(**earlier["about"]["settings"])
    if name == OURS:
        return _best_of_ours(results)
    if name in (HALF, PAPER, STALE):
        return _beside(name, results)
    if name in models("rest"):
        known = _lowest_rate(_tuning("gated_deltanet", results), results)
        return Settings(name, known.settings.rate, table(name)) if known is not None else None
    strongest, tuned = _strongest(results), _tuning(name, results)
    if not registered(name) or not strongest or not _ours(results):
        return None  # it may yet be one of the two that are searched further
    best = _lowest_rate(tuned + (_search(name, results) if name in strongest else []), results)
    return best.settings if best is not None else None


def _beside(name: str, results: Results) -> Settings | None:
    """Trellis beside the chosen one: as in the paper; with the paper's update alone; with half its slots."""
    whole = chosen(OURS, results)
    if whole is None:
        return None
    if name == PAPER:
        best = _lowest_rate(_tuning(PAPER, results), results)
        found = best.settings if best is not None else None
    else:
        own = _half(whole) if name == HALF else plan()["stale"]["set"]
        found = Settings(whole.model, whole.rate, {**whole.set, **own})
    return found if found != whole else None


def _half(whole: Settings) -> dict[str, Any]:
    """Half the slots; a value is no target of so few, which then have a projection, convolved likewise."""
    if whole.set.get(TARGETS) != "values":
        return {SLOTS: plan()["half"]["slots"]}
    return {
        SLOTS: plan()["half"]["slots"],
        TARGETS: "own",
        "model.trellis.conv_targets": whole.set.get(CONVOLVED, False),
    }


def _long(results: Results) -> Iterator[Task]:
    """Trellis and the best of the main models by seed 0."""
    options = plan()["long"]
    full = {name: results.get(f"full-{name}-s0") for name in models("main") if registered(name)}
    losses = {name: loss_of(found) for name, found in full.items() if found is not None}
    if len(losses) < len(full):
        return
    for name in [OURS, *sorted(losses, key=losses.__getitem__)[: options["baselines"]]]:
        settings = chosen(name, results)
        if settings is not None:
            yield _whole(name, settings, seed=0, length=options["length"])


def _recall(name: str, results: Results) -> list[Task]:
    own = chosen(OURS, results) if name == OURS else Settings(name, 0.0, table(name))
    if own is None or (name == OURS and own.set == table(own.model)):
        return []  # the form that was chosen has its own
    return recall_tasks(name, own, results)


def _recall_again(name: str, results: Results) -> list[Task]:
    return recall_again(name, Settings(name, 0.0, table(name)), results)
