"""Warnings of ours as one line; those of other packages as they are."""

from __future__ import annotations

import warnings

__all__ = ["show_warnings_plainly"]

_usual = warnings.formatwarning


def show_warnings_plainly() -> None:
    """Print our own warnings, such as a damaged checkpoint's, without the file and line that Python adds."""
    warnings.formatwarning = _plain


def _plain(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    if category.__module__.startswith(("checkpoints.", "evals.")):
        return f"trellis: warning: {message}\n"
    return _usual(message, category, filename, lineno, line)
