"""Which of several failing ranks knows the cause, and which failures are the machine's."""

from __future__ import annotations

__all__ = ["CUT_OFF", "SILENT_STORE", "EchoError", "MachineError"]

# With which the finding of a rank begins that knows only its own side of a hang; another rank's says more.
CUT_OFF, SILENT_STORE = "the network:", "the job's store"


class EchoError(Exception):
    """Marks the error of a rank that only agreed to fail: another rank knows the cause, and says it.

    Mixed into the exception that the failing rank raises, so that handlers need not know it.
    """


class MachineError(RuntimeError):
    """A fault of memory or of a device, said in a line that needs no traceback; a restart may cure it."""
