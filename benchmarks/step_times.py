"""Busy seconds of every rank in clean steps: what the straggler detector must stay silent on.

    python -m benchmarks.step_times         writes benchmarks/results/step_times.json, about 5 minutes

A small model trains for 1,000 steps on 2 ranks with the local engine and on 4 with ZeRO 1, over gloo on this
machine, and each rank's busy time (``watch.busy.BusyTimer``) is kept in microseconds. Whatever else the
machine does meanwhile is in the times: noise is what the record is for.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.local_ranks import join
from benchmarks.machine import machine, versions
from trellis_dist.files import atomic_write, read_json

RESULT = Path(__file__).parent / "results" / "step_times.json"
RUNS = {"2 ranks, local": (2, "local"), "4 ranks, ZeRO 1": (4, "deepspeed")}
STEPS, WARM_UP = 1000, 20
LENGTH, ROWS, VOCABULARY = 64, 4, 512


def train(rank: int, world_size: int, port: int, engine_name: str, steps: int, into: Any) -> None:
    """One rank: train, and put (rank, busy microseconds of every step after the warm-up) into the queue."""
    join(rank, world_size, port, timeout_s=300.0)
    import torch

    from trellis_dist.parallel import env
    from trellis_dist.training.watch.busy import BusyTimer

    engine = _engine(engine_name)
    timer, times = BusyTimer(engine.forward_module, device=torch.device("cpu")), []
    for step in range(WARM_UP + steps):
        batches = _batches(step * world_size + rank)
        env.agree(True)  # as the loop does: all begin a step together
        timer.begin()
        engine.train_step(batches, lr=1e-3, valid_tokens=world_size * ROWS * LENGTH)
        times.append(round(timer.finish() * 1e6))
    into.put((rank, times[WARM_UP:]))


def _engine(name: str) -> Any:
    from trellis_dist.models.config import ModelConfig, TrellisConfig
    from trellis_dist.models.language_model import build_language_model
    from trellis_dist.parallel.apply import apply_parallelism
    from trellis_dist.parallel.config import MeshConfig
    from trellis_dist.parallel.mesh import build_mesh
    from trellis_dist.training.config import OptimizerConfig, TrainingConfig
    from trellis_dist.training.engines.factory import build_engine

    trellis = TrellisConfig(slots=16, chunk_size=32)
    config = ModelConfig(vocab_size=VOCABULARY, num_layers=1, dim=64, num_heads=2, trellis=trellis)
    model, mesh = build_language_model(config, seed=0, device="cpu"), build_mesh(MeshConfig())
    training = TrainingConfig(steps=1, global_batch_tokens=LENGTH, engine=name, precision="fp32")  # type: ignore[arg-type]
    segments = apply_parallelism(model, mesh)
    return build_engine(model, training, optimizer=OptimizerConfig(), mesh=mesh, segments=segments)


def _batches(seed: int) -> list[Any]:
    """Two micro-batches of random tokens."""
    import torch

    from data_pipeline.loader import Batch

    rows = ROWS // 2
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (2, rows, LENGTH + 1), generator=generator)
    starts = torch.arange(0, rows * LENGTH + 1, LENGTH, dtype=torch.int32)
    return [
        Batch(
            tokens=part[:, :-1].contiguous(),
            labels=part[:, 1:].contiguous(),
            cu_seqlens=starts,
            valid_tokens=rows * LENGTH,
        )
        for part in tokens
    ]


def record(world_size: int, engine: str, steps: int) -> list[list[int]]:
    """Busy microseconds [rank][step] of a run on ``world_size`` ranks of this machine."""
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    ranks = [
        context.Process(target=train, args=(rank, world_size, store.port, engine, steps, queue), daemon=True)
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    found = dict(queue.get(timeout=1800) for _ in ranks)
    for process in ranks:
        process.join()
    return [found[rank] for rank in range(world_size)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Record every run and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    runs = {}
    for name, (world_size, engine) in RUNS.items():
        times = record(world_size, engine, options.steps)
        runs[name] = times
        middle = [f"{statistics.median(one) / 1000:.1f}" for one in times]
        print(f"{name}: median busy milliseconds per rank {', '.join(middle)}")
    write(
        options.output, {"machine": machine(), "versions": versions(), "unit": "microseconds", "runs": runs}
    )


def write(path: Path, result: dict[str, Any]) -> None:
    """JSON with one line per rank, so that the file stays small and a diff readable."""
    import json

    runs = ",\n".join(
        f"  {json.dumps(name)}: [\n   "
        + ",\n   ".join(json.dumps(rank, separators=(",", ":")) for rank in ranks)
        + "]"
        for name, ranks in result["runs"].items()
    )
    head = json.dumps(
        {key: value for key, value in result.items() if key != "runs"}, sort_keys=True, indent=1
    )
    atomic_write(path, f'{head[:-2]},\n "runs": {{\n{runs}}}\n}}\n')
    assert read_json(path)["runs"] == result["runs"], "the file must say what was measured"


if __name__ == "__main__":
    main()
