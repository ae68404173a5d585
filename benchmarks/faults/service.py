"""Row 20 of the fault table: the evaluation service, attacked and killed."""

from __future__ import annotations

from pathlib import Path

from benchmarks.faults.row import Outcome, Row
from benchmarks.faults.service_kills import KILLS, kill_in_evaluation
from benchmarks.faults.service_requests import FAMILIES, attack

__all__ = ["ROWS"]


def attack_or_kill(folder: Path, index: int) -> Outcome:
    """The families of requests first, then the kills."""
    attacks = len(FAMILIES)
    return attack(folder, index) if index < attacks else kill_in_evaluation(folder, index - attacks)


ROWS = {
    20: Row(
        title="evaluation service: requests without a token, of other sites, for paths out of its folders, "
        "of 1 GB; SIGKILL of worker, server or both in the midst of an evaluation",
        expected="401, 403, nothing there (404), 413; exactly one result per checkpoint, equal to an "
        "undisturbed one",
        full=len(FAMILIES) + KILLS,
        quick=len(FAMILIES) + 2,
        trial=attack_or_kill,
    ),
}
