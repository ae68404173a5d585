"""The queue: each key gets exactly one result, through deaths, cancels, retries and upgrades of its file."""

from __future__ import annotations

import json
import math
import sqlite3
import threading

import pytest

from evals.queue import MAX_ATTEMPTS, Queue, QueueFullError
from evals.results import Results
from evals.samples import Sample


def submit(queue, key, **options):
    return queue.submit(key, **{"run": "r", "step": 1, "task": "sample"} | options)


def test_a_key_is_queued_once_and_gets_one_result(queue):
    assert submit(queue, "a")
    assert not submit(queue, "a")
    assert queue.lease("w", seconds=10).key == "a"
    assert queue.lease("v", seconds=10) is None
    assert queue.finish("a", {"n": 1})
    assert not queue.finish("a", {"n": 2})
    assert Results(queue.database).record("a") == {"n": 1}
    assert not submit(queue, "a")
    assert queue.counts() == {"done": 1}
    assert queue.events() == {
        "submitted": 1,
        "leased": 1,
        "results_stored": 1,
        "results_dropped": 1,
    }


def test_higher_priority_first_then_the_older(queue, clock):
    for key, priority in (("a", 0), ("b", 1), ("c", 0), ("d", 0)):
        clock.now += 1
        submit(queue, key, priority=priority)
    assert not submit(queue, "d", priority=9)  # asked for again, more urgently
    assert not submit(queue, "b", priority=-9)
    assert [queue.lease("w", seconds=10).key for _ in range(4)] == ["d", "b", "a", "c"]


def test_the_job_of_a_dead_worker_comes_back(queue, clock):
    submit(queue, "a")
    queue.lease("dead", seconds=10)
    clock.now += 9
    assert queue.renew("a", "dead", seconds=10)
    clock.now += 9
    assert queue.lease("w", seconds=10) is None
    assert queue.overdue() == set()
    clock.now += 2
    assert queue.overdue() == {"dead"}
    assert queue.lease("w", seconds=10).attempts == 2
    assert not queue.renew("a", "dead", seconds=10)
    queue.fail("a", "dead", "too late to matter")
    assert queue.job("a").state == "running"


def test_a_failing_job_waits_longer_each_time_and_ends(queue, clock):
    submit(queue, "a")
    waits = []
    for attempt in range(1, MAX_ATTEMPTS + 1):
        assert queue.lease("w", seconds=10).attempts == attempt
        queue.fail("a", "w", "ValueError: no")
        failed = clock.now
        while attempt < MAX_ATTEMPTS and queue.lease("w", seconds=10) is None:
            clock.now += 5
        waits.append(clock.now - failed)
        queue.hand_back("w")
    assert waits == [10, 20, 0]
    assert queue.job("a").state == "failed"
    assert queue.job("a").error == "ValueError: no"
    assert submit(queue, "a", run="copy")  # a person asks again, for the same checkpoint elsewhere
    assert (queue.job("a").state, queue.job("a").run) == ("queued", "copy")


def test_what_a_dead_worker_held_is_there_at_once_and_ends_after_too_many(queue):
    submit(queue, "a")
    submit(queue, "b")
    for _ in range(MAX_ATTEMPTS):
        assert queue.lease("w", seconds=10).key == "a"
        queue.release("w", "its worker died (exit status -9)")
    assert (queue.job("a").state, queue.job("a").error) == ("failed", "its worker died (exit status -9)")
    assert queue.lease("w", seconds=10).key == "b"
    queue.release_all("the service ended")
    assert queue.job("b").state == "queued"


def test_a_job_that_was_handed_back_has_lost_no_attempt(queue):
    submit(queue, "a")
    for _ in range(MAX_ATTEMPTS + 1):
        assert queue.lease("w", seconds=10).attempts == 1
        queue.hand_back("w")


def test_a_job_whose_workers_all_died_fails_with_the_reason(queue, clock):
    submit(queue, "a")
    for _ in range(MAX_ATTEMPTS):
        queue.lease("w", seconds=10)
        clock.now += 11
    assert queue.lease("w", seconds=10) is None
    assert queue.job("a").error == "its worker died in every attempt"
    assert queue.events()["failed"] == 1


def test_a_cancelled_job_keeps_no_result(queue):
    submit(queue, "a")
    queue.lease("w", seconds=10)
    assert queue.cancel("a")
    assert not queue.renew("a", "w", seconds=10)
    assert not queue.finish("a", {})
    assert not queue.cancel("a")
    assert Results(queue.database).page() == ([], 0)
    assert queue.events()["results_dropped"] == 1


def test_a_full_queue_takes_no_more_but_knows_what_it_has(queue):
    for key in "ab":
        submit(queue, key, room=2)
    with pytest.raises(QueueFullError, match="2 jobs wait already"):
        submit(queue, "c", room=2)
    assert not submit(queue, "a", room=2)
    queue.cancel("a")
    assert submit(queue, "c", room=2)


def test_jobs_in_pages_by_state_run_and_task(queue, clock):
    for i in range(10):
        clock.now += 1
        submit(queue, str(i), run="xy"[i % 2], task=("sample", "decode")[i // 5])
    queue.lease("w", seconds=10)
    found, total = queue.jobs(run="x", limit=2, offset=1)
    assert ([job.key for job in found], total) == (["6", "4"], 5)
    assert [job.key for job in queue.jobs(run="y", task="decode")[0]] == ["9", "7", "5"]
    assert [job.key for job in queue.jobs(state="running")[0]] == ["0"]
    assert queue.jobs(run="z") == ([], 0)


def test_threads_share_the_queue(tmp_path):
    queue, count = Queue(tmp_path / "queue.sqlite"), 60
    for i in range(count):
        submit(queue, str(i))

    def work(owner):
        while job := queue.lease(owner, seconds=60):
            queue.finish(job.key, {"owner": owner})

    threads = [threading.Thread(target=work, args=(f"w{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert queue.counts() == {"done": count}
    assert Results(queue.database).page()[1] == count
    assert all(job.attempts == 1 for job in queue.jobs()[0])


FIRST_SCHEMA = """
CREATE TABLE jobs (
  key TEXT PRIMARY KEY, run TEXT NOT NULL, step INTEGER NOT NULL, task TEXT NOT NULL, state TEXT NOT NULL,
  priority INTEGER NOT NULL, attempts INTEGER NOT NULL DEFAULT 0, not_before REAL NOT NULL DEFAULT 0,
  owner TEXT, lease_until REAL, error TEXT, created REAL NOT NULL);
CREATE INDEX jobs_by_state ON jobs (state, priority DESC, created);
CREATE TABLE results (
  key TEXT PRIMARY KEY REFERENCES jobs (key), record TEXT NOT NULL, created REAL NOT NULL);
"""


def test_a_file_of_the_first_schema_is_upgraded_in_place(tmp_path):
    path = tmp_path / "queue.sqlite"
    old = {
        "length": 512,
        "depth": 0.25,
        "answer": "7",
        "output": "it is 7",
        "generated": True,
        "chosen": False,
    }
    record = {"result": {"rows": [1], "samples": [old, old | {"generated": False}]}}
    with sqlite3.connect(path) as database:
        database.executescript(FIRST_SCHEMA)
        rows = [("k", "r", 7, "needle", "done"), ("q", "r", 9, "sample", "queued")]
        for key, run, step, task, state in rows:
            database.execute(
                "INSERT INTO jobs (key, run, step, task, state, priority, created) "
                "VALUES (?, ?, ?, ?, ?, 0, 1.0)",
                (key, run, step, task, state),
            )
        database.execute("INSERT INTO results VALUES ('k', ?, 5.0)", (json.dumps(record),))
    database.close()
    for _ in range(2):  # the second time there is nothing left to do
        queue = Queue(path)
        results = Results(queue.database)
        assert results.record("k") == {"result": {"rows": [1]}}
        assert results.page(run="r")[0][0]["created"] == 5.0
        assert [place.run for place in queue.places("q")] == ["r"], "what waits has a place"
        samples, total, groups = results.samples("k", wrong=True)
        assert (total, groups, samples[0]["score"]) == (1, ["512"], 0.0)
        assert queue.job("k").tokens is None
    assert queue.lease("w", seconds=10).key == "q"
    with sqlite3.connect(path) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (3,)
    database.close()


def test_an_upgrade_that_fails_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "queue.sqlite"
    with sqlite3.connect(path) as database:
        database.executescript(FIRST_SCHEMA)
        database.execute("INSERT INTO jobs VALUES ('k', 'r', 7, 'x', 'done', 0, 0, 0, NULL, NULL, NULL, 1)")
        database.execute("INSERT INTO results VALUES ('k', 'no JSON', 5.0)")
    before = list(database.iterdump())
    with pytest.raises(ValueError, match="Expecting value"):
        Queue(path)
    assert list(database.iterdump()) == before
    assert database.execute("PRAGMA user_version").fetchone() == (0,)
    database.close()


def test_a_newer_file_and_one_that_is_no_database_are_refused_in_one_line(tmp_path):
    path = tmp_path / "queue.sqlite"
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(ValueError, match=r"has schema 99, .* knows up to 3: update") as refused:
        Queue(path)
    assert "\n" not in str(refused.value)
    path.write_text("no database at all, but long enough to have a header" * 10)
    with pytest.raises(ValueError, match="is no SQLite database"):
        Queue(path)


def sample(place, **values):
    default = {"id": f"q{place}", "group": "g", "score": 1.0, "prompt": "", "answer": "", "output": ""}
    return Sample(**default | values).to_json()


def test_only_equal_questions_are_paired(stored):
    """The text of some questions depends on the tokenizer or on a file, their ids do not."""
    stored("a", [sample(0, score=1.0, prompt="x"), sample(1, prompt="y"), sample(2, prompt="z", answer="7")])
    results = stored("b", [sample(0, score=0.0, prompt="x"), sample(1, prompt="Y"), sample(2, prompt="z")])
    first, second = results.pairs("a", "b")["g"]
    assert (first.tolist(), second.tolist()) == ([1.0], [0.0])
    stored("c", [sample(0, prompt="other"), sample(1, prompt="")])
    assert results.pairs("a", "c") == {}


@pytest.fixture
def stored(queue, clock):
    """Store a result and return the view of it."""

    def store(key, samples=(), *, scalars=None, step=1, run="r", tokens=None, **result):
        clock.now += 1
        queue.submit(key, run=run, step=step, task="sample", tokens=tokens)
        record = {"seconds": 2.5, "result": {**result, "samples": list(samples)}, "scalars": scalars or {}}
        assert queue.finish(key, record)
        return Results(queue.database)

    return store


def test_samples_have_their_own_table_and_are_found(stored):
    texts = [("The CAT sat", "on", "on"), ("dogs", "5% _", "cat"), ("birds", "é\n", "")]
    samples = [
        sample(i, group=f"g{i % 2}", score=(1.0, 0.5, 0.0)[i], prompt=p, answer=a, output=o)
        for i, (p, a, o) in enumerate(texts)
    ]
    results = stored("k", samples, groups={"g0": {"score": 50.0}})
    assert "samples" not in results.record("k")["result"]

    def ids(**wanted):
        found, total, groups = results.samples("k", **wanted)
        assert groups == ["g0", "g1"]
        return [row["id"] for row in found], total

    assert ids() == (["q0", "q1", "q2"], 3)
    assert ids(limit=1, offset=1) == (["q1"], 3)
    assert ids(group="g0") == (["q0", "q2"], 2)
    assert ids(wrong=True) == (["q1", "q2"], 2)
    assert ids(search="cat") == (["q0", "q1"], 2)
    assert ids(search="5% _") == (["q1"], 1)  # a text, not a pattern
    assert ids(search="é\n") == (["q2"], 1)
    assert ids(search="prompt") == ([], 0)  # a field's name is no text
    assert ids(group="g0", wrong=True, search="bird") == (["q2"], 1)
    assert results.samples("k")[0][0] == samples[0]
    row = results.page()[0][0]
    assert (row["groups"], row["seconds"]) == ({"g0": {"score": 50.0}}, 2.5)


def test_a_result_and_its_samples_are_stored_together_or_not_at_all(queue):
    submit(queue, "k")
    broken = [sample(0), {"id": None, "group": "g", "score": 0.0}]
    with pytest.raises(sqlite3.IntegrityError):
        queue.finish("k", {"result": {"samples": broken}})
    assert queue.job("k").state == "queued"
    assert Results(queue.database).record("k") is None
    assert Results(queue.database).samples("k")[1] == 0


def test_what_json_cannot_hold_is_stored_as_what_it_can(stored):
    details = {"log": [-math.inf, 1.0]}
    samples = [sample(0, prompt="half \ud800 of a pair", details=details)]
    results = stored("k", samples, scalars={"a/loss": math.nan, "a/acc": 50.0}, loss=math.nan)
    assert results.record("k")["result"] == {"loss": None}
    assert results.page()[0][0]["scalars"] == {"a/acc": 50.0}
    found = results.samples("k")[0][0]
    assert (found["prompt"], found["details"]) == ("half ? of a pair", {"log": [None, 1.0]})


def test_curves_by_step_with_the_newest_result_of_each(stored):
    for key, step, value in (("a", 20, 1.0), ("b", 10, 2.0), ("c", 20, 3.0)):
        results = stored(key, scalars={"x": value, "y": -value}, step=step, tokens=100 * step)
    stored("d", scalars={"x": 9.0}, run="other")
    assert results.series(run="r", name="x") == (
        [{"run": "r", "name": "x", "points": [[10, 1000, 2.0], [20, 2000, 3.0]]}],
        2,
    )
    assert [(s["run"], s["name"]) for s in results.series()[0]] == [("other", "x"), ("r", "x"), ("r", "y")]


def test_too_many_points_are_thinned_evenly_with_first_and_last(stored, monkeypatch):
    monkeypatch.setattr("evals.results.MAX_POINTS", 10)
    for step in range(1, 24):
        results = stored(f"a{step}", scalars={"x": step}, step=step)
    stored("b", scalars={"y": 0.0}, step=5)
    series, total = results.series()
    assert total == 24
    assert [[point[0] for point in one["points"]] for one in series] == [
        [1, 4, 7, 10, 13, 16, 19, 22, 23],
        [5],
    ]


def test_a_heat_map_by_length_and_depth(stored):
    places = [(2048, 0.0, 1.0), (1024, 1.0, 1.0), (1024, 0.95, 0.0), (1024, 0.3, 0.5), (1024, None, 1.0)]
    samples = [
        sample(i, length=length, depth=depth, score=score) for i, (length, depth, score) in enumerate(places)
    ]
    results = stored("k", [*samples, sample(9)])
    found = results.heatmap("k")
    assert found["lengths"] == [1024, 2048]
    assert (len(found["depths"]), found["depths"][0], found["depths"][-1]) == (11, 0.0, 1.0)
    expected = [[None] * 10, [None] * 10]
    expected[0][3] = {"score": 50.0, "samples": 1}
    expected[0][9] = {"score": 50.0, "samples": 2}
    expected[1][0] = {"score": 100.0, "samples": 1}
    assert found["cells"] == expected
    for row, length in zip(found["cells"], found["lengths"]):  # a cell's own samples
        for cell, low, high in zip(row, found["depths"], found["depths"][1:]):
            inside = [s for s in results.samples("k", depths=(low, high))[0] if s["length"] == length]
            assert len(inside) == (cell["samples"] if cell else 0)
    assert results.samples("k", depths=(None, 0.3))[1] == 1
    assert results.samples("k", depths=(0.3, None))[1] == 3
    assert stored("flat", [sample(0)]).heatmap("flat") == {"lengths": [], "depths": [], "cells": []}
