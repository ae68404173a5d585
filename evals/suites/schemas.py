"""Rows of the seven data sets, in their original and preprocessed forms, as questions.

Prompts, continuations and gold are those of lm-evaluation-harness 0.4.13 (lm_eval/tasks: lambada, piqa,
hellaswag, winogrande, arc, siqa); tests compare them with the installed package's on the same rows. A choice
follows its context after one space.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from evals.suites.question import Question, ask

__all__ = ["Row", "SchemaError", "arc", "arc_parts", "clean", "hellaswag", "lambada", "piqa", "siqa",
           "winogrande"]  # fmt: skip

Row = Mapping[str, Any]


class SchemaError(ValueError):
    """What a row lacks; the reader adds file, line and the schema."""


def lambada(row: Row) -> Question:
    """The last word (after the last space) of a passage. OpenAI's form: text."""
    text = _text(row, "text")
    if not text.strip():
        raise SchemaError("text is empty")
    context, _, word = text.rpartition(" ")
    return ask([(context, f" {word}")], 0, choices=[word])


def piqa(row: Row) -> Question:
    """A goal and two solutions: goal, sol1, sol2, label."""
    choices = [_text(row, "sol1"), _text(row, "sol2")]
    return _multiple_choice(f"Question: {_text(row, 'goal')}\nAnswer:", choices, _place(row, "label", 2))


def hellaswag(row: Row) -> Question:
    """A scene and four endings; with query and choices the texts were cleaned already."""
    if "query" in row:
        prompt, endings = _text(row, "query"), _texts(row, "choices")
    else:
        scene = f"{_text(row, 'ctx_a')} {_text(row, 'ctx_b').capitalize()}"
        prompt = clean(f"{_text(row, 'activity_label')}: {scene}")
        endings = [clean(ending) for ending in _texts(row, "endings")]
    if len(endings) != 4:
        raise SchemaError(f"{len(endings)} endings")
    return _multiple_choice(prompt, endings, _place(row, "label", 4))


def clean(text: str) -> str:
    """HellaSwag's text without WikiHow's marks, as ``lm_eval/tasks/hellaswag/utils.py`` does it.

    Spaces that stood beside a mark stay, and of a run of spaces every second one goes, once.
    """
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def winogrande(row: Row) -> Question:
    """Partial evaluation: the text after the gap, given the text before it with each option in the gap."""
    before, gap, after = _text(row, "sentence").partition("_")
    if not gap:
        raise SchemaError("sentence has no gap, _")
    choices = [before + _text(row, option) for option in ("option1", "option2")]
    requests = [(choice, f" {after.strip()}") for choice in choices]
    return ask(requests, _place(row, "answer", 2, first=1), choices=choices, prompt=row["sentence"])


def arc(row: Row) -> Question:
    """A question of natural science with three to five choices."""
    stem, texts, labels, key = arc_parts(row)
    return _multiple_choice(f"Question: {stem}\nAnswer:", texts, labels.index(key))


def arc_parts(row: Row) -> tuple[str, list[str], list[str], str]:
    """Stem, texts and labels of the choices, and the label of the right one, whatever the row's form.

    The original release nests all of it in question, the Hugging Face form has choices{text, label}, and
    the preprocessed one a list of texts and the place ``gold``.
    """
    nested = isinstance(row.get("question"), Mapping)
    stem = _text(row["question"], "stem") if nested else _text(row, "question")
    choices = (row["question"] if nested else row).get("choices")
    if isinstance(choices, Mapping):
        texts, labels = _texts(choices, "text"), _texts(choices, "label")
    elif nested and isinstance(choices, Sequence) and all(isinstance(one, Mapping) for one in choices):
        texts = [_text(choice, "text") for choice in choices]
        labels = [_text(choice, "label") for choice in choices]
    else:
        texts = _texts(row, "choices")
        labels = list("ABCDE")[: len(texts)]
    if not 3 <= len(texts) <= 5 or len(labels) != len(texts):
        raise SchemaError(f"{len(texts)} choices with {len(labels)} labels")
    key = row.get("answerKey") if "gold" not in row else labels[_place(row, "gold", len(labels))]
    if key not in labels:
        raise SchemaError(f"answerKey = {key!r} is none of {', '.join(labels)}")
    return stem, texts, labels, str(key)


def siqa(row: Row) -> Question:
    """What people feel and do: context, question, answerA to answerC, label from 1 on."""
    prompt = f"Q: {_text(row, 'context')} {_text(row, 'question')}\nA:"
    choices = [_text(row, f"answer{letter}") for letter in "ABC"]
    return _multiple_choice(prompt, choices, _place(row, "label", 3, first=1))


def _multiple_choice(prompt: str, choices: Sequence[str], gold: int) -> Question:
    return ask([(prompt, f" {choice}") for choice in choices], gold, choices=choices)


def _text(row: Row, key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise SchemaError(f"{key} is missing" if value is None else f"{key} = {value!r} is no text")
    return value


def _texts(row: Row, key: str) -> list[str]:
    value = row.get(key)
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise SchemaError(f"{key} is missing" if value is None else f"{key} is no list of texts")
    return value


def _place(row: Row, key: str, count: int, first: int = 0) -> int:
    """A label, as a number or as text, counted from 0. Hidden labels (-1, an empty text) are refused."""
    value = row.get(key)
    allowed = [str(first + place) for place in range(count)]
    if isinstance(value, bool) or not isinstance(value, int | str) or str(value) not in allowed:
        raise SchemaError(f"{key} is missing" if value is None else f"{key} = {value!r}")
    return allowed.index(str(value))
