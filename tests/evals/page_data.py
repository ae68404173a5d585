"""Synthetic results for the evaluation page: invented numbers that have the form of real ones.

Every sample has a difficulty of its own, so that two checkpoints of it are paired as real ones are.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evals.places import NO_STEP
from evals.queue import MAX_ATTEMPTS, Queue
from evals.samples import Sample, share
from trellis_dist.files import digest

HOSTILE = "<script>alert(1)</script>"
TOKENS_PER_STEP = 2**19
# Runs and how good they are, from 0 to 1.
RUNS = {
    "trellis-125m-c4": 0.92,
    "trellis-125m-c4-no-gate": 0.78,
    "gated-deltanet-125m-c4": 0.8,
    "deltanet-125m-c4": 0.62,
    "mamba2-125m-c4": 0.68,
    "ttt-125m-c4": 0.7,
    "transformer-125m-c4": 0.66,
    "linear-attention-125m-c4": 0.35,
}
# Models without steps, which are scored beside the runs.
BASELINES = {"pythia-160m": 0.74, "mamba-130m-hf": 0.7}
STEPS = (1000, 2000, 3000, 4000, 5000)
# Task -> (chance, what the best reach).
CHOICE = {"piqa": (50.0, 67.5), "arc_easy": (25.0, 65.1), "winogrande": (50.0, 55.0)}
NEEDLES = {"niah_single_1": 1.0, "niah_single_2": 0.8, "niah_multikey_1": 0.45}
LENGTHS = (1024, 2048, 4096, 8192)
_HAY = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_QUESTION = "To keep a garden hose from freezing in the winter,"


class Clock:
    """A second passes with every look at it."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def write_database(
    path: Path,
    *,
    now: float,
    runs: Mapping[str, float] = RUNS,
    steps: Sequence[int] = STEPS,
    baselines: Mapping[str, float] = BASELINES,
    samples: int = 50,
    odd: str | None = None,
) -> None:
    """Store results of every task for every run and step, then jobs in every state.

    Args:
        path: of the new queue.
        now: seconds since 1970 when the last of it happened.
        runs: name -> quality from 0 to 1.
        steps: of the checkpoints, increasing.
        baselines: as ``runs``; of the tasks that need no run.
        samples: questions per group.
        odd: a text that stands in samples and in an error.
    """
    clock = Clock(now - 32.0 * (len(runs) * len(steps) + len(baselines)) - 300.0)
    queue = Queue(path, clock=clock)

    def score(run: str, step: int, skill: float, tasks: Sequence[str] = ()) -> None:
        tokens = None if step == NO_STEP else step * TOKENS_PER_STEP
        for task, record in _records(run, step, skill, samples=samples, odd=odd).items():
            if task in tasks or not tasks:
                key = digest([run, step, task])
                queue.submit(key, run=run, step=step, task=task, tokens=tokens)
                queue.lease("worker-0", seconds=60.0)
                queue.finish(key, record)

    for name, quality in baselines.items():
        score(name, NO_STEP, 0.9 * quality, [*CHOICE, *NEEDLES])
    for step in steps:
        for run, quality in runs.items():
            score(run, step, quality * (1 - math.exp(-2.5 * step / steps[-1])))
    _jobs(queue, clock, next(iter(runs)), steps[-1], odd or "RuntimeError: 2.1 GiB wanted, 0.4 GiB free")


def _records(run: str, step: int, skill: float, *, samples: int, odd: str | None) -> dict[str, Any]:
    draw = random.Random(f"{run} {step}")
    results = {"perplexity": _perplexity(skill, draw), "decode": _decode(run)}
    results["context_length"] = _context_length(skill, run)
    for task, (chance, best) in CHOICE.items():
        results[task] = _choice(task, (chance + (best - chance) * skill) / 100, draw, count=4 * samples)
    for task, ease in NEEDLES.items():
        results[task] = _needles(task, ease * skill, draw, count=samples, odd=odd)
    settings = {"task_settings": "synthetic"}
    return {
        task: {"task": task, "step": step, "settings": settings, "seconds": draw.uniform(4, 90), **result}
        for task, result in results.items()
    }


def _perplexity(skill: float, draw: random.Random) -> dict[str, Any]:
    bits = 1.75 - 0.7 * skill + draw.gauss(0, 0.004)
    scalars = {"eval/bits_per_byte": bits, "eval/loss": 2.6 * bits, "eval/bigram_bits_per_byte": 2.1184}
    return {"result": {"model": {"bits_per_byte": bits}}, "scalars": scalars}


def _context_length(skill: float, run: str) -> dict[str, Any]:
    """Longer contexts help, until a transformer meets positions it was not trained on."""
    lost = 0.08 if run.startswith("transformer") else 0.0
    bits = {n: 1.9 - 0.7 * skill - 0.03 * math.log2(n / 256) + lost * (n > 2048) for n in (512, 2048, 8192)}
    return {"result": {}, "scalars": {f"context_length/{n}": value for n, value in bits.items()}}


def _decode(run: str) -> dict[str, Any]:
    grows = 12.0 if run.startswith("transformer") else 1.0
    return {
        "result": {},
        "scalars": {"decode/state_bytes": 2.25 * 2**20 * grows, "decode/ms_per_token": 4.1 + grows / 3},
    }


def _choice(task: str, p: float, draw: random.Random, *, count: int) -> dict[str, Any]:
    found = [_choice_sample(task, i, right=_right(task, i, p, draw), draw=draw) for i in range(count)]
    groups = {task: share([sample.score for sample in found])}
    scalars = {f"{task}/acc": groups[task]["score"]}
    return _result(found, groups, scalars) | {"chance": {f"{task}/acc": CHOICE[task][0]}}


def _right(task: str, index: int, p: float, draw: random.Random) -> bool:
    """Mostly a matter of the question, partly of the run."""
    difficulty = random.Random(f"{task} {index}").random()
    return 0.7 * difficulty + 0.3 * draw.random() < 0.3 + 0.7 * p - 0.15


def _choice_sample(task: str, index: int, *, right: bool, draw: random.Random) -> Sample:
    choices = ["drain it and store it indoors.", "fill it and leave it outside."]
    scores = sorted((-draw.uniform(8, 20), -draw.uniform(8, 20)), reverse=right)
    rows = [
        {"choice": text, "log_prob": score, "bytes": len(text)}
        for text, score in zip(choices, scores, strict=True)
    ]
    return Sample(
        id=f"{task}-{index:05d}",
        group=task,
        score=float(right),
        prompt=f"Question {index + 1}: {_QUESTION}\nAnswer:",
        answer=choices[0],
        output=choices[0] if right else choices[1],
        details={"choices": rows, "margin": abs(scores[0] - scores[1])},
    )


def _needles(task: str, skill: float, draw: random.Random, *, count: int, odd: str | None) -> dict[str, Any]:
    found = [
        _needle(task, length, i, count, skill=skill, draw=draw, odd=odd)
        for length in LENGTHS
        for i in range(count)
    ]
    groups = {
        str(length): share([sample.score for sample in found if sample.length == length])
        for length in LENGTHS
    }
    scalars = {f"{task}/generation/{name}": part["score"] for name, part in groups.items()}
    if task.startswith("niah_single"):
        # Of ten values the right one is chosen more often than it is written.
        chosen = {
            f"{task}/choice/{name}": 10 + 0.9 * part["score"] + 0.1 * skill for name, part in groups.items()
        }
        return _result(found, groups, scalars | chosen) | {
            "chance": dict.fromkeys(scalars, 0.0) | dict.fromkeys(chosen, 10.0)
        }
    return _result(found, groups, {name.replace("generation/", ""): value for name, value in scalars.items()})


def _needle(
    task: str, length: int, index: int, count: int, *, skill: float, draw: random.Random, odd: str | None
) -> Sample:
    question = random.Random(f"{task} {length} {index}")
    depth, answer = (index + 0.5) / count, str(question.randrange(10**6, 10**7))
    # Long prompts lose what stands early in them.
    kept = skill * (1.25 - 0.28 * math.log2(length / 1024) * (1.1 - depth))
    right = 0.7 * question.random() + 0.3 * draw.random() < kept
    needle = f"One of the special magic numbers for quiet-harbor-{index} is: {answer}."
    before = round(6 * depth)
    prompt = "\n".join([*[_HAY] * before, needle, *[_HAY] * (6 - before)])
    wrong = odd if odd and index == 1 else str(draw.randrange(10**6, 10**7))
    return Sample(
        id=f"{task}-{length}-{index:04d}",
        group=str(length),
        score=float(right),
        prompt=f"{prompt}\nWhat is the special magic number for quiet-harbor-{index}?",
        answer=answer,
        output=f" {answer}." if right else f" {wrong}.",
        length=length,
        depth=depth,
        details={"generated": right},
    )


def _result(
    found: Sequence[Sample], groups: Mapping[str, Any], scalars: Mapping[str, float]
) -> dict[str, Any]:
    rows = [sample.to_json() for sample in found]
    return {"result": {"groups": dict(groups), "samples": rows}, "scalars": dict(scalars)}


def _jobs(queue: Queue, clock: Clock, run: str, step: int, error: str) -> None:
    """One job that failed with ``error``, one that was cancelled, one that runs and two that wait."""

    def add(task: str, priority: int = 0) -> str:
        key = digest([run, step, task])
        queue.submit(key, run=run, step=step, task=task, priority=priority, tokens=step * TOKENS_PER_STEP)
        return key

    failed = add("harness", priority=9)
    for _ in range(MAX_ATTEMPTS):
        queue.lease("worker-0", seconds=60.0)
        queue.fail(failed, "worker-0", error)
        clock.now += 50.0  # past the wait for the next attempt
    queue.cancel(add("siqa", priority=8))
    add("hellaswag", priority=7)
    queue.lease("worker-1", seconds=86400.0)
    add("lambada")
    add("arc_challenge")
