"""What memory a rank can have: its share of what is left, its own limits, and what it holds already."""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from launch.planning import rank_memory
from launch.planning.rank_memory import host_memory, left_in_groups

MB = 10**6


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """A system with 0.9 GB left, and a process of 1 GB of its own and 0.2 GB of mapped files."""
    folder = tmp_path / "proc"
    (folder / "self").mkdir(parents=True)
    (folder / "meminfo").write_text("MemTotal: 9000000 kB\nMemAvailable: 900000 kB\n")
    sizes = {"VmSize": 3000000, "VmData": 1500000, "RssAnon": 1000000, "RssFile": 200000}
    lines = [f"{name}:\t{size} kB" for name, size in sizes.items()]
    (folder / "self/status").write_text("\n".join(["Name:\tpython", *lines]))
    (folder / "self/cgroup").write_text("")
    return folder


@pytest.fixture
def limits() -> Iterator[None]:
    """Puts this process's limits back."""
    before = {number: resource.getrlimit(number) for number, _ in rank_memory._LIMITS}
    yield
    for number, pair in before.items():
        resource.setrlimit(number, pair)


def group(folder: Path, version: int, *, limit: str, used: int, dropped: int) -> None:
    limit_file, use_file, keys = rank_memory._FILES[version]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / limit_file).write_text(f"{limit}\n")
    (folder / use_file).write_text(f"{used}\n")
    (folder / "memory.stat").write_text("".join(f"{key} {dropped // 2}\n" for key in keys))


def test_a_rank_that_runs_has_what_it_holds_and_its_share_of_what_is_left(proc: Path) -> None:
    kib = 1024
    assert host_memory(3, running=False, proc=proc, groups=proc) == 300000 * kib
    assert host_memory(3, running=True, proc=proc, groups=proc) == 1300000 * kib


def test_this_process_may_have_what_it_took() -> None:
    before = host_memory(4, running=False)
    held = torch.ones(50 * MB)
    # Of which others take a part, or leave it, at any time; what is held alone is 0.2 GB.
    assert host_memory(10**6, running=True) >= held.nbytes
    assert before > 0


@pytest.mark.parametrize("version, words, root", [(1, "4:cpu,memory:", "memory"), (2, "0::", "")])
def test_the_least_of_all_groups_around_a_process_counts(
    proc: Path, tmp_path: Path, version: int, words: str, root: str
) -> None:
    groups, unlimited = tmp_path / "groups", {1: str(2**63 - 4096), 2: "max"}[version]
    (proc / "self/cgroup").write_text(f"9:name=systemd:/\n{words}/job/step\n")
    group(groups / root, version, limit=unlimited, used=0, dropped=0)
    group(groups / root / "job", version, limit=str(800 * MB), used=500 * MB, dropped=200 * MB)
    group(groups / root / "job/step", version, limit=str(900 * MB), used=100 * MB, dropped=0)
    assert sorted(left_in_groups(proc=proc, groups=groups)) == [500 * MB, 800 * MB]
    assert host_memory(2, running=False, proc=proc, groups=groups) == 250 * MB


def test_a_group_whose_path_is_the_hosts_is_found_in_the_container(proc: Path, tmp_path: Path) -> None:
    (proc / "self/cgroup").write_text("0::/kubepods/pod1/abc\n")
    group(tmp_path / "groups", 2, limit=str(600 * MB), used=200 * MB, dropped=0)
    assert left_in_groups(proc=proc, groups=tmp_path / "groups") == [400 * MB]


def test_a_limit_of_the_process_counts_whole_for_each_rank(limits: None) -> None:
    own = rank_memory._sizes(Path("/proc/self/status"))
    soft = own["VmSize"] + 300 * MB
    resource.setrlimit(resource.RLIMIT_AS, (soft, resource.getrlimit(resource.RLIMIT_AS)[1]))
    found = host_memory(1, running=True)
    assert found == pytest.approx(300 * MB + own["RssAnon"], abs=20 * MB)


def test_devices_are_asked_of_the_driver_and_not_through_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        """Two devices, of 24 and 16 GB."""

        def cuInit(self, flags: int) -> int:  # noqa: N802
            return 0

        def cuDeviceGetCount(self, count: object) -> int:  # noqa: N802
            count._obj.value = 2  # type: ignore[attr-defined]
            return 0

        def cuDeviceTotalMem_v2(self, size: object, device: int) -> int:  # noqa: N802
            size._obj.value = (24, 16)[device] * 10**9  # type: ignore[attr-defined]
            return 0

    def context(*_: object) -> None:
        raise AssertionError("this makes a context")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("current_device", "get_device_properties", "init"):
        monkeypatch.setattr(torch.cuda, name, context)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    assert rank_memory.rank_memory(8) == 16 * 10**9
