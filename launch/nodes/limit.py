"""Work that may never end, bounded: CUDA that does not start, a dead file system, a peer that is gone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

__all__ = ["within"]

T = TypeVar("T")


def within(work: Callable[[], T], seconds: float) -> T:
    """What ``work`` returns or raises; TimeoutError after ``seconds``, and it is left to its thread.

    The caller must then not wait for that thread, nor import what it may be importing.
    """
    results: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(work())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="trellis-preflight", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"timed out: no end in {seconds:g} s")
    return results[0]
