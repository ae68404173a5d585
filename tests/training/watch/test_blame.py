from __future__ import annotations

import dataclasses

import pytest

from trellis_dist.training.watch.blame import blame
from trellis_dist.training.watch.flight import Collective, Group, groups_from_entries
from trellis_dist.training.watch.heartbeat import Beat

NOW = 1000.0
WORLD = "gloo:0"


def beat(rank: int, *, step: int = 12, operation: str = "backward pass", **fields: object) -> Beat:
    start = {"host": "node1", "pid": 100 + rank, "since": 900.0, "count": 50, "time": NOW - 0.5}
    return Beat(rank=rank, step=step, operation=operation, **{**start, **fields})  # type: ignore[arg-type]


def waiting(number: int, name: str = "all_reduce", sizes: str = "[[5]]", label: str = "default_pg") -> Group:
    here = Collective(number, name, sizes)
    return Group(label, here, here)


def idle(number: int, label: str = "default_pg") -> Group:
    return Group(label, Collective(number, "all_reduce", "[[5]]"))


def judge(after: list[Beat | None], *, stopped: tuple[int, ...] = (), members: dict | None = None):
    later = dict(enumerate(after))
    before = {
        rank: one and dataclasses.replace(one, count=one.count - (rank not in stopped))
        for rank, one in later.items()
    }
    return blame(before, later, now=NOW, members=members)


def with_groups(*groups: dict[str, Group], **fields: object) -> list[Beat | None]:
    return [beat(rank, groups=group, **fields) for rank, group in enumerate(groups)]


def test_a_rank_whose_beats_stopped_is_named_with_its_last_operation() -> None:
    beats = with_groups({WORLD: waiting(7)}, {WORLD: waiting(7)}, {WORLD: waiting(7)}, {WORLD: idle(6)})
    beats[3] = beat(3, time=NOW - 34, groups={WORLD: idle(6)})
    verdict = judge(beats, stopped=(3,))
    assert verdict.ranks == (3,)
    assert verdict.message == (
        "rank 3 (node1, pid 103) has not been heard of for 34 s; its last operation: step 12, backward pass"
    )


def test_ranks_never_heard_of_and_ranks_that_ended_are_named() -> None:
    verdict = judge([beat(0), None, beat(2, ended=True, operation="update")])
    assert verdict.ranks == (1, 2)
    assert "rank 1 has never been heard of" in verdict.message
    assert "rank 2 (node1, pid 102) has ended; its last operation: step 12, update" in verdict.message


def test_a_rank_that_started_again_between_the_readings_is_alive() -> None:
    after = {0: beat(0, count=3), 1: beat(1, count=1)}
    assert blame({0: beat(0, count=2), 1: None}, after, now=NOW).ranks == ()
    assert blame({0: beat(0, count=2), 1: beat(1, count=1, pid=9)}, after, now=NOW).ranks == ()


def test_many_lost_ranks_are_counted() -> None:
    verdict = judge([beat(0), *([None] * 9)])
    assert len(verdict.ranks) == 9
    assert verdict.message.endswith("rank 4 has never been heard of; and 5 more")


def test_a_skipped_collective_names_rank_operation_and_place() -> None:
    beats = with_groups({WORLD: waiting(57)}, {WORLD: idle(56)}, {WORLD: waiting(57)}, {WORLD: waiting(57)})
    beats[1] = beat(1, operation="optimizer update", groups={WORLD: idle(56)})
    verdict = judge(beats)
    assert verdict.ranks == (1,)
    assert verdict.message == (
        "rank 1 (node1, pid 101) is not in all_reduce #57 [[5]] of default_pg, in which 3 other ranks wait; "
        "it is in step 12, optimizer update"
    )


@pytest.mark.parametrize("instead", [("broadcast", "[[5]]"), ("all_reduce", "[[6]]")])
def test_another_collective_under_the_same_number_is_named_by_the_majority(instead: tuple[str, str]) -> None:
    other = waiting(57, *instead)
    verdict = judge(with_groups({WORLD: waiting(57)}, {WORLD: other}, {WORLD: waiting(57)}))
    assert verdict.ranks == (1,)
    assert "in which 2 other ranks wait" in verdict.message
    assert f"and waits in {instead[0]} #57 {instead[1]} there" in verdict.message


def test_two_ranks_in_different_collectives_are_both_named() -> None:
    verdict = judge(with_groups({WORLD: waiting(57)}, {WORLD: waiting(57, "broadcast")}))
    assert verdict.ranks == (0, 1)
    assert "rank 0 (node1, pid 100) is not in broadcast #57" in verdict.message
    assert "rank 1 (node1, pid 101) is not in all_reduce #57" in verdict.message


def test_gathers_of_uneven_sizes_match() -> None:
    groups = [{WORLD: waiting(9, "all_gather", f"[[{size}]]")} for size in (5, 6)]
    assert judge(with_groups(*groups)).ranks == ()


def test_of_two_groups_the_rank_that_waits_nowhere_is_the_cause() -> None:
    # dp2 x tp2: rank 1 is stuck outside; 0 waits for it in tp, 3 in dp, and 2 waits for 0.
    tp, dp = "gloo:5", "gloo:6"
    beats = with_groups(
        {tp: waiting(4, label="tp")},
        {tp: idle(3, "tp"), "gloo:8": idle(2, "dp1")},
        {dp: waiting(2, label="dp")},
        {"gloo:8": waiting(2 + 1, label="dp1")},
    )
    members = {"5": (0, 1), "6": (0, 2), "8": (1, 3)}
    verdict = judge(beats, members=members)
    assert verdict.ranks == (1,)
    # Rank 0 has never used dp: only the membership shows that rank 2 waits for it.
    assert judge([beats[0], beats[2], beats[2]], members={"6": (0, 1)}).ranks == (0,)


def test_the_cause_is_named_though_more_ranks_wait_for_one_that_waits_itself() -> None:
    pair = "gloo:5"
    held = {WORLD: idle(6), pair: waiting(4, label="pair")}
    beats = with_groups(held, {pair: idle(3, "pair")}, *[{WORLD: waiting(7)}] * 3)
    assert judge(beats, members={"0": (0, 2, 3, 4)}).ranks == (1,)


def test_in_a_circle_the_rank_most_wait_for_is_named() -> None:
    # Rank 1 skipped #57 of the world and waits with rank 0 in another group.
    pair = "gloo:5"
    beats = with_groups(
        {WORLD: waiting(57), pair: idle(3, "pair")},
        {WORLD: idle(56), pair: waiting(4, label="pair")},
        {WORLD: waiting(57)},
        {WORLD: waiting(57)},
    )
    assert judge(beats).ranks == (1,)


def test_without_collectives_the_place_decides() -> None:
    beats: list[Beat | None] = [beat(rank) for rank in range(4)]
    beats[2] = beat(2, operation="reading data")
    verdict = judge(beats)
    assert verdict.ranks == (2,)
    assert verdict.message == (
        "rank 2 (node1, pid 102) is in step 12, reading data, "
        "while 3 of 4 ranks are in step 12, backward pass"
    )
    behind = judge([beat(0, step=12), beat(1, step=11)])
    assert behind.ranks == (1,)
    assert behind.message.endswith("is in step 11, backward pass, while 1 of 2 ranks are further")
    assert judge([beat(0, operation="a"), beat(1, operation="b")]).ranks == (0, 1)


def test_where_all_are_slow_nobody_is_named() -> None:
    for groups in ({}, {WORLD: idle(5)}, {WORLD: waiting(5)}):
        verdict = judge(with_groups(*[groups] * 4))
        assert verdict.ranks == ()
        assert verdict.message == "no single rank is behind: all 4 are in step 12, backward pass"


def entry(number: int, *, backend: str = "gloo", **fields: object) -> dict[str, object]:
    return {
        "collective_seq_id": number,
        "profiling_name": f"{backend}:all_reduce",
        "process_group": ["3", "undefined"],
        "input_sizes": [[5]],
        "is_p2p": False,
        "state": "scheduled",
        "retired": False,
        **fields,
    }


def test_the_recorders_entries_are_folded_by_group() -> None:
    sent = entry(9, is_p2p=True)
    groups = groups_from_entries(
        [entry(1, retired=True), entry(2), entry(3), sent, entry(1, backend="nccl", state="completed")]
    )
    assert groups["gloo:3"] == Group(
        "group 3", Collective(3, "all_reduce", "[[5]]"), Collective(2, "all_reduce", "[[5]]")
    )
    assert groups["nccl:3"].waiting is None


def test_on_gpus_the_rank_whose_kernel_has_not_started_is_behind() -> None:
    started = groups_from_entries([entry(7, backend="nccl", state="started"), entry(8, backend="nccl")])
    queued = groups_from_entries([entry(7, backend="nccl"), entry(8, backend="nccl")])
    verdict = judge(with_groups(started, queued, started))
    assert verdict.ranks == (1,)
    assert "all_reduce #7" in verdict.message
    assert judge(with_groups(queued, queued)).ranks == ()


def test_beats_survive_their_journey() -> None:
    one = beat(3, groups={WORLD: waiting(5), "gloo:1": idle(4)}, ended=True)
    assert Beat.decode(one.encode()) == one
