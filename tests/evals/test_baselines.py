"""Models beside the runs: scored once, shown without a step, and what a guess would get."""

from __future__ import annotations

import json
import shutil

import pytest

from checkpoints.export import export_model
from evals.baselines import open_baselines
from evals.config import EvalConfig
from evals.evaluate import evaluate_subject
from evals.places import NO_STEP
from evals.results import Results
from evals.runs import load_export
from evals.service import create_app
from evals.tasks.registry import TASKS
from evals.watch import PublicError, Runs, Watcher, submit
from evals.worker import LocalJobs, Worker, work_once
from launch.evaluation import baselines_of
from tests.evals.conftest import VOCAB
from tests.evals.test_peers import save_peer
from tests.evals.test_service import make_client

CONFIG = EvalConfig(tasks=("decode", "mqar"), mqar_pairs=(2,), mqar_length=(32,), mqar_samples=2)


@pytest.fixture
def folder(tmp_path, run_dir, dataset_dir):
    """An export, what is no model, and what is a run."""
    folder = tmp_path / "models"
    recipe = json.loads((run_dir / "recipe.json").read_text())
    export_model(
        run_dir / "checkpoints" / "step-00000007",
        folder / "export",
        tokenizer=dataset_dir / "tokenizer.model",
        model_config=recipe["model"],
    )
    (folder / "notes").mkdir()
    (folder / "link").symlink_to(folder / "export")
    shutil.copytree(run_dir, folder / "a-run")
    return folder


@pytest.fixture
def runs(run_dir, folder):
    return Runs(run_dir.parent, baselines=open_baselines(folder, CONFIG))


def test_a_baseline_is_scored_once_and_shown_without_a_step(queue, runs, run_dir, folder, monkeypatch):
    import evals.baselines

    (run_dir / "recipe.json").write_text(
        json.dumps(json.loads((run_dir / "recipe.json").read_text()) | {"evals": {"tasks": []}})
    )
    read = []
    identify = evals.baselines.identify
    monkeypatch.setattr("evals.baselines.identify", lambda *a, **o: read.append(a) or identify(*a, **o))
    watcher = Watcher(queue, runs)
    assert watcher.look() == 1, "decode needs a run"
    assert watcher.look() == 0
    assert Watcher(queue, runs).look() == 0
    assert len(read) == 1, "what stays as it is, is read again"
    (job,) = queue.active()
    assert (job.run, job.step, job.task) == ("export", NO_STEP, "mqar")
    before = sorted(path.name for path in folder.rglob("*"))
    assert work_once(queue, runs, "w")
    assert sorted(path.name for path in folder.rglob("*")) == before
    client = make_client(create_app(queue, runs))
    assert client.get("/runs").json()["baselines"] == ["export"]
    (row,) = client.get("/results", params={"run": "export"}).json()["results"]
    assert (row["step"], row["tokens"], row["chance"]) == (None, None, {"mqar/2/32": 100 / VOCAB})
    assert client.get("/jobs").json()["jobs"][0]["step"] is None
    assert client.get("/scalars").json()["series"][0]["points"] == [[None, None, row["scalars"]["mqar/2/32"]]]
    assert client.get(f"/results/{row['key']}/samples").json()["total"] == 2
    compared = client.get("/compare", params={"first": row["key"], "second": row["key"]}).json()
    assert compared["groups"]["2/32"]["difference"] == 0
    body = {"run": "export", "task": "mqar"}
    assert client.post("/jobs", json=body).json() == {"key": row["key"], "new": False}
    for strange in (
        {"step": 3},
        {"task": "decode"},
        {"run": "a-run"},
        {"run": "link"},
        {"run": "../models/export"},
    ):
        assert client.post("/jobs", json=body | strange).status_code == 404
    records = evaluate_subject(
        load_export(folder / "export"), CONFIG_ALONE, run_dir / "by-hand", progress=False
    )
    assert records["mqar"]["key"] == row["key"], "trellis eval has another key for the same"


CONFIG_ALONE = EvalConfig(tasks=("mqar",), mqar_pairs=(2,), mqar_length=(32,), mqar_samples=2)


def test_a_baseline_that_changes_is_scored_anew(queue, runs, folder, run_dir):
    key, _ = submit(queue, runs, "export", "mqar")
    shutil.rmtree(folder / "export")
    save_peer(folder / "export")
    job = queue.lease("w", seconds=60)
    with pytest.raises(PublicError, match="changed since the job was queued"):
        Worker(LocalJobs(queue, runs), runs, "w").score(job)
    queue.hand_back("w")
    other, new = submit(queue, runs, "export", "mqar")
    assert (other != key, new) == (True, True)
    assert [job.key for job in queue.active()] == [other], "nobody needs the first"
    assert work_once(queue, runs, "w")
    assert [row["key"] for row in Results(queue.database).page()[0]] == [other]


def test_a_run_goes_before_a_baseline_of_its_name(queue, runs, folder, run_dir, caplog):
    shutil.copytree(folder / "export", folder / "tiny")
    (folder / "two words").mkdir()
    (folder / "two words" / "config.json").write_text("{}")
    Watcher(queue, runs).look()
    assert runs.baseline_ids() == ["export"]
    again = Runs(run_dir.parent, baselines=open_baselines(folder, CONFIG))  # as every worker that starts
    assert (again.ids(), again.baseline_ids()) == (["tiny"], ["export"])
    assert f"{folder / 'tiny'} is passed over: another folder has a run of that id" in caplog.text
    assert f"'{folder / 'link'}' is passed over: a link" in caplog.text
    assert f"'{folder / 'two words'}' is passed over: a name that clients cannot send" in caplog.text
    assert {job.step for job in queue.jobs(run="tiny")[0]} == {7}


def test_a_run_that_takes_the_name_of_a_baseline_shows_its_own_rows_alone(
    queue, runs, folder, run_dir, caplog
):
    key, _ = submit(queue, runs, "export", "mqar")
    queue.finish(key, {"scalars": {"mqar/x": 1.0}})
    assert [row["step"] for row in Results(queue.database).page(run="export")[0]] == [NO_STEP]
    shutil.copytree(run_dir, run_dir.parent / "export")
    Watcher(queue, runs).look()
    assert Results(queue.database).page(run="export") == ([], 0)
    assert "trained anew" not in caplog.text
    shutil.rmtree(run_dir.parent / "export")
    Watcher(queue, runs).look()
    assert [row["step"] for row in Results(queue.database).page(run="export")[0]] == [NO_STEP]


def test_a_folder_of_baselines_that_went_takes_no_run_along(queue, runs, folder, run_dir, caplog):
    baselines = open_baselines(folder, CONFIG)
    folder.rename(folder.with_name("unmounted"))
    watcher, client = Watcher(queue, runs), make_client(create_app(queue, runs))
    assert [watcher.look(), watcher.look()] == [2, 0]
    assert client.get("/runs").json()["baselines"] == []
    assert Runs(run_dir.parent, baselines=baselines).ids() == ["tiny"]
    assert [record.getMessage().count("no baseline is served") for record in caplog.records] == [1]
    with pytest.raises(PublicError, match="there is no baseline export"):
        baselines.place("export", "mqar")
    folder.with_name("unmounted").rename(folder)
    assert watcher.look() == 1


def test_a_model_that_cannot_be_opened_stops_no_other(queue, runs, folder, caplog):
    save_peer(folder / "pickled")
    for path in (folder / "pickled").glob("*.safetensors"):
        path.rename(path.with_suffix(".bin"))
    (folder / "bad").mkdir()
    (folder / "bad" / "model.safetensors").touch()
    for settings in ("5", '{"auto_map": {}, "model_type": []}'):
        (folder / "bad" / "config.json").write_text(settings)
        body = {"run": "bad", "task": "mqar"}
        assert make_client(create_app(queue, runs)).post("/jobs", json=body).status_code == 404
    assert Watcher(queue, runs).look() == 3  # of tiny two
    assert caplog.text.count("run pickled: task mqar is passed over") == 1


def test_what_baselines_are_scored_on(folder, tmp_path):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"name": "x", "evals": {"tasks": ["decode", "mqar"], "mqar_samples": 3}}))
    config = baselines_of(folder, recipe, trust_remote_code=False).config
    assert (config.tasks, config.mqar_samples) == (("mqar",), 3)
    toml = tmp_path / "recipe.toml"
    toml.write_text('[evals]\ntasks = ["mqar"]\nmqar_samples = 4\n')
    assert baselines_of(folder, toml, trust_remote_code=True).config.mqar_samples == 4
    assert baselines_of(folder, None, trust_remote_code=False).config.tasks == ("niah_single_1",)
    assert baselines_of(None, None, trust_remote_code=False) is None
    recipe.write_text('{"evals": {"tasks": ["decode"]}}')
    for given, reason in (
        ((folder, recipe), "all of them need a run"),
        ((folder / "nowhere", None), "is no folder"),
        ((None, recipe), "give that too"),
    ):
        with pytest.raises(ValueError, match=reason):
            baselines_of(*given, trust_remote_code=False)


def test_what_a_guess_would_get():
    def samples(group, *counts):
        return [{"group": group, "details": {"choices": ["x"] * n} if n else {}} for n in counts]

    metrics = {"acc": {"score": 1.0}, "acc_norm": {"score": 1.0}}
    for task, counts, expected in (
        ("arc_easy", (4, 4, 5), 70 / 3),
        ("winogrande", (2, 2), 50.0),
        ("lambada", (1,), 0),
    ):
        result = {"metrics": metrics, "samples": samples(task, *counts), "perplexity": {"value": 9.0}}
        assert TASKS[task].chance(result) == pytest.approx(
            {f"{task}/acc": expected, f"{task}/acc_norm": expected}
        )
    needle = {"score": 1.0}
    rows = [{"length": 512, "generation": needle, "choice": needle}]
    result = {"rows": rows, "chance": {"generation": 0.0, "choice": 10.0}}
    assert TASKS["niah_single_1"].chance(result) == {
        "niah_single_1/generation/512": 0.0,
        "niah_single_1/choice/512": 10.0,
    }
    harness = {
        "results": {
            "one": {"acc": 0.5, "word_perplexity": 3.0},
            "two": {"exact_match": 0.1},
            "all": {"acc": 0.2},
        },
        "samples": samples("one", 4, 2) + samples("two", 0),
    }
    assert TASKS["harness"].chance(harness) == {"harness/one/acc": 37.5}
    assert TASKS["perplexity"].chance({}) == {}
