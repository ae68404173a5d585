"""What a memory kept of something until it was asked for, against whether it was recalled.

A Trellis memory is multiplied by beta at every token, so of what was written t tokens ago it keeps the
product of those gates: ``retention`` is its logarithm, the sum of log beta over the gap (0: everything;
nats), of each head by itself, because a needle that one head keeps is kept.

Every head of every layer is looked at, so that the largest of many correlations is large by chance. Its p is
that of the maximum: how often, with the answers shuffled within each length, any head reaches as much
(Westfall and Young); 0.05 is then the chance of one false find among all of them.

Shapes: N items, L Trellis layers, P passes (keys; values too where their gate is another), H heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evals.figures.correlation import correlation
from evals.samples import share

__all__ = ["PARTS", "Items", "accuracy", "against_recall"]

Array = NDArray[np.float64]
# Items that are not what most of their group are, from which a correlation is given. Simulated without one,
# 95% intervals held 0 in 87 to 91% of cases at 3 to 6 of them (of 60 to 120), 91 to 92% at 12, 94% at 30.
OTHERS = 10
# Equal parts of the items by retention; shuffles of the answers.
PARTS, SHUFFLES = 4, 2000


@dataclass(frozen=True)
class Items:
    """Items that were read.

    Attributes:
        layers: numbers of the Trellis layers.
        passes: whose gates: ("keys",), or ("keys", "values") where those have their own.
        retention: sum of log beta over each item's gap [N, L, P, H].
        right: 1 or 0, or a share of answers [N].
        groups: what an item is one of: a length in tokens, or "pairs/tokens".
        chance: of each group the percentage that a guess gets.
    """

    layers: tuple[int, ...]
    passes: tuple[str, ...]
    retention: Array
    right: Array
    groups: tuple[str, ...]
    chance: Mapping[str, float]


def accuracy(items: Items) -> list[dict[str, Any]]:
    """Of each group "items", "percent" right with "low" and "high" (Wilson, 95%), and "chance"."""
    names = np.array(items.groups)
    return [
        {"group": name, **_share(items.right[names == name]), "chance": items.chance[name]}
        for name in dict.fromkeys(items.groups)
    ]


def _share(right: Array) -> dict[str, Any]:
    found = share(right.tolist())
    return {"items": len(right), "percent": found["score"], "low": found["low"], "high": found["high"]}


def against_recall(items: Items) -> dict[str, Any]:
    """Retention against being right, of the groups whose accuracy lies above chance.

    Longer prompts are harder and are kept less: both are centred within each group, so that a correlation is
    one between items of one group.

    Returns:
        "reason" why there is none, or ""; "groups" that were used; "looked_at", the correlations that were
        made; "heads": per layer, pass and head "r" with "low" and "high" (95% bootstrap, of this head by
        itself) and "p" (of all of them); "layers": per layer "parts", accuracies of the items by retention
        (`_parts`).
    """
    used = [row["group"] for row in accuracy(items) if row["low"] > row["chance"]]
    found: dict[str, Any] = {"reason": "", "groups": used, "looked_at": 0, "heads": [], "layers": []}
    if not used:
        return found | {"reason": "accuracy is nowhere above chance"}
    kept = _part(items, np.isin(items.groups, used))
    names = np.array(kept.groups)
    if sum(_others(kept.right[names == name]) for name in used) < OTHERS:
        return found | {"reason": f"fewer than {OTHERS} items are not what most of their length are"}
    heads = list(_heads(kept))
    return found | {"looked_at": len(heads), "heads": heads, "layers": list(_layers(kept))}


def _part(items: Items, chosen: NDArray[np.bool_]) -> Items:
    groups = tuple(name for name, one in zip(items.groups, chosen) if one)
    kept, right = items.retention[chosen], items.right[chosen]
    return Items(items.layers, items.passes, kept, right, groups, items.chance)


def _others(right: Array) -> int:
    """Items that are not what most are."""
    return len(right) - int(np.unique(right, return_counts=True)[1].max())


def _centred(x: Array, groups: tuple[str, ...]) -> Array:
    result, names = x.astype(np.float64), np.array(groups)
    for name in set(groups):
        result[names == name] -= x[names == name].mean(0)
    return result


def _heads(items: Items) -> Iterator[dict[str, Any]]:
    """Of each head that forgets differently from item to item."""
    x = _centred(items.retention, items.groups).reshape(len(items.right), -1)
    y = _centred(items.right, items.groups)
    found = {place: correlation(x[:, place], y) for place in range(x.shape[1]) if np.ptp(x[:, place]) > 1e-12}
    known = {place: one for place, one in found.items() if one is not None}
    largest = _largest(x[:, list(known)], items.right, items.groups)
    for place, one in known.items():
        layer, of_pass, head = np.unravel_index(place, items.retention.shape[1:])
        p = (1 + int((largest >= abs(one["r"]) - 1e-12).sum())) / (1 + len(largest))
        which = {"layer": items.layers[layer], "pass": items.passes[of_pass], "head": int(head)}
        yield {**which, **one, "p": p}


def _largest(x: Array, right: Array, groups: tuple[str, ...]) -> Array:
    """Of each shuffle of the answers within their groups the largest |r| of any column of ``x`` [N, K]."""
    rng, names = np.random.default_rng(0), np.array(groups)
    shuffled = np.tile(_centred(right, groups), (SHUFFLES, 1))
    for name in set(groups):
        places = np.flatnonzero(names == name)
        shuffled[:, places] = rng.permuted(shuffled[:, places], axis=1)
    unit = x / np.linalg.norm(x, axis=0)
    r: Array = np.abs(shuffled @ unit) / np.linalg.norm(shuffled[0])
    most: Array = r.max(1, initial=0.0)
    return most


def _layers(items: Items) -> Iterator[dict[str, Any]]:
    for place, layer in enumerate(items.layers):
        mean = items.retention[:, place].mean((1, 2))
        if np.ptp(_centred(mean, items.groups)) > 1e-12:
            yield {"layer": layer, "parts": list(_parts(mean, items))}


def _parts(retention: Array, items: Items) -> Iterator[dict[str, Any]]:
    """From what was kept least to what was kept most, each group by itself: accuracy and mean retention."""
    part, names = np.zeros(len(retention), dtype=int), np.array(items.groups)
    for name in set(items.groups):
        places = np.flatnonzero(names == name)
        part[places[retention[places].argsort(kind="stable")]] = PARTS * np.arange(len(places)) // len(places)
    for number in range(PARTS):
        chosen = part == number
        if chosen.any():
            yield {"retention": float(retention[chosen].mean()), **_share(items.right[chosen])}
