"""A folder in which lm-evaluation-harness finds its own definitions of the seven suites with local rows.

The task files are the installed package's, with the data set replaced by files; nothing else in them changes,
so what the harness says about such a folder is what it says about its stock tasks.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from evals.suites.catalogue import SUITES, Suite
from evals.suites.rows import find_file, read_rows
from evals.suites.schemas import Row, SchemaError, arc_parts, clean
from trellis_dist.files import atomic_write

__all__ = ["harness_row", "write_harness_tasks"]

# A key at the left margin with its value; comments before it belong to the key above.
FIELD = re.compile(r"^(\w+):.*\n(?:(?!\w).*\n)*", re.MULTILINE)
# What says where the rows come from.
DATA_FIELDS = ("dataset_path", "dataset_name", "dataset_kwargs", "training_split", "fewshot_split")


def write_harness_tasks(
    suites_folder: Path, folder: Path, *, suites: Iterable[str] = SUITES, cache: Path | None = None
) -> list[str]:
    """Write task files, what they import, and their rows (in the schemas they read) into ``folder``.

    Args:
        suites_folder: as `EvalConfig.suites_folder`.
        folder: for `EvalConfig.harness_folder`; made where it is missing, files in it are replaced.
        suites: names of suites.
        cache: where ``datasets`` keeps its copy of the rows, outside ``folder``; None leaves it the choice.

    Returns:
        The harness's names of the tasks, for `EvalConfig.harness_tasks`.

    Raises:
        ValueError: lm_eval is not installed, no file for a suite, or a row that the harness's schema cannot
            hold.
        OSError: as the file system says.
    """
    stock = _stock_folder()
    (folder / "rows").mkdir(parents=True, exist_ok=True)
    return [_write(SUITES[name], stock, Path(suites_folder), folder, cache) for name in suites]


def _stock_folder() -> Path:
    """lm_eval/tasks, without importing the package."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("lm_eval is not installed: pip install 'trellis-dist[evals]'")
    return Path(spec.submodule_search_locations[0]) / "tasks"


def _write(suite: Suite, stock: Path, suites_folder: Path, folder: Path, cache: Path | None) -> str:
    source = stock / suite.harness
    fields = _fields(source)
    task = fields["task"].partition(":")[2].strip()
    rows = (folder / "rows" / f"{task}.jsonl").resolve()
    atomic_write(rows, "".join(json.dumps(row) + "\n" for row in _rows(suite, suites_folder)))
    # The harness asks the test split where there is one; it must not look for splits that are not there.
    split = "test_split" if fields.get("test_split", "null").split()[-1] != "null" else "validation_split"
    name = fields[split].split()[-1]
    data: dict[str, Any] = {"data_files": {name: str(rows)}}
    if cache is not None:
        data["cache_dir"] = str(cache)
    dropped = {*DATA_FIELDS, "test_split", "validation_split"} - {split}
    kept = [text for key, text in fields.items() if key not in dropped]
    # JSON is YAML, so paths are quoted as they must be.
    kept.append(f"dataset_path: json\ndataset_kwargs: {json.dumps(data)}\n")
    atomic_write(folder / f"{task}.yaml", "".join(kept))
    for module in re.findall(r"!function (\w+)\.", "".join(kept)):
        atomic_write(folder / f"{module}.py", (source.parent / f"{module}.py").read_bytes())
    return task


def _fields(path: Path) -> dict[str, str]:
    """Top-level keys of a task file with their text, those of the file that it includes first."""
    text = path.read_text(encoding="utf-8").rstrip("\n") + "\n"
    fields = {match[1]: match[0] for match in FIELD.finditer(text)}
    include = fields.pop("include", None)
    return fields if include is None else _fields(path.parent / include.split()[-1]) | fields


def _rows(suite: Suite, suites_folder: Path) -> Iterable[Row]:
    for place, row in read_rows(find_file(suites_folder, suite)):
        try:
            yield harness_row(suite, row)
        except SchemaError as error:
            raise ValueError(f"{place}: {error}; a row of {suite.name} has {suite.expects}") from None


def harness_row(suite: Suite, row: Row) -> Row:
    """The row with the fields, and only those, that the harness's task file reads, one type per field.

    Raises:
        SchemaError: the row fits no schema, or its preprocessed text has no original.
    """
    if not isinstance(row, Mapping):
        raise SchemaError("not an object")
    gold = suite.read(row).gold  # it fits a schema from here on
    return _FORMS[suite.harness.partition("/")[0]](row, gold)


def _take(row: Row, *names: str) -> dict[str, Any]:
    return {name: row[name] for name in names}


def _hellaswag(row: Row, gold: int) -> Row:
    if "query" not in row:
        return {**_take(row, "activity_label", "ctx_a", "ctx_b", "endings"), "label": str(gold)}
    label, _, scene = row["query"].partition(": ")
    endings = [_uncleaned(choice) for choice in row["choices"]]
    original = {"activity_label": f"[]{_doubled(label)}", "ctx_a": f"{_doubled(scene)}[]", "ctx_b": ""}
    shown = clean(f"{original['activity_label']}: {original['ctx_a']} ")
    if shown != row["query"] or [clean(ending) for ending in endings] != row["choices"]:
        raise SchemaError("no original row gives these texts (brackets, or a query without a colon)")
    return {**original, "endings": endings, "label": str(gold)}


def _uncleaned(text: str) -> str:
    """A text of which `clean` makes ``text``: an empty mark at either end saves the spaces there."""
    return f"[]{_doubled(text)}[]"


def _doubled(text: str) -> str:
    """Runs of spaces twice as long: `clean` halves them."""
    return text.replace("  ", "    ")


def _arc(row: Row, gold: int) -> Row:
    stem, texts, labels, key = arc_parts(row)
    return {"question": stem, "choices": {"text": texts, "label": labels}, "answerKey": key}


# By lm_eval's folder.
_FORMS: Mapping[str, Callable[[Row, int], Row]] = {
    "lambada": lambda row, gold: _take(row, "text"),
    "piqa": lambda row, gold: {**_take(row, "goal", "sol1", "sol2"), "label": gold},
    "hellaswag": _hellaswag,
    "winogrande": lambda row, gold: {
        **_take(row, "sentence", "option1", "option2"),
        "answer": str(gold + 1),
    },
    "arc": _arc,
    "siqa": lambda row, gold: {
        **_take(row, "context", "question", "answerA", "answerB", "answerC"),
        "label": str(gold + 1),
    },
}
