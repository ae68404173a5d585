"""The runs of the study, in the order of their worth: ``plan.toml`` expanded by what earlier runs have shown.

    tune-MODEL-lr4e-3     a learning rate, at 2M tokens; where the best is the last of the grid, the next too
    vary-VARIANT          one change to a form of Trellis, at 2M tokens
    search-MODEL-3        further settings of the two strongest baselines, as many as Trellis has had
    full-MODEL-s0         9M tokens with the best settings found: seed by seed
    long-MODEL-s0         the same in rows of 4,096 tokens, of the best three
    recall-MODEL-lr3e-3   associative recall, in small models of their own

A run that needs a choice appears once the runs that it is chosen from are finished. Settings that one
finished full run of a model was trained with stay that model's.
"""

from __future__ import annotations

import random
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from benchmarks.study.books import BASE
from launch.experiments.runs import RunSpec, assignments

__all__ = ["HALF", "OURS", "Settings", "Task", "models", "plan", "registered", "table", "tasks"]

FOLDER = Path(__file__).parent
TOKENS_PER_STEP = 8192
# Tokens of a forward pass.
MICRO_TOKENS = 4096
# The name under which the best form of Trellis is trained in full, and with half the slots: then its memories
# have the numbers of one matrix state of the same heads.
OURS, HALF = "trellis", "trellis-half"

Kind = Literal["tune", "vary", "search", "full", "long", "recall"]
Results = Mapping[str, Mapping[str, Any]]
Table = Mapping[str, Any]


@dataclass(frozen=True)
class Settings:
    """What a model is trained with.

    Attributes:
        model: a name of ``plan.toml``'s models; "trellis" for the best of ours.
        rate: peak learning rate.
        set: recipe keys and values beyond the base.
    """

    model: str
    rate: float
    set: Mapping[str, Any] = field(default_factory=dict)

    def table(self) -> dict[str, Any]:
        """JSON types."""
        return {"model": self.model, "rate": self.rate, "set": dict(self.set)}


@dataclass(frozen=True)
class Task:
    """One run.

    Attributes:
        name: of its result file.
        characters: of each validation book that it is scored on; None for whole books.
    """

    name: str
    kind: Kind
    settings: Settings
    seed: int = 0
    length: int = 1024
    tokens: int = 0
    characters: int | None = None
    group: str = ""

    def spec(self, work: Path) -> RunSpec:
        """The run as ``launch.experiments`` takes it, of the same size as every other (within 2%)."""
        steps = self.tokens // TOKENS_PER_STEP
        changed = {
            "name": self.name,
            "data.source.path": str(work / "train"),
            "data.sequence_length": self.length,
            "data.seed": self.seed,
            "training.seed": self.seed,
            "training.steps": steps,
            "training.micro_batch": max(MICRO_TOKENS // self.length, 1),
            "schedule.warmup_steps": round(plan()["sizes"]["warmup"] * steps),
            "optimizer.lr": self.settings.rate,
            **self.settings.set,
        }
        changed["model.mlp_hidden"] = _equal_width(_key(self.settings.set))
        return RunSpec(
            name=self.name,
            recipe=str(BASE),
            overrides=assignments(changed),
            dataset_dir=str(work / "data"),
            about=self.about(),
        )

    def about(self) -> dict[str, Any]:
        """What the result says of itself."""
        return {
            "kind": self.kind,
            "group": self.group or self.settings.model,
            "seed": self.seed,
            "length": self.length,
            "tokens": self.tokens // TOKENS_PER_STEP * TOKENS_PER_STEP,
            "settings": self.settings.table(),
        }


@cache
def plan() -> dict[str, Any]:
    """``plan.toml``."""
    return tomllib.loads((FOLDER / "plan.toml").read_text(encoding="utf-8"))


def models(*roles: str) -> dict[str, Table]:
    """The models of these roles, all without any."""
    found: dict[str, Table] = plan()["models"]
    return {name: entry for name, entry in found.items() if not roles or entry["role"] in roles}


def registered(name: str) -> bool:
    """Whether this checkout has the layers of a model."""
    from trellis_dist.models.registry import MIXERS

    return all(kind in MIXERS for kind in _changes(models()[name]).get("model.pattern", ["trellis"]))


def table(name: str) -> dict[str, Any]:
    """Recipe keys of a model, or of a variant over those of what it changes."""
    if name in plan()["variants"]:
        entry = plan()["variants"][name]
        return _changes(models()[entry["of"]]) | _changes(entry)
    return _changes(models()[name])


def _changes(entry: Table) -> dict[str, Any]:
    return dict(entry.get("set", {}))


def tasks(results: Results) -> list[Task]:
    """All runs that can be named now, the most valuable first; ``results``: finished ones by name."""
    known = [name for name in models() if registered(name)]
    first = [name for name in known if models()[name]["role"] != "rest"]
    rest = [name for name in known if name not in first]
    found = [task for name in first for task in _tuning(name, results)]
    found += _variants(results)
    found += [task for name in _strongest(results) for task in _search(name, results)]
    found += _full(first, results)
    found += [task for name in known for task in _recall(name)]
    found += _long(first, results)
    found += [task for name in rest for task in _tuning(name, results)]
    found += _full(rest, results)
    return found


def _tuning(name: str, results: Results) -> list[Task]:
    return [_tune(name, rate) for rate in _rates(name, results)]


def _tune(name: str, rate: float) -> Task:
    return _short(f"tune-{name}-lr{_number(rate)}", "tune", Settings(name, rate, table(name)))


def _short(name: str, kind: Kind, settings: Settings, group: str = "") -> Task:
    sizes = plan()["sizes"]
    return Task(
        name,
        kind,
        settings,
        tokens=sizes["tuning_tokens"],
        characters=sizes["tuning_characters"],
        group=group,
    )


def _rates(name: str, results: Results) -> list[float]:
    """The grid, and beyond its end while the best of what is finished lies there."""
    options, rates = plan()["rates"], list(plan()["rates"]["grid"])
    while all(_tune(name, rate).name in results for rate in rates):
        best = min(rates, key=lambda rate: loss_of(results[_tune(name, rate).name]))
        low, high = min(rates), max(rates)
        beyond = low / options["next"] if best == low else high * options["next"] if best == high else best
        if beyond in rates or not options["least"] <= beyond <= options["most"]:
            break
        rates.append(beyond)
    return rates


def loss_of(result: Mapping[str, Any]) -> float:
    """Nats per token on the validation books (of a short run: on their beginnings)."""
    return float(result["validation"]["loss"])


def _finished(found: list[Task], results: Results) -> bool:
    return bool(found) and all(task.name in results for task in found)


def _best(found: list[Task], results: Results) -> Settings | None:
    """The settings of the lowest loss, once all are finished."""
    if not _finished(found, results):
        return None
    return min(found, key=lambda task: loss_of(results[task.name])).settings


def _variants(results: Results) -> list[Task]:
    """At the learning rate of the form that they change, once that is known."""
    found = []
    for name, entry in plan()["variants"].items():
        base = _best(_tuning(entry["of"], results), results)
        if base is not None:
            settings = Settings(entry["of"], base.rate, table(name))
            found.append(_short(f"vary-{name}", "vary", settings, group=name))
    return found


def _ours(results: Results) -> list[Task]:
    """Every short run of Trellis; empty until all of them can be named."""
    variants = _variants(results)
    if len(variants) < len(plan()["variants"]):
        return []
    return [task for name in models("ours") for task in _tuning(name, results)] + variants


def _strongest(results: Results) -> list[str]:
    """The two baselines with the lowest loss, once every one of them is tuned."""
    best: dict[str, float] = {}
    for name in models("main"):
        tuned = _tuning(name, results)
        if not _finished(tuned, results):
            return []
        best[name] = min(loss_of(results[task.name]) for task in tuned)
    return sorted(best, key=best.__getitem__)[:2]


def _search(name: str, results: Results) -> list[Task]:
    """As many more as bring a baseline's runs to Trellis's number: drawn from ``search``, always the same."""
    tuned, options = _tuning(name, results), plan()["search"]
    draw, rates = random.Random(name), [task.settings.rate for task in tuned]
    found: list[Task] = []
    while len(tuned) + len(found) < len(_ours(results)):
        drawn = {key: draw.choice(values) for key, values in options.items()}
        settings = Settings(name, draw.choice(rates), table(name) | drawn)
        if settings not in (task.settings for task in found):
            found.append(_short(f"search-{name}-{len(found) + 1}", "search", settings))
    return found


def _full(names: list[str], results: Results) -> list[Task]:
    """Seed by seed; of Trellis the best form, and with one seed the paper's and half the slots."""
    chosen = {name: _chosen(name, results) for name in _finalists(names)}
    found = []
    for place in range(3):
        for name, settings in chosen.items():
            seeds = plan()["seeds"]["ours" if name == OURS else _role(name)]
            if settings is not None and place < len(seeds):
                found.append(_whole(name, settings, seed=seeds[place]))
    return found


def _finalists(names: list[str]) -> list[str]:
    if not any(_role(name) == "main" for name in names):
        return names
    return [OURS, *(name for name in names if _role(name) == "main"), "trellis-paper", HALF]


def _role(name: str) -> str:
    """Seeds of the paper's form are those of the rest: it is there to be compared with the chosen one."""
    return "rest" if name == HALF or name in models("ours") else str(models()[name]["role"])


def _whole(name: str, settings: Settings, *, seed: int, length: int = 1024) -> Task:
    kind: Kind = "full" if length == 1024 else "long"
    tokens = plan()["sizes"]["full_tokens"]
    return Task(f"{kind}-{name}-s{seed}", kind, settings, seed=seed, length=length, tokens=tokens, group=name)


def _chosen(name: str, results: Results) -> Settings | None:
    """What a model is trained with in full: as before where it was, else the best of its short runs."""
    for seed in plan()["seeds"]["main"]:
        if (earlier := results.get(f"full-{name}-s{seed}")) is not None:
            return Settings(**earlier["about"]["settings"])
    if name == OURS:
        return _best(_ours(results), results)
    if name == HALF:
        whole = _chosen(OURS, results)
        return whole and Settings(whole.model, whole.rate, {**whole.set, "model.trellis.slots": 16})
    tuned = _tuning(name, results)
    strongest = _strongest(results)
    if _role(name) == "main" and (not strongest or not _ours(results)):
        return None  # it may yet be one of the two that are searched further
    return _best(tuned + (_search(name, results) if name in strongest else []), results)


def _long(names: list[str], results: Results) -> Iterator[Task]:
    """The best of the finished full runs of seed 0, each kind of model once."""
    options = plan()["long"]
    ranked = [name for name in _finalists(names) if name == OURS or _role(name) == "main"]
    full = {name: results.get(f"full-{name}-s0") for name in ranked}
    losses = {name: loss_of(found) for name, found in full.items() if found is not None}
    if len(losses) < len(full):
        return
    for seed in options["seeds"]:
        for name in sorted(losses, key=losses.__getitem__)[: options["models"]]:
            settings = _chosen(name, results)
            assert settings is not None, f"{name} has a finished run and no settings"
            yield _whole(name, settings, seed=seed, length=options["length"])


def _recall(name: str) -> list[Task]:
    options = plan()["recall"]
    own = dict(options["set"]) | table(name)
    tokens = options["steps"] * options["tokens_per_step"]
    return [
        Task(f"recall-{name}-lr{_number(rate)}", "recall", Settings(name, rate, own), tokens=tokens)
        for rate in options["rates"]
    ]


def _number(rate: float) -> str:
    """4e-3, 2.5e-3."""
    digits, exponent = f"{rate:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


def _key(changed: Mapping[str, Any]) -> tuple[str, ...]:
    """The model's part of a table of recipe keys, hashable."""
    return assignments({key: value for key, value in changed.items() if key.startswith("model.")})


@cache
def _equal_width(changed: tuple[str, ...]) -> int:
    """The MLP's width with which a model has the parameters of the paper's Trellis."""
    from launch.experiments.equal import equal_width
    from launch.recipe import load_recipe
    from trellis_dist.models.counts import parameter_counts

    wanted = parameter_counts(load_recipe(str(BASE)).model).total
    return equal_width(load_recipe(str(BASE), changed).model, parameters=wanted)
