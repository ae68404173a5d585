"""Runs of the study, some at a time, within a budget of core-seconds; each slice goes on where one ended."""

from __future__ import annotations

import fnmatch
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.study.one import EXIT_CUT
from benchmarks.study.order import tasks
from benchmarks.study.plan import Task, models, plan, registered, scale
from benchmarks.study.results import Store
from benchmarks.study.tried import run_name
from trellis_dist.files import read_json

__all__ = ["Pool", "estimate", "lines_of", "pending", "spent", "unregistered"]

POLL_S = 1.0
Results = Mapping[str, Mapping[str, Any]]


def unregistered() -> list[str]:
    """One line for each model of the plan that this checkout has no layers for."""
    missing = [name for name in models() if not registered(name)]
    return [f"{name}: left out, its layers are not in this checkout" for name in missing]


def pending(results: Results, only: str = "*") -> list[Task]:
    """What is left to run, in order, of the names that match a shell pattern."""
    left = [task for task in tasks(results) if task.name not in results]
    return [task for task in left if fnmatch.fnmatchcase(task.name, only)]


def estimate(task: Task, results: Results) -> float:
    """Core-seconds of a run: as its model's runs of that kind took per token, else as all of them did.

    Short runs say what a token costs; a run that is scored on whole books costs that scoring besides.
    """
    short = [found for found in results.values() if found["about"]["kind"] not in ("full", "long")]
    alike = [found for found in short if (found["about"]["kind"] == "recall") == (task.kind == "recall")]
    same = [found for found in alike if found["about"]["settings"]["model"] == task.settings.model]
    costs = [found["core_seconds"] / found["about"]["tokens"] for found in same or alike]
    usual = plan()["computes"]["usual"]
    each = statistics.median(costs) if costs else float(usual.get(task.kind, usual["train"]))
    whole = task.kind in ("full", "long")
    return task.tokens * each + (plan()["sizes"]["scored_tokens"] * _scoring(same) if whole else 0.0)


def _scoring(found: Sequence[Mapping[str, Any]]) -> float:
    """Seconds to score a token."""
    scored = [one["validation"] for one in found if one.get("validation", {}).get("seconds")]
    if not scored:
        return float(plan()["computes"]["usual"]["score"])
    return float(statistics.median(one["seconds"] / one["targets"] for one in scored))


def spent(store: Store, work: Path) -> float:
    """Core-seconds of all results, and of runs that are begun and not finished."""
    known = {*store.runs(), *map(run_name, store.tried())}
    known |= {run_name(found["tried_as"]) for found in store.runs().values() if "tried_as" in found}
    begun = (path for path in (work / "core-seconds").glob("*.json") if path.stem not in known)
    return store.spent() + sum(float(read_json(path)["seconds"]) for path in begun)


@dataclass
class Pool:
    """One slice.

    Attributes:
        books, work, store: folders of the novels, of runs and shards, and the results.
        jobs: runs at once, each with one thread.
        minutes: after which runs save and end; None for ever.
        budget: core-seconds of everything, earlier slices included; a run that may exceed it is not begun.
        only: shell pattern of names.
        say: takes a line.
    """

    books: Path
    work: Path
    store: Store
    jobs: int = 2
    minutes: float | None = None
    budget: float = 0.0
    only: str = "*"
    say: Callable[[str], None] = print
    _at_work: dict[str, tuple[Task, subprocess.Popen[bytes]]] = field(default_factory=dict, init=False)
    _failed: set[str] = field(default_factory=set, init=False)

    def run(self) -> list[str]:
        """Run what is left until it is done, the time or the budget is over, or a signal comes.

        Returns:
            Names of runs that failed.
        """
        self._end = None if self.minutes is None else time.monotonic() + 60 * self.minutes
        handlers = {number: signal.signal(number, _stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            while not self._over() and (self._fill() or self._at_work):
                self._wait()
            self._drain()
        except KeyboardInterrupt:
            self._drain(ask=True)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return sorted(self._failed)

    def _over(self) -> bool:
        return self._end is not None and time.monotonic() >= self._end

    def _fill(self) -> bool:
        """Begin what there is room for; whether something was begun."""
        begun = False
        while len(self._at_work) < self.jobs and (task := self._next()) is not None:
            self._begin(task)
            begun = True
        return begun

    def _next(self) -> Task | None:
        results = self.store.runs()
        taken = self._failed | set(self._at_work)
        found = next((task for task in pending(results, self.only) if task.name not in taken), None)
        if found is None:
            return None
        running = [task for task, _ in self._at_work.values()]
        ahead = sum(estimate(task, results) for task in [*running, found])
        if (used := spent(self.store, self.work)) + ahead > self.budget:
            self.say(
                f"{found.name} would bring {used:,.0f} core-seconds to {used + ahead:,.0f}: the budget is "
                f"{self.budget:,.0f}"
            )
            return None
        return found

    def _begin(self, task: Task) -> None:
        log = self.work / "logs" / f"{task.name}.study.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        left = [] if self._end is None else ["--minutes", f"{(self._end - time.monotonic()) / 60:.2f}"]
        command = [sys.executable, "-m", "benchmarks.study", "one", "--scale", scale()]
        command += ["--only", task.name, *left]
        command += ["--books", str(self.books), "--work", str(self.work), "--results", str(self.store.folder)]
        with log.open("ab") as output:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
        self._at_work[task.name] = (task, child)
        self.say(f"{task.name}: begins")

    def _wait(self) -> None:
        """Until one ends, or the time is over."""
        while not self._over() and not self._ended():
            time.sleep(POLL_S)
        for name in self._ended():
            self._settle(name)

    def _ended(self) -> list[str]:
        return [name for name, (_, child) in self._at_work.items() if child.poll() is not None]

    def _settle(self, name: str) -> None:
        _, child = self._at_work.pop(name)
        if child.returncode == 0:
            found = self.store.runs()[name]
            used = spent(self.store, self.work)
            self.say(f"{name}: done, {_outcome(found)}; {used:,.0f} of {self.budget:,.0f} core-seconds used")
        elif child.returncode == EXIT_CUT:
            self.say(f"{name}: saved, goes on next time")
        else:
            self._failed.add(name)
            self.say(f"{name}: failed, see {self.work / 'logs' / f'{name}.study.log'}")

    def _drain(self, *, ask: bool = False) -> None:
        """Wait for what is at work: it knows the time, or is asked to save."""
        for _, child in self._at_work.values():
            if ask and child.poll() is None:
                child.terminate()
        for name in list(self._at_work):
            self._at_work[name][1].wait()
            self._settle(name)


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def _outcome(found: Mapping[str, Any]) -> str:
    if "accuracy" in found:
        return f"accuracy {found['accuracy']}"
    return f"{found['validation']['loss']:.4f} nats per token"


def lines_of(found: Sequence[Task], results: Results) -> list[str]:
    """The plan as text: core-seconds expected, name."""
    return [f"{estimate(task, results):8,.0f}  {task.name}" for task in found]
