"""Preflight: what would fail later is said before ranks start."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from launch import preflight
from launch.recipe import load_recipe

BASE = str(Path(__file__).with_name("base.toml"))


def test_a_full_disk_is_refused_with_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    preflight.check_disk(tmp_path, checkpoint_bytes=10**5, kept=2)
    with pytest.raises(OSError, match=r"0.0 GB free, but 3 checkpoints need 3.0 GB.*checkpoint.keep"):
        preflight.check_disk(tmp_path, checkpoint_bytes=10**9, kept=2)


def test_a_run_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(OSError, match="use another --run-dir"):
        preflight.check_writable(tmp_path / "run")


def test_more_ranks_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="needs 2 ranks, one per CUDA device, but this machine has 1"):
        preflight.local_ranks(load_recipe(BASE))


def test_an_open_dp_takes_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("350m-c4")
    segments = load_recipe("350m-c4", ["training.engine=local", "mesh.sp=2"])
    for devices, ranks in ((4, 4), (2, 2), (0, 1)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda devices=devices: devices)
        assert preflight.local_ranks(recipe) == ranks
        assert preflight.local_ranks(segments) == 2


def test_sources_are_checked_before_ray_starts(tmp_path: Path) -> None:
    preflight.check_source(load_recipe(BASE))
    preflight.check_source(load_recipe("350m-c4"))
    gone = load_recipe(BASE, ["data.source.kind=path", f"data.source.path={tmp_path / 'gone'}"])
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        preflight.check_source(gone)
