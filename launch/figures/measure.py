"""Everything that `trellis figures` shows of a run, as one mapping of plain numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from evals.config import EvalConfig
    from evals.runs import LoadedRun
    from evals.scorer import Ids

__all__ = ["Extent", "measure"]

FORMAT = 2
# Positions are shown in so many equal parts of the text, which is as often as norms are taken.
PARTS = 64
FIRST_LENGTH, LAST_LENGTH = 512, 16384


@dataclass(frozen=True, kw_only=True)
class Extent:
    """How much is read.

    Attributes:
        tokens: of the long text, and of a row of its loss.
        items: needles of each length, rows of multi-query recall of each number of pairs, questions of each
            suite.
        suites: folder of the suites' rows; None leaves reasoning items out.
    """

    tokens: int
    items: int
    suites: Path | None = None


def measure(
    run: LoadedRun,
    text: str,
    extent: Extent,
    *,
    others: Sequence[LoadedRun] = (),
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """All sections, by name; those on gates are left out of a model without Trellis layers.

    Of ``others`` there are losses by position and speeds, to be set beside the run's.

    Raises:
        ValueError: a text of fewer than PARTS tokens, one too short for the items, or another run whose
            tokenizer is another one.
    """
    from evals.figures.trace import trellis_mixers
    from launch.figures.training import at_checkpoints, own_looks
    from launch.machine import commit, machine

    ids = run.tokenizer.encode(text[: 16 * extent.tokens])[: extent.tokens]
    if len(ids) < PARTS:
        raise ValueError(f"the text has {len(ids)} tokens: give one of {PARTS} or more, best of thousands")
    found: dict[str, Any] = {
        "format": FORMAT,
        "run": run.name,
        "step": run.step,
        "digest": run.digest,
        "tokens": len(ids),
        "commit": commit(),
        "machine": machine(),
        "layers": sorted(trellis_mixers(run.model)),
    }
    _refuse_other_tokenizers(run, others, text[: 16 * extent.tokens])
    say("loss by position")
    found["losses"] = _losses(run, text[: 64 * extent.tokens], len(ids))
    found |= _of_gates(run, ids, extent, say=say) if found["layers"] else _recall_alone(run, extent, say=say)
    found["training"] = own_looks(run.run_dir)
    if found["layers"]:
        found["checkpoints"] = at_checkpoints(run, text, suites=extent.suites, say=say)
    return found | _beside(run, others, text[: 64 * extent.tokens], extent, row=len(ids), say=say)


def _refuse_other_tokenizers(run: LoadedRun, others: Sequence[LoadedRun], text: str) -> None:
    ids = run.tokenizer.encode(text)
    for other in others:
        if other.tokenizer.encode(text) != ids:
            raise ValueError(
                f"{other.run_dir} has another tokenizer than {run.run_dir}: losses per token cannot stand in "
                "one chart; name runs of one tokenizer"
            )


def _beside(
    run: LoadedRun,
    others: Sequence[LoadedRun],
    text: str,
    extent: Extent,
    *,
    row: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Speeds of the run; of the others losses by position and speeds, all taken in turns."""
    from evals.figures.speed import prefill_speeds

    rest = []
    for other in others:
        say(f"loss by position of {other.name}")
        about = {"run": other.name, "step": other.step, "digest": other.digest}
        rest.append({**about, "losses": _losses(other, text, row)})
    say("throughput")
    lengths = [FIRST_LENGTH]
    while 2 * lengths[-1] <= min(LAST_LENGTH, extent.tokens):
        lengths.append(2 * lengths[-1])
    speeds, *of_others = prefill_speeds([run, *others], lengths)
    others_too = [{**one, "speeds": own} for one, own in zip(rest, of_others)]
    return {"speeds": speeds, "others": others_too}


def _losses(run: LoadedRun, text: str, length: int) -> dict[str, Any]:
    from evals.scorer import Scorer
    from evals.text_losses import score_text

    result = score_text(Scorer(run.model, run.tokenizer), [text], length=length)
    return {key: result[key] for key in ("model", "by_position", "targets", "bytes", "length")}


def _of_gates(
    run: LoadedRun, ids: Ids, extent: Extent, *, say: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    from evals.figures.ablation import losses_held_open
    from evals.figures.reasoning import against_prose, item_texts
    from evals.states import context_start

    say("gates and memories on the text")
    row = [*context_start(run.tokenizer, ids), *ids][: len(ids)]
    found: dict[str, Any] = {"text": _on_text(run, row)}
    say("losses with gates held open")
    found["held_open"] = losses_held_open(run, row)
    if extent.suites is not None:
        found["reasoning"] = {}
        for name, items in item_texts(extent.suites, limit=extent.items).items():
            say(f"gates on {name}")
            rows = against_prose(run, items, ids, piece=_piece(len(ids)))
            found["reasoning"][name] = {"items": len(items), "layers": rows}
    say("gates and recall")
    found["recall"] = _recall(run, extent)
    return found


def _piece(tokens: int) -> int:
    return -(-tokens // PARTS)


def _on_text(run: LoadedRun, row: Ids) -> dict[str, Any]:
    """Per layer and head, by position: gates (means of parts), norms (at their ends)."""
    import torch

    from evals.figures.trace import trace

    piece = _piece(len(row))
    seen = trace(run.model, torch.tensor([row], device=run.device), piece=piece)
    value = {} if seen.value_gate is None else {"value_gate": _parts(seen.value_gate[0], piece)}
    return {
        "ends": list(seen.ends),
        "gate": _parts(seen.gate[0], piece),
        **value,
        "step": _parts(seen.step[0], piece),
        "key_norm": seen.key_norm[0].tolist(),
        "value_norm": seen.value_norm[0].tolist(),
    }


def _parts(values: Tensor, piece: int) -> list[list[list[float]]]:
    """Means [L, H, P] of ``values`` [L, H, T] over parts of ``piece`` tokens, the last one shorter."""
    import torch

    return torch.stack([part.mean(-1) for part in values.split(piece, dim=-1)], -1).tolist()


def _recall(run: LoadedRun, extent: Extent) -> dict[str, Any]:
    """Needles and multi-query recall: accuracy by group, and what memories kept against it."""
    from evals.figures.retention import against_recall
    from evals.figures.retrieval import mqar_items, needle_items

    config = _config(run)
    lengths = _needle_lengths(config, extent)
    piece = _piece(extent.tokens)
    found = {}
    needles, shares = needle_items(run, lengths=lengths, count=extent.items, piece=max(piece, max(lengths)))
    found["needle"] = {"accuracy": shares, "retention": against_recall(needles)}
    rows, shares = mqar_items(run, config, count=extent.items, piece=max(piece, min(config.mqar_length)))
    found["mqar"] = {"accuracy": shares, "retention": against_recall(rows)}
    return found


def _needle_lengths(config: EvalConfig, extent: Extent) -> list[int]:
    lengths = sorted(set(config.ruler_lengths))
    return [n for n in lengths if n <= extent.tokens] or lengths[:1]


def _recall_alone(run: LoadedRun, extent: Extent, *, say: Callable[[str], None]) -> dict[str, Any]:
    """Of a model without Trellis layers: accuracies, as the evaluation has them."""
    import dataclasses

    from evals.tasks.registry import get_task

    say("recall")
    config, found = _config(run), {}
    config = dataclasses.replace(
        config,
        ruler_lengths=tuple(_needle_lengths(config, extent)),
        ruler_samples=extent.items,
        mqar_samples=extent.items,
        mqar_length=(min(config.mqar_length),),
    )
    for name, task in (("needle", "niah_single_1"), ("mqar", "mqar")):
        result = get_task(task).run(run, config, False)
        rows = result["rows"] if name == "needle" else []
        groups = {str(row["length"]): row["choice"] for row in rows} or result["groups"]
        found[name] = {"accuracy": [_accuracy(name, group, one) for group, one in groups.items()]}
    return {"recall": found}


def _accuracy(name: str, group: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """A group of a task's result as `evals.figures.retention.accuracy` has it."""
    from evals.tasks.ruler import CHANCE

    chance = CHANCE if name == "needle" else 100.0 / int(group.partition("/")[0])
    ends = {key: found[key] for key in ("low", "high")}
    return {"group": group, "items": found["samples"], "percent": found["score"], **ends, "chance": chance}


def _config(run: LoadedRun) -> EvalConfig:
    """The recipe's evals section, without the tasks that need more than the run."""
    from pydantic import TypeAdapter

    from evals.config import EvalConfig

    section: Mapping[str, Any] = {**run.recipe.get("evals", {}), "tasks": []}
    return TypeAdapter(EvalConfig).validate_json(json.dumps(section))
