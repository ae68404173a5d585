"""A pool replaces the dead, ends the stuck and leaves no job with either; a stuck task loses its job."""

from __future__ import annotations

import threading

import pytest

from evals.pool import MOST_WAIT, Pool
from evals.watch import Runs, submit
from evals.worker import LocalJobs, Worker
from tests.evals.test_queue import submit as queue_job


class Member:
    def __init__(self, reason="it died"):
        self.lives, self.reason = True, reason

    def alive(self):
        return self.lives

    def kill(self):
        self.lives = False

    def death(self):
        return self.reason


class FakePool(Pool):
    def _start(self, owner):
        self.owner, self.member = owner, Member()
        return self.member


@pytest.fixture
def pool(queue, clock):
    return FakePool(queue, count=1, clock=clock)


def test_what_a_dead_worker_held_goes_to_the_next(queue, pool, clock):
    queue_job(queue, "a")
    pool.keep_alive()
    first = pool.owner
    queue.lease(first, seconds=60)
    pool.keep_alive()
    assert pool.owner == first
    clock.now += 20
    pool.member.lives = False
    pool.keep_alive()
    assert pool.owner != first
    assert (queue.job("a").state, queue.job("a").error) == ("queued", "it died")
    assert queue.lease(pool.owner, seconds=60).attempts == 2
    assert pool.alive() == 1


def test_a_worker_that_does_not_renew_is_ended(queue, pool, clock):
    queue_job(queue, "a")
    pool.keep_alive()
    queue.lease(pool.owner, seconds=60)
    stuck = pool.member
    clock.now += 61
    pool.keep_alive()
    assert not stuck.alive()
    assert queue.job("a").error == "its worker did not renew the lease and was ended"
    assert pool.member is not stuck


def test_workers_that_die_at_once_are_not_started_at_once_again_and_again(pool, clock):
    starts = 0
    for _ in range(600):
        pool.keep_alive()
        if pool.alive():
            starts += 1
            pool.member.lives = False
        clock.now += 1
    assert 600 / MOST_WAIT < starts < 60
    pool.keep_alive()
    clock.now += MOST_WAIT
    pool.keep_alive()
    clock.now += 600
    pool.member.lives = False
    pool.keep_alive()
    assert pool.alive(), "one that lived long is replaced at once"


def test_a_worker_whose_job_was_taken_away_is_replaced_at_once(pool):
    pool.keep_alive()
    pool.member.lives, pool.member.reason = False, None
    pool.keep_alive()
    assert pool.alive()


def test_stopping_ends_the_workers_and_their_jobs_wait_again(queue, pool):
    queue_job(queue, "a")
    pool.keep_alive()
    queue.lease(pool.owner, seconds=60)
    pool.stop()
    assert pool.alive() == 0
    assert not pool.member.alive()
    assert (queue.job("a").state, queue.job("a").attempts) == ("queued", 0)


@pytest.fixture
def job(queue, run_dir, monkeypatch):
    """A worker and its job, which takes until it is lost."""
    runs, lost = Runs(run_dir.parent), threading.Event()
    key, _ = submit(queue, runs, "tiny", "sample")
    going = threading.Event()

    def score(self, leased):
        going.set()
        assert lost.wait(20), "nobody took the job away"
        return {"result": {}}

    monkeypatch.setattr(Worker, "score", score)

    def work(**limits):
        worker = Worker(LocalJobs(queue, runs), runs, "w", lost=lost.set, **limits)
        thread = threading.Thread(target=worker.once)
        thread.start()
        assert going.wait(10)
        return thread

    return key, work


def test_a_cancelled_job_is_stopped_and_its_result_dropped(queue, job):
    key, work = job
    thread = work(lease_seconds=0.3)
    assert queue.cancel(key)
    thread.join()
    assert queue.job(key).state == "cancelled"
    assert queue.events()["results_dropped"] == 1


def test_a_job_that_takes_too_long_is_lost_with_that_reason(queue, job, monkeypatch):
    key, work = job
    monkeypatch.setattr(
        queue, "finish", lambda *_: False
    )  # in a process of its own nothing is left to finish
    work(job_seconds=0.2).join()
    assert queue.job(key).state == "queued"
    assert queue.job(key).error == "it took more than 0.2 s (--job-timeout)"


def test_a_lease_that_cannot_be_renewed_for_a_while_is_kept_until_it_runs_out(queue, job, monkeypatch, clock):
    _, work = job
    renewals = []

    def renew(*_, **__):
        renewals.append(1)
        raise OSError("disk full")

    monkeypatch.setattr(queue, "renew", renew)
    work(lease_seconds=0.3).join()
    assert len(renewals) >= 3
