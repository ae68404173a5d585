"""The JSON of a run: it grows case by case, so a run that was killed goes on where it stopped."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trellis_dist.files import read_json, write_json

__all__ = ["Case", "Deadline", "Record", "one_line", "source_digest"]

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Case:
    """One measurement: a name that is unique in its run, and what measures it.

    Attributes:
        optional: a failure is recorded and is no failure of the run (a rival that is not installed).
    """

    name: str
    measure: Callable[[], dict[str, Any]]
    optional: bool = False


@dataclass
class Deadline:
    """A budget of seconds that starts when it is made; None never ends."""

    seconds: float | None = None
    now: Callable[[], float] = time.monotonic
    _begin: float = field(init=False)

    def __post_init__(self) -> None:
        self._begin = self.now()

    @property
    def passed(self) -> bool:
        """Whether the budget is used up."""
        return self.seconds is not None and self.now() - self._begin >= self.seconds

    @property
    def left(self) -> float:
        """Seconds left, at least 0."""
        return float("inf") if self.seconds is None else max(0.0, self.seconds - self.now() + self._begin)


class Record:
    """Results by case name in a file that is rewritten, atomically, after every case.

    Args:
        path: the file.
        identity: machine, versions, settings, ...: an unfinished file with the same identity is continued,
            any other is begun afresh.
        say: where progress goes.
    """

    def __init__(self, path: Path, identity: dict[str, Any], *, say: Callable[[str], None] = print) -> None:
        self.path, self.say = path, say
        self.data: dict[str, Any] = {**identity, "complete": False, "cases": {}}
        if path.is_file():
            self._continue(read_json(path), identity)

    def _continue(self, found: Any, identity: dict[str, Any]) -> None:
        if not isinstance(found, dict) or found.get("complete") is not False:
            return
        changed = sorted(key for key, value in identity.items() if found.get(key) != value)
        if changed:
            self.say(f"{self.path.name} is of another run ({', '.join(changed)} differ): begun afresh")
            return
        self.data["cases"] = found["cases"]
        self.say(f"{self.path.name}: continued after {len(found['cases'])} cases")

    @property
    def cases(self) -> dict[str, Any]:
        """Results so far."""
        found: dict[str, Any] = self.data["cases"]
        return found

    def left(self, cases: Sequence[Case]) -> list[Case]:
        """Those that have no result yet."""
        return [case for case in cases if case.name not in self.cases]

    def run(self, cases: Sequence[Case], deadline: Deadline) -> list[str]:
        """Measure what is left until the deadline; the names of the cases that it cut off."""
        for case in self.left(cases):
            if deadline.passed:
                break
            begin = time.monotonic()
            self.cases[case.name] = _result(case)
            seconds = time.monotonic() - begin
            self.cases[case.name]["seconds"] = round(seconds, 1)
            error = self.cases[case.name].get("error")
            self.say(f"{case.name}: {seconds:.1f} s" + (f", {error}" if error else ""))
            self.save()
        return [case.name for case in self.left(cases)]

    def finish(self, **derived: Any) -> None:
        """Add what follows from the cases; the record is complete."""
        self.data.update(derived, complete=True)
        self.save()

    def save(self) -> None:
        """Write the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.data)


def _result(case: Case) -> dict[str, Any]:
    """The case's result; an exception becomes its one line, so that one case does not end a run."""
    try:
        return case.measure()
    except Exception as error:
        return {"error": one_line(error), "optional": case.optional}


def one_line(error: BaseException) -> str:
    """Type and first line of an exception, at most 300 characters."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def source_digest(*rooms: str) -> str:
    """SHA-256 over the sources that are measured and that measure: results of two versions never mix."""
    digest = hashlib.sha256()
    for room in rooms:
        for path in sorted((ROOT / room).rglob("*")):
            if path.suffix in (".py", ".json"):
                digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
