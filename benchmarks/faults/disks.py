"""Rows 9 to 11: disks that are full, fail or are slow, and writers that raise, under small runs."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import io
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.faults import rank_job
from benchmarks.faults.file_systems import FailingFileSystem
from benchmarks.faults.other_disks import DevFull, OfOneStep, Raising, Slow, Watched
from benchmarks.faults.row import Outcome, Row
from benchmarks.faults.simulated import contents, fragment, holds, raw, save, saved
from checkpoints.background import BackgroundSaver, Settled
from checkpoints.commit import attempt_name
from checkpoints.state import CheckpointReader, SaveError, latest_verified
from trellis_dist.files import REAL, FileSystem
from trellis_dist.training import saving
from trellis_dist.training.engines.local import LocalEngine
from trellis_dist.training.loop import run

__all__ = ["ROWS"]

STEPS, INTERVAL = 12, 3
LOST = 6  # the step whose save fails
SHARD = "rank-00000.safetensors"
SLOW_S, LIMIT_S = 0.3, 60.0


def _job(shared: Path, *, background: bool) -> Any:
    values = {
        "training.engine": "local",
        "mesh.dp": 1,
        "training.steps": STEPS,
        "training.validation_interval": STEPS,
        "checkpoint.interval": INTERVAL,
        "checkpoint.keep": 0,
        "checkpoint.background": background,
    }
    return rank_job.job(shared, values)


@dataclasses.dataclass
class Ran:
    """A run in this process: what it said, with the step at which each line was said."""

    folder: Path
    error: str = ""
    said: list[tuple[int, str]] = dataclasses.field(default_factory=list)

    @property
    def steps(self) -> list[str]:
        """Names in its folder of checkpoints."""
        return sorted(path.name for path in (self.folder / "checkpoints").iterdir())

    def tensors(self) -> dict[str, bytes]:
        """What its last checkpoint holds."""
        reader = CheckpointReader(self.folder / "checkpoints" / f"step-{STEPS:08d}")
        return {name: raw(reader.read(name)) for name in reader.names()}

    def alerts(self, step: int) -> list[int]:
        """Steps at which the loss of the save of `step` was said."""
        return [at for at, line in self.said if f"alert: checkpoint of step {step} not saved" in line]


def _train(job: Any, folder: Path, after: Callable[[int], None] = lambda _: None) -> Ran:
    """Run the job; `after` is called after each optimizer step, with its number."""
    ran, now = Ran(folder), [0]
    step_of_engine = LocalEngine.train_step

    def train_step(self: LocalEngine, *arguments: Any, **options: Any) -> Any:
        now[0] += 1
        result = step_of_engine(self, *arguments, **options)
        after(now[0])
        return result

    class Said(io.StringIO):
        def write(self, text: str) -> int:
            ran.said.append((now[0], text))
            return len(text)

    try:
        # Afterwards the class has no attribute of its own, which patches of its base would not reach.
        with patch.object(LocalEngine, "train_step", train_step), contextlib.redirect_stderr(Said()):
            run(job, folder)
    except (OSError, ValueError) as error:
        ran.error = str(error)
    return ran


@contextlib.contextmanager
def _saving_through(system: FileSystem) -> Iterator[None]:
    before, saving.FILE_SYSTEM = saving.FILE_SYSTEM, system
    try:
        yield
    finally:
        saving.FILE_SYSTEM = before


def _mount(folder: Path) -> bool:
    """Whether a file system of 4 MiB in memory could be mounted on `folder`: it takes root."""
    libc = ctypes.CDLL(None, use_errno=True)
    folder.mkdir(parents=True)
    return not libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, b"size=4m")


def _unmount(folder: Path) -> None:
    detach = 2
    assert not ctypes.CDLL(None, use_errno=True).umount2(os.fsencode(folder), detach), (
        f"{folder} stays mounted"
    )


def _undisturbed(shared: Path) -> Ran:
    """The same run with room enough, trained once."""
    folder = shared / "room-enough"
    if not (folder / "checkpoints" / f"step-{STEPS:08d}").is_dir():
        _train(_job(shared, background=True), folder)
    return Ran(folder)


def _judge(ran: Ran, shared: Path) -> Outcome:
    """Whether one save was lost, said within a save interval, and all else is what it would have been."""
    whole = [f"step-{step:08d}" for step in range(INTERVAL, STEPS + 1, INTERVAL) if step != LOST]
    late = [at - LOST for at in ran.alerts(LOST)]
    problems = []
    if ran.error:
        problems.append(f"training ended: {ran.error}")
    elif ran.steps != whole:
        problems.append(f"there are {ran.steps}")
    elif latest_verified(ran.folder / "checkpoints") != ran.folder / "checkpoints" / whole[-1]:
        problems.append("the last checkpoint does not verify")
    elif ran.tensors() != _undisturbed(shared).tensors():
        problems.append("the weights are not those of a run with room enough")
    if len(late) != 1 or late[0] > INTERVAL:
        problems.append(f"said {late} steps after the save, and not once within {INTERVAL}")
    return Outcome(not problems, "; ".join(problems), {"steps until said": late[0]} if late else {})


FULL_DISKS: list[tuple[str, Callable[[], FileSystem] | None]] = [
    ("a full tmpfs", None),
    ("/dev/full", DevFull),
    *(
        (f"{operation} {name}", lambda o=operation, n=name: FailingFileSystem(o, n, errno.ENOSPC))
        for operation, name in (
            ("write", SHARD),
            ("fsync", SHARD),
            ("write", "state.json"),
            ("write", "manifest.json"),
        )
    ),
]


def full_disk(folder: Path, index: int) -> Outcome:
    """The disk is full while step 6 is saved, in the background or (odd numbers) the foreground."""
    name, make = FULL_DISKS[index // 2]
    job, run_dir, shared = _job(folder.parent, background=index % 2 == 0), folder / "run", folder.parent
    if make is not None:
        outcome = _judge(_with(make(), job, run_dir), shared)
    elif _mount(run_dir / "checkpoints"):
        try:
            outcome = _judge(_full_for_real(job, run_dir), shared)
        finally:
            _unmount(run_dir / "checkpoints")
    else:
        name = "no right to mount a tmpfs: write rank-00000.safetensors"
        outcome = _judge(_with(FailingFileSystem("write", SHARD, errno.ENOSPC), job, run_dir), shared)
    return dataclasses.replace(outcome, note=f"{name}{': ' + outcome.note if outcome.note else ''}")


def _with(system: FileSystem, job: Any, run_dir: Path) -> Ran:
    with _saving_through(OfOneStep(LOST, system)):
        return _train(job, run_dir)


def _full_for_real(job: Any, run_dir: Path) -> Ran:
    checkpoints, watched = run_dir / "checkpoints", Watched()
    ballast = checkpoints / "ballast"

    def after(step: int) -> None:
        if step == LOST - 1:
            rank_job.wait_for(
                lambda: (checkpoints / f"step-{LOST - INTERVAL:08d}").is_dir(), "the first save"
            )
            with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
        if step == LOST + INTERVAL - 1:
            watched.failed.wait(LIMIT_S)
            ballast.unlink()

    with _saving_through(watched):
        return _train(job, run_dir, after)


RAISES = [
    ("write", SHARD),
    ("fsync", SHARD),
    ("write", "state.json"),
    ("rename", "rank-00000.json"),
    ("write", "manifest.json"),
    ("rename", "step-"),
]


def writer_raises(folder: Path, index: int) -> Outcome:
    """The thread that writes step 6 raises."""
    ran = _with(Raising(*RAISES[index]), _job(folder.parent, background=True), folder / "run")
    return _judge(ran, folder.parent)


# Row 10: two simulated ranks, one of which has a bad disk.
FAILURES = [
    *((rank, "write", f"rank-0000{rank}.safetensors") for rank in (0, 1)),
    *((rank, "fsync", f"rank-0000{rank}.safetensors") for rank in (0, 1)),
    *((rank, "rename", f"rank-0000{rank}.json") for rank in (0, 1)),
    (0, "write", "manifest.json"),
    (0, "rename", "step-00000002"),
]
SLOW = [(background, rank) for background in (False, True) for rank in (0, 1)]


def bad_disk(folder: Path, index: int) -> Outcome:
    """An error in the foreground or background, then slow disks."""
    saved(folder, 1, world=2)
    if index >= 2 * len(FAILURES):
        return _slow(folder, *SLOW[index - 2 * len(FAILURES)])
    rank, operation, name = FAILURES[index // 2]
    systems: list[FileSystem] = [REAL, REAL]
    systems[rank] = FailingFileSystem(operation, name, errno.EIO)
    learnt = _fails_in_background(folder, systems, rank) if index % 2 else _fails(folder, systems)
    problems = [] if all(learnt) else [f"ranks that did not learn: {[r for r in (0, 1) if not learnt[r]]}"]
    if [path.name for path in folder.iterdir()] != ["step-00000001"]:
        problems.append(f"there are {sorted(path.name for path in folder.iterdir())}")
    elif not holds(folder / "step-00000001", contents(1)):
        problems.append("step 1 is not what it was")
    return Outcome(not problems, "; ".join(problems))


def _fails(root: Path, systems: list[FileSystem]) -> list[bool]:
    return [isinstance(result, SaveError) for result in save(root, 2, world=2, file_systems=systems)]


def _fails_in_background(root: Path, systems: list[FileSystem], rank: int) -> list[bool]:
    ranks = _started(root, systems)
    learnt = [result.failed == (rank,) for result in _settled(ranks)]
    for saver in ranks:
        saver.close()
    return learnt


def _started(root: Path, systems: list[FileSystem]) -> list[BackgroundSaver]:
    ranks = [
        BackgroundSaver(
            root, rank=rank, world_size=2, name=lambda step: attempt_name(step, number=7), file_system=system
        )
        for rank, system in enumerate(systems)
    ]
    for rank, saver in enumerate(ranks):
        saver.start(2, [fragment(n, t, rank=rank, world=2) for n, t in contents(2).items()], {"step": 2})
    return ranks


def _settled(ranks: list[BackgroundSaver]) -> list[Settled]:
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        statuses = [int(saver.status) for saver in ranks]
        results = [saver.settle(statuses) for saver in ranks]
        if None not in results:
            return [result for result in results if result is not None]
        time.sleep(0.005)
    raise RuntimeError("the save was never settled")


def _slow(root: Path, background: bool, rank: int) -> Outcome:
    """Nothing is committed while one rank still writes; then it is."""
    systems: list[FileSystem] = [REAL, REAL]
    systems[rank] = slow = Slow()
    early: list[bool] = []

    def look() -> None:
        time.sleep(SLOW_S)
        early.append(latest_verified(root) != root / "step-00000001")
        slow.go.set()

    watcher = threading.Thread(target=look)
    watcher.start()
    if background:
        ranks = _started(root, systems)
        done = all(result.failed == () for result in _settled(ranks))
    else:
        done = all(isinstance(result, Path) for result in save(root, 2, world=2, file_systems=systems))
    watcher.join()
    ok = early == [False] and done and holds(root / "step-00000002", contents(2))
    return Outcome(ok, "" if ok else f"committed before the slow rank: {early}, saved: {done}")


ROWS = {
    9: Row(
        "ENOSPC during a save (a tmpfs that is full, /dev/full, injected)",
        "training goes on, earlier checkpoints are intact, an alert is logged",
        full=2 * len(FULL_DISKS),
        quick=2,
        trial=full_disk,
    ),
    10: Row(
        "EIO or a slow disk on one of two ranks",
        "no commit before all ranks are durable; every rank learns",
        full=2 * len(FAILURES) + len(SLOW),
        quick=4,
        trial=bad_disk,
    ),
    11: Row(
        "the thread that writes raises",
        "said within one save interval; no commit",
        full=len(RAISES),
        quick=2,
        trial=writer_raises,
    ),
}
