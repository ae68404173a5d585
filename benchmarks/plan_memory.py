"""What `trellis plan` says of memory against what ranks take: ``python -m benchmarks.plan_memory``.

Measures, in a model of 53M parameters in fp32 on this machine's CPU, what each rank of each case of `CASES`
takes in its second step, and those of `KEPT` again as `trellis train` starts ranks, whose allocator
keeps most of what is freed. Writes benchmarks/results/plan_memory.json, one case after the other: a
run that was killed goes on where it stopped. --only measures the cases that begin so, --again although they
have a result. The estimates beside them are made from the recipe, here and in tests/launch/test_memory.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.machine import machine, versions
from launch.planning.memory import estimate_memory
from launch.ranks import MALLOC
from launch.recipe import Recipe, load_recipe, resolve
from trellis_dist.files import read_json, write_json
from trellis_dist.models.counts import parameter_counts

__all__ = [
    "CASES",
    "KEPT",
    "RESULT",
    "case_recipe",
    "estimated",
    "kept_table",
    "launcher_malloc",
    "main",
    "measure_case",
    "table",
]

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "plan_memory.json"
TIMEOUT_S = 900.0

# 12 layers of width 512 and a vocabulary of 16,384: 53.3M parameters, on rows of 1,024 tokens a rank.
MODEL = (
    "model.vocab_size=16384",
    "data.tokenizer.vocab_size=16000",
    "model.dim=512",
    "model.num_heads=8",
    "data.sequence_length=1024",
    "training.global_batch_tokens=1024",
    "training.micro_batch=1",
    "training.precision=fp32",
    "training.engine=local",
    "mesh.dp=1",
)
_REPLICAS = ("mesh.dp=2", "training.global_batch_tokens=2048", "training.engine=deepspeed")
_SEGMENTS = ("mesh.sp=2", "data.sequence_length=2048", "training.global_batch_tokens=2048")
_ALIGNED = (*_SEGMENTS, "data.chunk_aligned=true")
CASES: dict[str, tuple[str, ...]] = {
    "local": (),
    "ZeRO 1": (*_REPLICAS, "training.zero_stage=1"),
    "ZeRO 2": (*_REPLICAS, "training.zero_stage=2"),
    "ZeRO 3": (*_REPLICAS, "training.zero_stage=3"),
    "sp 2": _ALIGNED,
    "sp 2, ZeRO 1": (*_ALIGNED, "training.engine=deepspeed", "training.zero_stage=1"),
    "sp 2, all-to-all": (*_ALIGNED, 'sequence.mode="all_to_all"'),
    "selective recomputation": ('training.activation_checkpointing="selective"',),
    "full recomputation": ('training.activation_checkpointing="full"',),
    "two rows": ("data.sequence_length=512", "training.micro_batch=2"),
    "accumulation 2": ("training.global_batch_tokens=2048",),
    "ZeRO 1, accumulation 2": (*_REPLICAS, "training.zero_stage=1", "training.global_batch_tokens=4096"),
    "ZeRO 2, accumulation 2": (*_REPLICAS, "training.zero_stage=2", "training.global_batch_tokens=4096"),
    "FSDP2": (*_REPLICAS, "training.engine=fsdp2"),
}
# glibc keeps what is freed in blocks below a threshold that grows with use; fixed, the resident memory
# follows the tensors.
FIXED_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


# The cases that the planner is held to, also with what the launcher's allocator keeps.
KEPT = ("local", "ZeRO 1", "ZeRO 2", "ZeRO 3", "sp 2", "sp 2, ZeRO 1")


def case_recipe(name: str) -> Recipe:
    """The recipe of a case."""
    return load_recipe("125m-c4", [*MODEL, *CASES[name]])


def measure_case(recipe: Recipe, *, kept: bool = False) -> dict[str, Any]:
    """Of the rank that takes most, what `plan_memory_rank` measures; ``kept`` as `trellis train` starts it.

    Raises:
        RuntimeError: a rank failed; its last line.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    count = recipe.mesh.world_size() or 1
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    extra = launcher_malloc() if kept else FIXED_MALLOC
    source, mode = json.dumps(resolve(recipe)), ["kept"] if kept else []
    command = [sys.executable, "-m", "benchmarks.plan_memory_rank", source]
    ranks = [
        subprocess.Popen(
            [*command, *map(str, (i, count, store.port)), *mode],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | extra,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]
    try:
        found = [_result(rank) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return max(found, key=lambda one: one["kept" if kept else "live"])


def launcher_malloc() -> dict[str, str]:
    """What the launcher sets of glibc's allocator for its ranks."""
    return {name: str(size) for name, size in MALLOC.items()}


def _result(rank: subprocess.Popen[str]) -> dict[str, Any]:
    output, errors = rank.communicate(timeout=TIMEOUT_S)
    lines = [line for line in output.splitlines() if line.startswith("FOUND ")]
    if not lines:
        raise RuntimeError(f"a rank ended with {rank.returncode}: {errors[-2000:]}")
    found: dict[str, Any] = json.loads(lines[0].removeprefix("FOUND "))
    return found


def estimated(name: str, part: str = "total") -> int:
    """Bytes that the planner says a rank of the case takes at the most: of live tensors, or "resident"."""
    recipe = case_recipe(name)
    counts = parameter_counts(recipe.model)
    return estimate_memory(recipe, counts=counts, mesh=recipe.mesh, cuda=False)[part]


def table(record: dict[str, Any]) -> str:
    """The record as docs/planning.md has it."""
    lines = ["| case | plan, MB | live, MB | plan / live | resident, MB | plan / resident |"]
    lines.append("|---|---|---|---|---|---|")
    for name in (name for name in CASES if name in record["cases"]):
        found = record["cases"][name]
        plan, live, resident = estimated(name), found["live"], found["resident"]
        lines.append(
            f"| {name} | {plan / 1e6:,.0f} | {live / 1e6:,.0f} | {plan / live:.3f} | {resident / 1e6:,.0f} | "
            f"{plan / resident:.3f} |"
        )
    return "\n".join(lines)


def kept_table(record: dict[str, Any]) -> str:
    """What ranks took with the launcher's allocator, as docs/planning.md has it."""
    lines = ["| case | plan resident, MB | resident, MB | plan / measured |", "|---|---|---|---|"]
    for name in (name for name in KEPT if name in record["kept"]):
        plan, kept = estimated(name, "resident"), record["kept"][name]["kept"]
        lines.append(f"| {name} | {plan / 1e6:,.0f} | {kept / 1e6:,.0f} | {plan / kept:.3f} |")
    return "\n".join(lines)


def main() -> int:
    """Measure what is left and write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULT, help="the JSON")
    parser.add_argument("--only", default="", help="measure the cases that begin so")
    parser.add_argument("--again", action="store_true", help="measure them although they have a result")
    parser.add_argument("--show", action="store_true", help="print the table of what is measured")
    options = parser.parse_args()
    path: Path = options.output
    if options.show:
        print(table(read_json(path)), kept_table(read_json(path)), sep="\n\n")
        return 0
    record = read_json(path) if path.is_file() else {"cases": {}}
    record |= {"machine": machine(), "versions": versions(), "malloc": FIXED_MALLOC}
    record["kept_malloc"] = launcher_malloc()
    kept = record.setdefault("kept", {})
    for name in KEPT:
        if name.startswith(options.only) and (name not in kept or options.again):
            kept[name] = measure_case(case_recipe(name), kept=True)
            print(name, json.dumps(kept[name]), flush=True)
            write_json(path, record)
    for name in CASES:
        if not name.startswith(options.only) or (name in record["cases"] and not options.again):
            continue
        record["cases"][name] = measure_case(case_recipe(name))
        print(name, json.dumps(record["cases"][name]), flush=True)
        write_json(path, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
