"""Fetching in this process, and what then lies on the disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from data_pipeline import fetch
from data_pipeline.commit import clear_attempts
from data_pipeline.config import SourceConfig
from data_pipeline.fetch import Fetched, Want
from data_pipeline.readers import Document, Quarantined
from data_pipeline.sources import Unit
from data_pipeline.streams import Shard
from tests.data_pipeline.texts import unit_documents


def take(plan: Sequence[Unit | Shard], work: Path, limits: dict[str, float] | None = None) -> Fetched:
    """Fetch in this process, as `fetch` does with one worker."""
    clear_attempts(work)
    want = Want(Fetched(list(plan)), limits or {}, work)
    for place in want.fetched.missing:
        if not want.look(place):
            for entry in fetch.fetch_shard(*want.call(place)):
                want.put(place, entry)
        if want.full:
            break
    return want.fetched


def found(fetched: Fetched, work: Path) -> list[Document | Quarantined]:
    source = SourceConfig()  # parts are read already
    return [document for unit in fetched.units(work) for document in unit_documents(unit, source)]


def content(work: Path) -> dict[str, bytes]:
    paths = [path for path in (work / "fetch").rglob("*") if path.is_file()]
    return {str(path.relative_to(work)): path.read_bytes() for path in sorted(paths)}


def failing(function: Callable[..., object], number: int) -> Callable[..., object]:
    """The function, but its call of that number fails."""
    calls: list[None] = []

    def made(*arguments: object) -> object:
        calls.append(None)
        if len(calls) == number:
            raise OSError(28, "No space left on device")
        return function(*arguments)

    return made
