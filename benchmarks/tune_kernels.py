"""Time launch parameters on this GPU and rewrite their table: ``python -m benchmarks.tune_kernels``.

For every shape B,T,H,D,M,C,UPDATE (bf16, V = D): starting from the rule of ``kernels.triton.launch``, each
kernel in turn gets the candidate with which forward + backward (decode: a few steps) is fastest. The whole
call is timed and not the kernel alone, because one kernel's tile decides what another has to store. A
candidate has to reproduce the outputs and gradients of the rule's parameters, and to be faster by more than
MARGIN. Times are the device's, behind a fill that empties the L2 cache, on several sets of operands in turn;
the median counts.

Triton compiles on one core, so all candidates are compiled in advance in processes of their own, side by
side. The table is written after every shape, with device, versions, a digest of the kernels' sources and the
times: a run that was stopped goes on where it was, and shapes that are measured already are left alone.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import hashlib
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.record import Deadline, one_line
from benchmarks.kernels.sizes import Shape, make_operands
from benchmarks.kernels.timing import Clock, CudaClock, summary
from benchmarks.machine import versions
from kernels.layout import PackedLayout
from kernels.triton import launch
from kernels.triton.launch import INVERSE, KERNELS, Launch, Row, Size, padded
from kernels.types import Memories, Operands, Rule
from trellis_dist.files import write_json

__all__ = ["SHAPES", "Tuner", "candidates", "main", "parse_shape"]

SHAPES = tuple(
    f"{shape},64,{chunk},{update}"
    for shape in ("8,2048,12,64", "1,32768,16,96")
    for chunk in (64, 16)
    for update in ("stale", "corrected")
)
MARGIN = 0.01  # share of the whole call; less is noise
TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-5}  # RMS ratio to the rule's results
STEPS = 16  # tokens of one timed decoding

Choice = dict[str, Launch]
Timer = Callable[[Callable[[int], object], int], list[float]]


@dataclass(frozen=True)
class Tuner:
    """What a search needs of a machine; tests make one without a GPU.

    Attributes:
        device, dtype: of the operands.
        timer: milliseconds of a piece of work on operand set 0, 1, ... in turn, so many times.
        candidates: parameters to try for a kernel at a size.
        source: what a row says about where it was measured.
        warm: compiles, given (shape, kernel) pairs and seconds; None leaves it to the search.
        sets, repetitions: sets of operands, timings of a candidate.
    """

    device: torch.device
    dtype: torch.dtype
    timer: Timer
    candidates: Callable[[str, Size], list[Launch]]
    source: Mapping[str, Any]
    warm: Callable[[Sequence[tuple[str, str]], float], object] | None = None
    sets: int = 3
    repetitions: int = 20


def parse_shape(text: str) -> Shape:
    """ "B,T,H,D,M,C,UPDATE". Raises ValueError where it is not that."""
    *sizes, update = text.split(",")
    if len(sizes) != 6 or update not in ("stale", "corrected") or not all(s.isdigit() for s in sizes):
        raise ValueError(f"shape {text!r}: give B,T,H,D,M,C,UPDATE such as {SHAPES[0]}")
    return Shape(*map(int, sizes), update=update)


def size_of(shape: Shape, tuner: Tuner) -> Size:
    """The table's key."""
    arch, itemsize = launch.architecture(tuner.device), tuner.dtype.itemsize
    return Size(
        arch, shape.width, shape.width, shape.slots, shape.chunk, shape.update == "corrected", itemsize
    )


def candidates(kernel: str, size: Size) -> list[Launch]:
    """What is tried beside the rule's parameters; those that do not fit shared memory are left out."""
    base, slots = launch.rule(kernel, size), padded(size.m)
    if kernel == "decode":
        return [replace(base, warps=warps) for warps in (2, 4, 8, 16)]
    tokens = [t for t in (64, 32, 16) if base.tokens // 2 <= t <= min(64, padded(size.c))]
    if kernel not in INVERSE:
        return [Launch(t, slots, warps, stages) for t in tokens for warps in (4, 8) for stages in (1, 2)]
    blocks = [
        (s, warps) for s in (16, 32, 64) if s <= slots for warps in (2, 4, 8) if 8 <= s // warps * 2 <= 32
    ]
    tried = [Launch(base.tokens, s, warps, stages) for s, warps in blocks for stages in (1, 2)]
    return tried + [replace(base, tokens=t) for t in tokens if t != base.tokens]


def changed(choice: Choice, kernel: str, given: Launch, *, size: Size) -> Choice:
    """The choice with one kernel's parameters replaced; kernels that read the same inverses move together."""
    result = {**choice, kernel: given}
    if size.corrected and kernel in INVERSE:
        result |= {name: replace(result[name], tokens=given.tokens) for name in INVERSE}
    return result


@contextlib.contextmanager
def chosen(choice: Choice) -> Iterator[None]:
    """Run kernels with these parameters."""
    with contextlib.ExitStack() as stack:
        for kernel, given in choice.items():
            stack.enter_context(launch.override(kernel, given))
        yield


class Workload:
    """The calls that are timed for one shape, on several sets of operands."""

    def __init__(self, shape: Shape, tuner: Tuner) -> None:
        how = {"dtype": tuner.dtype, "device": tuner.device}
        drawn = [make_operands(shape, seed=seed, **how) for seed in range(tuner.sets)]
        self.operands = [Operands(**{n: x.detach() for n, x in one.items()}) for one in drawn]
        self.rule = Rule(update=shape.update)
        self.layout = PackedLayout.uniform(shape.batch, shape.length, shape.chunk).to(tuner.device)
        self.initial = self._memories(shape.batch, shape, tuner.device)
        self.token = [Operands(*(None if x is None else x[:1, 0] for x in one)) for one in self.operands]
        self.state = self._memories(1, shape, tuner.device)

    @staticmethod
    def _memories(batch: int, shape: Shape, device: torch.device) -> Memories:
        zeros = torch.zeros(batch, shape.heads, shape.slots, shape.width, device=device)
        return Memories(zeros, zeros.clone())

    def call(self, i: int) -> list[Tensor]:
        """Forward and backward on set i: outputs, final memories and every gradient."""
        from kernels.triton import compress

        operands, how = self.operands[i % len(self.operands)], {"layout": self.layout, "rule": self.rule}
        y, final, _, saved = compress.forward(operands, self.initial, None, **how)
        grads, dinitial, _ = compress.backward(
            operands, saved, None, operands.v, (final.key, final.value), (None, None), **how
        )
        found = (y, final.key, final.value, *grads, dinitial.key, dinitial.value)
        return [x for x in found if x is not None]

    def decode(self, i: int) -> list[Tensor]:
        """STEPS tokens of one sequence, each from the state before it."""
        from kernels.triton.decode import triton_decode

        token, chunk_size = self.token[i % len(self.token)], self.layout.chunk_size
        state = (self.state.key, self.state.value, self.state.key, self.state.value)
        for step in range(STEPS):
            offset = step % chunk_size
            y, state = triton_decode(token, state, offset, chunk_size=chunk_size, rule=self.rule)
        return [y, *state]


def search(shape: Shape, tuner: Tuner, *, say: Callable[[str], None] = print) -> Row:
    """The fastest parameters of every kernel at a shape."""
    size, work = size_of(shape, tuner), Workload(shape, tuner)
    calls = {"both": work.call, "decode": work.decode}
    choice = {kernel: launch.rule(kernel, size) for kernel in KERNELS}
    with chosen(choice):
        expected = {name: call(0) for name, call in calls.items()}
        before = {name: tuner.timer(call, tuner.repetitions) for name, call in calls.items()}
    best = dict(before)
    for kernel in KERNELS:
        name = _call_of(kernel)
        with chosen(choice):  # again: a machine drifts
            best[name] = tuner.timer(calls[name], tuner.repetitions)
        for given in _launched(kernel, choice, size, tuner):
            trial = changed(choice, kernel, given, size=size)
            times, why = _tried(trial, calls[name], expected[name], tuner)
            say(f"  {kernel:16} {_short(given)}: {why or f'{statistics.median(times):.4f} ms'}")
            if times and statistics.median(times) < (1 - MARGIN) * statistics.median(best[name]):
                choice, best[name] = trial, times
    times = {name: {"rule": summary(before[name]), "chosen": summary(best[name])} for name in calls}
    where = {"shape": [shape.batch, shape.length, shape.heads], "milliseconds": times}
    return Row(size, choice, {**tuner.source, **where, "kind": "measured"})


def _call_of(kernel: str) -> str:
    return "decode" if kernel == "decode" else "both"


def _launched(kernel: str, choice: Choice, size: Size, tuner: Tuner) -> list[Launch]:
    """Candidates that differ from the choice; none for a kernel that is not launched with it."""
    if kernel == "key_backward" and choice["query_backward"].tokens >= size.c:
        return []  # the query kernel holds the whole chunk
    return [given for given in tuner.candidates(kernel, size) if given != choice[kernel]]


def _tried(
    choice: Choice, call: Callable[[int], list[Tensor]], expected: list[Tensor], tuner: Tuner
) -> tuple[list[float], str]:
    """Times of a candidate; none, and why, where it does not run or computes something else."""
    with chosen(choice):
        try:
            found = call(0)
        except Exception as error:  # out of shared memory or registers, or more than the compiler takes
            return [], one_line(error)
        differences = [_difference(a, b) for a, b in zip(found, expected, strict=True)]
        if not all(d <= TOLERANCE[tuner.dtype] for d in differences):
            return [], f"differs from the rule's results by {max(differences):.1e}"
        return tuner.timer(call, tuner.repetitions), ""


def _difference(actual: Tensor, expected: Tensor) -> float:
    scale = expected.double().square().mean().sqrt().clamp_min(1e-20)
    return ((actual.double() - expected.double()).square().mean().sqrt() / scale).item()


def tune(
    texts: Sequence[str],
    path: Path,
    tuner: Tuner,
    *,
    deadline: Deadline,
    again: bool = False,
    say: Callable[[str], None] = print,
) -> list[str]:
    """Measure the shapes that the table lacks and write it after each; the shapes that were not reached."""
    table = launch.load_table(path) if path.is_file() else {}
    left = [t for t in texts if again or not _measured(table.get(size_of(parse_shape(t), tuner)), tuner)]
    if len(left) < len(texts):
        say(f"{path.name}: {len(texts) - len(left)} of {len(texts)} shapes are measured already")
    if left and tuner.warm is not None:
        tuner.warm([(text, "rule") for text in left], deadline.left / 3)
        tuner.warm([(text, kernel) for text in left for kernel in KERNELS], deadline.left / 2)
    rows = []
    while left and not deadline.passed:
        say(left[0])
        rows.append(search(parse_shape(left.pop(0)), tuner, say=say))
        table[rows[-1].size] = rows[-1]
        write_json(path, {"rows": [table[size].as_json() for size in sorted(table)]})
    say(report(rows))
    return left


def _measured(row: Row | None, tuner: Tuner) -> bool:
    """Whether a row is of this device, these versions and these kernels."""
    same = ("device", "versions", "kernels")
    return row is not None and all(row.source.get(name) == tuner.source.get(name) for name in same)


def report(rows: Sequence[Row]) -> str:
    """The rows as a table: parameters that left the rule, and times by the rule and as chosen."""
    lines = ["", f"{'D':>4}{'M':>4}{'C':>5}  update     kernel            rule          chosen"]
    for row in rows:
        size = row.size
        head = f"{size.d:4}{size.m:4}{size.c:5}  {'corrected' if size.corrected else 'stale':9}"
        for kernel in KERNELS:
            rule = launch.rule(kernel, size)
            if row.launches[kernel] != rule:
                lines.append(f"{head}  {kernel:16}  {_short(rule):12}  {_short(row.launches[kernel])}")
        for name, times in row.source["milliseconds"].items():
            rule, chosen_ = times["rule"]["median"], times["chosen"]["median"]
            lines.append(f"{head}  {name:16}  {rule:.4f} ms -> {chosen_:.4f} ms")
    return "\n".join(lines)


def _short(given: Launch) -> str:
    return f"{given.tokens}/{given.slots}/{given.warps}/{given.stages}"


def cuda_tuner() -> Tuner:
    """This machine's GPU. Raises ValueError where there is none."""
    if not torch.cuda.is_available():
        raise ValueError("no CUDA device here: tune on the machine whose table you want to rewrite")
    clock = functools.cache(CudaClock)  # it fills memory, which processes that only compile do not need
    source = {
        "device": torch.cuda.get_device_name(),
        "versions": {name: version for name, version in versions().items() if name in ("torch", "triton")},
        "kernels": source_digest(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    return Tuner(
        device=torch.device("cuda"),
        dtype=torch.bfloat16,
        timer=lambda work, repetitions: device_times(clock(), work, repetitions),
        candidates=candidates,
        source=source,
        warm=_warm_side_by_side,
    )


def device_times(
    clock: Clock, work: Callable[[int], object], repetitions: int, warmup: int = 3
) -> list[float]:
    """Milliseconds of the work on one set of operands after another, behind the clock's preparation."""
    times = []
    for i in range(warmup + repetitions):
        clock.prepare()
        begin = clock.stamp()
        work(i)
        times.append(clock.milliseconds(begin, clock.stamp()))
    return times[warmup:]


def source_digest() -> str:
    """SHA-256, shortened, over the kernels' sources: a row of other kernels is measured again."""
    digest = hashlib.sha256()
    for path in sorted(launch.TABLE.parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class _Warm:
    arguments: list[str]


def _warm_side_by_side(jobs: Sequence[tuple[str, str]], seconds: float) -> None:
    from benchmarks.kernels.device import warm_in_processes

    warm_in_processes(
        [_Warm(["--warm", *job]) for job in jobs],
        seconds,
        module="benchmarks.tune_kernels",
    )


def warm(text: str, kernel: str, tuner: Tuner) -> None:
    """Run a kernel's candidates once, which leaves them compiled on disk; "rule": all by the rule."""
    shape = parse_shape(text)
    size, work = size_of(shape, tuner), Workload(shape, replace(tuner, sets=1))
    rule = {name: launch.rule(name, size) for name in KERNELS}
    trials = [rule]
    if kernel != "rule":
        trials = [changed(rule, kernel, g, size=size) for g in _launched(kernel, rule, size, tuner)]
    for trial in trials:
        with chosen(trial), contextlib.suppress(Exception):  # the search will meet it and say why
            if _call_of(kernel) == "both":
                work.call(0)
            if kernel in ("rule", "decode"):
                work.decode(0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry; the exit status is 0 where every shape was measured, 1 where time ran out, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="benchmarks.tune_kernels", description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="B,T,H,D,M,C,UPDATE")
    parser.add_argument("--out", type=Path, default=launch.TABLE)
    parser.add_argument("--seconds", type=float, default=450, help="stop after the shape that passes this")
    parser.add_argument("--again", action="store_true", help="measure shapes again that have a row")
    parser.add_argument("--warm", nargs=2, metavar=("SHAPE", "KERNEL"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    try:
        for text in given.shapes:
            parse_shape(text)
        tuner = cuda_tuner()
    except ValueError as error:
        print(f"tune_kernels: {error}", file=sys.stderr)
        return 2
    if given.warm:
        warm(*given.warm, tuner)
        return 0
    left = tune(given.shapes, given.out, tuner, deadline=Deadline(given.seconds), again=given.again)
    if left:
        print(f"tune_kernels: time ran out before {' '.join(left)}; run it again", file=sys.stderr)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
