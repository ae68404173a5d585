"""Kill `prepare` at random moments, its driver or a worker, until it is done; what comes out must not differ.

The driver runs in a process of its own on a Ray cluster that survives it, as on a real one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import psutil

from data_pipeline.config import DataConfig

__all__ = ["TASKS", "Kills", "kill_until_done", "output_hashes"]

DRIVER = """
import sys
from pathlib import Path
from pydantic import TypeAdapter
from data_pipeline.config import DataConfig
from data_pipeline.job import prepare
config = TypeAdapter(DataConfig).validate_json(Path(sys.argv[1]).read_bytes())
print("ready", flush=True)
prepare(config, ray_address=sys.argv[2], progress=False)
"""
# What a data set holds beside its files: a lock, times (the report shows them), where it was made from.
NOT_COMPARED = (".lock", "timings.json", "config.json", "report.html")
LONGEST_RUN = 300.0
# Ray's own agents bear such titles too; without them a node ends.
TASKS = ("fetch_shard", "clean_unit", "run_partition", "token_unit", "write_planned")


@dataclass
class Kills:
    """What was killed, when (seconds after the driver was ready), and how often the job was started."""

    drivers: int = 0
    workers: int = 0
    starts: int = 0
    moments: list[float] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Processes killed."""
        return self.drivers + self.workers


def output_hashes(directory: Path) -> dict[str, str]:
    """sha256 of every file of a data set that must not depend on how it was made, by name."""
    paths = [*directory.iterdir(), *(directory / "index").glob("*")]
    files = (path for path in sorted(paths) if path.is_file() and path.name not in NOT_COMPARED)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def kill_until_done(config: DataConfig, directory: Path, *, kills: int, address: str, seed: int) -> Kills:
    """Prepare `config` in `directory`/0, 1, ... under `kills` SIGKILLs, then to its end.

    A data set that is done before all kills are spent is followed by another, from nothing.

    Args:
        config: the data set.
        directory: gets a folder per data set, all of which end complete.
        kills: processes to kill, drivers and workers about as often.
        address: of a Ray cluster on this machine, on which nothing else runs.
        seed: of the moments.

    Raises:
        RuntimeError: a driver failed by itself, or did not end.
    """
    draw, done, number = random.Random(seed), Kills(), 0
    while done.count < kills or number == 0:
        stored = directory / f"{number}.json"
        stored.write_text(json.dumps(asdict(replace(config, directory=str(directory / str(number))))))
        while not _one_start(stored, address, draw, done, kills):
            pass
        number += 1
    return done


def _one_start(stored: Path, address: str, draw: random.Random, done: Kills, kills: int) -> bool:
    """Start the driver, kill it or its workers; whether it came to its end."""
    command = [sys.executable, "-c", DRIVER, str(stored), address]
    done.starts += 1
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as driver:
        assert driver.stdout is not None
        driver.stdout.readline()
        start = time.monotonic()
        while done.count < kills:
            try:
                driver.wait(draw.uniform(0.02, 1.5))
                break
            except subprocess.TimeoutExpired:
                pass
            before, was_driver = done.count, _kill_one(driver, address, draw, done)
            if done.count > before:
                done.moments.append(round(time.monotonic() - start, 3))
            if was_driver:
                driver.wait()
                return False
        try:
            status = driver.wait(LONGEST_RUN)
        except subprocess.TimeoutExpired:
            driver.kill()
            raise RuntimeError(f"prepare did not end within {LONGEST_RUN:.0f} s after a kill") from None
    if status:
        raise RuntimeError(f"prepare failed with exit status {status} after {done.count} kills")
    return True


def _kill_one(driver: subprocess.Popen[bytes], address: str, draw: random.Random, done: Kills) -> bool:
    """Kill a worker at work, or the driver; whether it was the driver."""
    if draw.random() < 0.5:
        # A new driver's workers take a second or two to start.
        deadline = time.monotonic() + 5
        while not (workers := _workers_at_work(address)) and time.monotonic() < deadline:
            if driver.poll() is not None:
                return False
        with contextlib.suppress(ProcessLookupError, IndexError):
            os.kill(draw.choice(workers), signal.SIGKILL)
            done.workers += 1
        return False
    driver.send_signal(signal.SIGKILL)
    done.drivers += 1
    return True


def _workers_at_work(address: str) -> list[int]:
    """Process ids of this cluster's workers that run a task: their title is ``ray::FUNCTION``."""
    titles = {f"ray::{function}" for function in TASKS}
    found = []
    for process in psutil.process_iter(["name", "cmdline"]):
        if process.info["name"] == "raylet" and address in " ".join(process.info["cmdline"] or []):
            for child in process.children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if child.cmdline()[:1] and child.cmdline()[0] in titles:
                        found.append(child.pid)
    return found
