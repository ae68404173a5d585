"""The service over HTTP: pages, filters and refusals as documented; clients name nothing but ids."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from evals.counters import Counters
from evals.guard import LOOPBACK, Guard
from evals.service import create_app, serve
from evals.service.page import read_files
from evals.watch import Runs, submit
from tests.evals.test_queue import sample


@pytest.fixture
def runs(run_dir):
    return Runs(run_dir.parent)


@pytest.fixture
def client(queue, runs):
    return make_client(create_app(queue, runs))


def make_client(app):
    from fastapi.testclient import TestClient

    return TestClient(app, base_url="http://127.0.0.1:8321", raise_server_exceptions=False)


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


def test_http_lists_submits_and_cancels(client, queue):
    assert client.get("/health").json() == {"status": "ok", "jobs": {}, "results": 0, "counters": {}}
    answer = client.get("/runs").json()
    assert answer["runs"] == {"tiny": {"steps": [7], "tokens": {}}}
    assert "perplexity" in answer["tasks"]
    answer = client.post("/jobs", json={"run": "tiny", "task": "sample"})
    assert answer.status_code == 202
    assert answer.json()["new"]
    again = {"run": "tiny", "task": "sample", "step": 7, "priority": 9}
    assert not client.post("/jobs", json=again).json()["new"]
    found = client.get("/jobs", params={"state": "queued", "task": "sample", "run": "tiny"}).json()
    assert [(job["priority"], job["step"]) for job in found["jobs"]] == [(9, 7)]
    assert client.get("/jobs", params={"state": "done"}).json() == {"jobs": [], "total": 0}
    key = answer.json()["key"]
    assert client.get(f"/jobs/{key}").json() == found["jobs"][0]
    assert client.delete(f"/jobs/{key}").json() == {"key": key, "state": "cancelled"}
    assert client.delete(f"/jobs/{key}").status_code == 409
    assert client.delete("/jobs/nothing").status_code == client.get("/jobs/nothing").status_code == 404
    assert client.get("/results").json() == {"results": [], "total": 0}
    assert client.get("/health").json()["counters"] == {"submitted": 1, "cancelled": 1}


def test_tokens_come_from_the_checkpoint(queue, runs, run_dir, client):
    from checkpoints.logical import LogicalTensor
    from checkpoints.state import load_run_state, save_checkpoint

    state = load_run_state(runs.steps("tiny")[7]) | {"tokens": 12345}
    import torch

    tensors = [LogicalTensor.whole("model/x", torch.zeros(1))]
    save_checkpoint(run_dir / "checkpoints", step=8, tensors=tensors, run_state=state)
    assert client.get("/runs").json()["runs"]["tiny"] == {"steps": [7, 8], "tokens": {"8": 12345}}
    key, _ = submit(queue, runs, "tiny", "sample")
    assert queue.job(key).tokens == 12345


def test_a_run_that_just_went_is_left_out(client, monkeypatch):
    ids = Runs.ids
    monkeypatch.setattr(Runs, "ids", lambda self: [*ids(self), "gone"])
    assert client.get("/runs").json()["runs"].keys() == {"tiny"}


@pytest.fixture
def scored(queue):
    """Two results of one task with samples, one of another task."""
    for key, task, scores in (("a", "sample", (1, 0, 0)), ("b", "sample", (1, 1, 0)), ("c", "decode", ())):
        queue.submit(key, run="r", step=5, task=task, tokens=50)
        samples = [sample(i, score=float(s), length=512, depth=0.5) for i, s in enumerate(scores)]
        groups = {"g": {"score": 50.0, "low": 1.0, "high": 99.0, "samples": 3}}
        record = {
            "seconds": 1.0,
            "result": {"groups": groups, "samples": samples},
            "scalars": {"g/acc": 50.0},
        }
        queue.finish(key, record)


def test_http_shows_what_is_stored(client, scored):
    found = client.get("/results", params={"task": "sample", "limit": 1}).json()
    assert found["total"] == 2
    row = found["results"][0]
    assert {name: row[name] for name in ("run", "step", "tokens", "task", "scalars", "seconds")} == {
        "run": "r",
        "step": 5,
        "tokens": 50,
        "task": "sample",
        "scalars": {"g/acc": 50.0},
        "seconds": 1.0,
    }
    assert row["groups"]["g"]["samples"] == 3
    assert client.get("/results/a").json()["result"].keys() == {"groups"}
    samples = client.get("/results/a/samples", params={"wrong": True, "limit": 1}).json()
    assert (samples["samples"][0]["id"], samples["total"], samples["groups"]) == ("q1", 2, ["g"])
    assert client.get("/results/a/samples", params={"depth_from": 0.5, "depth_to": 0.6}).json()["total"] == 3
    assert client.get("/results/a/samples", params={"depth_from": 0.6}).json()["total"] == 0
    compared = client.get("/compare", params={"first": "a", "second": "b"}).json()
    assert compared["task"] == "sample"
    assert compared["groups"]["g"]["difference"] == pytest.approx(100 / 3)
    assert 0.5 < compared["groups"]["g"]["p_better"] <= 1
    other = {"first": "a", "second": "b", "group": "other"}
    assert client.get("/compare", params=other).json()["groups"] == {}
    found = client.get("/scalars", params={"run": "r", "name": "g/acc"}).json()
    series = [{"run": "r", "name": "g/acc", "points": [[5, 50, 50.0]]}]
    assert found == {"series": series, "thinned": False, "total": 1}
    heat = client.get("/heatmap/b").json()
    assert heat["lengths"] == [512]
    assert heat["cells"][0][5] == {"score": pytest.approx(200 / 3), "samples": 3}


@pytest.mark.parametrize(
    "path,status",
    [
        ("/results/nothing", 404),
        ("/results/nothing/samples", 404),
        ("/heatmap/nothing", 404),
        ("/compare?first=a&second=nothing", 404),
        ("/compare?first=a&second=c", 409),
        ("/compare?first=a", 422),
        ("/results?limit=0", 422),
        ("/results?limit=1001", 422),
        ("/results/a/samples?limit=201", 422),
        ("/results/a/samples?depth_from=1.5", 422),
        ("/jobs?offset=-1", 422),
        ("/jobs?state=lost", 422),
        ("/jobs?task=rm", 422),
        ("/jobs?stat=done", 422),
        ("/health?x=1", 422),
        ("/internal/lease", 404),
        ("/docs", 404),
    ],
)
def test_refusals_are_json_with_a_reason(client, scored, path, status):
    answer = client.get(path)
    assert answer.status_code == status
    assert answer.json()["detail"]


def test_metrics_are_prometheus_text(client, scored):
    client.get("/results/nothing")
    text = client.get("/metrics").text
    assert 'trellis_eval_jobs{state="done"} 3\n' in text
    assert 'trellis_eval_events_total{event="results_stored"} 3\n' in text
    assert 'trellis_eval_requests_total{status="404"} 1\n' in text
    assert "# TYPE trellis_eval_workers gauge\ntrellis_eval_workers 0\n" in text


@pytest.mark.parametrize(
    "body,status",
    [
        ({"run": "../tiny", "task": "sample"}, 404),
        ({"run": "/etc", "task": "sample"}, 404),
        ({"run": "..", "task": "sample"}, 404),
        ({"run": "tiny/../tiny", "task": "sample"}, 404),
        ({"run": "tiny\0", "task": "sample"}, 404),
        ({"run": "nowhere", "task": "sample"}, 404),
        ({"run": "tiny", "task": "sample", "step": 8}, 404),
        ({"run": "tiny", "task": "rm"}, 422),
        ({"run": "tiny", "task": "sample", "path": "/etc"}, 422),
        ({"run": "tiny", "task": "harness", "harness_folder": "/etc"}, 422),
        ({"run": "tiny", "task": "sample", "step": -1}, 422),
        ({"run": "tiny", "task": "sample", "step": float("nan")}, 422),
        ({"run": "tiny", "task": "sample", "priority": 101}, 422),
        ({"run": "\ud800", "task": "\ud800"}, 422),
        ({"run": "x" * 500, "task": "sample"}, 422),
    ],
)
def test_what_is_not_on_the_lists_is_refused(client, queue, body, status):
    answer = client.post("/jobs", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code == status
    assert queue.jobs() == ([], 0)


def test_a_full_queue_says_when_to_come_again(client, queue, monkeypatch):
    monkeypatch.setattr("evals.watch.MAX_QUEUE", 1)
    assert client.post("/jobs", json={"run": "tiny", "task": "sample"}).status_code == 202
    answer = client.post("/jobs", json={"run": "tiny", "task": "perplexity"})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "60")
    assert queue.counts() == {"queued": 1}


def test_other_hosts_origins_and_large_bodies_are_refused(client):
    assert client.get("/health", headers={"Host": "evil.example"}).status_code == 421
    assert client.get("/health", headers={"Host": "[::1]:8321"}).status_code == 200
    body = {"run": "tiny", "task": "sample"}
    for other in ("http://evil.example", "http://127.0.0.1:9999", "http://127.0.0.1", "null", ""):
        assert client.post("/jobs", json=body, headers={"Origin": other}).status_code == 403
    assert client.post("/jobs", json=body, headers={"Origin": "http://127.0.0.1:8321"}).status_code == 202
    assert client.post("/jobs", content=b"x" * 20_000).status_code == 413
    assert client.post("/jobs", content=iter([b"x" * 9000] * 2)).status_code == 413
    assert client.post("/jobs", content=iter([b"x"])).status_code == 422
    assert client.get("/health", headers={f"x-{i}": "y" for i in range(70)}).status_code == 431
    doubled = [("Host", "127.0.0.1:8321"), ("Authorization", "a"), ("Authorization", "b")]
    assert client.get("/health", headers=doubled).status_code == 400


@pytest.fixture
def slow(queue, runs):
    """A client, and an endpoint that says when it is asked and answers when it may."""
    asked, may_answer = threading.Event(), threading.Event()
    app = create_app(queue, runs)

    def wait():
        asked.set()
        assert may_answer.wait(60)
        return {}

    app.add_api_route("/slow", wait)
    with make_client(app) as client:
        yield client, asked, may_answer
        may_answer.set()


def test_too_many_at_a_time_are_told_to_come_again(slow, monkeypatch):
    client, asked, may_answer = slow
    monkeypatch.setattr("evals.guard.MAX_ACTIVE", 1)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(client.get, "/slow")
        assert asked.wait(60)
        busy = client.get("/health")
        may_answer.set()
        assert first.result().status_code == 200
    assert (busy.status_code, busy.headers["retry-after"]) == (503, "1")
    assert client.get("/health").status_code == 200


def test_an_answer_that_takes_too_long_is_broken_off(slow, monkeypatch):
    client, _, _ = slow
    monkeypatch.setattr("evals.guard.REQUEST_SECONDS", 0.1)
    answer = client.get("/slow")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")


def test_a_handler_that_works_on_after_its_time_keeps_its_place(slow, monkeypatch, caplog):
    client, _, may_answer = slow
    monkeypatch.setattr("evals.guard.MAX_ACTIVE", 1)
    with monkeypatch.context() as patched:
        patched.setattr("evals.guard.REQUEST_SECONDS", 0.1)
        assert client.get("/slow").json() == {"detail": "that took too long"}
    assert client.get("/health").json() == {"detail": "the service is busy"}
    may_answer.set()
    deadline = time.monotonic() + 60
    while client.get("/health").status_code != 200:
        assert time.monotonic() < deadline, "its place is not given back"
        time.sleep(0.01)
    assert "after its time" not in caplog.text, "what it answered late was sent"


def test_a_client_that_does_not_read_keeps_no_place(monkeypatch):
    async def application(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def stuck(message):
        await asyncio.Event().wait()

    async def ask():
        scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"host", b"localhost")]}
        with pytest.raises(TimeoutError):
            await guard(scope, None, stuck)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return guard._active

    monkeypatch.setattr("evals.guard.REQUEST_SECONDS", 0.05)
    guard = Guard(application, hosts=LOOPBACK, token=None, secret=None, counters=Counters())
    assert asyncio.run(ask()) == 0


def test_a_failure_of_ours_tells_nothing_but_the_log(queue, runs, monkeypatch, caplog):
    def broken():
        raise ValueError("/secret/place")

    app = create_app(queue, runs)
    app.add_api_route("/broken", broken)
    answer = make_client(app).get("/broken")
    assert answer.status_code == 500
    assert answer.json() == {"detail": "the service failed: its log says why"}
    assert "/secret/place" in caplog.text
    assert "default-src 'none'" in answer.headers["content-security-policy"]


def test_every_answer_has_the_content_policy(client):
    for path in ("/", "/health", "/nowhere", "/openapi.json", "/assets/nothing.js"):
        policy = client.get(path).headers["content-security-policy"]
        assert "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:" in policy
        assert "unsafe" not in policy
    refused = client.get("/", headers={"Host": "evil.example"})
    assert "default-src 'none'" in refused.headers["content-security-policy"]


def test_the_page_is_what_lay_in_its_folder_at_the_start(queue, runs, tmp_path):
    web = tmp_path / "web"
    (web / "sub.js").mkdir(parents=True)
    (tmp_path / "secret.js").write_text("secret")
    (web / "link.js").symlink_to(tmp_path / "secret.js")
    for name in ("index.html", "app.js", "style.css", "notes.py"):
        (web / name).write_text(name)
    client = make_client(create_app(queue, runs, token="t0k", web=web))
    (web / "late.js").write_text("late")
    (web / "app.js").write_text("changed")
    assert client.get("/").text == "index.html"
    answer = client.get("/assets/app.js")
    assert (answer.text, answer.headers["content-type"]) == ("app.js", "text/javascript; charset=utf-8")
    for name in (
        "notes.py",
        "late.js",
        "link.js",
        "sub.js",
        "nothing.js",
        "../secret.js",
        "%2e%2e/secret.js",
    ):
        assert client.get(f"/assets/{name}").status_code in (401, 404)
    for name in ("..%2fsecret.js", "%2fetc%2fpasswd", "app.js%00", ".."):
        assert "secret" not in client.get(f"/assets/{name}").text
    assert "index.html" in read_files(web)


def test_a_token_is_asked_for_when_there_is_one(queue, runs):
    client = make_client(create_app(queue, runs, token="secret"))
    for path in ("/health", "/runs", "/results", "/metrics", "/openapi.json", "/jobs", "/nowhere"):
        answer = client.get(path)
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert client.get("/health", headers={"Authorization": "Bearer other"}).status_code == 401
    assert client.get("/health", headers={"Authorization": b"Bearer s\xe9cret"}).status_code == 401
    assert client.post("/", headers={}).status_code == 401
    allowed = {"Authorization": "Bearer secret"}
    assert client.get("/health", headers=allowed).status_code == 200
    # The token is what lets in: on 0.0.0.0 the service cannot know the names it is reached by.
    there = {"Host": "gpu7.example:8321"}
    assert client.get("/health", headers=allowed | there).status_code == 200
    assert client.get("/health", headers=there).status_code == 401
    body, origin = {"run": "tiny", "task": "sample"}, {"Origin": "http://evil.example:8321"}
    assert client.post("/jobs", json=body, headers=allowed | there | origin).status_code == 403


def test_the_workers_secret_opens_their_door_and_no_other(queue, runs):
    client = make_client(create_app(queue, runs, token="token", secret="hush"))
    lease = {"owner": "w", "seconds": 5}
    worker, person = {"Authorization": "Bearer hush"}, {"Authorization": "Bearer token"}
    assert client.post("/internal/lease", json=lease, headers=worker).json() == {"job": None}
    for headers in (person, {}):
        assert client.post("/internal/lease", json=lease, headers=headers).status_code == 401
    assert client.get("/health", headers=worker).status_code == 401
    assert client.post("/internal/lease", json=lease | {"seconds": 1e9}, headers=worker).status_code == 422
    large = {"key": "k", "record": {"text": "x" * 100_000}}
    assert client.post("/internal/finish", json=large, headers=worker).json() == {"stored": False}
    assert client.post("/internal/finish", json=large, headers=person).status_code == 401
    assert "/internal/lease" not in client.get("/openapi.json", headers=person).json()["paths"]


def test_another_address_needs_a_token(run_dir):
    with pytest.raises(ValueError, match=r"host = 0\.0\.0\.0: .* needs a token"):
        serve(run_dir.parent, host="0.0.0.0")
    with pytest.raises(ValueError, match="workers = 0"):
        serve(run_dir.parent, workers=0)
