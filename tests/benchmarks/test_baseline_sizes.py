"""The page of the baselines says what the code counts, of every kind, and every kind has a recipe part."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from benchmarks import baseline_sizes
from launch.recipe import load_recipe
from trellis_dist.models.baseline_config import BASELINES
from trellis_dist.models.config import LayerKind

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "baselines.md").read_text(encoding="utf-8")


def test_the_page_has_the_table() -> None:
    assert baseline_sizes.table() in PAGE


def test_the_page_has_a_line_for_every_kind_and_recipe_part() -> None:
    for kind in BASELINES:
        assert f"| `{kind}` |" in PAGE, kind
    for part in (ROOT / "launch" / "recipes" / "mixers").glob("*.toml"):
        assert f"`mixers/{part.stem}`" in PAGE, part.stem


@pytest.mark.parametrize("kind", sorted(set(get_args(LayerKind)) - {"trellis", "sliding_window"}))
def test_a_part_makes_every_layer_of_one_kind(kind: str) -> None:
    assert load_recipe(f"125m-c4+mixers/{kind.replace('_', '-')}").model.pattern == (kind,)


def test_the_hybrid_part_has_windows_between_trellis_layers() -> None:
    model = load_recipe("125m-c4+mixers/trellis-window").model
    assert model.pattern == ("trellis", "sliding_window")
    assert model.attention.sliding_window == 256
