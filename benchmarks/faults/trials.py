"""Trials, one after another, each kept as a line of a file: a run that was killed does none twice."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.faults.row import STOCK_OUTCOMES, Outcome, Row, Trial
from benchmarks.kernels.record import one_line

__all__ = ["Trials"]

OURS = "trellis"


class Trials:
    """The trials in `work`/trials.jsonl; those of the same sources are used again."""

    def __init__(self, work: Path, source: str) -> None:
        """Read what is there."""
        self._work, self._source = work, source
        self._file = work / "trials.jsonl"
        work.mkdir(parents=True, exist_ok=True)
        self._done: dict[tuple[int, str, int], dict[str, Any]] = {}
        for line in self._lines():
            if line["source"] == source:
                self._done[line["row"], line["format"], line["index"]] = line

    def _lines(self) -> list[dict[str, Any]]:
        if not self._file.is_file():
            return []
        data = self._file.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:  # killed in the middle of a line
            os.truncate(self._file, len(whole))
        return [json.loads(line) for line in whole.splitlines()]

    def run(self, number: int, row: Row, count: int) -> list[dict[str, Any]]:
        """The results of trials 0 to `count` - 1 of a row."""
        return [
            self._get(number, OURS, index, lambda at, i: _ours(row.trial, at, i)) for index in range(count)
        ]

    def run_stock(self, number: int, row: Row, count: int) -> dict[str, list[dict[str, Any]]]:
        """The same of each stock format beside it, by name."""

        def results(name: str) -> list[dict[str, Any]]:
            stock = row.stock[name]
            return [
                self._get(number, name, index, lambda at, i: {"outcome": _known(stock(at, i))})
                for index in range(count)
            ]

        return {name: results(name) for name in row.stock}

    def _get(
        self, number: int, name: str, index: int, trial: Callable[[Path, int], dict[str, Any]]
    ) -> dict[str, Any]:
        key = (number, name, index)
        if key not in self._done:
            self._done[key] = self._keep(key, trial)
        return self._done[key]

    def _keep(
        self, key: tuple[int, str, int], trial: Callable[[Path, int], dict[str, Any]]
    ) -> dict[str, Any]:
        folder = self._work / f"row-{key[0]:02d}" / f"{key[1].replace(' ', '-')}-{key[2]}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        began = time.monotonic()
        try:
            result = trial(folder, key[2])
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        head = {"row": key[0], "format": key[1], "index": key[2], "source": self._source}
        line = {**head, **result, "seconds": round(time.monotonic() - began, 3)}
        with open(self._file, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if not line.get("ok", True):
            print(f"row {key[0]}, trial {key[2]}: {line['note']}", flush=True)
        return line


def _ours(trial: Trial, folder: Path, index: int) -> dict[str, Any]:
    try:
        outcome = trial(folder, index)
    except Exception as error:  # one trial that fails must not end a run of hours
        outcome = Outcome(False, one_line(error))
    counts = {"passed": outcome.count, "of": outcome.of}
    return {"ok": outcome.ok, "note": outcome.note, "numbers": dict(outcome.numbers), **counts}


def _known(outcome: str) -> str:
    assert outcome in STOCK_OUTCOMES, f"{outcome!r} is none of {', '.join(STOCK_OUTCOMES)}"
    return outcome
