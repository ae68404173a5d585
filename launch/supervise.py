"""Starts the ranks of a run again after a failure that a restart can cure (``--max-restarts``)."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from launch.ending import newest_step
from launch.failures import RankError

__all__ = ["supervise"]

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0


def _announce(line: str) -> None:
    print(f"trellis: {line}", file=sys.stderr, flush=True)


def supervise(
    start: Callable[[], None],
    *,
    run_dir: Path,
    max_restarts: int,
    say: Callable[[str], None] = _announce,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Call ``start``, and again after a restartable ``RankError``, up to ``max_restarts`` times in a row.

    Restarts in a row are those without progress: a start that committed a checkpoint before it failed begins
    the count anew. Each waits twice as long as the one before (1 s at first, a minute at most) and is
    announced in one line with ``say``.

    Raises:
        launch.failures.RankError: of the last start; with the number of restarts if there were any.
        What else ``start`` raises: a run that was asked to end is not started again.
    """
    if max_restarts < 0:
        raise ValueError(f"--max-restarts {max_restarts}: use 0 (never) or more")
    restarts = 0
    while True:
        before = newest_step(run_dir)
        try:
            return start()
        except RankError as error:
            newest = newest_step(run_dir)
            restarts = 0 if newest > before else restarts
            if not error.restartable or restarts >= max_restarts:
                raise _final(error, restarts) from None
            failed = error
        restarts += 1
        pause = min(FIRST_PAUSE_S * 2 ** (restarts - 1), LONGEST_PAUSE_S)
        found = f"newest checkpoint: step {newest}" if newest else "no checkpoint yet"
        line = "; ".join(str(failed).splitlines())
        say(f"{line}; restart {restarts} of {max_restarts} in {pause:.0f} s; {found}")
        sleep(pause)


def _final(error: RankError, restarts: int) -> RankError:
    if not restarts:
        return error
    tried = f" (after {restarts} restart{'s' if restarts > 1 else ''} without a new checkpoint)"
    return RankError(f"{error}{tried}", error.detail, restartable=error.restartable)
