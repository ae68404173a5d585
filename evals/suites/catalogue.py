"""The seven suites of the paper's table 1: where their rows are, how they are read, what they report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from evals.config import TaskName
from evals.suites import schemas
from evals.suites.question import Question
from evals.suites.schemas import Row

__all__ = ["DEFINITION", "SUITES", "HubData", "Suite"]

# Whose prompts and metrics these are; part of a result's key.
DEFINITION = "lm-evaluation-harness 0.4.13"


@dataclass(frozen=True)
class HubData:
    """A data set of the Hugging Face Hub at one commit: parquet or JSON files, no code."""

    name: str
    subset: str | None
    split: str
    revision: str


@dataclass(frozen=True, kw_only=True)
class Suite:
    """One suite.

    Attributes:
        name: of its task.
        files: what its file may be called, without ending.
        expects: what a row holds, for messages.
        read: a row's question. Raises `SchemaError`.
        metrics: what is reported; the first is the one of table 1, by which a sample is right or wrong.
        hub: the data where no folder is given.
        harness: lm_eval's file of the same task, below lm_eval/tasks.
    """

    name: TaskName
    files: tuple[str, ...]
    expects: str
    read: Callable[[Row], Question]
    metrics: tuple[str, ...]
    hub: HubData
    harness: str


ARC = (
    "question (a text, or {stem, choices}), choices ({text, label}, or three to five texts) and answerKey "
    "(one of the labels) or gold (from 0)"
)
ARC_REVISION = "210d026faf9955653af8916fad021475a3f00453"

_SUITES = (
    Suite(
        name="lambada",
        files=("lambada_openai", "lambada"),
        expects="text",
        read=schemas.lambada,
        metrics=("acc", "perplexity"),
        hub=HubData(
            "EleutherAI/lambada_openai", "default", "test", "900124bf3b8235c6daf21033af9948b3f07346c4"
        ),
        harness="lambada/lambada_openai.yaml",
    ),
    Suite(
        name="piqa",
        files=("piqa",),
        expects="goal, sol1, sol2 and label (0 or 1)",
        read=schemas.piqa,
        metrics=("acc", "acc_norm"),
        hub=HubData("baber/piqa", None, "validation", "142f6d7367fd9877f0fb3b5734ea6a545f54cdd1"),
        harness="piqa/piqa.yaml",
    ),
    Suite(
        name="hellaswag",
        files=("hellaswag",),
        expects="activity_label, ctx_a, ctx_b and four endings, or query and four choices; label (0 to 3)",
        read=schemas.hellaswag,
        metrics=("acc_norm", "acc"),
        hub=HubData("Rowan/hellaswag", None, "validation", "218ec52e09a7e7462a5400043bb9a69a41d06b76"),
        harness="hellaswag/hellaswag.yaml",
    ),
    Suite(
        name="winogrande",
        files=("winogrande",),
        expects="sentence (with a gap, _), option1, option2 and answer (1 or 2)",
        read=schemas.winogrande,
        metrics=("acc",),
        hub=HubData(
            "allenai/winogrande", "winogrande_xl", "validation", "01e74176c63542e6b0bcb004dcdea22d94fb67b5"
        ),
        harness="winogrande/default.yaml",
    ),
    Suite(
        name="arc_easy",
        files=("arc_easy",),
        expects=ARC,
        read=schemas.arc,
        metrics=("acc", "acc_norm"),
        hub=HubData("allenai/ai2_arc", "ARC-Easy", "test", ARC_REVISION),
        harness="arc/arc_easy.yaml",
    ),
    Suite(
        name="arc_challenge",
        files=("arc_challenge",),
        expects=ARC,
        read=schemas.arc,
        metrics=("acc_norm", "acc"),
        hub=HubData("allenai/ai2_arc", "ARC-Challenge", "test", ARC_REVISION),
        harness="arc/arc_challenge.yaml",
    ),
    Suite(
        name="siqa",
        files=("social_iqa", "siqa"),
        expects="context, question, answerA, answerB, answerC and label (1 to 3)",
        read=schemas.siqa,
        metrics=("acc",),
        hub=HubData("lighteval/siqa", None, "validation", "54c6a1f8cb6daf4f5abf24a601852612fb35eb25"),
        harness="siqa/siqa.yaml",
    ),
)
SUITES: Mapping[str, Suite] = {suite.name: suite for suite in _SUITES}
