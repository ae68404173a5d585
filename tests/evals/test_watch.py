"""Watcher and worker: what the recipes ask for is scored once, and each curve has each point once."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sqlite3
import time
from pathlib import Path

import pytest

from evals.evaluate import job_of, log_scalars
from evals.queue import Queue
from evals.results import Results
from evals.tasks.registry import get_task
from evals.watch import RETRY, Runs, Watcher, submit
from evals.worker import LocalJobs, Worker, work_once
from tests.evals.conftest import write_checkpoint
from tests.evals.holder import hold_one_job


@pytest.fixture
def runs(run_dir):
    return Runs(run_dir.parent)


def change_recipe(run_dir, **evals):
    path = run_dir / "recipe.json"
    recipe = json.loads(path.read_text())
    recipe["evals"] |= evals
    path.write_text(json.dumps(recipe))


def test_the_watcher_queues_each_committed_checkpoint_once(queue, runs, run_dir, monkeypatch):
    hashed = []
    monkeypatch.setattr("evals.watch.job_of", lambda *given: hashed.append(given) or job_of(*given))
    watcher = Watcher(queue, runs)
    assert watcher.look() == 2  # the recipe's tasks
    assert watcher.look() == 0
    assert len(hashed) == 2, "what was seen is hashed again"
    write_checkpoint(run_dir, step=9, seed=1)
    (run_dir / "checkpoints" / "step-00000011.tmp").mkdir()
    (run_dir / "checkpoints" / "step-00000013").mkdir()  # being removed: its manifest went first
    assert watcher.look() == 2
    assert {(job.step, job.task) for job in queue.jobs()[0]} == {
        (s, t) for s in (7, 9) for t in ("perplexity", "sample")
    }
    assert Watcher(queue, runs).look() == 0  # after a restart
    change_recipe(run_dir, tasks=["perplexity", "sample", "decode"])
    assert watcher.look() == 2


def test_what_a_person_cancelled_is_not_queued_again_by_a_restart(queue, runs):
    Watcher(queue, runs).look()
    keys = [job.key for job in queue.active()]
    queue.cancel(keys[0])
    assert Watcher(queue, runs).look() == 0
    assert queue.job(keys[0]).state == "cancelled"
    task = queue.job(keys[0]).task
    assert submit(queue, runs, "tiny", task) == (keys[0], True)


def test_one_broken_run_stops_no_other_and_is_logged_once_per_change(queue, runs, run_dir, caplog, clock):
    broken = run_dir.parent / "broken"
    (broken / "checkpoints" / "step-00000001").mkdir(parents=True)
    (broken / "checkpoints" / "step-00000001" / "manifest.json").write_text("{}")
    (broken / "recipe.json").write_text("{}")
    watcher = Watcher(queue, runs, clock=clock)
    assert watcher.look() == 2
    for _ in range(3):
        watcher.look()
        clock.now += RETRY
    assert [r.getMessage().count("run broken is passed over") for r in caplog.records] == [1]
    (broken / "recipe.json").write_text("no JSON")
    watcher.look()
    watcher.look()
    assert caplog.text.count("run broken is passed over") == 2


def test_a_broken_step_or_task_blocks_no_other_and_is_named_once(
    queue, runs, run_dir, caplog, clock, monkeypatch
):
    def refuse(run, checkpoint, task, config):
        if (checkpoint.name, task.name) in bad:
            raise bad[checkpoint.name, task.name]
        return job_of(run, checkpoint, task, config)

    bad = {("step-00000007", "perplexity"): ValueError("no text"), ("step-00000009", "sample"): KeyError("x")}
    monkeypatch.setattr("evals.watch.job_of", refuse)
    for step in (9, 11):
        write_checkpoint(run_dir, step=step, seed=1)
    watcher = Watcher(queue, runs, clock=clock)
    assert watcher.look() == 4
    for _ in range(3):
        clock.now += RETRY
        assert watcher.look() == 0
    assert [record.getMessage() for record in caplog.records] == [
        "run tiny: step 7, task perplexity is passed over: no text",
        "run tiny: step 9, task sample is passed over: KeyError: 'x'",
    ]
    bad["step-00000011", "sample"] = bad.pop(("step-00000009", "sample"))
    clock.now += RETRY
    assert watcher.look() == 1, "what went through later is not queued, or a step was seen in part"
    bad.clear()
    clock.now += RETRY
    assert watcher.look() == 1
    assert {(job.step, job.task) for job in queue.active()} == {
        (step, task) for step in (7, 9, 11) for task in ("perplexity", "sample")
    }


@pytest.mark.parametrize(
    "text", ["5", "[]", '{"model": {}}', '{"model": {}, "data": null}', '{"model": {}, "data": {}}']
)
def test_a_malformed_recipe_is_a_run_that_cannot_be_scored(queue, runs, run_dir, caplog, text):
    (run_dir / "recipe.json").write_text(text)
    check_refusal(queue, runs, caplog, "train the run again")


@pytest.mark.parametrize("state", [{}, {"data": None}, {"data": {}}, {"data": 5}])
def test_a_run_state_that_names_no_data_is_a_run_that_cannot_be_scored(
    queue, runs, caplog, monkeypatch, state
):
    monkeypatch.setattr("evals.runs.load_run_state", lambda checkpoint: state)
    monkeypatch.setattr("evals.folders.load_run_state", lambda checkpoint: state)
    assert runs.tokens("tiny") == {}
    check_refusal(queue, runs, caplog, "does not say what data it was trained on")


def check_refusal(queue, runs, caplog, reason):
    """Both ways to a job end in one line of the log; a client reads 404."""
    from fastapi.testclient import TestClient

    from evals.service import create_app

    assert Watcher(queue, runs).look() == 0
    assert len(caplog.records) == 1
    assert reason in caplog.text
    client = TestClient(create_app(queue, runs), base_url="http://127.0.0.1:8321")
    assert client.post("/jobs", json={"run": "tiny", "task": "sample"}).status_code == 404
    assert queue.jobs() == ([], 0)


def test_what_cannot_be_read_is_no_run_and_stops_no_other(queue, runs, run_dir, monkeypatch):
    secret = run_dir.parent / "secret"
    secret.mkdir()
    is_file = Path.is_file

    def denied(self):
        if secret in self.parents:
            raise PermissionError(13, "Permission denied", str(self))
        return is_file(self)

    monkeypatch.setattr(Path, "is_file", denied)
    assert Runs(run_dir.parent).ids() == ["tiny"]
    assert Watcher(queue, runs).look() == 2


def test_names_that_no_client_can_send_and_links_are_said_once(queue, runs, run_dir, caplog):
    for name in ("350M c4", "-x", "a" * 129):
        (run_dir.parent / name).mkdir()
        (run_dir.parent / name / "recipe.json").write_text("{}")
    (run_dir.parent / "link").symlink_to(run_dir)
    (run_dir.parent / "no run").mkdir()
    watcher = Watcher(queue, runs)
    assert watcher.look() == 2
    watcher.look()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 4
    assert all("letters, digits, dots, dashes and underscores" in text for text in said)
    assert sum(f"{str(run_dir.parent / 'link')!r} is passed over: a link" in text for text in said) == 1


def test_one_reason_for_many_steps_is_one_line(queue, runs, run_dir, caplog):
    write_checkpoint(run_dir, step=9, seed=1)
    recipe = json.loads((run_dir / "recipe.json").read_text())
    recipe["data"]["directory"] = "/nowhere"
    (run_dir / "recipe.json").write_text(json.dumps(recipe))
    assert Watcher(queue, runs).look() == 0
    (record,) = caplog.records
    assert "run tiny: step 7, task perplexity and 3 more is passed over" in record.getMessage()


def test_a_queue_that_is_busy_is_no_fault_of_the_run(queue, runs, monkeypatch, clock):
    def busy(*_, **__):
        raise sqlite3.OperationalError("database is locked")

    watcher = Watcher(queue, runs, clock=clock)
    with monkeypatch.context() as patched:
        patched.setattr(queue, "submit", busy)
        with pytest.raises(sqlite3.OperationalError):
            watcher.look()
    assert watcher.look() == 2, "the run is taken for broken"


def test_a_broken_run_is_looked_at_again_when_it_changes_or_after_a_while(
    queue, runs, run_dir, dataset_dir, clock
):
    recipe = json.loads((run_dir / "recipe.json").read_text())
    moved = run_dir.parent.parent / "moved"
    recipe["data"]["directory"] = str(moved)
    (run_dir / "recipe.json").write_text(json.dumps(recipe))
    watcher = Watcher(queue, runs, clock=clock)
    assert watcher.look() == 0
    moved.symlink_to(dataset_dir)
    assert watcher.look() == 0
    clock.now += RETRY
    assert watcher.look() == 2
    write_checkpoint(run_dir, step=9, seed=1)
    moved.unlink()
    assert watcher.look() == 0
    moved.symlink_to(dataset_dir)
    write_checkpoint(run_dir, step=11, seed=1)
    assert watcher.look() == 4


def test_ids_are_unique_over_the_folders(runs, run_dir, tmp_path, queue, caplog):
    other = tmp_path / "other"
    (other / "second").mkdir(parents=True)
    (other / "second" / "recipe.json").write_text("{}")
    both = Runs(run_dir.parent, other)
    assert both.ids() == ["second", "tiny"]
    assert both.folder("tiny") == run_dir
    assert both.folder("second") == other / "second"
    (other / "tiny").mkdir()
    (other / "tiny" / "recipe.json").write_text("{}")
    with pytest.raises(ValueError, match="has the id of a run in another folder"):
        Runs(run_dir.parent, other)
    watcher = Watcher(queue, both)
    assert watcher.look() == 2
    watcher.look()
    assert both.folder("tiny") == run_dir
    assert caplog.text.count("is passed over: another folder has a run of that id") == 1


def test_a_worker_scores_a_job_and_a_stored_result_is_taken_over(queue, runs, run_dir, tmp_path):
    key, new = submit(queue, runs, "tiny", "sample")
    assert new
    assert work_once(queue, runs, "w")
    assert queue.job(key).state == "done"
    record = json.loads((run_dir / "evals" / "sample-step-7.json").read_text())
    assert Results(queue.database).record(key) == record
    assert not work_once(queue, runs, "w")
    other = Queue(tmp_path / "other.sqlite")
    assert submit(other, runs, "tiny", "sample") == (key, True)
    assert other.counts() == {"done": 1}


def points(run_dir):
    """Steps of every scalar that TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not (run_dir / "tensorboard").is_dir():
        return {}
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize("way", ["retry", "submission"])
def test_a_crash_between_the_record_and_its_points_leaves_each_point_once(
    queue, runs, run_dir, monkeypatch, clock, way
):
    def crash(*_):
        raise OSError("the process died here")

    key, _ = submit(queue, runs, "tiny", "perplexity")
    monkeypatch.setattr("evals.evaluate.log_scalars", crash)
    work_once(queue, runs, "w")
    assert queue.job(key).state == "queued"
    assert points(run_dir) == {}
    monkeypatch.undo()
    if way == "retry":
        clock.now += 100
        assert work_once(queue, runs, "w")
    else:
        queue.cancel(key)
        assert submit(queue, runs, "tiny", "perplexity") == (key, True)
    assert queue.job(key).state == "done"
    expected = {"eval/bits_per_byte": [7], "eval/loss": [7], "eval/bigram_bits_per_byte": [7]}
    assert points(run_dir) == expected
    # The other way round: the points were written, and the attempt is made again from the start.
    (run_dir / "evals" / "perplexity-step-7.json").unlink()
    second = Queue(run_dir / "second.sqlite")
    submit(second, runs, "tiny", "perplexity")
    assert work_once(second, runs, "w")
    assert points(run_dir) == expected


def test_points_that_are_there_are_not_written_again(run_dir, runs, queue):
    submit(queue, runs, "tiny", "perplexity")
    work_once(queue, runs, "w")
    (events,) = (run_dir / "tensorboard").iterdir()
    before = events.stat()
    job = job_of(run_dir, runs.steps("tiny")[7], get_task("perplexity"), runs.config("tiny"))
    log_scalars(job, {"scalars": {"x": 1.0}})
    assert events.stat().st_ino == before.st_ino


def test_a_worker_keeps_the_model_of_a_checkpoint_for_its_next_job(queue, runs, run_dir, monkeypatch):
    from evals.runs import load_run

    loaded = []

    def load(*given, **options):
        loaded.append(options["step"])
        return load_run(*given, **options)

    monkeypatch.setattr("evals.worker.load_run", load)
    write_checkpoint(run_dir, step=9, seed=1)
    for step in (7, 9):
        for task in ("sample", "perplexity"):
            submit(queue, runs, "tiny", task, step=step, priority=-step)
    worker = Worker(LocalJobs(queue, runs), runs, "w")
    while worker.once():
        pass
    assert queue.counts() == {"done": 4}
    assert loaded == [7, 9]


def test_a_job_that_cannot_be_done_is_given_back_with_its_reason(queue, runs, run_dir, caplog):
    key, _ = submit(queue, runs, "tiny", "sample")
    for path in (run_dir / "checkpoints").rglob("*.safetensors"):
        path.write_bytes(b"damaged")
    assert work_once(queue, runs, "w")
    assert queue.job(key).state == "queued"
    assert queue.job(key).error == "ValueError while scoring run tiny: the log of the service says why"
    assert "damaged" in caplog.text


def test_a_reason_without_paths_is_told(queue, runs, run_dir):
    key, _ = submit(queue, runs, "tiny", "sample")
    change_recipe(run_dir, sample_tokens=9)
    assert work_once(queue, runs, "w")
    assert "changed since the job was queued: submit it again" in queue.job(key).error


def test_a_job_outlives_its_killed_worker(runs, run_dir, tmp_path):
    database = tmp_path / "queue.sqlite"
    queue = Queue(database)
    submit(queue, runs, "tiny", "sample")
    # Spawned: no thread of the test process is copied.
    holder = multiprocessing.get_context("spawn").Process(target=hold_one_job, args=(database,), daemon=True)
    holder.start()
    deadline = time.monotonic() + 60
    while queue.counts() != {"running": 1}:
        assert time.monotonic() < deadline, "the holder leased nothing"
        time.sleep(0.01)
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    deadline = time.monotonic() + 30
    while queue.counts() != {"done": 1} and time.monotonic() < deadline:
        work_once(queue, runs, "survivor")
        time.sleep(0.05)
    assert Results(queue.database).page()[1] == 1
    assert queue.jobs()[0][0].attempts == 2


def test_a_link_out_of_the_root_is_no_run(runs, run_dir, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "recipe.json").write_text("{}")
    (run_dir.parent / "link").symlink_to(outside)
    assert runs.ids() == ["tiny"]
    with pytest.raises(ValueError, match="no run 'link'"):
        runs.folder("link")
