"""The quickstart's result as the README shows it: ``python -m benchmarks.quickstart [RUN]``.

Reads a finished run folder (default runs/quickstart), writes benchmarks/results/quickstart.json and the
picture of the README, docs/quickstart.png. Nothing is measured here: the numbers are the run's own. The
picture needs matplotlib, which the quickstart does not install.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import machine, versions
from trellis_dist.files import read_json, write_json

__all__ = ["main"]

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "quickstart.json"
PICTURE = ROOT / "docs" / "quickstart.png"


def collect(run: Path) -> dict[str, Any]:
    """The record: where it ran, on which text, and the run's summary.

    Raises:
        FileNotFoundError: the run has not finished.
        ValueError: its validation curve is not on the text that the baselines are scored on.
    """
    if not (run / "summary.json").is_file():
        raise FileNotFoundError(f"{run} has no summary.json: finish it with trellis run quickstart")
    recipe = read_json(run / "recipe.json")
    if recipe["training"]["validation_rows"]:
        raise ValueError(
            f"{run} validated on a part of the split: train it with training.validation_rows = 0"
        )
    manifest = read_json(Path(recipe["data"]["directory"]) / "manifest.json")
    corpus = {key: manifest[key] for key in ("fingerprint", "source")}
    corpus["splits"] = {
        name: {key: split[key] for key in ("documents", "tokens", "bytes")}
        for name, split in manifest["splits"].items()
    }
    record = {"machine": machine(), "versions": versions(), "corpus": corpus}
    return {**record, "summary": read_json(run / "summary.json")}


def draw(run: Path, record: dict[str, Any], path: Path) -> None:
    """Training and validation loss over tokens, with the bigram the model has to beat."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    figure, axes = plt.subplots(figsize=(8, 3.6), dpi=150)
    for key, style in (
        ("loss/train", {"lw": 1, "alpha": 0.6}),
        ("loss/validation", {"lw": 2, "marker": "o"}),
    ):
        points = [(row["tokens"] / 1e6, row[key]) for row in rows if row.get(key) is not None]
        axes.plot(*zip(*points), label=key, **style)
    for name, dash in (("unigram", ":"), ("bigram", "--")):
        axes.axhline(_nats(record, name), color="black", ls=dash, lw=1, label=f"{name}, held out")
    python, fingerprint = record["versions"]["python"], record["corpus"]["fingerprint"][:12]
    axes.set_title(f"quickstart: the library of Python {python}, corpus {fingerprint}", fontsize=10)
    axes.set_xlabel("tokens (millions)")
    axes.set_ylabel("nats per token")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})


def _nats(record: dict[str, Any], name: str) -> float:
    """A baseline's bits per byte as nats per token of the same held-out text."""
    summary = record["summary"]
    per_token = summary["validation/loss"] / summary["validation/bits_per_byte"]
    return float(summary[f"baseline/{name}_bits_per_byte"] * per_token)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the JSON, and the picture where there is a matplotlib to draw it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("run", nargs="?", type=Path, default=ROOT / "runs" / "quickstart")
    run = parser.parse_args(arguments).run
    record = collect(run)
    write_json(RESULT, record)
    print(f"wrote {RESULT}")
    if importlib.util.find_spec("matplotlib") is None:
        pip = shlex.join([sys.executable, "-m", "pip", "install", "-c", str(ROOT / "constraints.txt")])
        print(f"{PICTURE} is not drawn anew: matplotlib is missing; {pip} matplotlib, and run this again")
        return
    draw(run, record, PICTURE)
    print(f"wrote {PICTURE}")


if __name__ == "__main__":
    main()
