"""A result counts wherever its checkpoint is, and nowhere that its checkpoint no longer is."""

from __future__ import annotations

import json
import shutil

import pytest

from checkpoints.commit import step_name
from checkpoints.pins import list_pins, pinned_steps
from evals.curves import events_file
from evals.evaluate import keep_copy, record_file
from evals.pins import PREFIX, sync_pins
from evals.places import Place
from evals.results import Results
from evals.sharing import SUPERSEDED
from evals.watch import RETRY, Runs, Watcher, submit
from evals.worker import LocalJobs, Worker, work_once
from tests.evals.conftest import write_checkpoint
from tests.evals.test_watch import points


@pytest.fixture
def runs(run_dir):
    return Runs(run_dir.parent)


@pytest.fixture
def scoring(monkeypatch):
    """Workers keep what the task would, without the model."""
    from evals.evaluate import job_of
    from evals.tasks.registry import get_task

    def score(self, leased):
        run_dir = self._runs.folder(leased.run)
        checkpoint = self._runs.steps(leased.run)[leased.step]
        job = job_of(run_dir, checkpoint, get_task(leased.task), self._runs.config(leased.run))
        assert job.key == leased.key
        samples = [{"id": "q", "group": "g", "score": 1.0, "prompt": "p"}]
        record = {"key": job.key, "task": job.task, "step": job.step, "result": {"samples": samples}}
        record |= {"scalars": {f"{job.task}/x": 2.5}}
        keep_copy(run_dir, record, task=job.task, step=job.step)
        return record

    monkeypatch.setattr(Worker, "score", score)


def copy_run(run_dir, name):
    """As a person copies what a run needs to go on."""
    target = run_dir.parent / name
    shutil.copytree(run_dir, target, ignore=shutil.ignore_patterns("evals", "tensorboard", ".pins"))
    return target


def shown(queue, **wanted):
    return {(row["run"], row["step"]) for row in Results(queue.database).page(**wanted)[0]}


def work(queue, runs):
    while work_once(queue, runs, "w"):
        pass


def test_a_copied_run_has_the_results_of_its_checkpoints(queue, runs, run_dir, scoring, monkeypatch):
    watcher = Watcher(queue, runs)
    assert watcher.look() == 2
    work(queue, runs)
    copy = copy_run(run_dir, "copy")
    assert watcher.look() == 0
    assert queue.counts() == {"done": 2}, "an equal checkpoint is scored again"
    record = record_file(copy, "perplexity", 7)
    assert json.loads(record.read_text()) == json.loads(record_file(run_dir, "perplexity", 7).read_text())
    assert points(copy) == points(run_dir) == {"perplexity/x": [7], "sample/x": [7]}
    assert shown(queue) == {("tiny", 7), ("copy", 7)}
    assert {(row["run"], row["task"]) for row in Results(queue.database).page(run="copy")[0]} == {
        ("copy", "perplexity"),
        ("copy", "sample"),
    }
    assert [s["run"] for s in Results(queue.database).series(name="sample/x")[0]] == ["copy", "tiny"]
    assert {job.run for job in queue.jobs(run="copy")[0]} == {"copy"}
    before = record.stat().st_ino
    monkeypatch.setattr(queue.database, "writing", None)  # nothing is left to write
    assert Watcher(queue, runs).look() == 0
    assert record.stat().st_ino == before
    record.unlink()  # as after a kill between the two
    assert Watcher(queue, runs).look() == 0
    assert record.is_file()


@pytest.mark.parametrize("again", [False, True])
def test_a_run_that_comes_while_the_result_is_stored_gets_it(
    queue, runs, run_dir, scoring, monkeypatch, again
):
    submit(queue, runs, "tiny", "perplexity")
    copy, called = copy_run(run_dir, "copy"), "submit" if again else "note"
    call = getattr(queue, called)

    def late(*given, **options):
        work_once(queue, runs, "w")
        return call(*given, **options)

    monkeypatch.setattr(queue, called, late)
    submit(queue, runs, "copy", "perplexity", again=again)
    assert points(copy) == {"perplexity/x": [7]}
    assert shown(queue) == {("tiny", 7), ("copy", 7)}


def test_a_renamed_run_keeps_the_curve_that_retention_left(queue, runs, run_dir, scoring):
    for step in (9, 11):
        write_checkpoint(run_dir, step=step, seed=step)
    watcher = Watcher(queue, runs)
    watcher.look()
    work(queue, runs)
    old = {(row["step"], row["task"]): row["key"] for row in Results(queue.database).page()[0]}
    remove(run_dir, 7, 9)
    renamed = run_dir.rename(run_dir.with_name("renamed"))
    record_file(renamed, "sample", 7).write_text('{"key": "of another database"}')
    (renamed / "evals" / "sample-step-x.json").write_text("5")
    assert watcher.look() == 0
    found = Results(queue.database).page(run="renamed")[0]
    del old[7, "sample"]
    assert {(row["step"], row["task"]): row["key"] for row in found} == old
    first, second = queue.places(old[9, "sample"])
    assert (first.run, first.digest, first.tokens) == ("renamed", second.digest, second.tokens)
    assert first.digest is not None
    write_checkpoint(renamed, step=9, seed=99)
    record_file(renamed, "sample", 9).write_text(json.dumps({"key": old[9, "sample"]}))
    assert Watcher(queue, runs).look() == 2
    assert shown(queue, run="renamed") == {("renamed", 7), ("renamed", 11)}


def test_a_disk_that_was_full_gets_the_result_later(queue, runs, run_dir, scoring, monkeypatch, clock):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    watcher = Watcher(queue, runs, clock=clock)
    watcher.look()
    work(queue, runs)
    copy = copy_run(run_dir, "copy")
    with monkeypatch.context() as patched:
        patched.setattr("evals.sharing.keep_copy", full)
        watcher.look()
    assert shown(queue) == {("tiny", 7), ("copy", 7)}
    assert points(copy) == {}
    clock.now += RETRY
    watcher.look()
    assert points(copy) == {"perplexity/x": [7], "sample/x": [7]}


def test_a_job_that_waits_serves_all_its_places(queue, runs, run_dir, scoring):
    key, _ = submit(queue, runs, "tiny", "perplexity")
    for name in ("copy", "gone"):
        copy_run(run_dir, name)
        assert submit(queue, runs, name, "perplexity") == (key, False)
    shutil.rmtree(run_dir.parent / "gone")
    assert [place.run for place in queue.places(key)] == ["copy", "gone", "tiny"]
    assert shown(queue) == set()
    assert pinned_steps(run_dir / "checkpoints") == {7}
    assert pinned_steps(run_dir.parent / "copy" / "checkpoints") == set(), "only one will be read"
    work(queue, runs)
    for name in ("tiny", "copy"):
        assert points(run_dir.parent / name) == {"perplexity/x": [7]}
    assert not (run_dir.parent / "gone").exists()
    assert shown(queue) == {("tiny", 7), ("copy", 7), ("gone", 7)}
    assert list_pins(run_dir / "checkpoints") == []


def test_a_service_that_dies_before_the_result_is_stored_has_served_all(queue, runs, run_dir, monkeypatch):
    def dies(*_):
        raise OSError("killed here")

    key, _ = submit(queue, runs, "tiny", "perplexity")
    copy = copy_run(run_dir, "copy")
    submit(queue, runs, "copy", "perplexity")
    monkeypatch.setattr(queue, "finish", dies)
    with pytest.raises(OSError, match="killed here"):
        LocalJobs(queue, runs).finish(key, {"key": key, "scalars": {"x": None}})
    assert json.loads(record_file(copy, "perplexity", 7).read_text())["key"] == key


@pytest.mark.parametrize("loss", ["removed", "replaced", "unreadable"])
def test_a_job_is_done_and_pinned_where_its_checkpoint_still_is(
    queue, runs, run_dir, scoring, monkeypatch, loss
):
    key, _ = submit(queue, runs, "tiny", "perplexity")
    copy = copy_run(run_dir, "copy")
    submit(queue, runs, "copy", "perplexity")
    if loss == "removed":
        shutil.rmtree(run_dir)
    elif loss == "replaced":
        remove(run_dir, 7)
        write_checkpoint(run_dir, step=7, seed=99)
    else:
        unreadable(monkeypatch, runs, "tiny")
    leased = LocalJobs(queue, runs).lease("w", seconds=60)
    assert (leased.key, leased.run, queue.job(key).run) == (key, "copy", "copy")
    assert [item.owner for item in list_pins(copy / "checkpoints")] == [PREFIX + key]
    sync_pins(queue, {"copy": copy / "checkpoints"})
    assert pinned_steps(copy / "checkpoints") == {7}
    queue.hand_back("w")
    work(queue, runs)
    assert points(copy) == {"perplexity/x": [7]}
    assert list_pins(copy / "checkpoints") == []


def unreadable(monkeypatch, runs, *names):
    """As a file system that lost its server."""
    steps = runs.steps

    def refuse(run):
        if run in names:
            raise PermissionError(13, "Permission denied")
        return steps(run)

    monkeypatch.setattr(runs, "steps", refuse)


def test_a_job_that_no_run_can_be_read_for_fails_with_its_reason(queue, runs, monkeypatch):
    key, _ = submit(queue, runs, "tiny", "perplexity")
    unreadable(monkeypatch, runs, "tiny")
    assert work_once(queue, runs, "w")
    assert queue.job(key).state == "queued"
    assert "PermissionError while scoring run tiny" in queue.job(key).error


@pytest.mark.parametrize("others", [["copy"], []])
def test_a_run_that_is_trained_anew_while_it_is_scored_keeps_nothing_of_it(queue, runs, run_dir, others):
    key, _ = submit(queue, runs, "tiny", "perplexity")
    copies = [copy_run(run_dir, name) for name in others]
    for name in others:
        submit(queue, runs, name, "perplexity")
    jobs = LocalJobs(queue, runs)
    assert jobs.lease("w", seconds=60).run == "tiny"
    remove(run_dir, 7)
    write_checkpoint(run_dir, step=7, seed=99)
    submit(queue, runs, "tiny", "sample")
    assert jobs.renew(key, "w", seconds=60) == bool(others)
    record = {"key": key, "task": "perplexity", "step": 7, "scalars": {"perplexity/x": 2.5}}
    keep_copy(run_dir, record, task="perplexity", step=7)  # the worker's last act
    assert jobs.finish(key, record) == bool(others)
    for copy in copies:
        assert points(copy) == {"perplexity/x": [7]}
        assert json.loads(record_file(copy, "perplexity", 7).read_text())["key"] == key
    assert points(run_dir) == {}
    assert not record_file(run_dir, "perplexity", 7).exists()
    assert shown(queue) == {(name, 7) for name in others}


def test_a_pin_that_was_copied_with_its_run_is_let_go_of(queue, runs, run_dir):
    submit(queue, runs, "tiny", "perplexity")
    shutil.copytree(run_dir, run_dir.parent / "copy")
    roots = {name: run_dir.parent / name / "checkpoints" for name in ("tiny", "copy")}
    sync_pins(queue, roots)
    assert [pinned_steps(root) for root in roots.values()] == [{7}, set()]


def test_a_cancelled_job_is_cancelled_for_all_and_comes_back_for_all(queue, runs, run_dir, scoring):
    key, _ = submit(queue, runs, "tiny", "perplexity")
    copy = copy_run(run_dir, "copy")
    submit(queue, runs, "copy", "perplexity")
    queue.cancel(key)
    assert submit(queue, runs, "copy", "perplexity", again=False) == (key, False)
    assert submit(queue, runs, "copy", "perplexity") == (key, True)
    assert pinned_steps(copy / "checkpoints") == {7}
    sync_pins(queue, {"tiny": run_dir / "checkpoints", "copy": copy / "checkpoints"})
    assert pinned_steps(run_dir / "checkpoints") == set()
    work(queue, runs)
    assert shown(queue) == {("tiny", 7), ("copy", 7)}
    assert points(run_dir) == {"perplexity/x": [7]}


def remove(run_dir, *steps):
    for step in steps:
        shutil.rmtree(run_dir / "checkpoints" / step_name(step))


def test_a_run_that_was_rolled_back_mixes_no_two_trainings(queue, runs, run_dir, scoring, monkeypatch, clock):
    def unknown(*_):
        raise PermissionError(13, "Permission denied")

    for step in (9, 11, 13):
        write_checkpoint(run_dir, step=step, seed=step)
    watcher = Watcher(queue, runs, clock=clock)
    watcher.look()
    work(queue, runs)
    old = {row["step"]: row["key"] for row in Results(queue.database).page(task="perplexity")[0]}
    remove(run_dir, 7, 9, 13)  # the first by retention
    write_checkpoint(run_dir, step=9, seed=99)
    with monkeypatch.context() as patched:
        patched.setattr("evals.sharing._digest", unknown)
        assert watcher.look() == 0
        assert ("tiny", 11) in shown(queue), "what cannot be read for a while is taken for gone"
    clock.now += RETRY
    assert watcher.look() == 2
    assert shown(queue) == {("tiny", 7), ("tiny", 11)}, "step 11 is as it was"
    assert points(run_dir)["perplexity/x"] == [7, 11]
    assert record_file(run_dir, "perplexity", 13).with_name(f"perplexity-step-13.json{SUPERSEDED}").is_file()
    assert Results(queue.database).record(old[13])["step"] == 13, "results stay by key"
    work(queue, runs)
    assert points(run_dir)["perplexity/x"] == [7, 9, 11]
    remove(run_dir, 9)
    write_checkpoint(run_dir, step=9, seed=9)  # back from a copy
    assert watcher.look() == 0
    assert {row["key"] for row in Results(queue.database).page(task="perplexity")[0]} == {
        old[step] for step in (7, 9, 11)
    }


def test_what_waits_for_a_checkpoint_that_was_replaced_goes(queue, runs, run_dir):
    key, _ = submit(queue, runs, "tiny", "perplexity")
    both, _ = submit(queue, runs, "tiny", "sample")
    copy_run(run_dir, "copy")
    submit(queue, runs, "copy", "sample")
    remove(run_dir, 7)
    write_checkpoint(run_dir, step=7, seed=99)
    for task in ("perplexity", "sample"):
        submit(queue, runs, "tiny", task)
    assert queue.job(key) is None, "nobody needs it"
    assert queue.job(both).run == "copy"
    owners = {item.owner for item in list_pins(run_dir / "checkpoints")}
    mine = {PREFIX + job.key for job in queue.active() if job.run == "tiny"}
    assert owners == mine
    assert len(mine) == 2


def test_newer_points_of_a_superseded_step_stay(queue, runs, run_dir, scoring):
    submit(queue, runs, "tiny", "perplexity")
    work(queue, runs)
    record = record_file(run_dir, "perplexity", 7)
    record.write_text(json.dumps({"key": "scored by hand since", "step": 7, "task": "perplexity"}))
    remove(run_dir, 7)
    write_checkpoint(run_dir, step=7, seed=99)
    submit(queue, runs, "tiny", "perplexity")
    assert record.is_file()
    assert events_file(run_dir, "perplexity", 7).is_file()


def test_another_identity_supersedes_the_steps_before_too(queue, runs, run_dir, monkeypatch):
    state = {"data": {"fingerprint": "f", "seed": 0}, "model": {"dim": 8}, "guards": 1}
    monkeypatch.setattr("evals.folders.load_run_state", lambda checkpoint: state)
    queue.submit("old", run="tiny", step=3, task="sample", digest="gone")
    submit(queue, runs, "tiny", "sample")
    queue.note(Place(run="tiny", step=3, task="sample", key="old", digest="gone", identity="another"))
    queue.note(Place(run="other", step=3, task="sample", key="old", digest="gone", identity="another"))
    state = {**state, "guards": 2}
    write_checkpoint(run_dir, step=9, seed=1)
    submit(queue, runs, "tiny", "sample", step=9)
    assert [place.run for place in queue.places("old")] == ["other"]
    kept = {place.step for job in queue.active() for place in queue.places(job.key)}
    assert kept == {3, 7, 9}, "guards are no part of an identity"


def test_the_settings_asked_for_last_are_the_ones_of_the_curve(queue, clock):
    for key, value in (("a", 1.0), ("b", 2.0)):
        clock.now += 1
        queue.submit(key, run="r", step=1, task="sample")
        queue.finish(key, {"scalars": {"x": value}})
    results = Results(queue.database)
    assert results.series()[0][0]["points"] == [[1, None, 2.0]]
    clock.now += 1
    assert not queue.submit("a", run="r", step=1, task="sample")
    assert results.series()[0][0]["points"] == [[1, None, 1.0]]


def test_the_settings_asked_for_last_count_in_whatever_order_they_are_scored(queue, clock):
    results, values = Results(queue.database), {"a": 1.0, "b": 2.0, "c": 3.0}
    for key in "abca":  # a again, while it waits
        clock.now += 1
        queue.submit(key, run="r", step=1, task="sample")
    for key, shown_value in (("c", 3.0), ("a", 1.0), ("b", 1.0)):
        clock.now += 1
        queue.finish(key, {"scalars": {"x": values[key]}})
        assert results.series()[0][0]["points"] == [[1, None, shown_value]]
    newest = results.page()[0]
    assert [row["key"] for row in newest] == ["a", "c", "b"]
    clock.now += 1
    assert not queue.submit("b", run="r", step=1, task="sample")
    assert results.series()[0][0]["points"] == [[1, None, 2.0]]
    assert queue.is_noted(Place(run="r", step=1, task="sample", key="b"))
