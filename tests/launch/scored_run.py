"""A run folder that the commands can score, export and continue texts with."""

from __future__ import annotations

import json
from pathlib import Path

from launch.recipe import load_recipe, resolve
from tests.evals.conftest import write_dataset, write_run

BASE = Path(__file__).with_name("base.toml")


def write_scored_run(folder: Path) -> Path:
    """FOLDER/runs/tiny: a checkpoint and a whole recipe; its shards are in FOLDER/data."""
    write_dataset(folder / "data")
    run = write_run(folder / "runs" / "tiny", folder / "data")
    table = resolve(load_recipe(str(BASE)))
    own = json.loads((run / "recipe.json").read_text())
    table["model"] = own["model"]
    table["data"]["directory"] = own["data"]["directory"]
    table["data"]["tokenizer"]["vocab_size"] = own["model"]["vocab_size"]
    table["logging"]["progress"] = False
    (run / "recipe.json").write_text(json.dumps(table))
    return run
