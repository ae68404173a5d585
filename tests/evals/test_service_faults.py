"""Fault row 20: processes killed in the midst of an evaluation, and hostile requests, over real HTTP."""

from __future__ import annotations

import json
import random
import socket
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import uvicorn

from evals.queue import Queue
from evals.results import Results
from evals.service import create_app, serve
from evals.service.server import server_config
from evals.watch import Runs
from tests.evals.conftest import write_checkpoint
from tests.evals.holder import Service, request


def write_evals(run_dir, **evals):
    recipe = json.loads((run_dir / "recipe.json").read_text())
    recipe["evals"] = evals
    (run_dir / "recipe.json").write_text(json.dumps(recipe))


def running(jobs):
    return [job for job in jobs if job["state"] == "running"]


def done(count):
    return lambda jobs: sum(job["state"] == "done" for job in jobs) == count


def test_each_checkpoint_has_one_result_after_kills_of_worker_and_server(run_dir):
    write_checkpoint(run_dir, step=9, seed=1)
    write_evals(run_dir, tasks=["sample"], sample_tokens=300, sample_temperature=0.0)  # about a second
    root = run_dir.parent
    with Service(root) as service:
        service.wait_for(running)
        (worker,) = service.workers()
        worker.kill()
        again = service.wait_for(lambda jobs: [job for job in running(jobs) if job["attempts"] == 2])
        assert "exit status -9" in again[0]["error"]
        (worker,) = service.workers()
        service.process.kill()
        service.process.wait()
        worker.wait(60)  # none outlives its server, that of a killed one included
    with Service(root) as service:
        service.wait_for(done(2))
        key = _cancel_what_runs(service, run_dir)
        health = service.ask("GET", "/health")
    assert health["jobs"] == {"done": 2, "cancelled": 1}
    assert health["counters"]["results_stored"] == 2
    assert "leases_lost" not in health["counters"], "a lease had to run out before its job came back"
    _check_stored(root, run_dir, cancelled=key)


def _cancel_what_runs(service, run_dir):
    """Cancel a job that would run for hours (greedy: no draw ends it), see its worker go and another come."""
    write_evals(run_dir, tasks=[], sample_tokens=10_000_000, sample_temperature=0.0)
    key = service.ask("POST", "/jobs", {"run": "tiny", "task": "sample", "step": 9})["key"]
    (worker,) = service.workers()
    service.wait_for(running)
    assert service.ask("DELETE", f"/jobs/{key}")["state"] == "cancelled"
    psutil.wait_procs([worker], timeout=60)
    assert not worker.is_running()
    deadline = time.monotonic() + 60
    while not service.workers() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert service.workers()
    return key


def _check_stored(root, run_dir, *, cancelled):
    queue = Queue(root / "evaluations.sqlite")
    found, total = Results(queue.database).page()
    assert (total, {row["step"] for row in found}) == (2, {7, 9})
    assert queue.job(cancelled).state == "cancelled"
    for row in found:
        record = json.loads((run_dir / "evals" / f"sample-step-{row['step']}.json").read_text())
        assert Results(queue.database).record(row["key"]) == record
    jobs = {job.step: job for job in queue.jobs(state="done")[0]}
    assert max(job.attempts for job in jobs.values()) == 3
    with sqlite3.connect(queue.database.path) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    database.close()


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
    with Served(create_app(queue, runs, token="t0k3n")) as served:
        yield served


ALLOWED = {"Authorization": "Bearer t0k3n"}


def raw(address, data):
    """What comes back for bytes as they are, until the connection is closed or nothing comes for a second."""
    with socket.create_connection(address, timeout=10) as connection:
        connection.sendall(data)
        return receive(connection)


def receive(connection):
    received = b""
    connection.settimeout(10)
    while b"\r\n\r\n" not in received or b"}" not in received:
        part = connection.recv(65536)
        if not part:
            break
        received += part
    return received.decode()


def test_no_token_and_wrong_tokens_open_nothing(guarded):
    for headers in ({}, {"Authorization": "Bearer t0k3"}, {"Authorization": "t0k3n"}, {"Cookie": "t0k3n"}):
        for method, path in (("GET", "/results"), ("POST", "/jobs"), ("GET", "/jobs?token=t0k3n")):
            status, _, text = request(guarded.address, method, path, headers=headers)
            assert status == 401
            assert "t0k3n" not in text
    assert request(guarded.address, "GET", "/results", headers=ALLOWED)[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        "/assets/../../queue.py",
        "/assets/..%2f..%2fqueue.py",
        "/assets/%2e%2e/%2e%2e/queue.py",
        "/assets//etc/passwd",
        "/assets/%2fetc%2fpasswd",
        "/assets/....//queue.py",
        "/assets/index.html%00.js",
        "/../etc/passwd",
        "//etc/passwd",
        "/jobs/..%2f..%2fetc%2fpasswd",
        "/results/%2e%2e%2f%2e%2e",
        "/heatmap/../../etc/passwd",
        "/runs/tiny/recipe.json",
    ],
)
def test_no_path_leads_out(guarded, path):
    head = f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer t0k3n\r\nConnection: close\r\n\r\n"
    answer = raw(guarded.address, head.encode())
    assert answer.split()[1] in ("404", "405", "422")
    assert "root:" not in answer
    assert "import" not in answer


def test_run_ids_that_are_paths_name_nothing(guarded, tmp_path):
    for run in ("../runs/tiny", "..", ".", "/etc", "tiny/../tiny", "tiny\x00", str(tmp_path)):
        body = {"run": run, "task": "sample"}
        status, _, text = request(guarded.address, "POST", "/jobs", body, ALLOWED)
        assert status == 404
        assert str(tmp_path) not in text.replace(run, "")


GIGABYTE = 2**30
HEAD = "POST /jobs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer t0k3n\r\nContent-Type: application/json\r\n"


def test_an_announced_gigabyte_is_refused_unread(guarded):
    with socket.create_connection(guarded.address) as connection:
        connection.sendall(f"{HEAD}Content-Length: {GIGABYTE}\r\n\r\n".encode())
        assert receive(connection).startswith("HTTP/1.1 413")
        connection.settimeout(10)
        assert connection.recv(1) == b"", "the connection stays open"


@pytest.mark.parametrize("token", [True, False])
def test_a_gigabyte_that_is_sent_is_refused_and_not_kept(guarded, token):
    """In chunks: nothing announces how much it will be. The sender never gets rid of it all."""
    head = HEAD if token else HEAD.replace("t0k3n", "other")
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    memory, sent = psutil.Process().memory_info().rss, 0
    with socket.create_connection(guarded.address) as connection:
        connection.settimeout(10)
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        try:
            while sent < GIGABYTE:
                connection.sendall(chunk)
                sent += len(chunk)
        except OSError:
            pass
    assert sent < GIGABYTE / 8
    assert psutil.Process().memory_info().rss - memory < 64 * 2**20
    with socket.create_connection(guarded.address) as connection:
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + chunk)
        assert receive(connection).startswith("HTTP/1.1 413" if token else "HTTP/1.1 401")
    assert request(guarded.address, "GET", "/health", headers=ALLOWED)[0] == 200


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
