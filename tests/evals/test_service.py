"""Queue, worker, watcher and HTTP: each key gets exactly one result, and clients can name nothing but ids."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time

import pytest

from evals.queue import MAX_ATTEMPTS, Queue
from evals.service import Background, create_app, leaderboard, serve
from evals.watch import Runs, Watcher, submit
from evals.worker import WorkerPool, work_once
from tests.evals.conftest import write_checkpoint
from tests.evals.holder import hold_one_job


def _submit(queue, key, **options):
    return queue.submit(key, run="r", step=1, task="sample", **options)


def test_a_key_is_queued_once_and_gets_one_result(queue):
    assert _submit(queue, "a")
    assert not _submit(queue, "a")
    assert queue.lease("w", seconds=10).key == "a"
    assert queue.lease("v", seconds=10) is None
    assert queue.finish("a", {"n": 1})
    assert not queue.finish("a", {"n": 2})
    assert [result["record"] for result in queue.results()] == [{"n": 1}]
    assert not _submit(queue, "a")
    assert queue.counts() == {"done": 1}


def test_higher_priority_first_then_the_older(queue, clock):
    for key, priority in (("a", 0), ("b", 1), ("c", 0)):
        clock.now += 1
        _submit(queue, key, priority=priority)
    assert [queue.lease("w", seconds=10).key for _ in range(3)] == ["b", "a", "c"]


def test_the_job_of_a_dead_worker_comes_back(queue, clock):
    _submit(queue, "a")
    queue.lease("dead", seconds=10)
    clock.now += 9
    assert queue.renew("a", "dead", seconds=10)
    clock.now += 9
    assert queue.lease("w", seconds=10) is None
    clock.now += 2
    assert queue.lease("w", seconds=10).attempts == 2
    assert not queue.renew("a", "dead", seconds=10)
    queue.fail("a", "dead", "too late to matter")
    assert queue.job("a").state == "running"


def test_a_failing_job_waits_longer_each_time_and_ends(queue, clock):
    _submit(queue, "a")
    for attempt in range(1, MAX_ATTEMPTS + 1):
        assert queue.lease("w", seconds=10).attempts == attempt
        queue.fail("a", "w", "ValueError: no")
        assert queue.lease("w", seconds=10) is None
        clock.now += 100
    assert queue.job("a").state == "failed"
    assert queue.job("a").error == "ValueError: no"
    assert _submit(queue, "a")  # a person asks again
    assert queue.job("a").state == "queued"


def test_a_job_whose_workers_all_died_fails_with_the_reason(queue, clock):
    _submit(queue, "a")
    for _ in range(MAX_ATTEMPTS):
        queue.lease("w", seconds=10)
        clock.now += 11
    assert queue.lease("w", seconds=10) is None
    assert queue.job("a").error == "its worker died in every attempt"


def test_a_cancelled_job_keeps_no_result(queue):
    _submit(queue, "a")
    queue.lease("w", seconds=10)
    assert queue.cancel("a")
    assert not queue.renew("a", "w", seconds=10)
    assert not queue.finish("a", {})
    assert not queue.cancel("a")
    assert queue.results() == []


def test_threads_share_the_queue(tmp_path):
    queue, count = Queue(tmp_path / "queue.sqlite"), 60
    for i in range(count):
        _submit(queue, str(i))

    def work(owner):
        while job := queue.lease(owner, seconds=60):
            queue.finish(job.key, {"owner": owner})

    threads = [threading.Thread(target=work, args=(f"w{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert queue.counts() == {"done": count}
    assert len(queue.results()) == count
    assert all(job.attempts == 1 for job in queue.jobs())


@pytest.fixture
def runs(run_dir):
    return Runs(run_dir.parent)


def test_the_watcher_queues_each_committed_checkpoint_once(queue, runs, run_dir):
    watcher = Watcher(queue, runs)
    assert watcher.look() == 2  # the recipe's tasks
    assert watcher.look() == 0
    write_checkpoint(run_dir, step=9, seed=1)
    (run_dir / "checkpoints" / "step-00000011.tmp").mkdir()
    assert watcher.look() == 2
    assert {(job.step, job.task) for job in queue.jobs()} == {
        (s, t) for s in (7, 9) for t in ("perplexity", "sample")
    }
    assert Watcher(queue, runs).look() == 0  # after a restart


def test_one_broken_run_does_not_stop_the_others(queue, runs, run_dir, caplog):
    broken = run_dir.parent / "broken"
    broken.mkdir()
    (broken / "recipe.json").write_text("{}")
    assert Watcher(queue, runs).look() == 2
    (broken / "checkpoints").mkdir()
    (broken / "checkpoints" / "step-00000001").mkdir()
    Watcher(queue, runs).look()
    assert "run broken is passed over" in caplog.text


def test_a_worker_scores_a_job_and_a_stored_result_is_taken_over(queue, runs, run_dir, tmp_path):
    key, new = submit(queue, runs, "tiny", "sample")
    assert new
    assert work_once(queue, runs, "w")
    assert queue.job(key).state == "done"
    record = json.loads((run_dir / "evals" / "sample-step-7.json").read_text())
    assert queue.results()[0]["record"] == record
    assert not work_once(queue, runs, "w")
    other = Queue(tmp_path / "other.sqlite")
    assert submit(other, runs, "tiny", "sample") == (key, True)
    assert other.counts() == {"done": 1}


def test_a_job_that_cannot_be_done_is_given_back_with_its_reason(queue, runs, run_dir, caplog):
    key, _ = submit(queue, runs, "tiny", "sample")
    for path in (run_dir / "checkpoints").rglob("*.safetensors"):
        path.write_bytes(b"damaged")
    assert work_once(queue, runs, "w")
    assert queue.job(key).state == "queued"
    assert queue.job(key).error == "ValueError while scoring run tiny: the log of the service says why"
    assert "damaged" in caplog.text


def test_a_reason_without_paths_is_told(queue, runs, run_dir):
    key, _ = submit(queue, runs, "tiny", "sample")
    recipe = json.loads((run_dir / "recipe.json").read_text())
    recipe["evals"]["sample_tokens"] = 9
    (run_dir / "recipe.json").write_text(json.dumps(recipe))
    assert work_once(queue, runs, "w")
    assert "changed since the job was queued: submit it again" in queue.job(key).error


@pytest.mark.parametrize("broken", ["data", "recipe"])
def test_answers_name_runs_and_no_folders(client, run_dir, caplog, broken):
    recipe = json.loads((run_dir / "recipe.json").read_text())
    if broken == "data":
        recipe["data"]["directory"] = "/secret/place"
    else:
        del recipe["data"]
    (run_dir / "recipe.json").write_text(json.dumps(recipe))
    answer = client.post("/jobs", json={"run": "tiny", "task": "sample"})
    assert answer.status_code == 404
    assert answer.json() == {"detail": "run tiny cannot be scored: the log of the service says why"}
    assert ("/secret/place" if broken == "data" else str(run_dir)) in caplog.text


def test_a_job_outlives_its_killed_worker(runs, run_dir, tmp_path):
    database = tmp_path / "queue.sqlite"
    queue = Queue(database)
    submit(queue, runs, "tiny", "sample")
    # Spawned: no thread of the test process is copied.
    holder = multiprocessing.get_context("spawn").Process(target=hold_one_job, args=(database,), daemon=True)
    holder.start()
    deadline = time.monotonic() + 60
    while queue.counts() != {"running": 1}:
        assert time.monotonic() < deadline, "the holder leased nothing"
        time.sleep(0.01)
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    deadline = time.monotonic() + 30
    while queue.counts() != {"done": 1} and time.monotonic() < deadline:
        work_once(queue, runs, "survivor")
        time.sleep(0.05)
    assert len(queue.results()) == 1
    assert queue.jobs()[0].attempts == 2


@pytest.fixture
def client(queue, runs):
    return _client(create_app(queue, runs))


def _client(app):
    from fastapi.testclient import TestClient

    return TestClient(app, base_url="http://127.0.0.1:8321")


def test_http_lists_submits_and_cancels(client, queue):
    assert client.get("/health").json() == {"status": "ok", "jobs": {}}
    assert client.get("/runs").json()["runs"] == {"tiny": [7]}
    answer = client.post("/jobs", json={"run": "tiny", "task": "sample"})
    assert answer.status_code == 202
    assert answer.json()["new"]
    assert not client.post("/jobs", json={"run": "tiny", "task": "sample", "step": 7}).json()["new"]
    assert [job["state"] for job in client.get("/jobs").json()] == ["queued"]
    key = answer.json()["key"]
    assert client.delete(f"/jobs/{key}").json() == {"key": key, "state": "cancelled"}
    assert client.delete(f"/jobs/{key}").status_code == 404
    assert client.get("/results").json() == []


@pytest.mark.parametrize(
    "body,status",
    [
        ({"run": "../tiny", "task": "sample"}, 404),
        ({"run": "/etc", "task": "sample"}, 404),
        ({"run": "..", "task": "sample"}, 404),
        ({"run": "nowhere", "task": "sample"}, 404),
        ({"run": "tiny", "task": "sample", "step": 8}, 404),
        ({"run": "tiny", "task": "rm"}, 422),
        ({"run": "tiny", "task": "sample", "path": "/etc"}, 422),
        ({"run": "tiny", "task": "sample", "step": -1}, 422),
        ({"run": "x" * 500, "task": "sample"}, 422),
    ],
)
def test_what_is_not_on_the_lists_is_refused(client, queue, body, status):
    assert client.post("/jobs", json=body).status_code == status
    assert queue.jobs() == []


def test_a_link_out_of_the_root_is_no_run(runs, run_dir, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "recipe.json").write_text("{}")
    (run_dir.parent / "link").symlink_to(outside)
    assert runs.ids() == ["tiny"]
    with pytest.raises(ValueError, match="no run 'link'"):
        runs.folder("link")


def test_other_hosts_origins_and_large_bodies_are_refused(client):
    assert client.get("/health", headers={"Host": "evil.example"}).status_code == 421
    body = {"run": "tiny", "task": "sample"}
    assert client.post("/jobs", json=body, headers={"Origin": "http://evil.example"}).status_code == 403
    for other in ("http://127.0.0.1:9999", "http://127.0.0.1", "null"):
        assert client.post("/jobs", json=body, headers={"Origin": other}).status_code == 403
    assert client.post("/jobs", json=body, headers={"Origin": "http://127.0.0.1:8321"}).status_code == 202
    assert client.post("/jobs", content=b"x" * 20_000).status_code == 413


def test_every_answer_has_the_content_policy(client):
    for path in ("/", "/health", "/nowhere", "/openapi.json"):
        assert "default-src 'none'" in client.get(path).headers["content-security-policy"]
    refused = client.get("/", headers={"Host": "evil.example"})
    assert "default-src 'none'" in refused.headers["content-security-policy"]


def test_a_token_is_asked_for_when_there_is_one(queue, runs):
    client = _client(create_app(queue, runs, token="secret"))
    assert client.get("/health").status_code == 401
    assert client.get("/health", headers={"Authorization": "Bearer other"}).status_code == 401
    allowed = {"Authorization": "Bearer secret"}
    assert client.get("/health", headers=allowed).status_code == 200
    # The token is what lets in: on 0.0.0.0 the service cannot know the names it is reached by.
    there = {"Host": "gpu7.example:8321"}
    assert client.get("/health", headers=allowed | there).status_code == 200
    assert client.get("/health", headers=there).status_code == 401
    body, origin = {"run": "tiny", "task": "sample"}, {"Origin": "http://evil.example:8321"}
    assert client.post("/jobs", json=body, headers=allowed | there | origin).status_code == 403


def test_another_address_needs_a_token(run_dir):
    with pytest.raises(ValueError, match=r"host = 0\.0\.0\.0: .* needs a token"):
        serve(run_dir.parent, host="0.0.0.0")


def test_the_page_is_escaped_and_sorted_by_score(queue):
    for key, run, score in (("a", "worse", 10.5), ("b", "better", 9.5)):
        queue.submit(key, run=run, step=1, task="perplexity")
        result = {"model": {"bits_per_byte": score}, "bigram": {"bits_per_byte": 2.0}}
        queue.finish(key, {"result": result})
    queue.submit("c", run="unscored", step=1, task="sample")
    queue.lease("w", seconds=10)
    queue.finish("c", {"result": {}})
    queue.submit("d", run="x", step=1, task="sample")
    queue.lease("w", seconds=10)
    queue.fail("d", "w", "<script>alert(1)</script>")
    page = leaderboard(queue)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert page.index("better") < page.index("worse") < page.index("unscored")


def test_the_service_scores_what_it_finds(runs, run_dir, tmp_path):
    database = tmp_path / "queue.sqlite"
    queue = Queue(database)
    pool = WorkerPool(database, run_dir.parent, count=1)
    background = Background(Watcher(queue, runs), pool, seconds=0.2)
    with _client(create_app(queue, runs, background=background)) as client:
        deadline = time.monotonic() + 90
        while client.get("/health").json()["jobs"] != {"done": 2} and time.monotonic() < deadline:
            time.sleep(0.2)
        results = client.get("/results").json()
        assert {result["task"] for result in results} == {"perplexity", "sample"}
        assert "tiny" in client.get("/").text
    assert pool.pids() == []
