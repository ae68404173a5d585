"""The run that faults are injected into: a tiny model and data set, two ranks, forty steps, saves.

`command` starts it as a user does, `job` gives it to ranks that are there already. Runs that were left alone,
to compare with, and the data set are made once in a folder that the trials of a row share.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from benchmarks.hand_made import random_splits
from benchmarks.kernels.record import source_digest
from checkpoints.state import CheckpointReader, latest_verified
from launch.failures import log_folder
from launch.recipe import load_recipe, resolve
from trellis_dist.training.job import Job
from trellis_dist.training.metrics import read_rows
from trellis_dist.training.watch.status_page import Status, read_status, status_path

__all__ = [
    "ENGINES",
    "INTERVAL",
    "STEPS",
    "Started",
    "command",
    "compare",
    "data_set",
    "exact_rows",
    "job",
    "recipe_file",
    "resume_step",
    "sources",
    "unharmed",
    "wait_for",
]

ROOT = Path(__file__).resolve().parents[2]
STEPS, INTERVAL = 40, 3
LIMIT_S = 400.0  # for one start, on a machine that does other things too
ENGINES: dict[str, dict[str, Any]] = {
    "local": {"training.engine": "local"},
    "ZeRO 0": {"training.engine": "deepspeed", "training.zero_stage": 0},
    "ZeRO 1": {"training.engine": "deepspeed", "training.zero_stage": 1},
    "ZeRO 2": {"training.engine": "deepspeed", "training.zero_stage": 2},
    "ZeRO 3": {
        "training.engine": "deepspeed",
        "training.zero_stage": 3,
        "training.zero3_persistence_threshold": 0,
    },
    "FSDP2": {"training.engine": "fsdp2"},
}
# The optimizer and the model's epsilon are the parity matrix's, which amplify no rounding.
RECIPE = f"""
name = "faults"
[data]
sequence_length = 32
chunk_aligned = true
[data.source]
kind = "stdlib"
licence = "PSF-2.0"
[data.tokenizer]
vocab_size = 400
[model]
vocab_size = 400
num_layers = 1
dim = 16
num_heads = 2
mlp_hidden = 24
norm_eps = 1e-2
[model.trellis]
slots = 4
chunk_size = 8
[mesh]
dp = 2
[optimizer]
lr = 4e-3
eps = 1e-3
clip_norm = 0.5
[schedule]
warmup_steps = 4
[training]
steps = {STEPS}
global_batch_tokens = 128
precision = "fp32"
validation_interval = 20
validation_rows = 4
threads = 1
[checkpoint]
interval = {INTERVAL}
[logging]
interval = 1
tensorboard = false
progress = false
"""
PIECES = 400
# What two runs must agree on in every bit; times and speeds they need not.
EXACT = ("step", "tokens", "loss/train", "loss/validation", "optim/lr", "optim/gradient_norm")


def data_set(shared: Path) -> Path:
    """Documents of very different lengths, made once."""
    final = shared / "set"
    if not final.exists():
        folder = shared / f"set-{os.getpid()}"
        random_splits(folder, seed=0, vocab_size=PIECES, lengths=(3, 9, 30, 100)).rename(final)
    return final


def recipe_file(shared: Path) -> Path:
    """The recipe, in a file."""
    path = shared / "faults.toml"
    path.write_text(RECIPE)
    return path


def _assignments(values: Mapping[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def job(shared: Path, values: Mapping[str, Any]) -> Job:
    """The job with dotted keys set to ``values``, for ranks that are there."""
    recipe = load_recipe(str(recipe_file(shared)), _assignments(values), dataset_dir=data_set(shared))
    names = ("model", "mesh", "tensor", "sequence", "data", "optimizer", "schedule", "training", "checkpoint")
    sections = {name: getattr(recipe, name) for name in names}
    return Job(**sections, logging=recipe.logging, recipe=resolve(recipe))


class Started:
    """A start of `trellis train` in a process of its own; what it says goes to a file."""

    def __init__(self, process: subprocess.Popen[bytes], run_dir: Path, said: Path) -> None:
        self.process, self.run_dir, self._said = process, run_dir, said
        self.begun = time.time()

    @property
    def said(self) -> str:
        """Both of its streams so far."""
        return self._said.read_text(errors="replace")

    def page(self, rank: int) -> Status | None:
        """What a rank of this start does; None before it says so."""
        status = read_status(status_path(log_folder(self.run_dir), rank))
        return status if status is not None and status.since >= self.begun else None

    def wait_for_step(self, rank: int, step: int) -> Status:
        """Wait until a rank has come to ``step``; its page."""
        self.wait_until(lambda: (page := self.page(rank)) is not None and page.step >= step, f"step {step}")
        page = self.page(rank)
        assert page is not None, "a page that was there stays"
        return page

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for ``condition``; RuntimeError when the run ends before it holds."""
        wait_for(lambda: condition() or self.process.poll() is not None, what)
        if not condition():
            raise RuntimeError(f"the run ended before {what}: {self.said[-300:]}")

    def flying(self) -> list[str]:
        """Saves that are begun and not committed."""
        return [path.name for path in (self.run_dir / "checkpoints").glob(".attempt-*")]

    def end(self) -> int:
        """Wait for the exit status."""
        return self.process.wait(LIMIT_S)

    def family(self) -> list[psutil.Process]:
        """The launcher and what it started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(self.process.pid)
            return [launcher, *launcher.children(recursive=True)]
        return []


@contextlib.contextmanager
def command(
    run_dir: Path,
    shared: Path,
    values: Mapping[str, Any],
    *options: str,
    code: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Started]:
    """Start `trellis train`; whatever is left of it at the end is killed.

    Args:
        run_dir: of the run.
        shared: folder of the data set and the recipe.
        values: dotted keys of the recipe to set.
        options: more of the command line.
        code: Python that stands in for the command.
        environment: variables to add.
    """
    sets = [part for assignment in _assignments(values) for part in ("--set", assignment)]
    arguments = [str(recipe_file(shared)), f"--run-dir={run_dir}", f"--dataset-dir={data_set(shared)}", *sets]
    program = ["-m", "launch.cli"] if code is None else ["-c", code]
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    variables = {key: value for key, value in os.environ.items() if key not in ranks}
    variables |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **(environment or {})}
    run_dir.mkdir(parents=True, exist_ok=True)
    said = run_dir / f"said-{len(list(run_dir.glob('said-*')))}.txt"
    with said.open("wb") as stream:
        started = Started(
            subprocess.Popen(
                [sys.executable, *program, "train", *arguments, *options],
                env=variables,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            ),
            run_dir,
            said,
        )
    family: list[psutil.Process] = []
    try:
        yield started
    finally:
        family = started.family()
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        started.process.wait()


def wait_for(condition: Callable[[], bool], what: str, *, limit_s: float = LIMIT_S) -> None:
    """Look every few milliseconds; RuntimeError after ``limit_s``."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what} did not come in {limit_s:.0f} s")
        time.sleep(0.004)


@functools.cache
def sources() -> str:
    """Tells the present sources from others."""
    return str(source_digest("checkpoints", "data_pipeline", "kernels", "launch", "trellis_dist"))[:12]


def unharmed(shared: Path, values: Mapping[str, Any], name: str) -> Path:
    """The folder of a run of these ``values`` that nobody disturbed, trained once by the present sources."""
    folder = shared / f"unharmed-{name.replace(' ', '-')}-{sources()}"
    if not (folder / "checkpoints" / f"step-{STEPS:08d}").is_dir():
        with command(folder, shared, values) as run:
            if run.end() != 0:
                raise RuntimeError(f"the run to compare with failed: {run.said[-500:]}")
    return folder


def exact_rows(run_dir: Path) -> list[dict[str, float]]:
    """The metrics of a run without times and speeds."""
    return [{k: row[k] for k in EXACT if k in row} for row in read_rows(run_dir / "metrics.jsonl")]


def compare(run_dir: Path, reference: Path) -> str:
    """What of a finished run is not, bit for bit, what it is in ``reference``; empty for nothing."""
    mine, theirs = exact_rows(run_dir), exact_rows(reference)
    if [row["step"] for row in mine] != list(range(1, STEPS + 1)):
        return f"metrics.jsonl holds the steps {[int(row['step']) for row in mine]}"
    for ours, expected in zip(mine, theirs, strict=True):
        if ours != expected:
            return f"step {int(ours['step'])}: {ours}, undisturbed {expected}"
    tensors, expected_tensors = (_tensors(folder) for folder in (run_dir, reference))
    if tensors.keys() != expected_tensors.keys():
        return f"tensors {sorted(tensors.keys() ^ expected_tensors.keys())[:3]} are in one of the two runs"
    different = [name for name, value in tensors.items() if value != expected_tensors[name]]
    return f"{len(different)} tensors differ, {different[0]} for one" if different else ""


def _tensors(run_dir: Path) -> dict[str, bytes]:
    """Every tensor of the last checkpoint, generator states included."""
    reader = CheckpointReader(run_dir / "checkpoints" / f"step-{STEPS:08d}")
    return {name: reader.read(name).numpy().tobytes() for name in reader.names()}


def resume_step(run_dir: Path) -> int:
    """The step that the next start will resume from; 0 without one."""
    found = latest_verified(run_dir / "checkpoints")
    return int(found.name.removeprefix("step-")) if found else 0
