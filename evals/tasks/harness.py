"""Tasks of lm-evaluation-harness from a local folder, through our scorer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.config import EvalConfig
from evals.harness import run_harness
from evals.samples import Sample, chance_of, clip, share
from evals.scorer import Scorer
from evals.tasks.protocol import Result, Task
from trellis_dist.files import sha256_file

if TYPE_CHECKING:
    from evals.subject import Subject

__all__ = ["TASK"]

# Metrics that are 0 to 1 per question; the first of them that a task has decides what is right.
SHARES = ("acc", "exact_match", "acc_norm", "acc_bytes", "acc_mutual_info")


def _folder(config: EvalConfig) -> Path:
    folder = Path(config.harness_folder or "")
    if not config.harness_folder or not folder.is_dir():
        raise ValueError(f"evals.harness_folder = {config.harness_folder}: name a folder of task files")
    return folder


def _settings(config: EvalConfig) -> Mapping[str, Any]:
    """The folder counts by the content of its files, data that lies in it included, and so does lm_eval."""
    folder = _folder(config)
    files = {
        str(path.relative_to(folder)): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".pyc"  # Python leaves those of `!function` modules there
    }
    return {
        "harness_version": version("lm_eval"),
        "files": {name: sha256_file(path) for name, path in files.items()},
        "tasks": sorted(config.harness_tasks),
        "limit": config.harness_limit,
    }


def _run(subject: Subject, config: EvalConfig, progress: bool) -> Result:
    scorer = Scorer(subject.model, subject.tokenizer)
    limit = config.harness_limit or None
    outcome = run_harness(scorer, config.harness_tasks, include_path=_folder(config), limit=limit)
    samples = [one for task, logged in outcome["samples"].items() for one in _samples(task, logged)]
    groups: dict[str, list[float]] = {}
    for sample in samples:
        groups.setdefault(sample.group, []).append(sample.score)
    return {
        "results": {task: _numbers(metrics) for task, metrics in outcome["results"].items()},
        "questions": {
            task: len({sample["doc_id"] for sample in logged}) for task, logged in outcome["samples"].items()
        },
        "harness_version": version("lm_eval"),
        "groups": {name: share(scores) for name, scores in groups.items()},
        "samples": [sample.to_json() for sample in samples],
    }


def _samples(task: str, logged: Sequence[Mapping[str, Any]]) -> list[Sample]:
    """The questions of a task that has a share among its metrics, once per filter of its answers."""
    samples, seen = [], dict[tuple[str, str], int]()
    for one in sorted(logged, key=lambda sample: sample["doc_id"]):
        metric = next((name for name in SHARES if name in one["metrics"]), None)
        if metric is None:
            continue
        group = task if one["filter"] == "none" else f"{task}/{one['filter']}"
        key = (group, one["doc_hash"][:16])
        seen[key] = number = seen.get(key, 0) + 1  # a row may be there twice
        id_ = key[1] if number == 1 else f"{key[1]}-{number}"
        samples.append(_sample(f"{task}-{id_}", group, one, metric))
    return samples


def _sample(id_: str, group: str, one: Mapping[str, Any], metric: str) -> Sample:
    numbers = {name: float(one[name]) for name in one["metrics"] if _is_number(one[name])}
    arguments, answers = one["arguments"], one["filtered_resps"]
    texts, details = [str(answers[0])], dict[str, Any](numbers)
    chosen = 0
    if isinstance(answers[0], list | tuple):  # (log-likelihood, greedy) of each choice
        log_likelihoods = [float(answer[0]) for answer in answers]
        chosen = max(range(len(answers)), key=lambda place: log_likelihoods[place])
        several_contexts = len({request[0] for request in arguments}) > 1
        texts = [request[0 if several_contexts else 1] for request in arguments]
        details |= {"choices": [clip(text) for text in texts], "log_likelihoods": log_likelihoods}
    target = one["target"]
    answer = texts[target] if isinstance(target, int) and 0 <= target < len(texts) else str(target)
    return Sample(
        id=id_,
        group=group,
        score=numbers[metric],
        prompt=clip(arguments[0][0]),
        answer=clip(answer),
        output=clip(texts[chosen]),
        details=details,
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Metric name -> value; the harness writes "acc,none" for a metric without a filter."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in metrics.items()
        if "," in name and isinstance(value, int | float) and "_stderr" not in name
    }


def _scalars(result: Result) -> dict[str, float]:
    """Shares in percent, as everywhere; other metrics as the harness gives them."""
    return {
        f"harness/{task}/{metric}": value * (100 if metric.partition(",")[0] in SHARES else 1)
        for task, metrics in result["results"].items()
        for metric, value in metrics.items()
    }


def _chance(result: Result) -> dict[str, float]:
    """Of the shares of tasks whose questions give choices."""
    by_group: dict[str, list[Mapping[str, Any]]] = {}
    for sample in result["samples"]:
        by_group.setdefault(sample["group"], []).append(sample)
    chances = {task: 100 * chance_of(samples) for task, samples in by_group.items()}
    return {
        f"harness/{task}/{metric}": chances[task]
        for task, metrics in result["results"].items()
        for metric in metrics
        if metric in SHARES and chances.get(task)
    }


TASK = Task(name="harness", settings=_settings, run=_run, scalars=_scalars, chance=_chance)
