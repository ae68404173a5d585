"""Warnings of ours as one line; those of other packages as they are."""

from __future__ import annotations

import warnings

__all__ = ["show_warnings_plainly"]

_usual = warnings.formatwarning


def show_warnings_plainly() -> None:
    """Print a damaged checkpoint's warning without the file and source line that Python adds to a warning."""
    warnings.formatwarning = _plain


def _plain(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    if category.__module__.startswith("checkpoints."):
        return f"trellis: warning: {message}\n"
    return _usual(message, category, filename, lineno, line)
