"""Continuations of texts from any model: many in batches, or one as it is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from evals.sampling import Sampling
from evals.scorer import Scorer
from evals.states import context_ids
from evals.subject import Subject
from evals.writing import Written

__all__ = ["as_json", "generate", "read_prompts"]


def read_prompts(given: Sequence[str], file: Path | None = None) -> list[str]:
    """The prompts that were given, then those of a file.

    Args:
        file: one prompt per line, blank lines left out; of a name ending in .jsonl, one JSON object per line
            with the text under "prompt".

    Raises:
        ValueError: there is none, or a line is not what it should be; the message has its number.
        OSError: the file cannot be read.
    """
    prompts = list(given)
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"--prompts {file}: not UTF-8 ({error})") from None
        numbered = {number: line.rstrip("\r") for number, line in enumerate(lines, 1) if line.strip()}
        is_json = file.suffix == ".jsonl"
        prompts += _json_prompts(file, numbered) if is_json else numbered.values()
    if not prompts:
        raise ValueError("no prompt: give --prompt TEXT, or --prompts FILE with one in it")
    return prompts


def _json_prompts(file: Path, lines: Mapping[int, str]) -> Iterator[str]:
    for number, line in lines.items():
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError):
            prompt = None
        if not isinstance(prompt, str):
            raise ValueError(f'--prompts {file}, line {number}: write {{"prompt": "some text"}}')
        yield prompt


def generate(
    subject: Subject,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    on_text: Callable[[int, str], None] | None = None,
) -> list[Written]:
    """A continuation of each prompt, in their order.

    Args:
        on_text: called with a prompt's place and what was added to its continuation, as soon as that is
            certain to stay: whole characters, and nothing that a stop string takes back.
    """
    scorer = Scorer(subject.model, subject.tokenizer)
    ids = [context_ids(subject.tokenizer, prompt) for prompt in prompts]
    return scorer.each(ids, lambda prefix: scorer.write_from(prefix, sampling, on_text))


def as_json(prompt: str, written: Written) -> Mapping[str, Any]:
    """One line of output: prompt, text, tokens written, why it ended and tokens per second."""
    count = len(written.tokens)
    return {
        "prompt": prompt,
        "text": written.text,
        "tokens": count,
        "finish": written.finish,
        "tokens_per_second": round(count / written.seconds, 2) if written.seconds > 0 else None,
    }
