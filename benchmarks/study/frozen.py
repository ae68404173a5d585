"""The test books are scored once: with settings that are frozen from then on.

A run's checkpoint may be gone by then, so the run itself scores the test books when it ends, and seals what
it found in a file of its own: no table and no choice reads it before ``score --test`` freezes the settings.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.study.one import test_scores
from benchmarks.study.plan import Settings, Task, plan
from benchmarks.study.results import Store
from trellis_dist.files import digest

__all__ = ["choices", "score_test", "task_of"]

Results = Mapping[str, Mapping[str, Any]]


def choices(results: Results) -> dict[str, Any]:
    """Kind and model of every full run -> the settings it was trained with."""
    whole = (found["about"] for found in results.values() if found["about"]["kind"] in ("full", "long"))
    return {f"{about['kind']}-{about['group']}": about["settings"] for about in whole}


def task_of(name: str, found: Mapping[str, Any]) -> Task:
    """The task that a result belongs to."""
    about = found["about"]
    return Task(
        name,
        about["kind"],
        Settings(**about["settings"]),
        seed=about["seed"],
        length=about["length"],
        tokens=plan()["sizes"]["full_tokens"],
        group=about["group"],
    )


def score_test(store: Store, *, books: Path, work: Path, say: Callable[[str], None] = print) -> None:
    """Take every finished full run's score on the test books: its sealed one, or a new one of its checkpoint.

    Raises:
        ValueError: there is no full run, a run has neither, or test books were scored before with other
            settings.
    """
    results = {
        name: found for name, found in store.runs().items() if found["about"]["kind"] in ("full", "long")
    }
    if not results:
        raise ValueError("no full run is finished: there is nothing to score on the test books")
    frozen, known = choices(results), store.once("test")
    mark = digest(frozen)
    if known is not None and known["digest"] != mark:
        raise ValueError(
            f"the test books were scored on {known['when']} with other settings (digest "
            f"{known['digest'][:12]}, now {mark[:12]}): they are scored once, so this is a new study"
        )
    found = dict(known) if known is not None else _begin(frozen, mark)
    found["runs"] = dict(found["runs"])
    for name, result in results.items():
        if name in found["runs"]:
            continue
        sealed = store.sealed(name)
        if sealed is None and not (work / "runs" / name).is_dir():
            raise ValueError(f"{work / 'runs' / name} is gone: train {name} again, or remove its result")
        scored = sealed or test_scores(task_of(name, result), books=books, work=work)
        found["runs"][name] = scored
        store.write("once/test", found)
        say(f"{name}: {found['runs'][name]['loss']:.4f} nats per token on the test books")


def _begin(frozen: Mapping[str, Any], mark: str) -> dict[str, Any]:
    when = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    return {"digest": mark, "when": when, "choices": dict(frozen), "runs": {}}
