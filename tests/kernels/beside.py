"""Test files that take minutes in a process of their own, run beside the other tests of this room."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import tempfile
from typing import IO

from tests.kernels.helpers import ROOT, TRITON_CASES

__all__ = ["IN_THE_INTERPRETER", "finish", "start"]

# The test that waits for it -> the file that Triton's interpreter runs.
IN_THE_INTERPRETER = {
    "test_kernels_equal_fp64_in_the_interpreter": TRITON_CASES,
    "test_parts_equal_fp64_in_the_interpreter": TRITON_CASES.with_name("on_triton_parts.py"),
}
TIMEOUT_S = 280.0

_running: dict[str, tuple[subprocess.Popen[str], IO[str]]] = {}


def start(test: str) -> None:
    """Begin the file that ``test`` waits for, unless it was begun."""
    if test in _running:
        return
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", str(IN_THE_INTERPRETER[test]), "-p", "no:cacheprovider"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        stdout=log,
        stderr=subprocess.STDOUT,
        text=True,
    )
    _running[test] = process, log
    atexit.register(process.kill)


def finish(test: str) -> None:
    """Wait for the file of ``test``; a failure shows its output."""
    start(test)
    process, log = _running[test]
    status = process.wait(timeout=TIMEOUT_S)
    log.seek(0)
    assert status == 0, log.read()[-6000:]
