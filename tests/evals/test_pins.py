"""A checkpoint stays while its evaluation waits or runs, through failures, cancels and killed services."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

from checkpoints.pins import EXPIRY, list_pins, pin, pinned_steps, unpin
from checkpoints.retention import Retention, retain
from evals.pins import PREFIX, sync_pins
from evals.queue import MAX_ATTEMPTS, Queue, QueueFullError
from evals.service import create_app
from evals.watch import PublicError, Runs, Watcher, submit
from evals.worker import Worker, work_once
from tests.evals.conftest import write_checkpoint


@pytest.fixture
def runs(run_dir):
    return Runs(run_dir.parent)


@pytest.fixture
def root(run_dir):
    return run_dir / "checkpoints"


def test_a_queued_checkpoint_outlives_retention_and_goes_after_its_last_job(queue, runs, run_dir, root):
    assert Watcher(queue, runs).look() == 2
    write_checkpoint(run_dir, step=9, seed=1)
    assert pinned_steps(root) == {7}
    assert retain(root, Retention(last=1)) == []
    assert work_once(queue, runs, "w")
    assert pinned_steps(root) == {7}, "its second job still waits"
    assert work_once(queue, runs, "w")
    assert queue.counts() == {"done": 2}
    assert [path.name for path in retain(root, Retention(last=1))] == ["step-00000007"]


def test_a_checkpoint_is_pinned_while_its_job_runs(queue, runs, root, monkeypatch):
    submit(queue, runs, "tiny", "sample")
    seen = []

    def score(self, leased):
        seen.append((queue.job(leased.key).state, pinned_steps(root)))
        return {"result": {}}

    monkeypatch.setattr(Worker, "score", score)
    work_once(queue, runs, "w")
    assert seen == [("running", {7})]
    assert pinned_steps(root) == set()


def test_a_job_that_will_be_tried_again_keeps_its_pin_and_one_that_failed_does_not(
    queue, runs, root, clock, monkeypatch
):
    def score(self, leased):
        raise PublicError("no")

    monkeypatch.setattr(Worker, "score", score)
    key, _ = submit(queue, runs, "tiny", "sample")
    for attempt in range(1, MAX_ATTEMPTS + 1):
        assert work_once(queue, runs, "w")
        assert pinned_steps(root) == (set() if attempt == MAX_ATTEMPTS else {7})
        clock.now += 100
    assert queue.job(key).state == "failed"
    assert submit(queue, runs, "tiny", "sample") == (key, True)
    assert pinned_steps(root) == {7}, "asked for again"


def test_a_cancelled_job_lets_go(queue, runs, root):
    from fastapi.testclient import TestClient

    client = TestClient(create_app(queue, runs), base_url="http://127.0.0.1:8321")
    key = client.post("/jobs", json={"run": "tiny", "task": "sample"}).json()["key"]
    other = client.post("/jobs", json={"run": "tiny", "task": "perplexity"}).json()["key"]
    assert client.delete(f"/jobs/{key}").status_code == 200
    assert [item.owner for item in list_pins(root)] == [PREFIX + other]
    assert client.delete(f"/jobs/{other}").status_code == 200
    assert list_pins(root) == []


def test_a_stored_result_needs_no_checkpoint(queue, runs, root, tmp_path):
    submit(queue, runs, "tiny", "sample")
    work_once(queue, runs, "w")
    other = Queue(tmp_path / "other.sqlite")
    assert submit(other, runs, "tiny", "sample")[1]
    assert other.counts() == {"done": 1}
    assert list_pins(root) == []


def test_a_checkpoint_that_goes_before_it_is_pinned_is_said_and_queues_nothing(
    queue, runs, root, monkeypatch
):
    def gone(checkpoint, key):
        raise FileNotFoundError(checkpoint)

    monkeypatch.setattr("evals.watch.pin_job", gone)
    with pytest.raises(PublicError, match="the checkpoint of step 7 is gone: submit another step"):
        submit(queue, runs, "tiny", "sample")
    assert queue.jobs() == ([], 0)


@pytest.mark.parametrize("error", [QueueFullError("full"), sqlite3.OperationalError("database is locked")])
def test_what_could_not_be_queued_is_not_pinned(queue, runs, root, monkeypatch, error):
    def refuse(*_, **__):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(queue, "submit", refuse)
        with pytest.raises(type(error)):
            submit(queue, runs, "tiny", "sample")
    assert list_pins(root) == []
    key, _ = submit(queue, runs, "tiny", "sample")
    queue.cancel(key)
    monkeypatch.setattr(queue, "submit", refuse)
    with pytest.raises(type(error)):
        submit(queue, runs, "tiny", "sample")
    assert pinned_steps(root) == set(), "a cancelled job"


def test_a_job_that_another_queued_meanwhile_keeps_its_pin(queue, runs, root, monkeypatch):
    def lost(*given, **options):
        Queue.submit(queue, *given, **options)
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(queue, "submit", lost)
    with pytest.raises(sqlite3.OperationalError):
        submit(queue, runs, "tiny", "sample")
    assert pinned_steps(root) == {7}


def test_a_look_between_the_pin_and_its_job_takes_no_pin_away(queue, runs, root, monkeypatch):
    key, _ = submit(queue, runs, "tiny", "sample")
    queue.cancel(key)

    def overtaken(*given, **options):
        sync_pins(queue, {"tiny": root})
        assert list_pins(root) == []
        return Queue.submit(queue, *given, **options)

    monkeypatch.setattr(queue, "submit", overtaken)
    assert submit(queue, runs, "tiny", "sample") == (key, True)
    assert pinned_steps(root) == {7}


def test_jobs_whose_workers_all_died_let_go_at_the_next_look(queue, runs, root, clock):
    submit(queue, runs, "tiny", "sample")
    submit(queue, runs, "tiny", "perplexity")
    for _ in range(2 * MAX_ATTEMPTS + 1):
        queue.lease("dead", seconds=10)
        clock.now += 11
    assert queue.counts() == {"failed": 2}
    assert pinned_steps(root) == {7}
    sync_pins(queue, {"tiny": root})
    assert list_pins(root) == []


def test_what_a_killed_service_queued_is_pinned_again_on_start(queue, runs, root):
    key, _ = submit(queue, runs, "tiny", "sample")
    done, _ = submit(queue, runs, "tiny", "perplexity")
    unpin(root / "step-00000007", PREFIX + key)
    queue.finish(done, {"result": {}})  # and killed before it let go
    pin(root / "step-00000007", PREFIX + "another queue's")
    assert Watcher(queue, runs).look() == 0
    assert {item.owner for item in list_pins(root)} == {PREFIX + "another queue's", PREFIX + key}


def test_a_long_queue_keeps_its_pins(queue, runs, root, monkeypatch):
    submit(queue, runs, "tiny", "sample")
    start = time.time()
    before = list_pins(root)
    sync_pins(queue, {"tiny": root})
    assert list_pins(root) == before, "a young pin is written again at every look"
    monkeypatch.setattr(time, "time", lambda: start + EXPIRY / 2)
    sync_pins(queue, {"tiny": root})
    monkeypatch.setattr(time, "time", lambda: start + EXPIRY * 1.2)
    assert pinned_steps(root) == {7}


def test_jobs_of_runs_and_steps_that_are_gone_stop_nothing(queue, runs, root):
    queue.submit("a", run="gone", step=1, task="sample")
    queue.submit("b", run="tiny", step=99, task="sample")
    sync_pins(queue, {"tiny": root})
    assert list_pins(root) == []
    (root / ".pins").write_text("no folder")
    queue.submit("c", run="tiny", step=7, task="sample")
    sync_pins(queue, {"tiny": root})
    assert pinned_steps(root) == set()


SERVICE = """
import os, signal, sys
from pathlib import Path
from evals.queue import Queue
from evals.watch import Runs, Watcher
import evals.watch
submit = Queue.submit
def killed(self, *arguments, **options):
    if sys.argv[3] == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    submit(self, *arguments, **options)
    os.kill(os.getpid(), signal.SIGKILL)
Queue.submit = killed
Watcher(Queue(Path(sys.argv[1])), Runs(Path(sys.argv[2]))).look()
"""


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_service_killed_while_it_queues_has_pinned_first(queue, runs, run_dir, root, tmp_path, moment):
    arguments = [str(tmp_path / "queue.sqlite"), str(run_dir.parent), moment]
    process = subprocess.run([sys.executable, "-c", SERVICE, *arguments], env=dict(os.environ), timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert pinned_steps(root) == {7}
    assert Watcher(queue, runs).look() == (2 if moment == "before" else 1)
    owners = {item.owner for item in list_pins(root)}
    assert owners == {PREFIX + job.key for job in queue.active()}
    assert json.loads(next((root / ".pins").iterdir()).read_text())["step"] == 7
