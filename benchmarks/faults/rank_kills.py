"""Rows 1, 2 and 17: real signals to a real `trellis train`, at a moment that the trial's number decides."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.faults.rank_job import (
    ENGINES,
    INTERVAL,
    STEPS,
    Started,
    command,
    compare,
    exact_rows,
    resume_step,
    unharmed,
    wait_for,
)
from benchmarks.faults.row import Outcome
from trellis_dist.training.job import EXIT_TERMINATED

__all__ = ["kill_all_ranks", "kill_in_flight", "kill_one_rank", "preempt"]

# Most of what a start costs is imports, and of these engines local has the fewest.
KILLED = ("local", "local", "ZeRO 1", "local", "FSDP2")
RESTARTED = re.compile(r"restart [0-9]+ of 3 in")
RESUMED = re.compile(r"resuming from .*/step-([0-9]{8})")
SAVED = re.compile(r"is saved \(([0-9.]+) s after it")
GRACE_S = 30.0


def kill_one_rank(folder: Path, index: int) -> Outcome:
    """SIGKILL a rank, in every second trial while a save is in flight; the command is to finish by itself."""
    draw, name = random.Random(f"one {index}"), KILLED[index % len(KILLED)]
    whole, run_dir = unharmed(folder.parent, ENGINES[name], name), folder / "run"
    with command(run_dir, folder.parent, ENGINES[name], "--max-restarts", "3") as run:
        victim, inside, place = _kill_one(run, draw, in_save=index % 2 == 0)
        status = run.end()
        said = run.said
    restarts = len(RESTARTED.findall(said))
    wrong = _what_is_wrong(status, run_dir, whole, said)
    if not wrong and restarts == 0:
        wrong = "it finished without a restart"
    note = f"{name}, {'inside a save' if inside else 'between saves'}"
    if wrong:
        note += f", rank {victim} killed in {place}: {wrong}"
    numbers = {"restarts": restarts} | ({"inside a save": 1} if inside else {})
    return Outcome(not wrong, note, numbers)


def _kill_one(run: Started, draw: random.Random, *, in_save: bool) -> tuple[int, bool, str]:
    """(rank, whether a save was in flight, what the rank did)."""
    victim, step, delay = draw.randrange(2), draw.randint(1, STEPS - 12), draw.uniform(0.0, 0.06)
    page = run.wait_for_step(victim, step)
    if in_save:
        run.wait_until(lambda: bool(run.flying()), "a save")
        delay /= 4
    time.sleep(delay)
    os.kill(page.pid, signal.SIGKILL)
    inside, last = bool(run.flying()), run.page(victim) or page
    return victim, inside, f"step {last.step}, {last.operation}"


def _what_is_wrong(status: int, run_dir: Path, whole: Path, said: str) -> str:
    """Why a run did not come to the end of the undisturbed one; empty where it did."""
    if status != 0:
        return f"exit status {status}: {_last_line(said)}"
    return compare(run_dir, whole)


def _last_line(said: str) -> str:
    lines = [line for line in said.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def kill_all_ranks(folder: Path, index: int) -> Outcome:
    """`kill_in_flight`, and the steps lost are at most the save interval: the bound of the fault table.

    Nothing in an asynchronous save makes that so: what is trained while the save in flight is being written
    is lost with it. How often that is more than the bound allows is what this row counts.
    """
    outcome = kill_in_flight(folder, index)
    lost = int(outcome.numbers["lost steps"])
    if outcome.ok and lost > INTERVAL:
        note = f"{outcome.note}: equal in every bit, {lost} steps lost, {INTERVAL} allowed"
        return Outcome(False, note, {**outcome.numbers, "equal, and lost more than the interval": 1})
    return outcome


def kill_in_flight(folder: Path, index: int) -> Outcome:
    """SIGKILL launcher and ranks while a save is in flight, start again by hand, compare every bit."""
    draw, name = random.Random(f"all {index}"), KILLED[index % len(KILLED)]
    whole, run_dir = unharmed(folder.parent, ENGINES[name], name), folder / "run"
    with command(run_dir, folder.parent, ENGINES[name]) as run:
        run.wait_for_step(0, draw.randint(1, STEPS - 12))
        run.wait_until(lambda: bool(run.flying()), "a save")
        time.sleep(draw.uniform(0.0, 0.015))
        family = run.family()
        for process in family:
            process.kill()
        inside = bool(run.flying())
        run.process.wait()
    psutil.wait_procs(family, timeout=10)
    done = int(exact_rows(run_dir)[-1]["step"])
    expected = resume_step(run_dir)
    with command(run_dir, folder.parent, ENGINES[name]) as run:
        status = run.end()
        said = run.said
    resumed = max((int(found) for found in RESUMED.findall(said)), default=0)
    wrong = _what_is_wrong(status, run_dir, whole, said)
    if not wrong and resumed != expected:
        wrong = f"it resumed from step {resumed}, the newest verified one is {expected}"
    note = f"{name}, {'inside a save' if inside else 'just after a save'}"
    if wrong:
        note += f", killed after step {done}, resumed from step {resumed}: {wrong}"
    numbers = {"lost steps": done - resumed} | ({"inside a save": 1} if inside else {})
    return Outcome(not wrong, note, numbers)


def preempt(folder: Path, index: int) -> Outcome:
    """SIGTERM or SIGUSR1 to the command, every fourth time while it still starts; then start again."""
    draw, name = random.Random(f"preempt {index}"), KILLED[index % len(KILLED)]
    number = (signal.SIGTERM, signal.SIGUSR1)[index % 2]
    whole, run_dir = unharmed(folder.parent, ENGINES[name], name), folder / "run"
    values = {**ENGINES[name], "checkpoint.grace_s": GRACE_S}
    starting = index % 4 == 3
    with command(run_dir, folder.parent, values) as run:
        place = _moment(run, draw, starting=starting)
        sent = time.monotonic()
        run.process.send_signal(number)
        status = run.end()
        seconds, said = time.monotonic() - sent, run.said
    saved = [float(found) for found in SAVED.findall(said)]
    wrong = "" if status == EXIT_TERMINATED else f"exit status {status}: {_last_line(said)}"
    # A step whose validation was broken off is saved and has no row yet.
    if exact_rows(run_dir) and resume_step(run_dir) < int(exact_rows(run_dir)[-1]["step"]):
        wrong = wrong or f"step {int(exact_rows(run_dir)[-1]['step'])} was not saved"
    if seconds > GRACE_S:
        wrong = wrong or f"it took {seconds:.1f} s, more than the {GRACE_S:.0f} s of grace"
    with command(run_dir, folder.parent, values) as run:
        wrong = wrong or _what_is_wrong(run.end(), run_dir, whole, run.said)
    numbers: dict[str, Any] = {"exit seconds": round(seconds, 2)}
    if saved:
        numbers["save seconds"] = saved[-1]
    note = f"{number.name} {'while it started' if starting else 'while it trained'}"
    return Outcome(not wrong, f"{note}, {name}, {place}: {wrong}" if wrong else note, numbers)


def _moment(run: Started, draw: random.Random, *, starting: bool) -> str:
    """Wait for it; what it was, in words."""
    if not starting:
        page = run.wait_for_step(0, draw.randint(1, STEPS - 12))
        time.sleep(draw.uniform(0.0, 0.06))
        page = run.page(0) or page
        return f"in step {page.step}, {page.operation}"
    # Before that, Python itself is not up, and the system ends it.
    wait_for(lambda: _catches(run.process.pid, signal.SIGUSR1), "a handler of the command")
    delay = draw.uniform(0.0, 8.0)
    deadline = time.monotonic() + delay
    while time.monotonic() < deadline and run.page(0) is None:
        time.sleep(0.004)
    return f"{delay:.1f} s after the command could answer" if run.page(0) is None else "as its ranks began"


def _catches(process: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal (Linux)."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False
