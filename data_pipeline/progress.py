"""What a person sees while a corpus is prepared: a bar per stage, with rates, time left and quarantined."""

from __future__ import annotations

import sys
import time
from typing import Any

__all__ = ["Bar", "say"]


def say(shown: bool, message: str) -> None:
    """One line on stderr, if `shown`."""
    if shown:
        print(f"data: {message}", file=sys.stderr, flush=True)


class Bar:
    """A tqdm bar over the work units of a stage: ``clean: 41% 9/22 [00:12<00:17] 512 documents/s, ...``."""

    def __init__(self, title: str, total: int, *, shown: bool) -> None:
        """`total` work units at most; nothing is printed unless `shown`."""
        from tqdm import tqdm

        form = "{desc}: {percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"
        self._bar: Any = tqdm(
            total=total, desc=f"data: {title}", disable=not shown, mininterval=0.5, bar_format=form
        )
        self._sums = dict.fromkeys(("documents", "bytes", "tokens"), 0)
        self._quarantined = self._reused = 0
        self._started = time.monotonic()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def restart(self) -> None:
        """Count time from here: what was waited for before is no work."""
        self._bar.unpause()
        self._started = time.monotonic()

    def count(self, entry: dict[str, Any], *, reused: bool = False) -> None:
        """Add a unit (the content of its unit.json); one that was committed before counts in no rate."""
        self._quarantined += entry.get("quarantined", 0)
        self._reused += reused
        if not reused:
            for name in self._sums:
                value = entry.get(name, 0)
                self._sums[name] += sum(value) if isinstance(value, list) else value
        self._bar.set_postfix_str(self._text(), refresh=False)
        self._bar.update()

    def _text(self) -> str:
        seconds = max(1e-3, time.monotonic() - self._started)
        documents, size, tokens = (self._sums[name] / seconds for name in ("documents", "bytes", "tokens"))
        parts = []
        if documents:
            parts += [f"{documents:,.0f} documents/s", f"{size / 1e6:.1f} MB/s"]
        if tokens:
            parts.append(f"{tokens / 1e6:.2f} Mtok/s")
        if self._quarantined:
            parts.append(f"{self._quarantined:,} quarantined")
        if self._reused:
            parts.append(f"{self._reused:,} re-used")
        return ", ".join(parts)
