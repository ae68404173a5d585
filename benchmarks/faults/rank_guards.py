"""Rows 14, 15 and 16, in runs on real ranks: a slow rank, a gradient that is not finite, a flipped bit."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.faults.rank_job import ENGINES, job
from benchmarks.faults.rank_pool import pool, said, to_log
from benchmarks.faults.row import Outcome
from benchmarks.step_times import RESULT
from trellis_dist.files import read_json
from trellis_dist.training.config import TrainingConfig
from trellis_dist.training.job import Job
from trellis_dist.training.watch.stragglers import StragglerDetector

__all__ = ["flip_bit", "poison_gradient", "slow_rank"]

WITHIN = 20  # steps
QUIET: dict[str, Any] = {"training.validation_interval": 0, "checkpoint.interval": 1000}
# Ranks of one tensor or sequence group, and all ranks of an engine that gathers weights, wait for each other
# inside what is timed, and show alike.
SLOWED = ("local", "ZeRO 1", "ZeRO 0", "ZeRO 2")
POISONED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("local", {"mesh.dp": 2}),
    ("ZeRO 1", {"mesh.dp": 2}),
    ("FSDP2", {"mesh.dp": 2}),
    ("local", {"mesh.dp": 1, "mesh.tp": 2}),
    ("ZeRO 2", {"mesh.dp": 2}),
    ("ZeRO 3", {"mesh.dp": 2}),
    ("ZeRO 0", {"mesh.dp": 2}),
    ("ZeRO 1", {"mesh.dp": 1, "mesh.sp": 2}),
)
CHECK_INTERVAL = 5
# Engine, mesh, ranks; what is expected of a flip on rank 1: "rank", "both", "rewritten" (the next update
# writes all copies anew) or "no copies".
FLIPPED: tuple[tuple[str, dict[str, Any], int, str], ...] = (
    ("local", {"mesh.dp": 4}, 4, "rank"),
    ("ZeRO 1", {"mesh.dp": 4}, 4, "rank"),
    ("local", {"mesh.dp": 2, "mesh.tp": 2}, 4, "both"),
    ("ZeRO 3", {"mesh.dp": 2}, 2, "no copies"),
    ("FSDP2", {"mesh.dp": 2, "mesh.sp": 2}, 4, "both"),
    ("ZeRO 0", {"mesh.dp": 2}, 2, "both"),
    ("FSDP2", {"mesh.dp": 2}, 2, "no copies"),
    ("ZeRO 1", {"mesh.dp": 4}, 4, "rewritten"),
)


def slow_rank(folder: Path, index: int) -> Outcome:
    """One rank of two to four takes twice as long; and clean step times, recorded, raise no alarm."""
    draw, name = random.Random(f"slow {index}"), SLOWED[index % len(SLOWED)]
    ranks = (2, 4)[index % 2]
    victim, start = draw.randrange(ranks), draw.randint(17, 40)
    values = {**ENGINES[name], **QUIET, "mesh.dp": ranks, "training.steps": 200}
    answers = pool(ranks).run(_run_slowed, job(folder.parent, values), folder, victim, start)
    alarms, false = answers[0], _false_alarms()
    wrong = "" if all(answer == alarms for answer in answers) else "ranks saw different alarms"
    named = [rank for _, rank, _ in alarms]
    if named != [victim]:
        wrong = wrong or f"alarms {alarms}, rank {victim} was slowed from step {start} on"
    elif alarms[0][0] - start >= WITHIN:
        wrong = wrong or f"rank {victim} was named {alarms[0][0] - start + 1} steps after it was slowed"
    elif f"alert: rank {victim} (" not in said(folder, 0):
        wrong = wrong or "the run did not say so"
    if false:
        wrong = wrong or f"{false} false alarms in the recorded steps"
    numbers: dict[str, Any] = {"false alarms in recorded steps": false}
    if alarms:
        numbers |= {"steps until named": alarms[0][0] - start + 1, "ratio": round(alarms[0][2], 2)}
    return Outcome(not wrong, f"{name} on {ranks} ranks{wrong and ': ' + wrong}", numbers)


@functools.cache
def _false_alarms() -> int:
    """Alarms of the detector, as a run sets it up, on clean step times."""
    alarms = 0
    for ranks in read_json(RESULT)["runs"].values():
        detector = StragglerDetector(len(ranks), ratio=TrainingConfig.straggler_ratio)
        for step, busy in enumerate(zip(*ranks, strict=True), start=1):
            alarms += len(detector.note(step, [us / 1e6 for us in busy]))
    return alarms


def _run_slowed(job: Job, folder: Path, victim: int, start: int) -> list[tuple[int, int, float]]:
    """On every rank: (step, rank, ratio) of all alarms."""
    from trellis_dist.parallel import env
    from trellis_dist.training.loop import run

    alarms: list[tuple[int, int, float]] = []
    note = StragglerDetector.note

    def noted(self: StragglerDetector, step: int, busy: Any) -> Any:
        found = note(self, step, busy)
        alarms.extend((step, one.rank, one.ratio) for one in found)
        return found

    to_log(folder)
    slow = _slowed(start) if env.rank() == victim else contextlib.nullcontext()
    with slow, patch.object(StragglerDetector, "note", noted):
        run(job, folder / "run", stop_at_step=start + WITHIN + 3)
    return alarms


@contextlib.contextmanager
def _slowed(start: int) -> Iterator[None]:
    """From step ``start`` on this rank sleeps as long as it has computed, where its time is taken."""
    import torch

    from trellis_dist.training.engines.base import LossModule
    from trellis_dist.training.watch.busy import BusyTimer, own_seconds

    begin, forward, step, mark = BusyTimer.begin, LossModule.forward, 0, 0.0

    def begun(self: Any) -> None:
        nonlocal step, mark
        begin(self)
        step, mark = step + 1, own_seconds()

    def slower(self: Any, *arguments: Any) -> Any:
        nonlocal mark
        loss = forward(self, *arguments)
        if step >= start and torch.is_grad_enabled():
            time.sleep(own_seconds() - mark)
            mark = own_seconds()
        return loss

    with patch.object(BusyTimer, "begin", begun), patch.object(LossModule, "forward", slower):
        yield


def poison_gradient(folder: Path, index: int) -> Outcome:
    """A NaN or Inf in one rank's gradient: all skip that step, or stop with it, and keep their weights."""
    draw, (name, axes) = random.Random(f"poison {index}"), POISONED[index % len(POISONED)]
    bad = ("nan", "inf")[index // len(POISONED) % 2]
    stop, victim, step = index % 3 == 2, draw.randrange(2), draw.randint(2, 8)
    values = {**ENGINES[name], **QUIET, **axes, "training.max_skipped_steps": 0 if stop else 10}
    values["training.steps"] = 10
    # A tensor rank uses its own part of the vocabulary alone: one bad element of the embedding's output would
    # often be dropped, rightly.
    single = "mesh.tp" not in axes and draw.random() < 0.5
    answers = pool(2).run(_run_poisoned, job(folder.parent, values), folder, victim, step, bad, single)
    wrong = _judge_poisoned(answers, step, stop=stop)
    where = "x".join(f"{key.removeprefix('mesh.')}{value}" for key, value in axes.items() if value > 1)
    return Outcome(not wrong, f"{name} {where}, {'stop' if stop else 'skip'}{wrong and ': ' + wrong}")


def _judge_poisoned(answers: list[dict[str, Any]], step: int, *, stop: bool) -> str:
    first = answers[0]
    if any(answer["applied"] != first["applied"] or answer["error"] != first["error"] for answer in answers):
        return f"the ranks did not agree: {answers}"
    expected = [number != step for number in range(1, (step if stop else 10) + 1)]
    if first["applied"] != expected:
        return f"updates were applied {first['applied']}, the gradient of step {step} was bad"
    if not all(answer["kept"] for answer in answers):
        return "the weights or the optimizer state changed in the skipped step"
    if not any(answer["went on"] for answer in answers) and not stop:
        return "the step after the skipped one changed nothing"
    if stop != ("updates in a row" in first["error"]):
        return f"error {first['error']!r}"
    return ""


def _run_poisoned(
    job: Job, folder: Path, victim: int, bad_step: int, bad: str, single: bool
) -> dict[str, Any]:
    """On every rank: which updates were applied, whether the bad one changed anything here, the error."""
    from trellis_dist.parallel import env
    from trellis_dist.training.engines.common import CommonEngine
    from trellis_dist.training.guards import DivergedError
    from trellis_dist.training.loop import run

    train_step = CommonEngine.train_step
    found: dict[str, Any] = {"applied": [], "kept": False, "went on": False, "error": ""}

    def watched(self: Any, *arguments: Any, **options: Any) -> Any:
        step = len(found["applied"]) + 1
        before = _digests(self)
        poison = step == bad_step and env.rank() == victim
        with _poisoned(float(bad), single=single) if poison else contextlib.nullcontext():
            result = train_step(self, *arguments, **options)
        found["applied"].append(result.applied)
        if step == bad_step:
            found["kept"] = _digests(self) == before
        elif step == bad_step + 1:
            found["went on"] = _digests(self) != before
        return result

    to_log(folder)
    with patch.object(CommonEngine, "train_step", watched):
        try:
            run(job, folder / "run", stop_at_step=10)
        except DivergedError as error:
            found["error"] = str(error)
    return found


def _digests(engine: Any) -> dict[str, str]:
    """Of everything this rank would write to a checkpoint."""
    import torch

    parts: dict[str, str] = {}
    for part in engine.logical_tensors():
        data = part.local.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        parts[f"{part.name} {len(parts)}"] = hashlib.sha256(data).hexdigest()
    return parts


@contextlib.contextmanager
def _poisoned(bad: float, *, single: bool) -> Iterator[None]:
    """The first backward pass has a gradient that is ``bad``: of the loss, or of one element of an input."""
    from trellis_dist.training.engines.base import LossModule

    forward, left = LossModule.forward, [1]

    def spoil(gradient: Any) -> Any:
        spoilt = gradient.clone()
        spoilt.view(-1)[0] = bad
        return spoilt

    def spoilt(self: Any, *arguments: Any) -> Any:
        if not left:
            return forward(self, *arguments)
        left.pop()
        block = self.model.blocks[0]
        if not single:
            loss = forward(self, *arguments)
            loss.register_hook(spoil)
            return loss

        def hook(_: Any, inputs: Any) -> None:
            inputs[0].register_hook(spoil)

        handle = block.register_forward_pre_hook(hook)
        try:
            return forward(self, *arguments)
        finally:
            handle.remove()

    with patch.object(LossModule, "forward", spoilt):
        yield


def flip_bit(folder: Path, index: int) -> Outcome:
    """A bit of a weight on rank 1 is flipped after a step: the checksums are to find it and name the rank."""
    draw, (name, axes, ranks, expected) = random.Random(f"flip {index}"), FLIPPED[index % len(FLIPPED)]
    # An update of ZeRO 1 or 2 writes every copy anew from its masters: a flip is there until then.
    step = 2 * CHECK_INTERVAL if (name, expected) == ("ZeRO 1", "rank") else draw.randint(6, 9)
    values = {**ENGINES[name], **QUIET, "mesh.dp": 1, **axes, "training.steps": 16}
    values["training.replica_check_interval"] = CHECK_INTERVAL
    where = (draw.random(), draw.random(), draw.randrange(31))
    answers = pool(ranks).run(_run_flipped, job(folder.parent, values), folder, step, where)
    errors, log = {error for error, _ in answers}, said(folder, 0)
    parameter = answers[1][1]
    wrong = _judge_flipped(errors, expected, step, parameter, log)
    mesh = "x".join(f"{key.removeprefix('mesh.')}{value}" for key, value in axes.items())
    note = {
        "rank": "rank named",
        "both": "one of two copies, both named",
        "rewritten": "flipped between two checks: the next update wrote all copies anew from the masters",
        "no copies": "no copies, said in the log",
    }[expected]
    numbers = {"steps until found": _found_at(errors) - step} if expected in ("rank", "both") else {}
    return Outcome(not wrong, f"{name} {mesh}: {wrong or note}", {} if wrong else numbers)


def _found_at(errors: set[str]) -> int:
    words = next(iter(errors)).partition("differ after step ")[2]
    return int(words.partition(":")[0]) if words else -1


def _judge_flipped(errors: set[str], expected: str, step: int, parameter: str, log: str) -> str:
    if len(errors) > 1:
        return f"the ranks did not agree: {errors}"
    error = errors.pop() if errors else ""
    errors.add(error)
    if expected in ("no copies", "rewritten"):
        why = "replica checksums: weights are divided over every rank" in log
        return (
            f"found: {error}" if error else "" if why == (expected == "no copies") else "no reason in the log"
        )
    if not 0 <= _found_at(errors) - step < CHECK_INTERVAL:
        return f"flipped after step {step} in {parameter}, not found in time: {error!r}"
    suspects = error.partition("device of rank ")[2].partition(" and start")[0].split(", ")
    exact = expected == "rank" or "cannot be told" not in error
    return "" if "1" in suspects and len(suspects) == (1 if exact else 2) else f"not named: {error}"


def _run_flipped(job: Job, folder: Path, step: int, where: tuple[float, float, int]) -> tuple[str, str]:
    """On every rank: what the check said, and on rank 1 which parameter was flipped."""
    from trellis_dist.parallel import env
    from trellis_dist.training.engines.common import CommonEngine
    from trellis_dist.training.loop import run
    from trellis_dist.training.watch.replicas import ReplicaError

    train_step: Callable[..., Any] = CommonEngine.train_step
    calls, flipped = 0, ""

    def wrapped(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal calls, flipped
        result = train_step(self, *arguments, **options)
        calls += 1
        if calls == step and env.rank() == 1:
            flipped = _flip(self.model, *where)
        return result

    to_log(folder)
    with patch.object(CommonEngine, "train_step", wrapped):
        try:
            run(job, folder / "run")
        except ReplicaError as error:
            return str(error), flipped
    return "", flipped


def _flip(model: Any, which: float, element: float, bit: int) -> str:
    """Flip one bit of what this rank holds of a parameter; its name."""
    import torch

    held = []
    for name, parameter in model.named_parameters():
        whole = getattr(parameter, "ds_tensor", parameter)
        local = (whole.to_local() if hasattr(whole, "to_local") else whole).detach()
        if local.numel():
            held.append((name, local))
    name, local = held[int(which * len(held))]
    words = local.view(-1).view(torch.int32)
    words[int(element * words.numel())] ^= 1 << bit
    return str(name)
