"""Fault row 20: processes killed in the midst of an evaluation, and hostile requests, over real HTTP."""

from __future__ import annotations

import http.server
import json
import os
import random
import socket
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from types import SimpleNamespace

import psutil
import pytest
import uvicorn

from benchmarks.faults import service_requests
from benchmarks.faults.service_kills import STEPS, kill_in_evaluation, undisturbed, what_is_wrong
from benchmarks.faults.service_requests import FAMILIES, HEAD, TOKEN, Target, attack, raw, receive
from benchmarks.faults.service_run import request, write_checkpoint, write_evals
from evals.queue import Queue
from evals.service import create_app, serve
from evals.service.server import server_config
from evals.watch import Runs


def test_each_checkpoint_has_one_result_after_kills_of_worker_and_server(tmp_path, dataset_dir):
    (tmp_path / "set").symlink_to(dataset_dir)
    (folder := tmp_path / "trial").mkdir()
    outcome = kill_in_evaluation(folder, 3, afterwards=_cancel_what_runs)
    assert outcome.ok, outcome.note
    assert outcome.note == "worker, then server, at a random moment"
    assert outcome.numbers["kills"] - outcome.numbers.get("kills between two evaluations", 0) == 2
    _the_judge_sees_what_is_wrong(folder / "runs" / "tiny", undisturbed(tmp_path))


def _cancel_what_runs(service, run):
    """Cancel a job that would run for hours (greedy: no draw ends it), see its worker go and another come."""
    write_evals(run, tasks=[], sample_tokens=10_000_000, sample_temperature=0.0)
    key = service.ask("POST", "/jobs", {"run": "tiny", "task": "sample", "step": 9})["key"]
    (worker,) = service.workers()
    service.wait_for(lambda jobs: [job for job in jobs if job["state"] == "running"])
    assert service.ask("DELETE", f"/jobs/{key}")["state"] == "cancelled"
    psutil.wait_procs([worker], timeout=60)
    assert not worker.is_running()
    deadline = time.monotonic() + 60
    while not service.workers() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert service.workers()
    assert service.ask("GET", "/health")["jobs"] == {"done": len(STEPS), "cancelled": 1}


def _the_judge_sees_what_is_wrong(run, expected):
    def change(statement):
        with sqlite3.connect(run.parent / "evaluations.sqlite") as database:
            database.execute(statement)
        database.close()

    record = run / "evals" / "mqar-step-9.json"
    assert what_is_wrong(run, expected) == ""
    other = {**expected, "9": {**expected["9"], "oracle": 1.0}}
    assert what_is_wrong(run, other) == "step 9: not the result of an undisturbed evaluation"
    kept = record.read_text()
    record.write_text(json.dumps({**json.loads(kept), "seconds": 1e9}))
    assert what_is_wrong(run, expected) == "step 9: the database and mqar-step-9.json differ"
    record.write_text(kept)
    change("DELETE FROM samples WHERE place = 7")
    assert " samples" in what_is_wrong(run, expected)
    change("DELETE FROM results WHERE json_extract(record, '$.step') = 9")
    assert what_is_wrong(run, expected) == "results of the steps [7, 11, 13]"
    change("UPDATE jobs SET state = 'failed' WHERE step = 9")
    assert what_is_wrong(run, expected).startswith("jobs ended as [")


class Served:
    """An application behind the service's own uvicorn settings, in a thread."""

    def __init__(self, app):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = self.listener.getsockname()
        self.server = uvicorn.Server(server_config(app))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]})

    def __enter__(self):
        self.thread.start()
        deadline = time.monotonic() + 60
        while not self.server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join()
        self.listener.close()


@pytest.fixture
def runs(run_dir):
    return Runs(run_dir.parent)


def test_a_thousand_submissions_from_many_threads_lose_and_double_nothing(run_dir, runs, tmp_path):
    steps, tasks = range(10, 35), ("sample", "perplexity", "decode", "mqar")
    for step in steps:
        write_checkpoint(run_dir, step=step, seed=step)
    queue = Queue(tmp_path / "queue.sqlite")
    wanted = [(step, task) for step in steps for task in tasks] * 10
    random.Random(0).shuffle(wanted)

    def post(pair):
        body = {"run": "tiny", "step": pair[0], "task": pair[1]}
        return pair, *request(served.address, "POST", "/jobs", body)

    with Served(create_app(queue, runs)) as served:
        start = time.perf_counter()
        with ThreadPoolExecutor(16) as threads:
            answers = list(threads.map(post, wanted))
        seconds = time.perf_counter() - start
    print(f"{len(wanted)} submissions from 16 threads in {seconds:.2f} s")
    assert {status for _, status, _, _ in answers} == {202}
    parsed = [(pair, json.loads(text)) for pair, _, _, text in answers]
    keys = {pair: answer["key"] for pair, answer in parsed}
    assert len(set(keys.values())) == 100
    assert all(answer["key"] == keys[pair] for pair, answer in parsed)
    assert sorted(pair for pair, answer in parsed if answer["new"]) == sorted(keys)
    jobs, total = queue.jobs()
    assert total == 100
    assert {(job.step, job.task): job.key for job in jobs} == keys


@pytest.fixture
def guarded(runs, tmp_path):
    queue = Queue(tmp_path / "queue.sqlite")
    with Served(create_app(queue, runs, token=TOKEN)) as served:
        yield served


@pytest.mark.parametrize("family", FAMILIES)
def test_what_must_not_get_in_is_refused(guarded, tmp_path, family):
    target = Target(guarded.address, os.getpid(), tmp_path)
    assert [said for case in FAMILIES[family] if (said := case(target))] == []
    allowed = {"Authorization": f"Bearer {TOKEN}"}
    assert request(guarded.address, "GET", "/results", headers=allowed)[0] == 200


class Open(http.server.BaseHTTPRequestHandler):
    """Lets everything in, and tells what it should not."""

    timeout = 0.3  # seconds without a byte, which end a body in chunks

    def do_GET(self):
        with suppress(TimeoutError):
            while "Transfer-Encoding" in self.headers and self.rfile.read(65536):
                pass
        if (size := int(self.headers.get("Content-Length", 0))) < 1000:
            self.rfile.read(size)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{root: t0k3n}")

    do_POST = do_DELETE = do_GET  # noqa: N815

    def log_message(self, *_):
        pass


def test_a_service_that_lets_everything_in_passes_no_case(tmp_path, monkeypatch):
    monkeypatch.setattr(service_requests, "GIGABYTE", 2**24)
    monkeypatch.setattr(service_requests, "MOST_SENT", 2**21)
    for name, value in (("undisturbed", {}), ("make_run", tmp_path / "runs" / "tiny"), ("what_is_wrong", "")):
        monkeypatch.setattr(service_requests, name, lambda *_, value=value: value)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Open) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        process = SimpleNamespace(pid=os.getpid())
        fake = SimpleNamespace(address=server.server_address, process=process, wait_for=lambda _: None)
        monkeypatch.setattr(service_requests, "Service", lambda *_, **__: nullcontext(fake))
        for index, cases in enumerate(FAMILIES.values()):
            outcome = attack(tmp_path, index)
            assert (outcome.ok, outcome.count, outcome.of) == (False, 0, len(cases)), outcome.note
        assert "2: 16 MiB were taken" in outcome.note
        server.shutdown()


def test_who_sends_too_much_reads_the_refusal_when_done(guarded, monkeypatch):
    """Most clients read nothing before all is sent; a reset in between would be all that they see."""
    monkeypatch.setattr("evals.guard.LINGER_SECONDS", 30)
    with socket.create_connection(guarded.address) as connection:
        connection.sendall(f"{HEAD}Content-Length: 600000\r\n\r\n".encode())
        for _ in range(6):
            connection.sendall(b"x" * 100_000)
            time.sleep(0.05)
        assert receive(connection).startswith("HTTP/1.1 413")


def test_who_sends_slowly_is_let_go(guarded, monkeypatch):
    monkeypatch.setattr("evals.guard.BODY_SECONDS", 0.3)
    monkeypatch.setattr("evals.service.server.IDLE_SECONDS", 0.3)
    with socket.create_connection(guarded.address) as connection:
        connection.sendall(f"{HEAD}Content-Length: 100\r\n\r\n{{".encode())
        assert receive(connection).startswith("HTTP/1.1 408")
    with socket.create_connection(guarded.address) as connection:
        connection.settimeout(10)
        connection.sendall(b"GET /health HTTP/1.1\r\nHost:")
        assert connection.recv(1) == b"", "half a request was answered"


def test_another_hosts_name_is_refused_without_a_token(runs, tmp_path):
    with Served(create_app(Queue(tmp_path / "queue.sqlite"), runs)) as served:
        for host in ("evil.example", f"evil.example:{served.address[1]}", ""):
            answer = raw(served.address, f"GET /results HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            assert answer.startswith("HTTP/1.1 421")
        origin = {"Origin": "http://evil.example"}
        assert request(served.address, "DELETE", "/jobs/k", headers=origin)[0] == 403


def test_a_second_service_and_a_taken_port_are_refused_in_one_line(run_dir, tmp_path):
    import fcntl

    lock = run_dir.parent / "evaluations.sqlite.lock"
    with open(lock, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another service has the queue"):
            serve(run_dir.parent)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"cannot listen on 127.0.0.1:{port}: .*; choose another"):
            serve(run_dir.parent, port=port)
