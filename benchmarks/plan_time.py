"""The planner's step time against two real ranks: ``python -m benchmarks.plan_time``.

Trains the model of `benchmarks.plan_memory` on two ranks of this machine, one thread each, measures with both
at once how fast their matrix products and their link are, has `trellis plan`'s model predict the step from
these, and writes benchmarks/results/plan_time.json: seconds and tokens/s, predicted and measured, by case;
then its table into docs/planning.md. Under four minutes on two quiet cores; --show prints the record's table.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.kernels.timing import summary
from benchmarks.machine import machine, versions
from benchmarks.plan_memory import case_recipe
from benchmarks.sequence_parallel.ranks import Ranks
from launch.planning.cluster import CPU_CORE, Cluster
from launch.planning.step_time import predict
from launch.recipe import Recipe
from trellis_dist.files import read_json, write_json
from trellis_dist.models.counts import parameter_counts

__all__ = ["CASES", "PAGE", "RESULT", "main", "predicted", "table"]

RESULT = Path(__file__).resolve().parent / "results" / "plan_time.json"
PAGE = RESULT.parents[2] / "docs" / "planning.md"
CASES = ("ZeRO 1", "sp 2", "sp 2, ZeRO 1")
REPETITIONS = 5


def predicted(recipe: Recipe, cluster: Cluster) -> float:
    """Seconds of a step."""
    counts = parameter_counts(recipe.model)
    return predict(recipe, cluster, counts=counts, mesh=recipe.mesh).total


def _products(size: int = 1024) -> float:
    """On one rank: FLOPs a second of matrix products of the model's size, the median of several."""
    import torch

    from trellis_dist.models.linear import matmul_transposed

    a, b = torch.randn(size, 512), torch.randn(2816, 512)
    seconds = []
    for _ in range(40):
        begin = time.perf_counter()
        matmul_transposed(a, b)
        seconds.append(time.perf_counter() - begin)
    return 2.0 * size * 512 * 2816 / median(seconds)


def _step(recipe: Recipe) -> float:
    """On one rank: seconds of a step; the first call trains one more before it."""
    import torch.distributed as dist

    from benchmarks.plan_memory_rank import step

    engine, batches = _prepared(recipe)
    dist.barrier()
    begin = time.perf_counter()
    step(engine, batches)
    return time.perf_counter() - begin


@functools.cache
def _built(source: str) -> Any:
    import json

    import torch.distributed as dist

    from benchmarks.plan_memory_rank import build, make_rows, step
    from launch.recipe import parse_recipe

    recipe = parse_recipe(json.loads(source), source="benchmark")
    found = build(recipe), make_rows(recipe, rank=dist.get_rank())
    step(*found)
    return found


def _prepared(recipe: Recipe) -> Any:
    import json

    from launch.recipe import resolve

    return _built(json.dumps(resolve(recipe)))


def measure(name: str) -> dict[str, Any]:
    """One case: its ranks in processes of their own."""
    recipe = case_recipe(name)
    with Ranks(2) as ranks:
        rates, seconds = [], []
        for _ in range(REPETITIONS):  # in turn: what slows the machine down slows both
            rates.append(min(ranks.run(_products)))
            seconds.append(max(ranks.run(_step, recipe)))
    cluster = dataclasses.replace(CPU_CORE, devices_per_node=2, tflops=median(rates) / 1e12)
    expected, taken = predicted(recipe, cluster), median(seconds)
    tokens = recipe.training.global_batch_tokens
    return {
        "tflops": cluster.tflops,
        "step_seconds": summary(seconds),
        "tokens_per_second": tokens / taken,
        "predicted_step_seconds": expected,
        "predicted_tokens_per_second": tokens / expected,
        "predicted_over_measured": taken / expected,
    }


def table(record: dict[str, Any]) -> str:
    """The record as docs/planning.md has it."""
    lines = [
        "| two ranks | products of a rank, GFLOP/s | step, s | predicted, s | predicted / measured tokens/s |"
    ]
    lines.append("|---|---|---|---|---|")
    for name in (name for name in CASES if name in record["cases"]):
        case = record["cases"][name]
        lines.append(
            f"| {name} | {1e3 * case['tflops']:.0f} | {case['step_seconds']['median']:.1f} | "
            f"{case['predicted_step_seconds']:.1f} | {case['predicted_over_measured']:.2f} |"
        )
    return "\n".join(lines)


def write_page(record: dict[str, Any]) -> None:
    """Put the table where docs/planning.md has it."""
    before, rest = PAGE.read_text(encoding="utf-8").split("<!-- time -->", maxsplit=1)
    _, after = rest.split("<!-- end -->", maxsplit=1)
    text = f"{before}<!-- time -->\n\n{table(record)}\n\n<!-- end -->{after}"
    PAGE.write_text(text, encoding="utf-8")


def main() -> int:
    """Measure all cases, write the record and its table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--show", action="store_true", help="print the table of the record; measure nothing")
    if parser.parse_args().show:
        print(table(read_json(RESULT)))
        return 0
    record: dict[str, Any] = {"machine": machine(), "versions": versions(), "efficiency": CPU_CORE.efficiency}
    record["cases"] = {}
    for name in CASES:
        record["cases"][name] = measure(name)
        print(name, record["cases"][name], flush=True)
    write_json(RESULT, record)
    write_page(record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
