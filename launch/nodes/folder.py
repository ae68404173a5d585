"""Is the run folder of all nodes one and the same? A token that one leaves there must be seen by all."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.nodes.meet import Meeting
from launch.nodes.verdict import Problem, failed

__all__ = ["ANNOUNCE_S", "TOKEN_S", "folder_answers", "shared"]

TOKEN_S = 30.0  # a network file system may show a new file late
ANNOUNCE_S = 20.0  # to write a small file
SLACK_S = 10.0  # for the answer of a node that gave up at the limit to come
WHAT = "run folder"
REMEDY = "put the run on a file system that all nodes share"


def folder_answers(run_dir: Path) -> dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]]:
    """What a node whose run folder is ``run_dir`` answers."""
    from checkpoints.probe import announce, await_token, withdraw

    return {
        "announce": lambda details: _done(lambda: announce(run_dir, str(details["token"]))),
        "token": lambda details: _done(lambda: await_token(run_dir, str(details["token"]), timeout=TOKEN_S)),
        "withdraw": lambda details: _done(lambda: withdraw(run_dir, str(details["token"]))),
    }


def _done(work: Callable[[], object]) -> dict[str, Any]:
    work()
    return {}


def shared(meeting: Meeting) -> list[Problem]:
    """The nodes that do not have the folder of the first one; where most have not, it may be the odd one."""
    first = _look(meeting, 0)
    lost = [node for node, answer in enumerate(first) if "failed" in answer]
    if 2 * len(lost) <= len(first) or 0 in lost:
        return failed(first, WHAT)
    second = _look(meeting, lost[0])
    have = [node for node, answer in enumerate(second) if "failed" not in answer]
    if 2 * len(have) <= len(second):
        return [Problem(node=None, what=WHAT, message=f"the run folders of the nodes are several: {REMEDY}")]
    line = f"{WHAT}: it is not the folder that {len(have)} of {len(second)} nodes share: {REMEDY}"
    return [Problem(node=node, what=WHAT, message=line) for node in range(len(second)) if node not in have]


def _look(meeting: Meeting, place: int) -> Sequence[Mapping[str, Any]]:
    """What all nodes answer about a token, which nobody can guess, that the one at ``place`` leaves."""
    token = {"token": os.urandom(16).hex()}
    node, count = meeting.nodes[place], len(meeting.nodes)
    try:
        left = meeting.round_trip(node, "announce", seconds=ANNOUNCE_S + SLACK_S, details=token)
        if "failed" in left:
            return [left if other == place else {} for other in range(count)]
        return meeting.ask("token", seconds=TOKEN_S + 2 * SLACK_S, details=[token] * count)
    except (OSError, ValueError) as error:
        return [
            {"failed": f"it stopped answering ({error})"} if other == place else {} for other in range(count)
        ]
    finally:
        _forget(meeting, place, token)


def _forget(meeting: Meeting, place: int, token: Mapping[str, Any]) -> None:
    try:
        meeting.round_trip(meeting.nodes[place], "withdraw", seconds=ANNOUNCE_S + SLACK_S, details=token)
    except (OSError, ValueError):  # what it left is cleared by the next probe of the folder
        return
