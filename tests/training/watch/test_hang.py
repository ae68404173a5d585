from __future__ import annotations

import signal
import socket
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.training.watch import hang_cases
from tests.training.watch.hang_cases import VICTIM_STEP, alone_main, log, ranks, reports, the_message, until
from trellis_dist.files import read_json
from trellis_dist.training.watch import hang
from trellis_dist.training.watch.flight import flight_path
from trellis_dist.training.watch.hang import HangWatch
from trellis_dist.training.watch.heartbeat import Heartbeat, bounded
from trellis_dist.training.watch.status_page import read_status, status_path


def ended(processes: list) -> bool:
    return all(process.exitcode is not None for process in processes)


@pytest.mark.parametrize("own_store, victim", [(False, 1), (True, 0)])
def test_a_stopped_rank_is_named_in_time_also_when_it_keeps_the_store(
    tmp_path: Path, own_store: bool, victim: int
) -> None:
    others = [rank for rank in range(3) if rank != victim]
    with ranks(3, tmp_path, f"stop {victim}", own_store=own_store) as processes:
        until(lambda: ended([processes[rank] for rank in others]))
        assert [processes[rank].exitcode for rank in others] == [1, 1]
        if not own_store:  # found by its beats: nobody has to wait for a process that hears nothing
            until(lambda: ended([processes[victim]]))
            assert processes[victim].exitcode == -signal.SIGKILL
    found = reports(tmp_path, 3)
    assert sorted(found) == others
    assert [echo for _, echo in found.values()].count(False) == 1
    expected = (
        f"rank {victim} ({socket.gethostname()}, pid {processes[victim].pid}) has not been heard of for"
    )
    if own_store:
        expected = "rank 0, which keeps it, is stopped or gone"
    assert all(expected in message for message, _ in found.values()), found
    for rank in others:
        assert "rank_main" in log(tmp_path, rank)  # its stack
    status = read_status(status_path(tmp_path, victim))
    assert status is not None
    assert (status.step, status.operation) == (VICTIM_STEP, "gradient reduction")


def test_a_rank_is_named_within_five_seconds_of_the_timeout_however_slow_the_store() -> None:
    claim_and_two_readings = 3 * hang.READ_LIMIT_S + hang.BEATS_APART * 1.0
    assert 0.25 + claim_and_two_readings < 5.0 < hang.GRACE_S


def test_a_skipped_collective_is_named_with_rank_and_operation_and_all_ranks_end(tmp_path: Path) -> None:
    with ranks(3, tmp_path, "skip 1") as processes:
        until(lambda: ended(processes))
        assert [process.exitcode for process in processes] == [1, 1, 1]
    message = the_message(reports(tmp_path, 3))
    assert "rank 1 (" in message
    assert "is not in all_reduce #" in message
    assert "in which 2 other ranks wait; it is in step 4, a detour" in message
    entered = []
    for rank in range(3):
        assert "stacks of all threads" in log(tmp_path, rank)
        assert "rank_main" in log(tmp_path, rank)
        flight = flight_path(tmp_path, step=VICTIM_STEP, rank=rank)
        assert f"rank {rank}: its last collectives are in {flight}" in log(tmp_path, rank)
        entries = read_json(flight)["recorders"]["fr_trace_json"]["entries"]
        last = max(int(entry["collective_seq_id"]) for entry in entries)
        entered.append(last)
        assert all("all_reduce" in entry["profiling_name"] for entry in entries)
    assert entered[0] == entered[2] == entered[1] + 1  # the collective that rank 1 never came to


def test_a_run_that_gets_on_is_left_alone(tmp_path: Path) -> None:
    with ranks(2, tmp_path, "finish") as processes:
        until(lambda: ended(processes))
        assert [process.exitcode for process in processes] == [0, 0]
    assert reports(tmp_path, 2) == {}
    assert [log(tmp_path, rank) for rank in range(2)] == ["", ""]


@pytest.mark.parametrize("holds_the_lock", [False, True])
def test_a_single_process_ends_with_its_stacks(tmp_path: Path, holds_the_lock: bool) -> None:
    with hang_cases.started([(alone_main, (tmp_path, holds_the_lock))]) as processes:
        until(lambda: ended(processes))
        assert processes[0].exitcode == 1
    assert "alone_main" in log(tmp_path, 0)
    # A thread that cannot run cannot report: there the C timer ends the process.
    expected = "no progress on rank 0 (step 3, forward pass: more than 0.5 s)"
    assert reports(tmp_path, 1) == ({} if holds_the_lock else {0: (expected, False)})


def test_deadlines_count_from_arm_and_disarm_and_close_end_them() -> None:
    now, ends, said = [0.0], [], []
    watch = HangWatch(
        rank=0, report=lambda *what: said.append(what), poll_s=0.01, clock=lambda: now[0], end=ends.append
    )
    watch.arm(5.0, step=1, operation="a")
    now[0] = 4.0
    watch.enter("b")
    watch.arm(5.0, step=2, operation="c")
    now[0] = 8.0
    time.sleep(0.1)
    watch.disarm()
    now[0] = 100.0
    time.sleep(0.1)
    watch.arm(0.0, step=3, operation="no limit")
    now[0] = 1e6
    time.sleep(0.1)
    assert (ends, said) == ([], [])
    watch.arm(5.0, step=4, operation="d")
    watch.enter("e")
    now[0] += 5.0
    until(lambda: bool(ends))
    assert (ends, said) == ([1], [("no progress on rank 0 (step 4, e: more than 5 s)", False)])
    watch.close()
    watch.close()


def test_a_report_that_fails_does_not_keep_the_process(capfd: pytest.CaptureFixture[str]) -> None:
    def fail(message: str, echo: bool) -> None:
        raise OSError("disk full")

    now, ends = [0.0], []
    watch = HangWatch(rank=0, report=fail, poll_s=0.01, clock=lambda: now[0], end=ends.append)
    watch.arm(1.0, step=1, operation="a")
    now[0] = 2.0
    until(lambda: ends == [1])
    watch.close()
    assert "the hang could not be recorded (disk full): no progress on rank 0" in capfd.readouterr().err


def test_a_file_system_that_hangs_delays_neither_the_verdict_nor_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    release, order = threading.Event(), []

    class Judge(Heartbeat):
        def publish(self, verdict: str, limit_s: float) -> None:
            order.append("published")

    def stuck(*what: object) -> None:
        order.append("wrote" if isinstance(what[0], Path) else "reported")
        release.wait(250)

    monkeypatch.setattr(hang, "FILES_LIMIT_S", 0.05)
    monkeypatch.setattr(hang, "dump_flight", lambda **_: {"recorders": {}})
    monkeypatch.setattr(hang, "write_flight", stuck)
    now, ends = [0.0], []
    watch = HangWatch(
        rank=0,
        report=stuck,
        heartbeat=Judge(dist.HashStore(), rank=0, world_size=1, interval_s=0.05),
        logs=tmp_path,
        poll_s=0.01,
        clock=lambda: now[0],
        end=ends.append,
    )
    watch.arm(1.0, step=1, operation="a")
    now[0] = 2.0
    until(lambda: ends == [1])
    watch.close()
    release.set()
    assert sorted(order) == ["published", "reported", "wrote"]
    assert order.index("published") < order.index("reported")
    said = capfd.readouterr().err
    assert "the hang could not be recorded (not done within 0.05 s): no progress on rank 0" in said
    assert "rank 0: no flight record: not done within 0.05 s" in said


def test_a_verdict_that_came_just_after_a_beat_is_found_and_not_given_twice() -> None:
    store, now, said = dist.HashStore(), [0.0], []
    judge, late = (Heartbeat(store, rank=rank, world_size=2, interval_s=0.01) for rank in (0, 1))
    late.close()  # no beat comes any more
    assert judge.claim(5.0)
    watch = HangWatch(
        rank=1,
        report=lambda *what: said.append(what),
        heartbeat=late,
        poll_s=0.01,
        clock=lambda: now[0],
        end=lambda status: None,
    )
    watch.arm(1.0, step=1, operation="a")
    judge.publish("rank 1 did it", 5.0)
    now[0] = 2.0
    until(lambda: bool(said))
    watch.close()
    judge.close()
    assert said == [("rank 1 did it", True)]


def test_a_judge_that_fails_still_reports() -> None:
    class Broken(Heartbeat):
        def claim(self, limit_s: float) -> bool | None:
            raise KeyError("what no release of torch wrote so far")

    now, ends, said = [0.0], [], []
    watch = HangWatch(
        rank=0,
        report=lambda *what: said.append(what),
        heartbeat=Broken(dist.HashStore(), rank=0, world_size=1, interval_s=0.05),
        poll_s=0.01,
        clock=lambda: now[0],
        end=ends.append,
    )
    watch.arm(1.0, step=1, operation="a")
    now[0] = 2.0
    until(lambda: ends == [1])
    watch.close()
    ((message, echo),) = said
    assert message.startswith("no progress on rank 0 (step 1, a: more than 1 s); no cause found: KeyError")
    assert not echo


def test_beats_say_what_ranks_do_and_that_they_ended() -> None:
    store = dist.HashStore()
    one, other = (Heartbeat(store, rank=rank, world_size=3, interval_s=0.05) for rank in (0, 2))
    one.note(7, "backward pass")
    until(lambda: one.read(1.0)[0].step == 7)
    found = one.read(1.0)
    assert (found[0].operation, found[1], found[2].operation) == ("backward pass", None, "start")
    count = found[2].count
    until(lambda: one.read(1.0)[2].count > count + 2)
    assert [one.claim(1.0), other.claim(1.0), one.claim(1.0)] == [True, False, True]
    one.publish("rank 1 did it", 1.0)
    until(lambda: other.verdict == "rank 1 did it")
    other.close()
    assert one.read(1.0)[2].ended
    assert not one.read(1.0)[0].ended
    one.close()


def test_a_store_that_does_not_answer_costs_no_more_than_the_limit() -> None:
    start = time.monotonic()
    assert bounded(lambda: time.sleep(5), 0.05) is None
    assert time.monotonic() - start < 4
    assert bounded(lambda: 1 // 1, 5.0) == 1

    def lost() -> None:
        raise dist.DistNetworkError("connection reset")

    assert bounded(lost, 5.0) is None


class SilentStore:
    """Beats whose store does not answer."""

    interval_s, verdict = 0.01, None

    def note(self, step: int, operation: str) -> None: ...

    def close(self) -> None: ...

    def claim(self, limit_s: float) -> bool | None:
        return None


@pytest.mark.parametrize(
    "rank, store_rank, speaks, says",
    [
        (0, 0, None, False),  # it keeps the store: it would be what is stopped
        (1, 0, None, True),
        (2, 0, None, False),
        (4, None, True, True),  # the first rank of a node that is left, of a job whose first node is gone
        (5, None, False, False),
    ],
)
def test_when_the_store_is_silent_a_rank_that_is_left_says_so(
    rank: int, store_rank: int | None, speaks: bool | None, says: bool
) -> None:
    told: list[tuple[str, bool]] = []
    watch = HangWatch(
        rank=rank,
        report=lambda message, echo: told.append((message, echo)),
        heartbeat=SilentStore(),  # type: ignore[arg-type]
        store_rank=store_rank,
        speaks=speaks,
        poll_s=0.01,
        end=lambda status: None,
    )
    watch.arm(0.02, step=3, operation="update")
    watch._thread.join(30)
    watch.close()
    ((message, echo),) = told
    assert "store does not answer" in message
    assert echo is not says
