"""Gates and memories of a run through its training: its own looks, and its saved checkpoints read again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evals.runs import LoadedRun
    from evals.scorer import Ids

__all__ = ["at_checkpoints", "own_looks"]

# What a run's metrics say of its layers (docs/monitoring.md).
PROBES = ("forget_gate", "norm_key", "norm_value")
# Of the text that every checkpoint reads, and of the questions of each suite; how many checkpoints do.
TOKENS, ITEMS, MOST = 2048, 10, 8


def own_looks(run_dir: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """What the run's own looks saw: probe -> layer -> (step, mean over heads); empty without any."""
    from evals.summary import read_metrics

    if not (run_dir / "metrics.jsonl").is_file():
        return {}
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in read_metrics(run_dir):
        for key, value in row.items():
            start, _, probe = key.rpartition("/")
            if probe in PROBES and start.startswith("trellis/layer_"):
                layer = str(int(start.removeprefix("trellis/layer_")))
                found.setdefault(probe, {}).setdefault(layer, []).append((row["step"], value))
    return found


def at_checkpoints(
    run: LoadedRun, text: str, *, suites: Path | None, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The saved checkpoints up to ``run``'s, at most MOST of them, each on the same text and items.

    Returns:
        By step: "prose" and, with ``suites``, "items" and "beside" (as many tokens of the prose): per
        quantity ("gate", "key_norm", "value_norm": means over heads, over tokens or at the end, and over
        texts) a value for each layer, and "positions" (`evals.figures.by_position`); "needle", single needles
        that are right (`evals.figures.retention.accuracy`), and "retention" of them, a mean for each layer.
        Empty where there is one checkpoint. Damaged ones are said and left out.

    Raises:
        ValueError: the text is shorter than an item.
    """
    from checkpoints.commit import list_steps
    from evals.figures.reasoning import item_texts, prose_stretches
    from evals.runs import load_run
    from evals.states import context_ids

    steps = _spread(sorted(step for step in list_steps(run.run_dir / "checkpoints") if step <= run.step))
    if len(steps) < 2:
        return []
    texts = {"prose": [context_ids(run.tokenizer, text[: 16 * TOKENS])[:TOKENS]]}
    if suites is not None:
        items = item_texts(suites, limit=ITEMS).values()
        texts["items"] = [context_ids(run.tokenizer, item) for suite in items for item in suite]
        prose = run.tokenizer.encode(text[: 16 * TOKENS])[:TOKENS]
        texts["beside"] = prose_stretches(run, prose, [len(ids) for ids in texts["items"]])
    found = []
    for step in steps:
        say(f"step {step} on the same text")
        try:
            saved = load_run(run.run_dir, step=step, device=_device(run), dataset_dir=run.dataset_dir)
        except ValueError as error:
            say(f"left out: {error}")
            continue
        read = {name: _read(saved, ids) for name, ids in texts.items()}
        found.append({"step": step, **_needles(saved), **read})
    return found


def _read(run: LoadedRun, texts: Sequence[Ids]) -> dict[str, Any]:
    from evals.figures.by_position import by_position
    from evals.figures.reasoning import NAMES, layer_numbers

    _, numbers = layer_numbers(run, texts, piece=TOKENS)
    return {**dict(zip(NAMES, numbers.mean(0).tolist())), "positions": by_position(run, texts)}


def _needles(run: LoadedRun) -> dict[str, Any]:
    """4 ITEMS single needles at 512 tokens, preferred to nine other numbers, and what was kept of them."""
    from evals.figures.retrieval import needle_items

    items, (share,) = needle_items(run, lengths=[512], count=4 * ITEMS, piece=512)
    return {"needle": share, "retention": items.retention.mean((0, 2, 3)).tolist()}


def _device(run: LoadedRun) -> Any:
    return "cuda" if run.device.type == "cuda" else "cpu"


def _spread(steps: Sequence[int]) -> list[int]:
    """At most MOST of them, evenly, the first and the last among them."""
    if len(steps) <= MOST:
        return list(steps)
    return [steps[round(place * (len(steps) - 1) / (MOST - 1))] for place in range(MOST)]
