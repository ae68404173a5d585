"""Writes docs/configuration.md from the configuration itself: ``python -m launch.config_docs``.

A table typed by hand goes stale with the first new key; tests/launch/test_config_docs.py fails when the page
is not what this module writes.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

from launch.recipe import Recipe

__all__ = ["main", "render"]

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"

INTRODUCTION = """# Configuration

One TOML file is a whole run. `trellis plan RECIPE` prints the resolved recipe, what differs from the
defaults, parameter counts, the batch equation and memory per rank, and starts nothing. Recipes are found by
name in `launch/recipes/` or by path; `extends = ["sizes/350m", "corpora/c4"]` composes them,
`RECIPE+contexts/16k` adds a layer on the command line, and `--set section.key=value` overrides last. An
unknown key or an impossible combination is refused with key, value and remedy. The resolved recipe is saved
in the run folder as `recipe.json`.

This page is written by `python -m launch.config_docs` from the configuration classes.
"""


def render() -> str:
    """The page, Markdown."""
    parts = [INTRODUCTION]
    for title, kind in _sections("", Recipe):
        parts.append(
            f"\n## {title or 'The recipe'}\n\n{_summary(kind).replace('``', '`')}\n\n{_table(title, kind)}"
        )
    return "".join(parts)


def _sections(prefix: str, kind: type) -> Iterator[tuple[str, type]]:
    yield prefix, kind
    hints = get_type_hints(kind)
    for item in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[item.name]):
            yield from _sections(f"{prefix}.{item.name}".lstrip("."), hints[item.name])


def _summary(kind: type) -> str:
    return (inspect.getdoc(kind) or "").split("\n\nAttributes:")[0]


def _table(title: str, kind: type) -> str:
    meanings = attribute_docs(kind)
    rows = ["| key | default | meaning |\n|---|---|---|\n"]
    for item in _plain_fields(kind):
        meaning = meanings[item.name].replace("|", "\\|")
        rows.append(f"| `{f'{title}.{item.name}'.lstrip('.')}` | {_default(item)} | {meaning} |\n")
    return "".join(rows)


def _plain_fields(kind: type) -> Iterator[dataclasses.Field[Any]]:
    hints = get_type_hints(kind)
    return (item for item in dataclasses.fields(kind) if not dataclasses.is_dataclass(hints[item.name]))


def attribute_docs(kind: type) -> dict[str, str]:
    """Field name -> its sentence in the class docstring's Attributes section.

    Raises:
        ValueError: a field has none.
    """
    text = (inspect.getdoc(kind) or "").partition("Attributes:\n")[2]
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=    \S)", text.rstrip()):
        names, _, meaning = entry.strip().partition(":")
        for name in names.split(","):
            found[name.strip()] = " ".join(meaning.split()).replace("``", "`")
    missing = [item.name for item in _plain_fields(kind) if item.name not in found]
    if missing:
        raise ValueError(f"{kind.__module__}.{kind.__name__}: no docstring line for {', '.join(missing)}")
    return found


def _default(item: dataclasses.Field[Any]) -> str:
    if item.default is not dataclasses.MISSING:
        return "none" if item.default is None else f"`{json.dumps(item.default)}`"
    return (
        "*required*"
        if item.default_factory is dataclasses.MISSING
        else f"`{json.dumps(item.default_factory())}`"
    )


def main() -> None:
    """Write the page."""
    PAGE.write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    main()
