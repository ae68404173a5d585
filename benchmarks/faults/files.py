"""The rows of the fault table that are about files: 3 to 11.

3 and 4 are here; 5 to 8 (damage) in damage.py, 9 to 11 (disks and writers that fail) in disks.py.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.faults import damage, disks, stock
from benchmarks.faults.file_systems import DyingFileSystem, Killed, PowerCutFileSystem
from benchmarks.faults.row import Outcome, Row
from benchmarks.faults.simulated import contents, fragment, holds, save, saved
from checkpoints import save as save_module
from checkpoints.background import BackgroundSaver, Status
from checkpoints.commit import CheckpointWarning, attempt_name
from checkpoints.retention import Retention, retain
from checkpoints.state import latest_verified, load_run_state
from trellis_dist.files import REAL

__all__ = ["ROWS", "Scenario"]

BACKGROUND_S = 60.0
# A re-save of the tensors of row 4 takes about as long; kills fall anywhere in the first few.
RESAVES_S = 0.25
LARGE = (256, 1024)  # 4 MiB in all, so that a write takes a while


@dataclass(frozen=True)
class Scenario:
    """One way to save step 2 beside step 1, which retention then removes; stopped at every boundary."""

    background: bool
    power_cut: bool
    world: int

    def __str__(self) -> str:
        kind = "power cut" if self.power_cut else "kill"
        saver = "background" if self.background else "foreground"
        files = ", several files each" if self.several_files else ""
        return f"{kind}, {saver}, {self.world} rank{'s' * (self.world > 1)}{files}"

    @property
    def several_files(self) -> bool:
        """Whether ranks cut what they own into files, which threads write side by side."""
        return self.world == 2

    def stopped(self, root: Path, stop_at: int | None) -> DyingFileSystem:
        """Save with all ranks stopped at operation `stop_at`; the file system, after a cut."""
        system = PowerCutFileSystem(stop_at) if self.power_cut else DyingFileSystem(stop_at)
        if self.background:
            self._in_background(root, system)
        else:
            save(root, 2, world=self.world, keep=1, file_systems=system)
        if isinstance(system, PowerCutFileSystem):
            system.cut()
        return system

    def _in_background(self, root: Path, system: DyingFileSystem) -> None:
        ranks = [
            BackgroundSaver(
                root,
                rank=rank,
                world_size=self.world,
                name=lambda step: attempt_name(step, number=7),
                afterwards=lambda _: _retain(root, system),
                file_system=system,
            )
            for rank in range(self.world)
        ]
        for rank, saver in enumerate(ranks):
            slices = [fragment(name, t, rank=rank, world=self.world) for name, t in contents(2).items()]
            saver.start(2, slices, {"step": 2})
        deadline = time.monotonic() + BACKGROUND_S
        while not system.died and any(saver.status == Status.WORKING for saver in ranks):
            assert time.monotonic() < deadline, f"{self}: the save does not end"
            ranks[0].wait(0.002)
        for saver in ranks:
            saver.close()


def _retain(root: Path, system: DyingFileSystem) -> None:
    retain(root, Retention(last=1), file_system=system)


SCENARIOS = [
    Scenario(background, power_cut, world)
    for background in (False, True)
    for power_cut in (False, True)
    for world in (1, 2, 4)
]


def every_boundary(folder: Path, index: int) -> Outcome:
    """One scenario, stopped before each operation of a save in turn; recovered means `_recovered`."""
    scenario, lost = SCENARIOS[index], []
    with _quiet_threads(), _files_of(64 if scenario.several_files else save_module.FILE_BYTES):
        count = len(_attempt(scenario, folder / "count", None)[1].log)
        for stop_at in range(count):
            root, system = _attempt(scenario, folder / str(stop_at), stop_at)
            if not system.died or not _recovered(root, scenario.world):
                lost.append(stop_at)
        root, _ = _attempt(scenario, folder / "whole", count)
        if not holds(root / "step-00000002", contents(2)):
            lost.append(count)  # a save that returned must survive
    note = f"{scenario}: {count} boundaries" + (f", not recovered: {lost}" if lost else "")
    return Outcome(not lost, note, of=count, passed=count - min(count, len(lost)))


def _attempt(scenario: Scenario, root: Path, stop_at: int | None) -> tuple[Path, DyingFileSystem]:
    saved(root, 1, world=scenario.world)
    return root, scenario.stopped(root, stop_at)


def _recovered(root: Path, world: int) -> bool:
    """Step 1 or 2 is there, whole, and is found; the next save goes through and clears away the rest."""
    found = latest_verified(root)
    if found is None:
        return False
    step = int(found.name.removeprefix("step-"))
    whole = load_run_state(found)["step"] == step and holds(found, contents(step))
    saved(root, 2, world=world, keep=1)
    left = [path.name for path in root.iterdir()]
    return whole and left == ["step-00000002"] and holds(root / left[0], contents(2))


@contextlib.contextmanager
def _files_of(size: int) -> Iterator[None]:
    before, save_module.FILE_BYTES = save_module.FILE_BYTES, size
    try:
        yield
    finally:
        save_module.FILE_BYTES = before


@contextlib.contextmanager
def _quiet_threads() -> Iterator[None]:
    """Threads that die as killed say nothing; neither do warnings about what they leave."""
    before = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if arguments.exc_type is not Killed:
            before(arguments)

    threading.excepthook = hook
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointWarning)
        yield
    threading.excepthook = before


def _killed_in_resaves(index: int, work: Callable[[], None]) -> None:
    chance = random.Random(index)
    assert stock.kill_while(work, chance.uniform(0.0, RESAVES_S)), "the process ended before it was killed"


def resave(folder: Path, index: int) -> Outcome:
    """Step 1 is there; a process that saves other values over it again and again is killed."""
    good, other = (stock.flat(stock.shards(seed, LARGE)) for seed in (index, 1000 + index))
    saved(folder, 1, tensors=good, file_systems=REAL)

    def work() -> None:
        warnings.simplefilter("ignore", CheckpointWarning)
        saved(folder, 1, tensors=other, file_systems=REAL)

    _killed_in_resaves(index, work)
    left = sum(path.name.startswith(".attempt") for path in folder.iterdir())
    found = latest_verified(folder)
    ok = found is not None and holds(found, good)
    note = f"{left} unfinished attempts left beside it" if ok else "the good copy is lost"
    return Outcome(ok, note)


def resave_stock(folder: Path, index: int, name: str) -> str:
    """The same with a stock format: a whole copy of either values is unharmed."""
    form = stock.FORMATS[name]
    good, other = stock.shards(index, LARGE), stock.shards(1000 + index, LARGE)
    form.write(folder, good)
    _killed_in_resaves(index, lambda: form.write(folder, other))
    outcome = stock.in_child(lambda: stock.load(form, folder, [good, other]))
    return "good copy lost" if outcome == "detected" else outcome


ROWS = {
    3: Row(
        "kill or power cut at every write, fsync and rename of a save, enumerated (1, 2, 4 ranks)",
        "every boundary recovers",
        full=len(SCENARIOS),
        quick=3,
        trial=every_boundary,
    ),
    4: Row(
        "SIGKILL while an existing step is saved again",
        "0 good copies lost",
        full=30,
        quick=3,
        trial=resave,
        stock={name: partial(resave_stock, name=name) for name in (stock.DCP, "safetensors")},
    ),
    **damage.ROWS,
    **disks.ROWS,
}
