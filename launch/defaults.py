"""What every key of a recipe is where the recipe does not say it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any, get_type_hints

from launch.recipe import Recipe, dotted_items

__all__ = ["changed", "defaults"]


def defaults(section: type = Recipe, prefix: str = "") -> dict[str, Any]:
    """Default of every dotted key that has one; a key that a recipe must give is absent."""
    return dict(_defaults(section, prefix))


def _defaults(section: type, prefix: str) -> Iterator[tuple[str, Any]]:
    hints = get_type_hints(section)
    for item in dataclasses.fields(section):
        if dataclasses.is_dataclass(hints[item.name]):
            yield from _defaults(hints[item.name], f"{prefix}{item.name}.")
        elif item.default is not dataclasses.MISSING:
            yield f"{prefix}{item.name}", json.loads(json.dumps(item.default))


def changed(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key -> default, of the keys whose value in a resolved recipe is another one."""
    known = defaults()
    return {key: known[key] for key, value in dotted_items(resolved) if key in known and known[key] != value}
