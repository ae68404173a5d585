"""How a recipe's TOML files become one table: named bases, ``extends``, then ``--set`` overrides."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["RECIPES", "merge", "override", "read_layers", "recipe_names"]

RECIPES = Path(__file__).parent / "recipes"


def recipe_names() -> list[str]:
    """Names of the shipped recipes: the TOML files in ``launch/recipes`` itself (sub-folders hold parts)."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def read_layers(reference: str) -> dict[str, Any]:
    """Table of ``NAME_OR_PATH[+PART...]``, each file over those it extends, later parts over earlier.

    Raises:
        ValueError: the file is not TOML, or files extend each other in a circle.
        FileNotFoundError: no recipe has that name; the message lists the closest.
    """
    table: dict[str, Any] = {}
    for part in _parts(reference):
        _lay(table, _read(_find(part, beside=None), seen=()))
    return table


def _lay(table: dict[str, Any], layer: Mapping[str, Any]) -> None:
    """`merge`, but a mixture replaces a single source, and a source a mixture: a recipe has one of them."""
    for given, other in (("mixture", "source"), ("source", "mixture")):
        if layer.get("data", {}).get(given):
            table.get("data", {}).pop(other, None)
    merge(table, layer)


def _parts(reference: str) -> Iterator[str]:
    """Split at every +, except inside the path of a file that is there."""
    pieces = reference.split("+")
    while pieces:
        joined = ["+".join(pieces[:count]) for count in range(1, len(pieces) + 1)]
        paths = [part for part in joined if part.endswith(".toml") and Path(part).is_file()]
        part = max(paths, key=len, default=pieces[0])
        yield part
        pieces = pieces[joined.index(part) + 1 :]


def merge(table: dict[str, Any], layer: Mapping[str, Any]) -> None:
    """Lay ``layer`` over ``table`` in place: tables merge key by key, everything else is replaced."""
    for key, value in layer.items():
        if isinstance(value, Mapping) and isinstance(table.get(key), dict):
            merge(table[key], value)
        else:
            table[key] = dict(value) if isinstance(value, Mapping) else value


def override(table: dict[str, Any], assignments: Iterable[str]) -> None:
    """Apply ``a.b=c`` in place; ``c`` is TOML, null or a bare string; an empty one means the default.

    TOML has no null: without it a key whose default is a value could not be left without one.
    """
    for assignment in assignments:
        dotted, separator, text = assignment.partition("=")
        keys = [key.strip() for key in dotted.split(".")]
        if not separator or not all(keys):
            raise ValueError(f"--set {assignment}: write it as --set section.key=value")
        target = table
        for key in keys[:-1]:
            target = target.setdefault(key, {})
            if not isinstance(target, dict):
                raise ValueError(f"--set {assignment}: {key} is a value, not a section")
        if text.strip():
            target[keys[-1]] = _value(text.strip())
        else:
            target.pop(keys[-1], None)


def _value(text: str) -> Any:
    if text == "null":
        return None
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if len(parsed) == 1 else text


def _read(path: Path, *, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path in seen:
        raise ValueError(
            f"recipe {path}: it extends itself through {' -> '.join(p.stem for p in (*seen, path))}"
        )
    try:
        own = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {path}: not valid TOML: {error}") from error
    bases = own.pop("extends", [])
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ValueError(f"recipe {path}: extends = {bases!r}: write a list of recipe names or paths")
    table: dict[str, Any] = {}
    for base in bases:
        _lay(table, _read(_find(base, beside=path.parent), seen=(*seen, path)))
    _lay(table, own)
    return table


def _find(reference: str, *, beside: Path | None) -> Path:
    folders = [folder for folder in (beside, RECIPES) if folder is not None]
    candidates = [folder / f"{reference}.toml" for folder in folders]
    if reference.endswith(".toml"):
        candidates = [folder / reference for folder in (*folders, Path.cwd())]
    for candidate in candidates:
        if candidate.is_file():
            return candidate.resolve()
    known = sorted(str(path.relative_to(RECIPES).with_suffix("")) for path in RECIPES.rglob("*.toml"))
    near = difflib.get_close_matches(reference, known, n=3, cutoff=0.5) or recipe_names()
    raise FileNotFoundError(
        f"no recipe {reference!r}: give a path ending in .toml or one of {', '.join(near)}"
    )
