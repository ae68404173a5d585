"""What watching a run costs at the default intervals: ``python -m benchmarks.observe``, about six minutes.

Writes benchmarks/results/observe.json and the table of docs/monitoring.md. One process (in the last case two
ranks of one thread each) trains a model in blocks of ten steps of three kinds, which take turns:

    off      the bare steps: nothing is counted, written or looked at
    rows     every step is timed, counted and noted (parts, busy seconds, starts.jsonl, the console); a row of
             metrics at the end (logging.interval = 10), to JSON lines and TensorBoard
    looks    the same, and a look into the memories at the last step (logging.probe_interval = 100)

A run at the default intervals has a row in every ten steps and a look in every hundred, so per step

    cost = (rows - off) / 10 + (looks - rows) / 100          of off / 10

Every round has one block of each kind, in an order that turns; differences are taken inside a round, so that
what else the machine does cancels as far as it lasts longer than a round, and their median is reported. CPU
seconds stand beside wall seconds: they do not grow while another program has the cores. Of two ranks both
are means; which kind a block is follows from its number, so that the ranks do the same.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.hand_made import random_splits
from benchmarks.local_ranks import join
from benchmarks.machine import machine, versions
from checkpoints.config import CheckpointConfig
from data_pipeline.config import DataConfig
from data_pipeline.loader import Batch
from trellis_dist.files import read_json, write_json
from trellis_dist.models.config import ModelConfig, TrellisConfig
from trellis_dist.models.counts import parameter_counts
from trellis_dist.parallel.config import MeshConfig
from trellis_dist.training.collectives import gather_objects, gather_scalars
from trellis_dist.training.config import LoggingConfig, OptimizerConfig, ScheduleConfig, TrainingConfig
from trellis_dist.training.engines.base import StepResult
from trellis_dist.training.job import Job
from trellis_dist.training.metrics_row import RowMeter
from trellis_dist.training.probes import Probes
from trellis_dist.training.run_lock import RunLock
from trellis_dist.training.setup import Session, open_session, runtime

RESULT = Path(__file__).parent / "results" / "observe.json"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "monitoring.md"
HEADING = "## What it costs\n\n"  # the page's last
KINDS = ("off", "rows", "looks")
BLOCK, PROBE_INTERVAL = 10, 100
SEQUENCE = 512
# Of each model: layers, width, heads, vocabulary; slots, rows per step, ranks and rounds.
MODELS = {
    "quickstart": {"shape": (2, 192, 6, 2048), "slots": 32, "rows": 4, "ranks": 1, "rounds": 10},
    "17m": {"shape": (6, 384, 6, 12288), "slots": 64, "rows": 2, "ranks": 1, "rounds": 4},
    "two-ranks": {"shape": (2, 192, 6, 2048), "slots": 32, "rows": 4, "ranks": 2, "rounds": 10},
}
Times = dict[str, tuple[float, float]]  # wall and CPU seconds of a block, by kind


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--rounds", type=int, help="of every model; without it as many as the result has")
    parser.add_argument("--output", type=Path, default=RESULT)
    chosen = parser.parse_args()
    record: dict[str, Any] = {"machine": machine(), "versions": versions()}
    record |= {"block_steps": BLOCK, "probe_interval": PROBE_INTERVAL, "models": {}}
    for name in chosen.models:
        record["models"][name] = measure(name, rounds=chosen.rounds or int(MODELS[name]["rounds"]))
        print(name, record["models"][name]["cost"], flush=True)
    write_json(chosen.output, record)
    if chosen.output == RESULT:
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(page[: page.index(HEADING)] + section(read_json(RESULT)), encoding="utf-8")


def section(record: dict[str, Any]) -> str:
    """The end of the page, from a record."""
    where, lines = record["machine"], []
    for found in record["models"].values():
        wall, cpu = found["wall"], found["cpu"]
        spread = f"{_percent(wall['rows']['first_quartile'])} .. {_percent(wall['rows']['third_quartile'])}"
        shares = [_percent(wall["rows"]["median"]), spread, _percent(wall["looks"]["median"])]
        shares += [f"**{_percent(found['cost'][clock])}**" for clock in ("wall", "cpu")]
        ranks = f"{found['ranks']} ranks" if found["ranks"] > 1 else "1 rank"
        size = f"{found['parameters'] / 1e6:.1f}M parameters, {found['tokens_per_step']:,} tokens, {ranks}"
        lines.append(f"| {size} | {cpu['step_seconds']:.2f} s | {' | '.join(shares)} |\n")
    torch = record["versions"]["torch"]
    machine_line = f"{where['processor']}, {where['cores']} cores, torch {torch}"
    return (
        f"{HEADING}Rows every ten steps and a look every hundred, against the same steps with nothing of it, "
        "in the same processes, taking turns\n(`python -m benchmarks.observe`; medians of the differences "
        f"inside a round; {machine_line}):\n\n"
        "| model and step | step, CPU time | rows | quartiles | looks | together | together, CPU time |\n"
        f"|---|---|---|---|---|---|---|\n{''.join(lines)}\n"
        "A negative number is noise. A row costs the same whatever the model: larger steps pay less.\n"
    )


def _percent(share: float) -> str:
    return f"{share:.2%}"


def measure(name: str, *, rounds: int) -> dict[str, Any]:
    """The blocks of one model, and what follows from them."""
    job_of: dict[str, Any] = MODELS[name]
    with tempfile.TemporaryDirectory() as folder:
        settings = {key: job_of[key] for key in ("shape", "slots", "rows", "ranks")}
        job = make_job(Path(folder) / "set", **settings)
        taken = (on_ranks if job.mesh.dp != 1 else take)(job, Path(folder) / "run", rounds)
    return {
        "parameters": parameter_counts(job.model).total,
        "tokens_per_step": job.training.global_batch_tokens,
        "ranks": job_of["ranks"],
        "rounds": rounds,
        **summary(taken),
    }


def on_ranks(job: Job, run_dir: Path, rounds: int) -> list[Times]:
    """``take`` on ranks of their own."""
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    fixed = (store.port, job, run_dir, rounds, answers)
    ranks = [context.Process(target=_rank, args=(rank, *fixed), daemon=True) for rank in range(job.mesh.dp)]
    for process in ranks:
        process.start()
    taken: list[Times] = answers.get(timeout=900.0)
    for process in ranks:
        process.join()
    return taken


def _rank(rank: int, port: int, job: Job, run_dir: Path, rounds: int, answers: Any) -> None:
    join(rank, job.mesh.dp, port, timeout_s=300.0)
    taken = take(job, run_dir, rounds)
    if rank == 0:
        answers.put(taken)


def take(job: Job, run_dir: Path, rounds: int) -> list[Times]:
    """Blocks of a new run; with several ranks every one calls it and gets the means over all."""
    with runtime(job) as device, RunLock(run_dir) as lock:
        session = open_session(
            job, run_dir, resume="auto", device=device, started=time.monotonic(), lock=lock
        )
        assert session is not None, "a new run has steps to do"
        try:
            of_ranks = gather_objects(Blocks(session).take(rounds))
        finally:
            session.close()
    return [_mean(times) for times in zip(*of_ranks, strict=True)]


def _mean(of_ranks: Sequence[Times]) -> Times:
    def over_ranks(kind: str, clock: int) -> float:
        return statistics.mean(times[kind][clock] for times in of_ranks)

    return {kind: (over_ranks(kind, 0), over_ranks(kind, 1)) for kind in of_ranks[0]}


def make_job(data: Path, *, shape: Sequence[int], slots: int, rows: int, ranks: int) -> Job:
    """A run with nothing due but what is measured; several ranks have one thread each."""
    layers, dim, heads, vocabulary = shape
    random_splits(data, seed=0, vocab_size=vocabulary, lengths=(200, 2000, 8000))
    return Job(
        model=ModelConfig(
            vocab_size=vocabulary,
            num_layers=layers,
            dim=dim,
            num_heads=heads,
            trellis=TrellisConfig(slots=slots, chunk_size=64),
        ),
        mesh=MeshConfig(dp=ranks),
        data=DataConfig(directory=str(data), sequence_length=SEQUENCE),
        optimizer=OptimizerConfig(),
        schedule=ScheduleConfig(),
        training=TrainingConfig(
            steps=10**6,
            global_batch_tokens=rows * SEQUENCE,
            micro_batch=rows // ranks,
            engine="local",
            precision="fp32",
            threads=1 if ranks > 1 else 0,
            first_step_timeout_s=0,
            step_timeout_s=0,
        ),
        checkpoint=CheckpointConfig(interval=10**6),
        logging=LoggingConfig(progress=False, probe_interval=1),
        recipe={},
    )


class Blocks:
    """Steps of one session, watched or not."""

    def __init__(self, session: Session) -> None:
        """Take two steps to warm up."""
        self._session, self._step = session, 0
        self._meter, self._probes = RowMeter(session), Probes(session)
        self._busy = 0.0
        for kind in KINDS:
            self._block(kind, steps=2)

    def take(self, rounds: int) -> list[Times]:
        """One block of each kind a round."""
        found = []
        for number in range(rounds):
            order = KINDS[number % 3 :] + KINDS[: number % 3]
            found.append({kind: self._block(kind) for kind in order})
        return found

    def _block(self, kind: str, *, steps: int = BLOCK) -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        for left in reversed(range(steps)):
            self._one(watched=kind != "off", row=left == 0, look=kind == "looks" and left == 0)
        return time.perf_counter() - wall, time.process_time() - cpu

    def _one(self, *, watched: bool, row: bool, look: bool) -> None:
        """What the loop does in a step, with or without what is to be paid for."""
        session, began = self._session, time.monotonic()
        self._step += 1
        batches = session.loader.micro_batches(session.progress.samples)
        if watched:
            self._meter.begin_step(data_seconds=time.monotonic() - began)
        counted, busy = zip(
            *gather_scalars([sum(batch.valid_tokens for batch in batches), self._busy]), strict=True
        )
        valid = int(sum(counted))
        if watched:
            session.guards.note_busy(self._step - 1, busy)
            self._meter.agreed(valid)
            if look:
                self._probes.before_step(self._step, batches)
            self._meter.begin_passes()
            session.busy.begin()
        result = session.engine.train_step(batches, lr=1e-4, valid_tokens=valid)
        self._busy = session.busy.finish() if watched else 0.0
        progress = session.progress
        progress.step, progress.samples = self._step, progress.samples + session.job.global_rows
        progress.tokens += session.job.training.global_batch_tokens
        if watched:
            self._noted(result, batches, seconds=time.monotonic() - began)
        if watched and row:
            found = self._meter.row(self._step, rate=1e-4, result=result)
            session.metrics.write(found | (self._probes.after_step(self._step) if look else {}))

    def _noted(self, result: StepResult, batches: Sequence[Batch], *, seconds: float) -> None:
        """What the loop notes of a step that is done."""
        session = self._session
        self._meter.end_step(result, seconds=seconds)
        session.starts.note(self._step, seconds)
        speed = session.job.training.global_batch_tokens / seconds
        session.metrics.advance(self._step, loss=result.loss, tokens_per_second=speed)
        session.guards.note_result(self._step, result, batches, samples=session.progress.samples)


def summary(taken: Sequence[Times]) -> dict[str, Any]:
    """Per step: seconds without watching, and the cost of rows and looks as a share of them."""
    found: dict[str, Any] = {"blocks": [dict(round_) for round_ in taken]}
    for place, clock in enumerate(("wall", "cpu")):
        off = statistics.median(times["off"][place] for times in taken) / BLOCK
        rows = [(times["rows"][place] - times["off"][place]) / BLOCK / off for times in taken]
        looks = [(times["looks"][place] - times["rows"][place]) / PROBE_INTERVAL / off for times in taken]
        found[clock] = {
            "step_seconds": off,
            "step_seconds_range": [f(times["off"][place] for times in taken) / BLOCK for f in (min, max)],
            "rows": _median_and_spread(rows),
            "looks": _median_and_spread(looks),
        }
    found["cost"] = {clock: cost(found[clock]) for clock in ("wall", "cpu")}
    return found


def cost(found: dict[str, Any]) -> float:
    """Rows and looks together, as a share of a step."""
    total: float = found["rows"]["median"] + found["looks"]["median"]
    return total


def _median_and_spread(values: Sequence[float]) -> dict[str, float]:
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return {"median": statistics.median(values), "first_quartile": low, "third_quartile": high}


if __name__ == "__main__":
    main()
