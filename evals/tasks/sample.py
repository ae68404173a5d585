"""A sample: the model continues the start of a held-out document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from data_pipeline.loader import TokenDataset
from evals.config import EvalConfig
from evals.sampling import Sampling
from evals.scorer import Scorer
from evals.tasks.protocol import Result, Task

if TYPE_CHECKING:
    from evals.runs import LoadedRun

__all__ = ["TASK"]

PROMPT_TOKENS = 96


def _settings(config: EvalConfig) -> Mapping[str, Any]:
    return {name: getattr(config, f"sample_{name}") for name in ("tokens", "temperature", "top_p", "seed")}


def _prompt(loaded: LoadedRun) -> tuple[list[int], list[int]]:
    """The first tokens of a held-out document, and the tokens that really follow."""
    dataset = TokenDataset(
        loaded.dataset_dir,
        "validation",
        sequence_length=int(loaded.recipe["data"]["sequence_length"]),
        seed=0,
    )
    documents = [dataset.tokens_of(i) for i in range(min(dataset.num_documents, 200))]
    # The first document that is long enough, else the longest one cut in the middle.
    long = [d for d in documents if len(d) > 2 * PROMPT_TOKENS]
    document = (long or [max(documents, key=len)])[0].tolist()
    cut = min(PROMPT_TOKENS, max(len(document) // 2, 1))
    return document[:cut], document[cut:]


def _run(loaded: LoadedRun, config: EvalConfig, progress: bool) -> Result:
    prompt, follows = _prompt(loaded)
    sampling = Sampling(
        max_tokens=config.sample_tokens,
        temperature=config.sample_temperature,
        top_p=config.sample_top_p,
        seed=config.sample_seed,
    )
    text = Scorer(loaded.model, loaded.tokenizer).generate([prompt], sampling)[0]
    special = {loaded.tokenizer.bos_id, loaded.tokenizer.eos_id}

    def decode(ids: list[int]) -> str:
        return loaded.tokenizer.decode([i for i in ids if i not in special])

    return {"prompt": decode(prompt), "continuation": text, "actual": decode(follows[: config.sample_tokens])}


TASK = Task(name="sample", needs_run=True, settings=_settings, run=_run, scalars=lambda result: {})
