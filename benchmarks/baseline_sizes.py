"""What each layer kind costs at the paper's 125M size, counted: ``python -m benchmarks.baseline_sizes``.

Prints the table of docs/baselines.md, which tests/benchmarks/test_baseline_sizes.py holds against it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

from trellis_dist.models.config import LayerKind, ModelConfig
from trellis_dist.models.counts import flops_per_token, memory_elements, parameter_counts, state_bytes

__all__ = ["main", "table"]

POSITION = 2048  # tokens of a row, and of the state


def table() -> str:
    """Markdown: with each kind in every layer, parameters, training FLOPs, and state at ``POSITION``."""
    from launch.recipe import load_recipe

    model = load_recipe("125m-c4").model
    rows = [
        "| layers | parameters | training FLOPs per token | memory of a head | state of a sequence |\n",
        "|---|---:|---:|---:|---:|\n",
    ]
    return "".join(rows + [_row(model, kind) for kind in get_args(LayerKind)])


def _row(model: ModelConfig, kind: LayerKind) -> str:
    config = replace(model, pattern=(kind,))
    parameters = parameter_counts(config).total / 1e6
    flops = flops_per_token(config, sequence_length=POSITION) / 1e6
    kept = memory_elements(config, kind) // config.num_heads
    state = state_bytes(config, position=POSITION, element_bytes=2) / 2**20
    memory = f"{kept:,} numbers" if kept else "keys and values"
    return f"| {kind} | {parameters:.1f}M | {flops:,.0f}M | {memory} | {state:.2f} MiB |\n"


def main() -> None:
    """Print the table."""
    print(table(), end="")


if __name__ == "__main__":
    main()
