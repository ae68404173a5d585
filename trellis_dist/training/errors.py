"""Which of several failing ranks knows the cause."""

from __future__ import annotations

__all__ = ["EchoError"]


class EchoError(Exception):
    """Marks the error of a rank that only agreed to fail: another rank knows the cause, and says it.

    Mixed into the exception that the failing rank raises, so that handlers need not know it.
    """
