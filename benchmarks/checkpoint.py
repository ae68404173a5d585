"""What saving and loading cost: 125M parameters with Adam's moments in fp32, one process on a CPU.

    python -m benchmarks.checkpoint --work DIR    writes benchmarks/results/checkpoint.json; DIR on the disk
    python -m benchmarks.checkpoint --show        its table, as docs/reliability.md has it

Saves are compared with plain fsynced writes of the same bytes in the same pieces to one file, in turns. Cases
are kept in DIR/checkpoint.json one by one; a run that was killed goes on after the last one.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import itertools
import math
import os
import shutil
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkpoint_ranks import OTHER_MESHES, load_on, make_engine, one_batch
from benchmarks.checkpoint_table import table
from benchmarks.kernels.record import Case, Deadline, Record, source_digest
from benchmarks.machine import machine, versions
from checkpoints import tensor_file
from checkpoints.background import BackgroundSaver
from checkpoints.logical import LogicalTensor
from checkpoints.reader import CheckpointReader
from checkpoints.state import save_checkpoint, verify_checkpoint
from launch.recipe import load_recipe
from trellis_dist.files import REAL, read_json, write_json
from trellis_dist.models.config import ModelConfig
from trellis_dist.training.engines.base import Engine

__all__ = ["RESULT", "Bench", "main", "measure", "table"]

RESULT = Path(__file__).parent / "results" / "checkpoint.json"
RECIPE, ROUNDS = "125m-c4", 5
LOOP_STEPS, LOOP_ROUNDS = 12, 3
SETTLE_S = 600.0


class Bench:
    """The engine, trained for a step so that it has moments, and where to save it."""

    def __init__(self, model: ModelConfig, work: Path) -> None:
        """Nothing is built before it is needed."""
        self.model, self.work = model, work
        self._steps = itertools.count(1)

    @functools.cached_property
    def engine(self) -> Engine:
        """One process."""
        engine = make_engine(self.model, {}, {"engine": "local"})
        self._train(engine)
        return engine

    def _train(self, engine: Engine) -> None:
        batch = one_batch(self.model.vocab_size)
        assert engine.train_step([batch], lr=1e-4, valid_tokens=batch.valid_tokens).applied

    def slices(self) -> list[LogicalTensor]:
        """What a checkpoint holds."""
        return list(self.engine.logical_tensors())

    @functools.cached_property
    def size(self) -> int:
        """Bytes of it."""
        return sum(item.local.nbytes for item in self.slices())

    def pieces(self) -> Iterator[memoryview]:
        """The same bytes as a save writes, in pieces of the same size, from where they are."""
        for item in self.slices():
            data = item.local.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
            yield from (data[at : at + tensor_file.PIECE] for at in range(0, len(data), tensor_file.PIECE))

    # Each returns seconds, and leaves nothing.
    def plain(self) -> float:
        """One file, written and fsynced."""
        return self._plain(REAL.write)

    def direct(self) -> float:
        """The same past the page cache, as a save writes."""
        return self._plain(REAL.write_large)

    def _plain(self, write: Callable[[Path, Iterator[memoryview]], None]) -> float:
        path = self.work / "plain"
        with _timed() as seconds:
            write(path, self.pieces())
            REAL.fsync_file(path)
        path.unlink()
        return seconds[0]

    def foreground(self) -> float:
        """A save that is waited for."""
        root = self.work / "foreground"
        with _timed() as seconds:
            save_checkpoint(root, step=next(self._steps), tensors=self.slices(), run_state={})
        shutil.rmtree(root)
        return seconds[0]

    def unhashed(self) -> float:
        """The same without SHA-256 of the tensors."""
        before = tensor_file.hashlib
        tensor_file.hashlib = types.SimpleNamespace(sha256=_NoHash)  # type: ignore[assignment]
        try:
            return self.foreground()
        finally:
            tensor_file.hashlib = before

    def hashed(self) -> float:
        """SHA-256 of all bytes in one thread."""
        state = hashlib.sha256()
        with _timed() as seconds:
            for piece in self.pieces():
                state.update(piece)
        return seconds[0]

    def kept(self) -> Path:
        """A checkpoint to load, saved once."""
        path = self.work / "kept" / "step-00000001"
        if not path.is_dir():
            save_checkpoint(path.parent, step=1, tensors=self.slices(), run_state={})
        return path


class _NoHash:
    def update(self, _: Any) -> None:
        pass

    def hexdigest(self) -> str:
        return "0" * 64


@contextlib.contextmanager
def _timed() -> Iterator[list[float]]:
    os.sync()  # what came before is no part of it
    found, begin = [math.nan], time.perf_counter()
    yield found
    found[0] = time.perf_counter() - begin


def _in_turns(rounds: int, **measures: Callable[[], float]) -> dict[str, list[float]]:
    """Name -> seconds of each round; one round before them is not counted."""
    found = [{name: measure() for name, measure in measures.items()} for _ in range(rounds + 1)][1:]
    return {name: [round(row[name], 4) for row in found] for name in measures}


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 4), "min": min(values), "max": max(values)}


def save_case(bench: Bench) -> dict[str, Any]:
    """Plain writes, plain direct writes, saves, saves without hashes."""
    kinds = {"plain": bench.plain, "direct": bench.direct}
    times = _in_turns(ROUNDS, **kinds, save=bench.foreground, unhashed=bench.unhashed)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "bytes": bench.size,
        "rounds": times,
        **{name: _spread(values) for name, values in times.items()},
        "bandwidth_of_plain": round(medians["plain"] / medians["save"], 3),
        "bandwidth_of_direct": round(medians["direct"] / medians["save"], 3),
        "unhashed_of_plain": round(medians["plain"] / medians["unhashed"], 3),
    }


def hash_case(bench: Bench) -> dict[str, Any]:
    """One thread over all bytes."""
    times = _in_turns(3, hashed=bench.hashed)["hashed"]
    return {**_spread(times), "bytes_per_second": round(bench.size / statistics.median(times))}


def background_case(bench: Bench) -> dict[str, Any]:
    """How long a loop that does nothing else is blocked, beside saves in the foreground."""
    root, durations = bench.work / "background", []
    saver, steps = BackgroundSaver(root, rank=0, world_size=1), itertools.count(1)

    def blocked() -> float:
        with _timed() as seconds:
            saver.start(next(steps), bench.slices(), {})
            saver.wait_copied()
        durations.append(_settled(saver))
        shutil.rmtree(root)
        return seconds[0]

    first = blocked()  # gets the memory
    times = _in_turns(ROUNDS, foreground=bench.foreground, blocked=blocked)
    held = saver.buffer_bytes
    saver.close()
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "rounds": times,
        **{name: _spread(values) for name, values in times.items()},
        "first_blocked": round(first, 4),
        "whole_save": _spread([round(value, 4) for value in durations[2:]]),
        "blocked_of_foreground": round(medians["blocked"] / medians["foreground"], 4),
        "snapshot_bytes": held,
    }


def _settled(saver: BackgroundSaver) -> float:
    """Seconds of a save that must succeed."""
    saver.wait(SETTLE_S)
    result = saver.settle([int(saver.status)])
    assert result is not None, "the save does not end"
    assert not result.failed, str(result.error)
    return result.seconds


def loop_case(bench: Bench) -> dict[str, Any]:
    """Steps with one save in the background and without, in turns; the save ends within them.

    Blocked is what the loop itself waits for: the beginning of the save, and the copies before an update.
    """
    root = bench.work / "loop"
    engine, saver, steps = bench.engine, BackgroundSaver(root, rank=0, world_size=1), itertools.count(1)
    before = engine.before_update
    waited: list[float] = []
    blocked: list[float] = []

    def hold() -> None:
        begin = time.perf_counter()
        saver.wait_copied()
        if blocked:
            blocked[-1] += time.perf_counter() - begin

    engine.before_update = hold

    def train(*, saves: bool) -> float:
        with _timed() as seconds:
            if saves:
                begin = time.perf_counter()
                saver.start(next(steps), bench.slices(), {})
                blocked.append(time.perf_counter() - begin)
            for _ in range(LOOP_STEPS):
                bench._train(engine)
            left = time.perf_counter()
            if saves:
                _settled(saver)
                waited.append(round(time.perf_counter() - left, 4))
        shutil.rmtree(root, ignore_errors=True)
        return seconds[0]

    try:
        times = _in_turns(
            LOOP_ROUNDS,
            without=functools.partial(train, saves=False),
            with_save=functools.partial(train, saves=True),
        )
    finally:
        engine.before_update = before
        saver.close()
    lost = [round(b - a, 4) for a, b in zip(times["without"], times["with_save"], strict=True)]
    found = {
        "steps": LOOP_STEPS,
        "rounds": times,
        "lost": _spread(lost),
        "blocked": _spread(blocked[1:]),  # the first round warms up
        "waited_at_the_end": waited[1:],
    }
    return {**found, "step_seconds": round(statistics.median(times["without"]) / LOOP_STEPS, 4)}


def load_case(bench: Bench, *, cold: bool) -> dict[str, Any]:
    """Into the engine that saved it, every file verified; from the disk or from the page cache."""
    path = bench.kept()

    def load() -> float:
        if cold:
            _forget(path)
        with _timed() as seconds:
            bench.engine.load(CheckpointReader(path), optimizer_steps=1)
        return seconds[0]

    times = _in_turns(3, load=load)["load"]
    return {
        **_spread(times),
        "bytes": bench.size,
        "bytes_per_second": round(bench.size / statistics.median(times)),
    }


def _forget(path: Path) -> None:
    """Ask the kernel to drop the files' pages."""
    os.sync()
    for file in path.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def verify_case(bench: Bench) -> dict[str, Any]:
    """`trellis doctor` of one checkpoint, from the page cache."""
    path = bench.kept()

    def verify() -> float:
        with _timed() as seconds:
            assert verify_checkpoint(path) == []
        return seconds[0]

    return _spread(_in_turns(3, verify=verify)["verify"])


def other_mesh_case(bench: Bench, name: str) -> dict[str, Any]:
    """Two ranks load the checkpoint of one process; the slower rank counts."""
    rows = load_on(name, bench.model, bench.kept())
    slowest = [round(max(pair), 4) for pair in zip(*rows, strict=True)]
    return {**_spread(slowest), "ranks": len(rows), "bytes": bench.size}


def all_cases(bench: Bench) -> list[Case]:
    """Every measurement, by name."""
    return [
        Case("save", lambda: save_case(bench)),
        Case("hash", lambda: hash_case(bench)),
        Case("background", lambda: background_case(bench)),
        Case("loop", lambda: loop_case(bench)),
        Case("load, from the disk", lambda: load_case(bench, cold=True)),
        Case("load, from memory", lambda: load_case(bench, cold=False)),
        Case("verify", lambda: verify_case(bench)),
        *(Case(f"load on {name}", functools.partial(other_mesh_case, bench, name)) for name in OTHER_MESHES),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is left and write the result; 1 where a case failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checkpoint", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--work", type=Path, help="folder on the disk to be measured; 5 GB")
    parser.add_argument("--only", default="", help="cases that begin with this")
    parser.add_argument("--again", action="store_true", help="measure these cases anew")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--show", action="store_true", help="print the table of the result there is")
    given = parser.parse_args(arguments)
    if given.show:
        print(table(read_json(given.output)))
        return 0
    if given.work is None:
        parser.error("give --work DIR")
    given.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(load_recipe(RECIPE).model, given.work)
    return measure(bench, given.output, only=given.only, again=given.again)


def measure(bench: Bench, output: Path, *, only: str = "", again: bool = False) -> int:
    """Run what is left of the cases, each kept in the work folder; write ``output`` when all are there."""
    sources = source_digest("checkpoints", "trellis_dist")
    identity = {"machine": machine(), "versions": versions(), "source": sources}
    record = Record(bench.work / RESULT.name, identity)
    cases = all_cases(bench)
    for name, case in list(record.cases.items()):
        if "error" in case or (again and name.startswith(only)):
            del record.cases[name]
    record.run([case for case in cases if case.name.startswith(only)], Deadline())
    failed = [name for name, case in record.cases.items() if "error" in case]
    left = record.left(cases)
    if failed or left:
        print(f"failed: {failed}; left: {[case.name for case in left]}")
        return 1
    write_json(output, {key: value for key, value in record.data.items() if key != "complete"})
    print(table(record.data))
    return 0


if __name__ == "__main__":
    sys.exit(main())
