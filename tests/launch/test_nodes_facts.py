"""What a node finds out about itself and its GPUs, and how slow links are told."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from launch.nodes import facts as facts_module
from launch.nodes.facts import device_problems, facts, source_digest
from launch.nodes.meet import MeetingError
from launch.nodes.verdict import slow_links
from launch.recipe import Recipe, load_recipe

BASE = str(Path(__file__).with_name("base.toml"))
GIB = 2**30


def test_a_node_says_what_is_wrong_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    recipe = load_recipe(BASE, [f"data.directory={tmp_path / 'none'}"])
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    problems = "\n".join(facts(recipe, tmp_path / "run", nodes=3, ranks=1)["problems"])
    assert "no token shards in" in problems
    assert "0.0 GB free" in problems
    assert "3 ranks" in problems or "WORLD_SIZE" in problems or "mesh" in problems, problems


def test_a_name_that_leads_nowhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    with pytest.raises(
        OSError, match=r"its own name localhost is (127\.0\.0\.1|::1), where no other node comes"
    ):
        facts_module._check_name()
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
    with pytest.raises(OSError, match=r"no-such-host.invalid is not known to it.*GLOO_SOCKET_IFNAME"):
        facts_module._check_name()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    facts_module._check_name()


def test_the_address_that_is_given_is_used_in_place_of_the_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(variable, "")  # so that it is put back
        monkeypatch.delenv(variable)
    with pytest.raises(ValueError, match=r"--local-addr 203\.0\.113\.7 is no address of "):
        facts_module.use_local_address("203.0.113.7")
    monkeypatch.setattr(facts_module, "interface_of", {"127.0.0.1": "eth7"}.get)
    facts_module.use_local_address("127.0.0.1")
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
    facts_module._check_name()
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("eth7", "eth7")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    facts_module.use_local_address("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0", "the user's choice stays"


def test_the_command_compares_the_data_set_that_the_run_will_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[Recipe] = []

    def check(recipe: Recipe, *_: Any, **__: Any) -> dict[str, Any]:
        checked.append(recipe)
        raise MeetingError("nobody came")

    def end(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr("launch.nodes.check.preflight", check)
    monkeypatch.setattr("launch.ending.end_process", end)
    text = tmp_path / "text.txt"
    text.write_text("words\n")
    line = ["preflight", BASE, "--nodes=2", "--rdzv=127.0.0.1:1", "--ranks-per-node=1"]
    for more in ([f"--corpus={text}"], [f"--dataset-dir={tmp_path / 'shards'}"]):
        with pytest.raises(SystemExit, match="1"):  # without waiting for what may hang
            main([*line, *more])
    assert checked[0].data == load_recipe(BASE, corpus=str(text)).data
    assert checked[0].data != load_recipe(BASE).data
    assert checked[1].data.directory == str(tmp_path / "shards")


@pytest.mark.parametrize(
    "device, words",
    [
        ({}, None),
        ({"free": 40 * GIB}, "GPU 2 has 40.0 of 80.0 GiB free: end what runs on it"),
        ({"ecc": 3.0}, "GPU 2 has 3 uncorrected memory errors"),
        ({"temperature": 95.0}, "GPU 2 is at 95 C: look at its cooling"),
        ({"ecc": None, "temperature": None}, None),
    ],
)
def test_the_health_of_a_gpu_is_judged(device: dict[str, Any], words: str | None) -> None:
    found = device_problems(2, {"name": "H100", "memory": 80 * GIB, "free": 79 * GIB, **device})
    assert [line for line in found if words is None or not line.startswith(words)] == []
    assert len(found) == (words is not None)


def test_nvidia_smi_is_read_and_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '550.54, 41, 0'\necho '550.54, 43, [N/A]'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert facts_module._smi() == [["550.54", "41", "0"], ["550.54", "43", "[N/A]"]]
    assert [facts_module._number(text) for text in ("41", "[N/A]")] == [41.0, None]
    program.write_text("#!/bin/sh\nexit 9\n")
    assert facts_module._smi() == []
    monkeypatch.setenv("PATH", "/nonexistent")
    assert facts_module._smi() == []


def test_the_source_has_a_digest_that_tells_one_commit_from_another(tmp_path: Path) -> None:
    path = tmp_path / "kernels" / "a.py"
    path.parent.mkdir()
    path.write_text("x = 1\n")
    first = source_digest(tmp_path)
    assert source_digest(tmp_path) == first
    path.write_text("x = 2\n")
    second = source_digest(tmp_path)
    path.rename(path.with_name("b.py"))
    assert len({first, second, source_digest(tmp_path)}) == 3


def test_the_slow_node_is_named_and_not_its_neighbours() -> None:
    links = [(0, 1, 10.0), (1, 2, 2.0), (2, 3, 2.1), (3, 0, 9.0)]
    best, (problem,) = slow_links(links, 4)
    assert best == [10.0, 10.0, 2.1, 9.0]
    assert problem.node == 2
    assert problem.message.startswith("2.1 GB/s with its neighbours, the median of the nodes is 9.5: look at")
    assert slow_links([(0, 1, 3.0)], 2) == ([3.0, 3.0], [])
    assert slow_links([(0, 1, 3.0), (1, 2, 3.1), (2, 0, 0.1)], 3)[1] == []
