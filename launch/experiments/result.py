"""The one JSON of a finished run: what was trained, what it cost, what it scored, and where."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.experiments.spec import RunSpec, changes
from launch.recipe import Recipe, resolve
from trellis_dist.files import read_json

if TYPE_CHECKING:
    from evals.config import EvalConfig

__all__ = ["FORMAT", "collect", "known_result", "refuse_another"]

# Raise it when a key changes its meaning.
FORMAT = 1
# Records hold their prompts one by one too; the run's own folder keeps those.
_LEFT_OUT = ("samples",)
# Where texts lie: a checkout elsewhere has them elsewhere.
_PATHS = ("perplexity_text", "ruler_essay", "suites_folder", "harness_folder")
# What of a task's settings says which text that was: digests, or a data set's commit.
_CONTENT = ("essay", "data", "text")


def collect(spec: RunSpec, run_dir: Path) -> dict[str, Any]:
    """The result of a trained and scored run, read from its folder (nats, bytes, seconds, FLOPs).

    Keys: "name", "about", "digest", "recipe" (resolved), "data" (fingerprint), "commit", "machine",
    "versions"; "training" (`_training`), "model" (`_model`); "validation" (loss, bits per byte, the bigram's,
    losses by position) where perplexity was scored; "scores": per task settings, seconds, chance and result;
    "checkpoints" of a spec with ``trace``: "layers", "steps" (`launch.figures.training.at_checkpoints`).
    """
    from launch.machine import commit, machine, versions

    recipe = spec.resolved
    records = _records(run_dir, recipe)
    found: dict[str, Any] = {
        "format": FORMAT,
        "name": spec.name,
        "about": dict(spec.about),
        "digest": spec.digest,
        "recipe": resolve(recipe),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "training": _training(run_dir, recipe),
        "model": _model(recipe),
        "scores": {task: _short(record) for task, record in records.items()},
        "scalars": {key: value for record in records.values() for key, value in record["scalars"].items()},
    }
    if records:
        found["data"] = next(iter(records.values()))["data"]
    if "perplexity" in records:
        found["validation"] = _validation(records["perplexity"]["result"])
    if spec.trace and "trellis" in recipe.model.pattern:
        found["checkpoints"] = _checkpoints(run_dir, recipe)
    return found


def _checkpoints(run_dir: Path, recipe: Recipe) -> dict[str, Any]:
    """Gates and norms at the checkpoints that are there, on prose and, with a folder of suites, on items."""
    from evals.figures.trace import trellis_mixers
    from evals.runs import load_run
    from launch.experiments.expand import essay
    from launch.figures.training import at_checkpoints

    last = load_run(run_dir, step=recipe.training.steps, dataset_dir=Path(recipe.data.directory))
    suites = Path(folder) if (folder := recipe.evals.suites_folder) else None
    steps = at_checkpoints(last, essay(), suites=suites, say=lambda _: None)
    return {"layers": sorted(trellis_mixers(last.model)), "steps": steps}


def known_result(path: Path, spec: RunSpec) -> dict[str, Any] | None:
    """The result in ``path`` if it is that of ``spec``; None without one, or where it scored other things.

    Raises:
        ValueError: the file holds the result of another run, or of other text; one line says what differs.
    """
    if not path.is_file():
        return None
    stored: dict[str, Any] = read_json(path)
    refuse_another(stored["recipe"], spec, holder=path)
    _refuse_other_text(stored, spec, holder=path)
    same = all(
        _same(key, stored["recipe"]["evals"].get(key, value), value) for key, value in spec.scoring.items()
    )
    return {**stored, "about": dict(spec.about)} if same and _of_these_texts(stored, spec) else None


def _of_these_texts(stored: Mapping[str, Any], spec: RunSpec) -> bool:
    """Whether what was scored are the files that the evals section names now, by their content.

    A file that is not there says nothing: scores are not lost with the text they are of.
    """
    scores = stored.get("scores", {}).items()
    return all(_same_content(task, score["settings"], spec.resolved.evals) for task, score in scores)


def _same_content(task: str, before: Mapping[str, Any], config: EvalConfig) -> bool:
    from evals.tasks.registry import get_task

    kept = {key: before[key] for key in _CONTENT if key in before}
    if not kept:
        return True
    try:
        now = get_task(task).settings(config)
    except (OSError, ValueError):
        return True
    return all(now.get(key) == value for key, value in kept.items())


def _refuse_other_text(stored: Mapping[str, Any], spec: RunSpec, *, holder: Path) -> None:
    from data_pipeline.manifest import MANIFEST, load_manifest

    folder = Path(spec.resolved.data.directory)
    if "data" not in stored or not (folder / MANIFEST).is_file():
        return
    fingerprint = load_manifest(folder).fingerprint
    if fingerprint != stored["data"]:
        raise ValueError(
            f"{holder} was trained on other text ({stored['data'][:12]}) than {folder} holds "
            f"({fingerprint[:12]}): use another --root, or remove it"
        )


def _same(key: str, before: Any, now: Any) -> bool:
    return (before is None) == (now is None) if key in _PATHS else bool(before == now)


def refuse_another(recipe: Mapping[str, Any], spec: RunSpec, *, holder: Path) -> None:
    """Raise ValueError unless the resolved ``recipe`` stored in ``holder`` fixes what ``spec`` does."""
    changed = changes(recipe, spec.resolved, source=str(holder))
    if changed:
        listed = ", ".join(f"{key} {old!r} -> {new!r}" for key, (old, new) in sorted(changed.items())[:4])
        more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
        raise ValueError(
            f"{holder} is of another run named {spec.name} ({listed}{more}): use another --root, or remove it"
        )


def _records(run_dir: Path, recipe: Recipe) -> dict[str, Any]:
    """Per task of the recipe the record of its last step."""
    step = recipe.training.steps
    paths = {task: run_dir / "evals" / f"{task}-step-{step}.json" for task in recipe.evals.tasks}
    return {task: read_json(path) for task, path in paths.items()}


def _short(record: Mapping[str, Any]) -> dict[str, Any]:
    result = {key: value for key, value in record["result"].items() if key not in _LEFT_OUT}
    return {
        "settings": record["settings"],
        "seconds": record["seconds"],
        "chance": record.get("chance", {}),
        "result": result,
    }


def _training(run_dir: Path, recipe: Recipe) -> dict[str, Any]:
    """Steps, tokens and seconds; the losses while it trained, [step, nats], validation's and a few others."""
    from evals.summary import read_metrics
    from trellis_dist.training.starts import read_starts, useful_seconds

    rows, starts = read_metrics(run_dir), read_starts(run_dir)
    speeds = [row["perf/tokens_per_second"] for row in rows if row.get("perf/tokens_per_second")]
    losses = [[row["step"], row["loss/train"]] for row in rows if "loss/train" in row]
    return {
        "steps": recipe.training.steps,
        "tokens": recipe.tokens(),
        "sequence_length": recipe.data.sequence_length,
        "seed": recipe.training.seed,
        "seconds": useful_seconds(starts),
        "starts": len(starts),
        "seconds_per_token": 1.0 / statistics.median(speeds) if speeds else None,
        "train_losses": _thinned(losses),
        "gradient_norm": _spread(
            [row["optim/gradient_norm"] for row in rows if "optim/gradient_norm" in row]
        ),
        "probes": _last_probes(rows),
        "looks": _looks(rows, steps=recipe.training.steps),
        "validation_losses": [
            [row["step"], row["loss/validation"]] for row in rows if "loss/validation" in row
        ],
    }


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    """Mean and variance over the second half, and the variance without its trend; None of too few values.

    "detrended" is half the mean square of the differences between neighbours (von Neumann's estimate): the
    schedule moves a norm over hundreds of steps, which leaves those differences alone.
    """
    half = values[len(values) // 2 :]
    if len(half) < 2:
        return None
    apart = [(after - before) ** 2 / 2 for before, after in pairwise(half)]
    return {
        "mean": statistics.fmean(half),
        "variance": statistics.variance(half),
        "detrended": statistics.fmean(apart),
    }


def _looks(rows: Sequence[Mapping[str, Any]], *, steps: int) -> dict[str, dict[str, Any]]:
    """Of each number that looks give, over those of the second half of training: the mean over them and over
    layers, its standard error over the looks (None of one), and how many there were."""
    found: dict[str, list[float]] = {}
    for row in rows:
        layers: dict[str, list[float]] = {}
        for key, value in row.items():
            if key.startswith("trellis/") and 2 * row["step"] > steps:
                layers.setdefault(key.rpartition("/")[2], []).append(value)
        for name, values in layers.items():
            found.setdefault(name, []).append(statistics.fmean(values))
    return {name: _mean(values) for name, values in found.items()}


def _mean(values: Sequence[float]) -> dict[str, Any]:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "error": error, "looks": len(values)}


def _last_probes(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The last look into the memories of Trellis layers (docs/monitoring.md); empty of a model without."""
    looks = [{k: v for k, v in row.items() if k.startswith("trellis/")} for row in rows]
    return next((look for look in reversed(looks) if look), {})


def _thinned(rows: Sequence[Any], most: int = 100) -> list[Any]:
    """At most about ``most`` of them, the last among them."""
    step = max(len(rows) // most, 1)
    return list(rows[::-1][::step][::-1])


def _model(recipe: Recipe) -> dict[str, Any]:
    """Parameters, forward and backward FLOPs per trained token, bytes of decode state after a row."""
    from trellis_dist.models.counts import flops_per_token, parameter_counts, state_bytes

    counts, length = parameter_counts(recipe.model), recipe.data.sequence_length
    return {
        "parameters": counts.total,
        "embedding_parameters": counts.embedding,
        "non_embedding_parameters": counts.non_embedding,
        "flops_per_token": flops_per_token(recipe.model, sequence_length=length),
        "state_bytes": state_bytes(recipe.model, position=length),
        "state_position": length,
    }


def _validation(result: Mapping[str, Any]) -> dict[str, Any]:
    """Of the held-out text: the model, the n-grams counted on the training text, losses by position."""
    kept = ("unigram", "bigram", "by_position", "targets", "bytes")
    return {**result["model"], **{key: result[key] for key in kept if key in result}}
