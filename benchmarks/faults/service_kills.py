"""Row 20, kills: SIGKILL to the workers and the server of a real `trellis eval-service`, as they evaluate."""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from benchmarks.faults.rank_job import wait_for
from benchmarks.faults.row import Outcome
from benchmarks.faults.service_run import Service, write_checkpoint, write_dataset, write_evals, write_run
from benchmarks.kernels.record import source_digest
from evals.evaluate import evaluate_run
from evals.queue import Queue, QueuedJob
from evals.results import Results
from evals.watch import Runs
from trellis_dist.files import read_json, write_json

__all__ = ["KILLS", "kill_in_evaluation", "make_run", "undisturbed", "what_is_wrong"]

KILLS = 20
# Who is killed in a trial, one after the other; a server that is killed is started again by hand.
VICTIMS = (("worker",), ("server",), ("both at once",), ("worker", "server"))
STEPS = (7, 9, 11, 13)
TASK = "mqar"
EVALS: dict[str, Any] = {"mqar_pairs": [4, 8], "mqar_length": [64, 128], "mqar_samples": 100}
# An evaluation takes longer, the first of a worker much longer.
WINDOW_S = 0.4
DATABASE = "evaluations.sqlite"


def make_run(shared: Path, root: Path) -> Path:
    """A run with a checkpoint of each of `STEPS`, whose recipe asks for `TASK`."""
    dataset = shared / "set"
    if not dataset.exists():
        made = shared / f"set-{os.getpid()}"
        write_dataset(made)
        made.rename(dataset)
    run = write_run(root / "tiny", dataset)
    for step in STEPS[1:]:
        write_checkpoint(run, step=step, seed=step)
    write_evals(run, tasks=[TASK], device="cpu", **EVALS)
    return run


@functools.cache
def _sources() -> str:
    """Tells the present sources from others."""
    return source_digest("checkpoints", "data_pipeline", "evals", "kernels", "trellis_dist")[:12]


def undisturbed(shared: Path) -> dict[str, Any]:
    """The result of each step, in the words of JSON, of an evaluation that nobody disturbs, made once."""
    path = shared / f"undisturbed-{_sources()}.json"
    if not path.is_file():
        root = shared / f"undisturbed-{os.getpid()}"
        run = make_run(shared, root)
        config = Runs(root).config(run.name)
        found = {
            str(step): evaluate_run(run, config, step=step, progress=False)[TASK]["result"] for step in STEPS
        }
        write_json(path, found)
        shutil.rmtree(root)
    found = read_json(path)
    assert isinstance(found, dict), "it was written so"
    return found


def kill_in_evaluation(
    folder: Path, index: int, *, afterwards: Callable[[Service, Path], None] | None = None
) -> Outcome:
    """Kill worker, server or both while a checkpoint is scored; each is to have one result in the end.

    The first or second kill comes when as many are done as is drawn; every third time it comes between the
    record in the run's folder and the row in the database.
    ``afterwards`` gets the service and the run when all is done.
    """
    draw, victims, expected = (
        random.Random(f"service {index}"),
        VICTIMS[index % 4],
        undisturbed(folder.parent),
    )
    run = make_run(folder.parent, folder / "runs")
    kills = _Kills(run, late=index % 3 == 2, draw=draw)
    with Service(run.parent, said=folder / "said.txt") as service:
        for number, victim in enumerate(victims):
            kills.interrupt(service, victim, done=number + draw.randint(0, 1))
        service.wait_for(lambda jobs: all(job["state"] == "done" for job in jobs) and len(jobs) >= len(STEPS))
        if afterwards is not None:
            afterwards(service, run)
    wrong = what_is_wrong(run, expected)
    attempts = [job.attempts for job in Queue(run.parent / DATABASE).jobs(task=TASK)[0]]
    if not wrong and sum(attempts) < len(STEPS) + len(victims):
        wrong = f"attempts {attempts}: nothing was tried again"
    kills.numbers["attempts of a checkpoint"] = max(attempts, default=0)
    note = f"{', then '.join(victims)}, {'its record written' if kills.late else 'at a random moment'}"
    return Outcome(not wrong, f"{note}: {wrong}" if wrong else note, kills.numbers)


class _Kills:
    """Kills in one trial, and what was seen of them."""

    def __init__(self, run: Path, *, late: bool, draw: random.Random) -> None:
        self.run, self.late, self._draw = run, late, draw
        self.numbers: dict[str, float] = {}

    def interrupt(self, service: Service, victim: str, *, done: int) -> None:
        """Kill until an evaluation was under way; one that had just ended counts as a kill between two.

        Not before as many as ``done`` have ended.

        Raises RuntimeError when nothing is left to interrupt.
        """
        while not self._interrupted(service, victim, self._moment(service, done)):
            self._count("kills between two evaluations", 1)

    def _interrupted(self, service: Service, victim: str, key: str) -> bool:
        """Kill; whether job ``key`` was not done."""
        self._kill(service, victim)
        self._count("kills", 1)
        queue = Queue(self.run.parent / DATABASE)
        state, began = _job(queue, key).state, time.monotonic()
        if victim != "worker":
            service.start()
        elif state != "done":
            wait_for(lambda: "exit status -9" in (_job(queue, key).error or ""), "the news of a death")
            self._at_least("seconds until a dead worker's job waits again", time.monotonic() - began)
        return state != "done"

    def _count(self, name: str, number: float) -> None:
        self.numbers[name] = self.numbers.get(name, 0) + number

    def _at_least(self, name: str, number: float) -> None:
        self.numbers[name] = max(self.numbers.get(name, 0.0), round(number, 3))

    def _moment(self, service: Service, done: int) -> str:
        """Wait for it; the key of the job that runs."""
        job = service.wait_for(lambda jobs: _running(jobs, done))
        if self.late:
            path = self.run / "evals" / f"{TASK}-step-{job['step']}.json"
            wait_for(path.is_file, "a record", limit_s=60.0)
        else:
            time.sleep(self._draw.uniform(0.0, WINDOW_S))
        return str(job["key"])

    def _kill(self, service: Service, victim: str) -> None:
        workers = service.workers()
        if victim != "server":
            for worker in workers:
                worker.kill()
        if victim != "worker":
            service.kill()
        began = time.monotonic()
        wait_for(
            lambda: not any(map(_works, workers)), "the end of every worker of that server", limit_s=60.0
        )
        if victim == "server":
            self._at_least("seconds that a worker outlives its server", time.monotonic() - began)


def _job(queue: Queue, key: str) -> QueuedJob:
    job = queue.job(key)
    assert job is not None, "a job stays"
    return job


def _works(process: psutil.Process) -> bool:
    """Whether it runs; what its new parent has not yet taken note of does not."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _running(jobs: list[dict[str, Any]], done: int) -> dict[str, Any] | None:
    """The job that runs when as many are done."""
    states = [job["state"] for job in jobs]
    if len(jobs) >= len(STEPS) and set(states) <= {"done", "failed"}:
        raise RuntimeError("nothing was left to interrupt")
    return jobs[states.index("running")] if "running" in states and states.count("done") >= done else None


def what_is_wrong(run: Path, expected: dict[str, Any]) -> str:
    """Why not every checkpoint of ``run`` has one whole result, equal to ``expected``; empty where it has."""
    queue = Queue(run.parent / DATABASE)
    results, events = Results(queue.database), queue.events()
    found = {row["step"]: row["key"] for row in results.page(task=TASK)[0]}
    jobs = [job for job in queue.jobs(task=TASK)[0] if job.state != "cancelled"]
    if [job.state for job in jobs] != ["done"] * len(STEPS):
        return f"jobs ended as {[(job.step, job.state, job.error) for job in jobs]}"
    if results.page(task=TASK)[1] != len(STEPS) or sorted(found) != list(STEPS):
        return f"results of the steps {sorted(found)}"
    if events["results_stored"] != len(STEPS):
        return f"{events['results_stored']} results were stored"
    if "leases_lost" in events:
        return "a lease had to run out before its job came back"
    for step, key in found.items():
        if wrong := _differs(results, key, run / "evals" / f"{TASK}-step-{step}.json", expected[str(step)]):
            return f"step {step}: {wrong}"
    with queue.database.reading() as database:
        (said,) = database.execute("PRAGMA integrity_check").fetchone()
    return "" if said == "ok" else f"the database: {said}"


def _differs(results: Results, key: str, path: Path, expected: dict[str, Any]) -> str:
    """How a stored result is not what the run's folder holds, or not what an undisturbed evaluation found."""
    record, kept = results.record(key), json.loads(path.read_text(encoding="utf-8"))
    if kept["result"] != expected:
        return "not the result of an undisturbed evaluation"
    samples = kept["result"].pop("samples")
    if record != kept:
        return f"the database and {path.name} differ"
    try:
        stored, total, _ = results.samples(key, limit=len(samples) + 1)
    except sqlite3.DatabaseError as error:
        return f"the samples cannot be read: {error}"
    return "" if stored == samples and total == len(samples) else f"{total} of {len(samples)} samples"
