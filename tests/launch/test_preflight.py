"""Preflight: what would fail later is said before ranks start."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints.config import CheckpointConfig
from launch import preflight
from launch.fit import fit_to_devices
from launch.planning.plan import make_plan
from launch.recipe import load_recipe
from trellis_dist.parallel.config import MeshConfig

BASE = str(Path(__file__).with_name("base.toml"))


def test_a_full_disk_is_refused_with_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    preflight.check_disk(tmp_path, checkpoint_bytes=10**5, kept=2)
    with pytest.raises(OSError, match=r"0.0 GB free, but 3 checkpoints need 3.0 GB.*checkpoint.keep"):
        preflight.check_disk(tmp_path, checkpoint_bytes=10**9, kept=2)


@pytest.mark.parametrize(
    "fields, kept",
    [
        ({}, 3),
        ({"keep": 2, "keep_best": 4}, 6),
        ({"keep": 2, "keep_every": 300, "keep_best": 1}, 6),
        ({"keep": 0}, 10),
        ({"keep": 8, "keep_best": 8}, 10),
        ({"interval": 700, "keep": 5}, 2),
    ],
)
def test_what_retention_can_keep_is_counted(fields: dict[str, Any], kept: int) -> None:
    assert preflight.most_kept(CheckpointConfig(**{"interval": 100} | fields), steps=1000) == kept


def test_the_disk_is_asked_for_all_that_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    settings = ["checkpoint.interval=10", "checkpoint.keep=2", "training.steps=60"]
    recipe = load_recipe(BASE, settings)
    needed = preflight.checkpoint_bytes(recipe)
    usage = shutil.disk_usage(tmp_path)._replace(free=int(needed * 3.5))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    preflight.check_machine(recipe, tmp_path / "run")
    for more in ("checkpoint.keep_best=1", "checkpoint.keep_every=20", "checkpoint.keep=0"):
        with pytest.raises(
            OSError, match=r"free, but [4567] checkpoints need .* keep fewer \(checkpoint.keep"
        ):
            preflight.check_machine(load_recipe(BASE, [*settings, more]), tmp_path / "run")


def test_a_store_that_cannot_be_spoken_to_is_refused_before_ranks_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    recipe = load_recipe(BASE, ["checkpoint.upload=nosuch://bucket/run"])
    with pytest.raises(ValueError, match=r"checkpoint.upload = nosuch://bucket/run: .*use s3://"):
        preflight.check_machine(recipe, tmp_path / "run")


def test_a_run_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(OSError, match="use another --run-dir"):
        preflight.check_writable(tmp_path / "run")


def test_more_ranks_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="needs 2 ranks, one per CUDA device, but this machine has 1"):
        preflight.local_ranks(load_recipe(BASE))


@pytest.mark.parametrize(
    "devices, dp, micro_batch, accumulation",
    [(0, 2, 4, 1), (1, 1, 4, 2), (2, 2, 4, 1), (3, 2, 4, 1), (4, 4, 2, 1), (8, 8, 1, 1)],
)
def test_the_quickstart_fits_every_number_of_devices(
    devices: int, dp: int, micro_batch: int, accumulation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    said: list[str] = []
    recipe = load_recipe("quickstart")
    fitted = preflight.fit_to_machine(recipe, say=said.append)
    assert (fitted.mesh.dp, fitted.training.micro_batch) == (dp, micro_batch)
    assert fitted.global_rows == recipe.global_rows == dp * micro_batch * accumulation
    assert preflight.local_ranks(recipe) == preflight.local_ranks(fitted) == dp
    assert make_plan(recipe)["batch"]["accumulation"] == accumulation
    assert len(said) == (devices in (3, 4, 8))
    assert preflight.fit_to_machine(fitted, say=said.append) == fitted


def test_what_fitting_changed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    for devices in (3, 4):
        monkeypatch.setattr(torch.cuda, "device_count", lambda devices=devices: devices)
        preflight.fit_to_machine(load_recipe("quickstart"), say=said.append)
    assert said == [
        "8 rows per step on mesh.dp = 2: 2 of 3 devices are used",
        "8 rows per step on mesh.dp = 4: training.micro_batch 4 -> 2",
    ]


def test_ranks_that_are_there_decide_before_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "8")
    fitted = preflight.fit_to_machine(load_recipe("quickstart"), say=print)
    assert (fitted.mesh.dp, fitted.training.micro_batch) == (8, 1)


def test_an_open_dp_takes_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("350m-c4")
    for devices, ranks in ((4, 4), (2, 2), (0, 1)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda devices=devices: devices)
        assert preflight.local_ranks(recipe) == ranks
    segments = dataclasses.replace(recipe, mesh=MeshConfig(sp=2))
    assert fit_to_devices(segments, 4).mesh == MeshConfig(dp=2, sp=2)


def test_an_open_dp_needs_no_micro_batch_that_divides() -> None:
    recipe = load_recipe("quickstart", ["training.micro_batch=3"])
    assert fit_to_devices(recipe, 0).training.micro_batch == 2
    assert make_plan(recipe)["batch"]["micro_batch"] == 2


def test_checkpoints_that_are_there_take_no_more_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=int(1.5e9))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"3 checkpoints need 3\.0 GB"):
        preflight.check_disk(tmp_path, checkpoint_bytes=10**9, kept=2)
    for step in (1, 2, 3):
        (tmp_path / "checkpoints" / f"step-0000000{step}").mkdir(parents=True)
    preflight.check_disk(tmp_path, checkpoint_bytes=10**9, kept=2)


def test_sources_are_checked_before_ray_starts(tmp_path: Path) -> None:
    preflight.check_source(load_recipe(BASE))
    preflight.check_source(load_recipe("350m-c4"))
    gone = load_recipe(BASE, ["data.source.kind=path", f"data.source.path={tmp_path / 'gone'}"])
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        preflight.check_source(gone)
