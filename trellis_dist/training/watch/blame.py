"""Who holds a hanging run up, from what every rank said last: pure functions.

In this order: ranks that ended or fell silent; ranks that are missing from a collective in which others wait;
ranks that are somewhere else than most. Where none of it singles anybody out, the verdict says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from trellis_dist.training.watch.flight import Collective, Group
from trellis_dist.training.watch.heartbeat import Beat

__all__ = ["Verdict", "blame", "waits"]

Beats = Mapping[int, Beat | None]
NAMED = 4  # ranks a message describes; more are counted
# Inputs of these have one size on all members, so another size is another collective.
EVEN = ("all_reduce", "allreduce", "broadcast")


@dataclass(frozen=True)
class Verdict:
    """The ranks to blame (none: nobody stands out) and one line that says why.

    ``silent`` are those of them whose process may be there still and says nothing.
    """

    ranks: tuple[int, ...]
    message: str
    silent: tuple[int, ...] = ()


@dataclass(frozen=True)
class Wait:
    """``ranks`` wait in ``collective`` of the group ``key`` for ``absent``."""

    key: str
    collective: Collective
    ranks: tuple[int, ...]
    absent: tuple[int, ...]


def blame(
    before: Beats, after: Beats, *, now: float, members: Mapping[str, Sequence[int]] | None = None
) -> Verdict:
    """Decide from two readings, a few beats apart, of every rank's beat (None: never heard of).

    Args:
        before, after: beats by rank, for all ranks of the job.
        now: unix seconds of the second reading.
        members: ranks of process groups where they are known; of others, those that have used them count.
    """
    lost = {rank: why for rank, why in _lost(before, after, now).items() if why}
    if lost:
        silent = tuple(rank for rank in lost if (beat := after[rank]) is not None and not beat.ended)
        return Verdict(tuple(lost), _joined(lost.values()), silent)
    beats = {rank: beat for rank, beat in after.items() if beat is not None}
    held = waits(beats, members or {})
    return _missing(beats, held) or _elsewhere(beats) or _nobody(beats)


def _lost(before: Beats, after: Beats, now: float) -> dict[int, str]:
    reasons = {}
    for rank, beat in after.items():
        first = before.get(rank)
        if beat is None:
            reasons[rank] = f"rank {rank} has never been heard of"
        elif beat.ended:
            reasons[rank] = f"{_who(beat)} has ended; {_did(beat)}"
        elif first is not None and (first.pid, first.count) == (beat.pid, beat.count):
            # The age mixes two machines' clocks; that it is silent was seen on the store's side.
            age = max(0.0, now - beat.time)
            reasons[rank] = f"{_who(beat)} has not been heard of for {age:.0f} s; {_did(beat)}"
    return reasons


def waits(beats: Mapping[int, Beat], members: Mapping[str, Sequence[int]]) -> list[Wait]:
    """Every collective in which some ranks wait and others of its group are not."""
    found = []
    for key in sorted({key for beat in beats.values() for key in beat.groups}):
        states = {rank: beat.groups[key] for rank, beat in beats.items() if key in beat.groups}
        ranks = [rank for rank in members.get(key.partition(":")[2], sorted(states)) if rank in beats]
        inside = {rank: state.waiting for rank, state in states.items() if state.waiting is not None}
        for number in sorted({collective.number for collective in inside.values()}):
            here = {rank: c for rank, c in inside.items() if c.number == number}
            found += _divided(key, here, {rank: states.get(rank) for rank in ranks})
    return found


def _divided(key: str, here: Mapping[int, Collective], states: Mapping[int, Group | None]) -> list[Wait]:
    """Who of ``here``, ranks that wait under one number, waits for whom of the group's ``states``."""
    number = next(iter(here.values())).number
    late = {rank for rank, state in states.items() if state is None or state.last.number < number}
    if any(collective.started for collective in here.values()):  # GPUs that have not come to it yet
        late |= {rank for rank, collective in here.items() if not collective.started}
    kinds = Counter(_kind(collective) for rank, collective in here.items() if rank not in late)
    (_, most), *others = kinds.most_common()
    # The majority says which collective it is; without one, each kind waits for the others.
    right = [kind for kind, count in kinds.items() if count == most or 2 * most <= sum(kinds.values())]
    found = []
    for kind in right:
        ranks = tuple(rank for rank, c in here.items() if _kind(c) == kind and rank not in late)
        absent = late | (set(here) - set(ranks) if others else set())
        if absent:
            found.append(Wait(key, here[ranks[0]], ranks, tuple(sorted(absent))))
    return found


def _kind(collective: Collective) -> tuple[str, str]:
    return collective.name, collective.sizes if collective.name in EVEN else ""


def _missing(beats: Mapping[int, Beat], held: Sequence[Wait]) -> Verdict | None:
    """Those that others wait for and that wait for nobody; in a circle, those most ranks wait for."""
    waiting = {rank for wait in held for rank in wait.ranks}
    waiters: Counter[int] = Counter()
    for wait in held:
        waiters.update(dict.fromkeys(wait.absent, len(wait.ranks)))
    if not waiters:
        return None
    roots = [rank for rank in waiters if rank not in waiting] or list(waiters)
    worst = max(waiters[rank] for rank in roots)
    culprits = tuple(sorted(rank for rank in roots if waiters[rank] == worst))
    return Verdict(culprits, _joined(_absence(beats, held, rank) for rank in culprits))


def _absence(beats: Mapping[int, Beat], held: Sequence[Wait], rank: int) -> str:
    wait = max((wait for wait in held if rank in wait.absent), key=lambda wait: len(wait.ranks))
    others, what = len(wait.ranks), wait.collective
    group = next(beats[r].groups[wait.key] for r in wait.ranks)
    where = f"it is in {_where(beats[rank])}"
    own = beats[rank].groups.get(wait.key)
    if own is not None and own.waiting is not None and _kind(own.waiting) != _kind(what):
        where += f", and waits in {_collective(own.waiting)} there"
    return (
        f"{_who(beats[rank])} is not in {_collective(what)} of {group.label}, in which {others} other "
        f"{'rank waits' if others == 1 else 'ranks wait'}; {where}"
    )


def _collective(collective: Collective) -> str:
    return f"{collective.name} #{collective.number} {collective.sizes}".rstrip()


def _elsewhere(beats: Mapping[int, Beat]) -> Verdict | None:
    """Those at another step or operation than most; without a majority, those at the earliest step."""
    places = Counter((beat.step, beat.operation) for beat in beats.values())
    if len(places) == 1:
        return None
    (place, most), *_ = places.most_common()
    first = min(beat.step for beat in beats.values())
    if 2 * most > len(beats):
        odd = [rank for rank, beat in beats.items() if (beat.step, beat.operation) != place]
        rest = f"while {most} of {len(beats)} ranks are in step {place[0]}, {place[1]}"
    else:
        odd = [rank for rank, beat in beats.items() if beat.step == first]
        further = len(beats) - len(odd)
        rest = f"while {further} of {len(beats)} ranks are further" if further else "and none is further"
    lines = _joined(f"{_who(beats[rank])} is in {_where(beats[rank])}" for rank in odd)
    return Verdict(tuple(odd), f"{lines}, {rest}")


def _nobody(beats: Mapping[int, Beat]) -> Verdict:
    place = _where(next(iter(beats.values())))
    return Verdict((), f"no single rank is behind: all {len(beats)} are in {place}")


def _who(beat: Beat) -> str:
    return f"rank {beat.rank} ({beat.host}, pid {beat.pid})"


def _where(beat: Beat) -> str:
    return f"step {beat.step}, {beat.operation}"


def _did(beat: Beat) -> str:
    return f"its last operation: {_where(beat)}"


def _joined(lines: Iterable[str]) -> str:
    every = list(lines)
    rest = [f"and {len(every) - NAMED} more"] if len(every) > NAMED else []
    return "; ".join(every[:NAMED] + rest)
