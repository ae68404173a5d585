"""lm-evaluation-harness over the scorer: its tasks, our log-likelihoods.

Tasks are YAML files in a local folder, with their data beside them (``dataset_path: json``); the harness's
own task index, whose scan takes many seconds, is not read. Such files may name Python functions that the
harness then runs (``!function``), so the folder is trusted like code and never taken from a client of the
service. `evals.suites.harness_tasks` writes such a folder for the stock definitions of seven suites.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evals.sampling import Sampling
from evals.scorer import Scorer
from evals.states import context_ids

__all__ = ["harness_model", "run_harness"]

MAX_NEW_TOKENS = 256


def harness_model(scorer: Scorer) -> Any:
    """An ``lm_eval.api.model.LM`` that scores with ``scorer``."""
    from lm_eval.api.model import LM

    class TrellisLM(LM):  # type: ignore[misc]
        """Log-likelihoods and generation from carried state."""

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            scores = scorer.log_likelihoods([tuple(request.args[:2]) for request in requests])
            return [(score.log_prob, score.greedy) for score in scores]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return [score.log_prob for score in scorer.rolling([request.args[0] for request in requests])]

        def generate_until(self, requests: list[Any]) -> list[str]:
            return _generate(scorer, [tuple(request.args[:2]) for request in requests])

    return TrellisLM()


def _generate(scorer: Scorer, requests: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """Generate all prompts of one setting together."""
    groups: dict[Sampling, list[int]] = {}
    for place, (_, options) in enumerate(requests):
        groups.setdefault(_sampling(options), []).append(place)
    texts = [""] * len(requests)
    for sampling, places in groups.items():
        # The whole context: nothing follows that could take the spaces at its end.
        prompts = [context_ids(scorer.tokenizer, requests[place][0]) for place in places]
        for place, text in zip(places, scorer.generate(prompts, sampling)):
            texts[place] = text
    return texts


def _sampling(options: dict[str, Any]) -> Sampling:
    """The harness's ``generation_kwargs``, their other names included; greedy unless it asks to sample."""
    from lm_eval.models.utils import normalize_gen_kwargs

    options = normalize_gen_kwargs(options, MAX_NEW_TOKENS)
    stop = options["until"]
    return Sampling(
        max_tokens=options["max_gen_toks"],
        temperature=float(options.get("temperature", 1.0)) if options["do_sample"] else 0.0,
        top_p=float(options.get("top_p", 1.0)),
        stop=tuple(text for text in stop if text),
    )


def run_harness(
    scorer: Scorer, tasks: Sequence[str], *, include_path: Path, limit: int | None = None
) -> dict[str, Any]:
    """Run harness tasks found in ``include_path``.

    Returns:
        "results": metrics per task; "samples": per task and question, the model's answers and metrics.

    Raises:
        ValueError: a task that the folder does not have.
    """
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(include_path), include_defaults=False)
    unknown = sorted(set(tasks) - set(manager.all_tasks))
    if unknown:
        have = ", ".join(sorted(manager.all_tasks)) or "none"
        raise ValueError(f"{include_path} has no harness task {unknown[0]!r}: it has {have}")
    outcome = simple_evaluate(
        model=harness_model(scorer), tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=0,
        log_samples=True,
    )  # fmt: skip
    return {"results": outcome["results"], "samples": outcome["samples"]}
