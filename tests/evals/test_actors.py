"""Workers as Ray actors: they take leases over HTTP, outlive neither server nor cancel, and lose nothing."""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from types import SimpleNamespace

import psutil
import pytest

from data_pipeline.workers import ray_session
from evals.actors import RayPool, public_url, resolve_address
from evals.queue import Queue
from evals.remote import RefusedError, RemoteJobs
from evals.results import Results
from evals.service import create_app, serve
from evals.watch import Runs, submit
from tests.evals.conftest import write_checkpoint
from tests.evals.test_service_faults import Served, write_evals

SECRET = "hush"


@pytest.fixture(scope="module")
def ray():
    with ray_session(workers=1, ray_address=None) as session:
        yield session


@pytest.fixture
def queue(tmp_path):
    return Queue(tmp_path / "queue.sqlite")


@pytest.fixture
def runs(run_dir):
    return Runs(run_dir.parent)


@pytest.fixture
def served(queue, runs):
    with Served(create_app(queue, runs, secret=SECRET)) as served:
        served.url = public_url(*served.address[:2])
        yield served


def wait_for(condition, pool, *, seconds=120):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pool.keep_alive()
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"waited for {seconds} s in vain")


def actors():
    """Processes of actors that are at work."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.name().startswith("ray::Evaluation") and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def test_actors_score_what_is_queued_through_a_kill_and_a_cancel(ray, served, queue, runs, run_dir):
    write_checkpoint(run_dir, step=9, seed=1)
    write_evals(run_dir, tasks=[], sample_tokens=300, sample_temperature=0.0)
    keys = [submit(queue, runs, "tiny", "sample", step=step)[0] for step in (7, 9)]
    pool = RayPool(queue, runs.roots, count=1, address="local", url=served.url, secret=SECRET)
    try:
        wait_for(lambda: queue.counts().get("running"), pool)
        (actor,) = actors()
        actor.kill()
        wait_for(lambda: queue.counts() == {"done": 2}, pool)
        write_evals(run_dir, tasks=[], sample_tokens=10_000_000, sample_temperature=0.0)
        endless, _ = submit(queue, runs, "tiny", "sample", step=9)
        wait_for(lambda: queue.counts().get("running"), pool)
        (actor,) = actors()
        queue.cancel(endless)
        wait_for(lambda: not actor.is_running(), pool)
    finally:
        pool.stop()
    assert pool.alive() == 0
    assert ray.is_initialized(), "a session that was there is left open"
    assert max(queue.job(key).attempts for key in keys) == 2
    found, total = Results(queue.database).page()
    assert (total, {row["key"] for row in found}) == (2, set(keys))
    assert queue.job(endless).state == "cancelled"
    for row in found:
        record = json.loads((run_dir / "evals" / f"sample-step-{row['step']}.json").read_text())
        assert Results(queue.database).record(row["key"]) == record


def test_the_queue_over_http_is_the_queue(served, queue, runs, run_dir):
    jobs = RemoteJobs(served.url, SECRET)
    assert jobs.lease("w", seconds=5) is None
    key, _ = submit(queue, runs, "tiny", "sample")
    leased = jobs.lease("w", seconds=5)
    assert leased == queue.job(key)
    assert jobs.renew(key, "w", seconds=5)
    assert not jobs.renew(key, "v", seconds=5)
    jobs.fail(key, "w", "no")
    assert (queue.job(key).state, queue.job(key).error) == ("queued", "no")
    samples = [{"id": str(i), "group": "g", "score": 0.5, "prompt": "x" * 2000} for i in range(2000)]
    record = {"result": {"samples": samples, "loss": float("nan")}, "scalars": {"a": 1.0, "b": float("nan")}}
    assert jobs.finish(key, record)
    assert not jobs.finish(key, record)
    results = Results(queue.database)
    assert results.samples(key)[1] == 2000
    assert results.record(key)["result"] == {"loss": None}
    assert list((run_dir / "checkpoints" / ".pins").iterdir()) == [], "the checkpoint is let go of"


def test_another_servers_secret_is_refused_and_a_gone_server_is_no_answer(served):
    with pytest.raises(RefusedError, match="refuses this worker"):
        RemoteJobs(served.url, "another").lease("w", seconds=5)
    with pytest.raises(OSError):
        RemoteJobs("http://127.0.0.1:9", SECRET).lease("w", seconds=5)


def test_a_result_waits_for_a_server_that_is_busy(served, queue, runs, monkeypatch):
    key, _ = submit(queue, runs, "tiny", "sample")
    jobs, calls = RemoteJobs(served.url, SECRET), []
    post = jobs._post

    def busy(name, body):
        calls.append(name)
        if calls.count("finish") < 3:
            raise ConnectionError("503")
        return post(name, body)

    monkeypatch.setattr(jobs, "_post", busy)
    monkeypatch.setattr(time, "sleep", calls.append)
    assert jobs.finish(key, {})
    assert calls == ["finish", 1.0, "finish", 2.0, "finish"]


def test_addresses_of_clusters(monkeypatch):
    assert resolve_address("local") is None
    assert resolve_address("10.0.0.1:6379") == "10.0.0.1:6379"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.2:6379")
    assert resolve_address("auto") == "10.0.0.2:6379"


def test_a_cluster_on_the_network_without_a_token_is_refused(queue, runs, monkeypatch):
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.2:6379")
    with pytest.raises(ValueError, match="RAY_AUTH_MODE=token"):
        RayPool(queue, runs.roots, count=1, address="auto", url="http://x", secret=SECRET)


def node_id(address):
    return address.encode().hex().ljust(56, "0")


@pytest.fixture
def cluster(monkeypatch):
    """A session of Ray on 10.0.0.1; ``alive`` says which nodes live, ``open`` whether it is still open."""
    cluster = SimpleNamespace(alive={}, open=False, actors=[])
    util = SimpleNamespace(get_node_ip_address=lambda: "10.0.0.1")

    def nodes():
        return [
            {
                "NodeManagerAddress": address,
                "Alive": alive,
                "NodeID": node_id(address),
                "Resources": {"CPU": 8.0},
            }
            for address, alive in cluster.alive.items()
        ]

    def remote(**options):
        cluster.actors.append(options)
        call = SimpleNamespace(remote=lambda *_: None)
        return lambda kind: SimpleNamespace(remote=lambda: SimpleNamespace(work=call))

    @contextmanager
    def session(**_):
        cluster.open = True
        try:
            yield SimpleNamespace(
                nodes=nodes,
                util=util,
                remote=remote,
                wait=lambda calls, timeout: ([], calls),
                cluster_resources=lambda: {"GPU": 1.0},
                get_runtime_context=lambda: SimpleNamespace(get_node_id=lambda: node_id("10.0.0.1")),
            )
        finally:
            cluster.open = False

    monkeypatch.setattr("evals.actors.ray_session", session)
    return cluster


@pytest.mark.parametrize("url", ["http://127.0.0.1:80", "http://[::1]:80"])
def test_a_loopback_address_is_refused_where_the_cluster_has_other_nodes(cluster, queue, runs, url):
    cluster.alive = {"10.0.0.1": True, "10.0.0.8": True, "10.0.0.7": True}
    with pytest.raises(ValueError, match=r"nodes \(10.0.0.7, 10.0.0.8\) .* --host .* TRELLIS_TOKEN"):
        RayPool(queue, runs.roots, count=1, address="local", url=url, secret=SECRET)
    assert not cluster.open


@pytest.mark.parametrize(
    ("alive", "url"),
    [
        ({"10.0.0.1": True, "127.0.0.1": True, "10.0.0.7": False}, "http://127.0.0.1:80"),
        ({"10.0.0.1": True, "10.0.0.7": True}, "http://10.0.0.1:80"),
    ],
)
def test_a_loopback_address_is_enough_where_no_other_node_lives(cluster, queue, runs, alive, url):
    cluster.alive = alive
    pool = RayPool(queue, runs.roots, count=1, address="local", url=url, secret=SECRET)
    assert cluster.open
    pool.stop()


def test_nodes_that_join_later_get_no_worker_that_could_not_reach_the_server(cluster, queue, runs, caplog):
    cluster.alive = {"10.0.0.1": True}
    pools = [
        RayPool(queue, runs.roots, count=2, address="local", url=url, secret=SECRET)
        for url in ("http://127.0.0.1:80", "http://10.0.0.1:80")
    ]
    cluster.alive["10.0.0.7"] = True
    for pool in pools:
        pool.keep_alive()
    strategies = [options.get("scheduling_strategy") for options in cluster.actors]
    assert [strategy and (strategy.node_id, strategy.soft) for strategy in strategies] == [
        *[(node_id("10.0.0.1"), False)] * 2,
        *[None] * 2,
    ]
    assert [options["num_gpus"] for options in cluster.actors] == [0, 0, 1, 1], "the GPU is the other node's"
    assert caplog.text.count("nodes joined (10.0.0.7) that cannot reach --host") == 1


@pytest.mark.parametrize("address", ["local", "auto", "10.0.0.2:6379"])
def test_without_ray_one_line_says_what_to_do(monkeypatch, run_dir, address):
    monkeypatch.setattr("evals.actors.find_spec", lambda name: None)
    for host in ("127.0.0.1", "0.0.0.0"):
        with pytest.raises(ValueError, match=r"needs Ray, which is not installed: pip install") as refused:
            serve(run_dir.parent, host=host, token="t", port=0, ray_address=address)
        assert "\n" not in str(refused.value)


def test_where_actors_find_the_server():
    assert public_url("127.0.0.1", 80) == "http://127.0.0.1:80"
    assert public_url("::1", 80) == "http://[::1]:80"
