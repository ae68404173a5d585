"""What a process of its own runs in the tests of the queue."""

from __future__ import annotations

import time

from evals.queue import Queue


def hold_one_job(database):
    """Lease a job for a second and do nothing with it."""
    Queue(database).lease("holder", seconds=1.0)
    time.sleep(60)
