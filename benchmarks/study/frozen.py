"""The test books are scored once: with settings that are frozen from then on.

A run's checkpoint may be gone by then, so the run itself scores the test books when it ends, and seals what
it found in a file of its own: no table and no choice reads it before ``score --test`` freezes the settings.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.study.one import test_scores, used
from benchmarks.study.plan import task_of
from benchmarks.study.results import Store

__all__ = ["choices", "score_test"]

Results = Mapping[str, Mapping[str, Any]]


def choices(results: Results) -> dict[str, Any]:
    """Kind and model of every full run -> the settings it was trained with."""
    whole = (found["about"] for found in results.values() if found["about"]["kind"] in ("full", "long"))
    return {f"{about['kind']}-{about['group']}": about["settings"] for about in whole}


def score_test(store: Store, *, books: Path, work: Path, say: Callable[[str], None] = print) -> None:
    """Take every finished full run's score on the test books: its sealed one, or a new one of its checkpoint.

    Raises:
        ValueError: there is no full run, a run has neither, or test books were scored before with other
            settings.
    """
    runs = store.runs()
    results = {name: found for name, found in runs.items() if found["about"]["kind"] in ("full", "long")}
    if not results:
        raise ValueError("no full run is finished: there is nothing to score on the test books")
    found = _frozen(store.once("test"), choices(results))
    for name, result in results.items():
        if name not in found["runs"]:
            found["runs"][name] = _score(result, store, books=books, work=work)
            store.write("once/test", found)
            say(f"{name}: {found['runs'][name]['loss']:.4f} nats per token on the test books")


def _frozen(known: Mapping[str, Any] | None, now: Mapping[str, Any]) -> dict[str, Any]:
    """What is frozen, with the models that were finished since; those before must be as they were."""
    if known is None:
        when = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
        return {"when": when, "choices": dict(now), "runs": {}}
    for name, settings in now.items():
        if known["choices"].get(name, settings) != settings:
            raise ValueError(
                f"the test books were scored on {known['when']} with other settings of {name}: they are "
                "scored once, so this is a new study"
            )
    return {**known, "choices": {**known["choices"], **now}, "runs": dict(known["runs"])}


def _score(result: Mapping[str, Any], store: Store, *, books: Path, work: Path) -> dict[str, Any]:
    """The sealed score, else a new one with its core-seconds."""
    name = result["name"]
    sealed = store.sealed(name)
    if sealed is not None:
        return sealed
    if not (work / "runs" / name).is_dir():
        raise ValueError(f"{work / 'runs' / name} is gone: train {name} again, or remove its result")
    before = used()
    scored = test_scores(task_of(name, result), books=books, work=work)
    return scored | {"core_seconds": round(used() - before, 1)}
