"""Rows of the seven suites in their original schemas, written for what is easily got wrong."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from evals.subject import Subject
from tests.evals.fakes import ByteTokenizer, RecurrentModel

REAL = Path(__file__).resolve().parents[3] / "shared/data/evals"

ARC_NESTED = {
    "id": "Mercury_1",
    "question": {
        "stem": "Which is a liquid at room temperature?",
        "choices": [
            {"text": "iron", "label": "A"},
            {"text": "water", "label": "B"},
            {"text": "salt", "label": "C"},
        ],
    },
    "answerKey": "B",
}
ARC_HUB = {
    "id": "Mercury_1",
    "question": "Which is a liquid at room temperature?",
    "choices": {"text": ["iron", "water", "salt"], "label": ["A", "B", "C"]},
    "answerKey": "B",
}
ARC_FLAT = {
    "question": "Which is a liquid at room temperature?",
    "choices": ["iron", "water", "salt"],
    "gold": 1,
}
ARC_NUMBERED = {
    "id": "NYSEDREGENTS_2",
    "question": 'Which part of "the plant" takes in light?\nLook at the table.',
    "choices": {
        "text": ["the root", "it's the leaf", "the \\ stem", "the seed 30 \u00b0C"],
        "label": ["1", "2", "3", "4"],
    },
    "answerKey": "4",
}
ARC_FIVE = {
    "id": "MCAS_3",
    "question": "How many?",
    "choices": {"text": ["1", "2", "3", "4", "5"], "label": ["A", "B", "C", "D", "E"]},
    "answerKey": "E",
}
HELLASWAG = {
    "ind": 24,
    "activity_label": "Roof shingle removal",
    "ctx_a": "A man is sitting on a roof.",
    "ctx_b": "he",
    "ctx": "A man is sitting on a roof. he",
    "endings": [
        "is using wrap to wrap a pair of skis.",
        "is ripping level tiles off.",
        "is holding a rubik's cube.",
        "starts pulling up roofing on a roof.",
    ],
    "source_id": "activitynet~v_1",
    "split": "val",
    "split_type": "indomain",
    "label": "3",
}
# What WikiHow's marks leave behind: spaces at the start, a full stop, runs of spaces halved once.
HELLASWAG_MARKED = {
    "ind": 2,
    "activity_label": "Home and Garden",
    "ctx_a": "[header] How to paint [title] Take a brush. [step] Any   brush  will do. ",
    "ctx_b": "",
    "endings": [
        "[step] Dip it. [substeps] Only the tip.",
        " Wait [title]Rest now.",
        "Paint    the wall [a] [b] twice.",
        "STOP",
    ],
    "label": 1,
}
HELLASWAG_CLEAN = {
    "query": "Home and Garden: How to paint. Take a brush. Any  brush will do.",
    "choices": [" Dip it. Only the tip.", "Wait. Rest now.", "Paint  the wall  twice.", "STOP"],
    "label": 1,
}

ROWS = {
    "lambada_openai": [
        {"text": 'He said,\n\n"Do not  go." She went, \u201cwhy\u201d he asked her mother'},
        {"text": "one two"},
        {"text": "alone"},
        {"text": "ends with a line\nbreak"},
    ],
    "piqa": [
        {"goal": "How do I boil {{eggs}}?", "sol1": "In water.", "sol2": "In 'a' \"sock\".", "label": 0},
        {"goal": "dresser", "sol1": "replace it with a pin ", "sol2": " sand \\ it,  twice", "label": 1},
    ],
    "hellaswag": [HELLASWAG, HELLASWAG_MARKED],
    "winogrande": [
        {"sentence": "Sarah is better than Maria so _ always wins.", "option1": "Sarah",
         "option2": "Maria", "answer": "2"},
        {"sentence": "_ , he thought, was late.", "option1": "the bus", "option2": "the train",
         "answer": "1"},
        {"sentence": "The cup fell off _  and then _ broke", "option1": "the table", "option2": "it",
         "answer": "1"},
    ],
    "arc_easy": [ARC_NESTED, ARC_NUMBERED],
    "arc_challenge": [ARC_FIVE, ARC_HUB, ARC_NUMBERED],
    "social_iqa": [
        {"context": "Tracy went home.", "question": "Why did Tracy do this?", "answerA": "to rest",
         "answerB": "to see Riley's cat", "answerC": "none", "label": "3"},
        {"context": "Robin sang.  Loudly.", "question": "How is Robin?", "answerA": "happy",
         "answerB": "", "answerC": "sad", "label": "1"},
    ],
}  # fmt: skip


def write_rows(folder: Path) -> Path:
    """A folder for `EvalConfig.suites_folder`."""
    folder.mkdir(parents=True)
    for name, rows in ROWS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def fake_subject(model=None, tokenizer=None) -> Subject:
    """An fp64 model of bytes, or what is given."""
    return Subject(
        name="fake",
        model=model or RecurrentModel(),
        tokenizer=tokenizer or ByteTokenizer(),
        digest="d",
        tokenizer_digest="t",
        device=torch.device("cpu"),
    )
