"""What a person sees while a corpus is prepared: a bar with documents, MB, tokens and quarantined."""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["Bar", "say"]


def say(shown: bool, message: str) -> None:
    """One line on stderr, if `shown`."""
    if shown:
        print(f"data: {message}", file=sys.stderr, flush=True)


class Bar:
    """A tqdm bar over work units."""

    def __init__(self, total: int, *, shown: bool) -> None:
        """`total` work units; nothing is printed unless `shown`."""
        from tqdm import tqdm

        self._bar: Any = tqdm(total=total, unit="unit", desc="tokenise", disable=not shown, mininterval=0.5)
        self._documents = self._bytes = self._tokens = self._quarantined = 0

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def count(self, entry: dict[str, Any]) -> None:
        """Add a finished unit (the content of its unit.json)."""
        self._documents += entry["documents"]
        self._tokens += entry["tokens"]
        self._bytes += entry["bytes"]
        self._quarantined += entry["quarantined"]
        rate = self._bytes / 1e6 / max(1e-3, self._bar.format_dict["elapsed"])
        self._bar.set_postfix_str(
            f"{self._documents} documents, {self._bytes / 1e6:.1f} MB ({rate:.1f} MB/s), "
            f"{self._tokens / 1e6:.2f} Mtok, {self._quarantined} quarantined",
            refresh=False,
        )
        self._bar.update()
