"""From a job to everything a loop needs, on every rank, with every refusal before the first step."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from checkpoints.probe import announce, await_token, probe, withdraw
from checkpoints.state import CheckpointReader
from data_pipeline.loader import BatchLoader, TokenDataset
from data_pipeline.manifest import load_manifest
from data_pipeline.prefetch import Prefetcher
from trellis_dist.files import write_json
from trellis_dist.models.language_model import build_language_model
from trellis_dist.parallel import env
from trellis_dist.parallel.apply import apply_parallelism
from trellis_dist.parallel.mesh import Mesh, build_mesh
from trellis_dist.training.announce import describe_start
from trellis_dist.training.carry import RowStates
from trellis_dist.training.collectives import on_main, together
from trellis_dist.training.engines.base import Engine
from trellis_dist.training.engines.factory import build_engine
from trellis_dist.training.evaluate import Validator
from trellis_dist.training.guards import Guards
from trellis_dist.training.job import Job, Resume
from trellis_dist.training.metrics import MetricsWriter
from trellis_dist.training.profiling import Profiler
from trellis_dist.training.rng import restore_random_states, seed_generators
from trellis_dist.training.run_lock import RunLock
from trellis_dist.training.saving import Saver, upload_newest
from trellis_dist.training.starts import Starts
from trellis_dist.training.state import Progress, Start, find_start, let_go
from trellis_dist.training.watch.busy import BusyTimer
from trellis_dist.training.watch.hang import HangWatch
from trellis_dist.training.watch.open import Report, open_watch
from trellis_dist.training.writers import check_wandb

__all__ = ["Session", "open_session", "runtime"]

NO_LIMIT_S = 24 * 3600.0  # of a collective, where the watch has none: torch wants a number


@dataclass
class Session:
    """A run in progress on this rank; ``started`` is the monotonic time at which this start began."""

    job: Job
    mesh: Mesh
    engine: Engine
    loader: Prefetcher
    validator: Validator
    metrics: MetricsWriter
    saver: Saver
    guards: Guards
    states: RowStates | None
    watch: HangWatch
    busy: BusyTimer
    starts: Starts
    profiler: Profiler
    progress: Progress
    run_dir: Path
    resumed_step: int
    pending_row: Mapping[str, float]
    started: float

    def close(self, *, failed: bool = False) -> None:
        """Stop the watch, the saver's and the loader's threads, close files.

        After a run that ``failed`` nothing is done that waits for a device, whose work may never end.
        """
        self.watch.disarm()  # what comes now limits itself, and other ranks may have ended
        self.saver.close()
        self.loader.close()
        self.busy.close()
        self.profiler.close(failed=failed)
        self.starts.close()
        self.metrics.close()
        self.watch.close()


@contextlib.contextmanager
def runtime(job: Job) -> Iterator[torch.device]:
    """Set threads, join the process group; leave it at the end if it was joined (or made) here.

    After an error it is left as it is: a peer that failed answers no more, and NCCL would wait for it before
    anybody learns of the error.
    """
    device = env.device()
    torch.set_num_threads(job.training.threads or _share_of_cores())
    joined_before = dist.is_initialized()
    limits = (job.training.first_step_timeout_s, job.training.step_timeout_s)
    longest = max(limits) if all(limits) else NO_LIMIT_S
    # The watchdog names the stuck line; the collectives' own timeout comes after it.
    env.init_distributed(device, timeout_s=longest + 60.0)
    yield device
    if not joined_before:
        env.shutdown()


def _share_of_cores() -> int:
    """Cores of this machine that this process may use, divided among its ranks."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def open_session(
    job: Job,
    run_dir: Path,
    *,
    resume: Resume,
    device: torch.device,
    started: float,
    lock: RunLock,
    report: Report | None = None,
) -> Session | None:
    """Open the data, take ``lock``, open model, engine and outputs, and restore the newest checkpoint.

    Returns None when that checkpoint is already at ``training.steps``. ``report`` is told of a hang.

    Raises:
        ValueError, FileNotFoundError: what a user can put right, in one line; on every rank.
        OSError: a file system that cannot keep checkpoints, or that ranks do not share.
    """
    on_main(lambda: check_wandb(job.logging.wandb))
    train, validation = _open_data(job)
    on_main(lock.take)
    token = env.broadcast_object(os.urandom(8).hex())
    together(lambda: _check_folder(run_dir / "checkpoints", token), what="looking at the checkpoint folder")
    watch = open_watch(run_dir, token=token, report=report)
    watch.arm(job.training.first_step_timeout_s, step=0, operation="opening the run")
    try:
        return _open(
            job, run_dir, train, validation, watch=watch, resume=resume, device=device, started=started
        )
    except BaseException:
        watch.close()
        raise


def _check_folder(root: Path, token: str) -> None:
    """Check that the file system can keep checkpoints, and that all ranks see the same folder."""
    on_main(lambda: probe(root))
    on_main(lambda: announce(root, token))
    try:
        together(lambda: await_token(root, token), what="sharing the checkpoint folder")
    finally:
        if env.is_main():
            withdraw(root, token)


def _open(
    job: Job,
    run_dir: Path,
    train: TokenDataset,
    validation: TokenDataset,
    *,
    watch: HangWatch,
    resume: Resume,
    device: torch.device,
    started: float,
) -> Session | None:
    root = run_dir / "checkpoints"
    start = on_main(lambda: find_start(root, resume, job, fingerprint=train.fingerprint))
    progress = start.progress
    if progress.step >= job.training.steps:
        lines = on_main(lambda: upload_newest(root, job.checkpoint.upload))
        if env.is_main():
            print("".join(f"upload: {line}\n" for line in lines), end="", file=sys.stderr, flush=True)
        watch.close()
        return None
    mesh = build_mesh(job.mesh, tensor=job.tensor, sequence=job.sequence, device=device)
    states = _row_states(job, mesh)
    engine = together(lambda: _engine(job, mesh, start, states), what="building or restoring the model")
    if start.weights is not None:
        on_main(lambda: let_go(start))
    engine.enter = watch.enter
    on_main(lambda: _record(job, run_dir))
    metrics = together(lambda: _metrics(job, run_dir, progress), what="opening the run folder")
    starts = _starts(run_dir, progress, mesh=mesh, started=started)
    on_main(
        lambda: _say_start(
            metrics,
            job,
            mesh=mesh,
            train=train,
            validation=validation,
            start=start,
            starts=starts,
            run_dir=run_dir,
        )
    )
    guards = Guards(job.training, engine=engine, mesh=mesh, metrics=metrics, run_dir=run_dir)
    guards.load(start.guards)
    fingerprint = train.fingerprint
    saver = Saver(root, job, fingerprint=fingerprint, metrics=metrics, start=start, guards=guards)
    return Session(
        job=job,
        mesh=mesh,
        engine=engine,
        loader=_loader(job, train, mesh),
        validator=_validator(job, validation, mesh),
        metrics=metrics,
        saver=saver,
        guards=guards,
        states=states,
        watch=watch,
        busy=BusyTimer(engine.forward_module, device=mesh.device),
        starts=starts,
        profiler=_profiler(job, run_dir, progress, metrics),
        progress=progress,
        run_dir=run_dir,
        resumed_step=progress.step,
        pending_row=start.pending_row,
        started=started,
    )


def _open_data(job: Job) -> tuple[TokenDataset, TokenDataset]:
    """Open both splits: rank 0 checks the files' hashes and makes missing row indexes, then the others."""
    what = "opening the data"
    first = together(lambda: _open_splits(job) if env.is_main() else None, what=what)
    return together(lambda: first or _open_splits(job), what=what)


def _open_splits(job: Job) -> tuple[TokenDataset, TokenDataset]:
    folder = Path(job.data.directory)
    vocabulary = int(load_manifest(folder).tokenizer["vocab_size"])
    if vocabulary > job.model.vocab_size:
        raise ValueError(
            f"the tokenizer of {folder} has {vocabulary} pieces, model.vocab_size is {job.model.vocab_size}: "
            f"set model.vocab_size to {vocabulary} or more, or train a smaller tokenizer"
        )
    options: dict[str, Any] = {
        "sequence_length": job.data.sequence_length,
        "seed": job.data.seed,
        "packing": job.data.packing,
        "align": job.model.grain if job.data.chunk_aligned else 1,
        "verify": env.is_main(),
    }
    weights = {name: part.weight for name, part in job.data.mixture.items() if part.weight is not None}
    train = TokenDataset(folder, "train", weights=weights, carry_rows=job.data.carry_rows, **options)
    return train, TokenDataset(folder, "validation", **options)


def _row_states(job: Job, mesh: Mesh) -> RowStates | None:
    if job.data.carry_rows == 1:
        return None
    return RowStates(global_rows=job.global_rows, micro_batch=job.training.micro_batch, mesh=mesh)


def _engine(job: Job, mesh: Mesh, start: Start, states: RowStates | None) -> Engine:
    """Build the model, split it over the mesh, wrap it, and restore what the run starts from."""
    seed_generators(job.training.seed)
    model = build_language_model(job.model, seed=job.training.seed, device=mesh.device)
    segments = apply_parallelism(
        model, mesh, recompute=job.training.activation_checkpointing, compile_backend=job.training.compile
    )
    engine = build_engine(
        model, job.training, optimizer=job.optimizer, mesh=mesh, segments=segments, states=states
    )
    if start.checkpoint is not None:
        reader = CheckpointReader(start.checkpoint)
        engine.load(reader, optimizer_steps=start.optimizer_steps)
        restore_random_states(reader)
    elif start.weights is not None:
        engine.load_weights(CheckpointReader(start.weights))
    return engine


def _record(job: Job, run_dir: Path) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(run_dir / "recipe.json", dict(job.recipe))


def _starts(run_dir: Path, progress: Progress, *, mesh: Mesh, started: float) -> Starts:
    return Starts(
        run_dir,
        main=env.is_main(),
        resumed_step=progress.step,
        world_size=mesh.world_size,
        began=time.time() - (time.monotonic() - started),
    )


def _say_start(metrics: MetricsWriter, job: Job, **parts: Any) -> None:
    """Say and log what is about to run, of which ``parts`` are those of ``describe_start``."""
    text, facts = describe_start(job, width=metrics.width, **parts)
    metrics.say(text, kind="start", **facts)


def _profiler(job: Job, run_dir: Path, progress: Progress, metrics: MetricsWriter) -> Profiler:
    def say(text: str) -> None:
        if env.is_main():
            metrics.say(text)
        else:
            print(text, file=sys.stderr, flush=True)  # of this rank's log

    return Profiler(job.logging.profile, run_dir, rank=env.rank(), resumed_step=progress.step, say=say)


def _metrics(job: Job, run_dir: Path, progress: Progress) -> MetricsWriter:
    return MetricsWriter(
        run_dir,
        main=env.is_main(),
        resumed_step=progress.step,
        steps=job.training.steps,
        tensorboard=job.logging.tensorboard,
        progress=job.logging.progress,
        wandb=job.logging.wandb,
        config=job.recipe,
    )


def _loader(job: Job, dataset: TokenDataset, mesh: Mesh) -> Prefetcher:
    loader = BatchLoader(
        dataset,
        global_batch=job.global_rows,
        micro_batch=job.training.micro_batch,
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp,
    )
    return Prefetcher(loader, pin=mesh.device.type == "cuda")


def _validator(job: Job, dataset: TokenDataset, mesh: Mesh) -> Validator:
    return Validator(
        dataset, rows=job.training.validation_rows, micro_batch=job.training.micro_batch, mesh=mesh
    )
