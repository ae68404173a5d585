"""What every key of a recipe is where the recipe does not say it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any, get_type_hints

from launch.recipe import Recipe

__all__ = ["defaults"]


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
