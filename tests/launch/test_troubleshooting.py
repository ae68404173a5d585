"""docs/troubleshooting.md: every message it explains is one that the source can say."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
ROOMS = ("launch", "trellis_dist", "checkpoints", "data_pipeline", "evals")
HEADINGS = re.findall(r"^### `(.+)`$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def texts(tree: ast.AST) -> Iterator[str]:
    """Strings, adjoining ones in one piece, with ``...`` where something is filled in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@cache
def said() -> tuple[str, ...]:
    files = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    return tuple(text for path in files for text in texts(ast.parse(path.read_text(encoding="utf-8"))))


def pattern(heading: str) -> re.Pattern[str]:
    return re.compile(".*".join(re.escape(part) for part in heading.split("...")), re.DOTALL)


def test_the_page_has_headings() -> None:
    assert len(HEADINGS) >= 40
    assert len(set(HEADINGS)) == len(HEADINGS)


@pytest.mark.parametrize("heading", HEADINGS)
def test_a_message_is_one_of_the_source(heading: str) -> None:
    longest = max(heading.split("..."), key=len)
    assert len(longest.strip()) >= 8, "a heading this short is found anywhere"
    found = pattern(heading)
    assert any(found.search(text) for text in said())


def test_a_message_that_nobody_says_is_found_out() -> None:
    assert not any(pattern("the flux ... is not aligned with ...").search(text) for text in said())
