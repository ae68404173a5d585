"""Result files of the study, one JSON per finished run, and the core-seconds that they add up to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trellis_dist.files import atomic_write, read_json

__all__ = ["FOLDER", "Store", "compact", "folder_of"]

FOLDER = Path(__file__).parents[1] / "results" / "study"


def folder_of(scale: str) -> Path:
    """Where the results of a scale are: those of "tiny" in FOLDER, of another beside it."""
    return FOLDER if scale == "tiny" else FOLDER.with_name(f"{FOLDER.name}-{scale}")


class Store:
    """The folder of results.

    Runs are FOLDER/NAME.json. FOLDER/once/ holds what is no run: the n-grams, the test split, the speeds;
    FOLDER/sealed/ the runs' scores on the test books (benchmarks/study/frozen.py); FOLDER/tried/ runs by
    hand, which choose nothing (benchmarks/study/tried.py).
    """

    def __init__(self, folder: Path = FOLDER) -> None:
        self.folder = folder

    def runs(self) -> dict[str, dict[str, Any]]:
        """Name -> result of every finished run."""
        return {path.stem: read_json(path) for path in sorted(self.folder.glob("*.json"))}

    def tried(self) -> dict[str, dict[str, Any]]:
        """Name -> result of every run by hand."""
        return {path.stem: read_json(path) for path in sorted((self.folder / "tried").glob("*.json"))}

    def once(self, name: str) -> dict[str, Any] | None:
        """What ``once/NAME.json`` holds; None without it."""
        path = self.folder / "once" / f"{name}.json"
        return read_json(path) if path.is_file() else None

    def sealed(self, name: str) -> dict[str, Any] | None:
        """The sealed test scores of a run; None where it has none."""
        path = self.folder / "sealed" / f"{name}.json"
        return read_json(path) if path.is_file() else None

    def write(self, name: str, found: Mapping[str, Any]) -> Path:
        """Write a run's result, or with "once/NAME" something else; its path."""
        path = self.folder / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, compact(found) + "\n")
        return path

    def spent(self) -> float:
        """Core-seconds of all results, and of test books that were not scored by the run itself."""
        later = (self.once("test") or {}).get("runs", {})
        every = [*self.runs().values(), *self.tried().values(), *later.values()]
        return sum(float(found.get("core_seconds", 0.0)) for found in every)


def compact(value: Any, depth: int = 0) -> str:
    """JSON whose two outer levels have a line per key, everything below one line."""
    if isinstance(value, Mapping) and value and depth < 2:
        pad = " " * (2 * depth + 2)
        lines = (f"{pad}{json.dumps(key)}: {compact(item, depth + 1)}" for key, item in value.items())
        return "{\n" + ",\n".join(lines) + f"\n{' ' * (2 * depth)}}}"
    return json.dumps(value)
