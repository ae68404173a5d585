"""Ray as it is started here: on loopback, without a dashboard, and never an open cluster on the network."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from data_pipeline.workers import NO_CLUSTER, ray_session, run_tasks

CLUSTER = "10.1.2.3:6379"


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """Neither a token nor a home folder that has one."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    return monkeypatch


@pytest.mark.parametrize("address", [CLUSTER, f"ray://{CLUSTER}", "gpu-node:10001"])
@pytest.mark.parametrize("given", [{}, {"RAY_AUTH_TOKEN": "x"}, {"RAY_AUTH_MODE": "token"}])
def test_a_cluster_on_the_network_needs_a_token(
    bare: pytest.MonkeyPatch, address: str, given: dict[str, str]
) -> None:
    for name, value in given.items():
        bare.setenv(name, value)
    with (
        pytest.raises(ValueError, match="is not on this machine, and Ray runs what it is sent") as refused,
        ray_session(workers=1, ray_address=address),
    ):
        pass
    assert "RAY_AUTH_MODE=token" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("where", ["variable", "file"])
def test_a_cluster_with_a_token_and_one_on_this_machine_are_connected_to(
    bare: pytest.MonkeyPatch, tmp_path: Path, where: str
) -> None:
    import ray

    asked: list[dict[str, object]] = []
    bare.setattr(ray, "is_initialized", lambda: False)
    bare.setattr(ray, "init", lambda **options: asked.append(options))
    bare.setattr(ray, "shutdown", lambda: None)
    with ray_session(workers=1, ray_address="127.0.0.1:6379"):
        pass
    bare.setenv("RAY_AUTH_MODE", "token")
    if where == "variable":
        bare.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "secret"))
    else:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("secret")
    with ray_session(workers=1, ray_address=CLUSTER):
        pass
    assert [options["address"] for options in asked] == ["127.0.0.1:6379", CLUSTER]


def test_ray_on_this_machine_listens_on_loopback_and_has_no_dashboard(
    bare: pytest.MonkeyPatch, ray_cluster: object
) -> None:
    import ray
    from ray._private import ray_constants

    asked: list[dict[str, object]] = []
    bare.setattr(ray, "is_initialized", lambda: False)
    bare.setattr(ray, "init", lambda **options: asked.append(options))
    bare.setattr(ray, "shutdown", lambda: None)
    bare.delenv(NO_CLUSTER)
    bare.setattr(ray_constants, "ENABLE_RAY_CLUSTER", True)
    before = None, True
    bare.setattr(ray, "nodes", lambda: [{"NodeManagerAddress": "192.0.2.2"}])
    with (
        pytest.raises(ValueError, match="Ray would listen on the network"),
        ray_session(workers=3, ray_address=None),
    ):
        pass
    bare.setattr(ray, "nodes", lambda: [{"NodeManagerAddress": "127.0.0.1"}])
    asked.clear()
    with ray_session(workers=3, ray_address=None):
        pass
    (options,) = asked
    assert options["address"] == "local"
    assert options["include_dashboard"] is False
    assert options["_node_ip_address"] == "127.0.0.1"
    assert options["num_cpus"] == 3
    assert (os.environ.get(NO_CLUSTER), ray_constants.ENABLE_RAY_CLUSTER) == before
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


def test_what_is_in_flight_is_waited_for_when_a_run_ends_early(ray_cluster: Any, tmp_path: Path) -> None:
    """And never cancelled: Ray can abort this process over a task that ends while it is being cancelled."""

    def work(number: int, folder: str) -> int:
        time.sleep(0.2 * number)
        (Path(folder) / str(number)).touch()
        return number

    results = run_tasks(ray_cluster, work, ((n, str(tmp_path)) for n in range(100)), workers=2)
    assert next(results) == (0, 0)
    results.close()
    done = {int(path.name) for path in tmp_path.iterdir()}
    assert {0, 1} <= done
    assert len(done) <= 4, "nothing was begun after the end"


def test_nothing_of_a_session_listens_on_the_network(ray_cluster: Any) -> None:
    """Of the session of these tests, with a worker in it: every socket of Ray's processes."""
    assert ray_cluster.get(ray_cluster.remote(lambda: os.getpid()).remote()) != os.getpid()
    listening = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if not process.name().startswith(("ray", "gcs_server")):
                continue
            found = process.net_connections("inet")
            listening += [(process.name(), c.laddr) for c in found if c.status == psutil.CONN_LISTEN]
    assert {"raylet", "gcs_server"} <= {name for name, _ in listening}
    open_ones = [
        (name, at) for name, at in listening if at.ip not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")
    ]
    assert not open_ones
