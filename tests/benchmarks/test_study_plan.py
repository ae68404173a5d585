"""The study's plan, its budget, its test books and its page."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.study import frozen, one, plan, pool, report, results, score, tables
from benchmarks.study.__main__ import check_data, main
from trellis_dist.files import read_json
from trellis_dist.models.counts import parameter_counts

# The plan


def result(task: plan.Task, loss: float, *, core_seconds: float = 100.0) -> dict[str, Any]:
    """A result file as a finished run leaves it, with losses that fall with the position."""
    found: dict[str, Any] = {"name": task.name, "about": task.about(), "core_seconds": core_seconds}
    if task.kind == "recall":
        pairs = {str(count): 0.5 for count in plan.plan()["recall"]["pairs"]}
        return found | {"accuracy": pairs, "state_bytes": 1000, "parameters": 1}
    slope = [0.3, 0.2, 0.1, 0.0, -0.1, -0.1, -0.1]
    ranges = [[100 * (loss + more), 100] for _, more in zip(score.edges_up_to(task.length), slope)]
    scored = {name: {"bytes": 3200, "parts": [ranges] * score.PARTS} for name in ("One", "Two")}
    model = {"parameters": 1, "state_bytes": 200_000, "flops_per_token": 1e6}
    validation = {"loss": loss, "bits_per_byte": loss / 3, "books": scored}
    return found | {"validation": validation, "model": model, "training": {"seconds_per_token": 1e-4}}


def go_through(losses: Mapping[str, float]) -> dict[str, Any]:
    """Finish every run that can be named until there is none: losses are the models', less at high rates."""
    done: dict[str, Any] = {}
    while left := [task for task in plan.tasks(done) if task.name not in done]:
        for task in left:
            bonus = 0.01 * task.settings.rate / 4e-3 + 0.1 * (task.kind in ("full", "long"))
            done[task.name] = result(task, losses.get(task.settings.model, 4.0) - bonus)
    return done


@pytest.fixture(scope="module")
def every_kind() -> Any:
    """Every model's layers are there, whatever this checkout has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "registered", lambda name: True)
        yield


@pytest.fixture(scope="module")
def finished(every_kind: None) -> dict[str, Any]:
    return go_through({"trellis-corrected": 3.5, "gated_deltanet": 3.6, "gsa": 3.7, "attention": 3.65})


def test_learning_rates_go_on_where_the_best_is_the_last_one(finished: dict[str, Any]) -> None:
    """The made-up losses fall with the rate, so it doubles until the plan's bound."""
    rates = [
        found["about"]["settings"]["rate"] for name, found in finished.items() if name.startswith("tune-gsa-")
    ]
    assert sorted(rates) == [2e-3, 4e-3, 8e-3, 16e-3]
    assert finished["full-gsa-s0"]["about"]["settings"]["rate"] == 16e-3


def test_the_two_strongest_baselines_have_as_many_runs_as_trellis(finished: dict[str, Any]) -> None:
    def runs(*models: str) -> int:
        short = ("tune", "vary", "search")
        abouts = [found["about"] for found in finished.values()]
        return sum(about["kind"] in short and about["settings"]["model"] in models for about in abouts)

    ours = runs("trellis-paper", "trellis-corrected")
    assert ours == runs("gated_deltanet") == runs("attention") > runs("gsa") == 4


def test_full_runs_have_the_best_settings_and_the_seeds_of_their_role(finished: dict[str, Any]) -> None:
    seeds = {name: [f"full-{name}-s{s}" in finished for s in (0, 1, 2)] for name in ("trellis", "abc")}
    assert seeds == {"trellis": [True] * 3, "abc": [True, False, False]}
    chosen = finished["full-trellis-s0"]["about"]["settings"]
    assert chosen["model"] == "trellis-corrected"
    assert finished["full-trellis-half-s0"]["about"]["settings"]["set"] == {
        **chosen["set"],
        "model.trellis.slots": 16,
    }
    longer = {name for name in finished if name.startswith("long-")}
    assert longer == {"long-trellis-s0", "long-gated_deltanet-s0", "long-attention-s0"}


def test_what_a_full_run_was_trained_with_stays(finished: dict[str, Any]) -> None:
    before = dict(finished)
    del before["full-gsa-s1"]
    name = "tune-gsa-lr2e-3"
    before[name] = {**before[name], "validation": {**before[name]["validation"], "loss": 1.0}}
    (task,) = (task for task in plan.tasks(before) if task.name == "full-gsa-s1")
    assert task.settings.rate == 16e-3


def test_layers_that_are_not_there_are_left_out_with_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "registered", lambda name: name != "rwkv7")
    monkeypatch.setattr(pool, "registered", lambda name: name != "rwkv7")
    assert [line.partition(":")[0] for line in pool.unregistered()] == ["rwkv7"]
    assert not any("rwkv7" in task.name for task in plan.tasks({}))


def test_models_are_equally_large() -> None:
    wanted = parameter_counts(
        plan.Task("x", "tune", plan.Settings("trellis-paper", 1e-3), tokens=10**6)
        .spec(Path("w"))
        .resolved.model
    )
    for name in [name for name in plan.models() if plan.registered(name)] + list(plan.plan()["variants"]):
        settings = plan.Settings(name, 1e-3, plan.table(name))
        spec = plan.Task("x", "tune", settings, tokens=10**6).spec(Path("w"))
        found = parameter_counts(spec.resolved.model).total
        assert abs(found / wanted.total - 1) <= 0.02, name


# The budget


def test_core_seconds_of_results_add_up_and_bound_what_is_begun(
    tmp_path: Path, every_kind: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, first, said = results.Store(tmp_path / "results"), plan.tasks({})[0], []
    store.write(first.name, result(first, 4.0, core_seconds=800.0))
    begun = tmp_path / "core-seconds" / f"{plan.tasks({})[1].name}.json"
    begun.parent.mkdir()
    begun.write_text(json.dumps({"seconds": 50.0}))
    assert pool.spent(store, tmp_path) == 850.0
    # The next run of that model is expected to cost 800 core-seconds too.
    for budget, begins in ((1649.0, 0), (1651.0, 1)):
        started: list[str] = []
        slice_ = pool.Pool(tmp_path, tmp_path, store, jobs=1, budget=budget, say=said.append)
        monkeypatch.setattr(slice_, "_begin", lambda task, started=started: started.append(task.name))
        slice_._fill() if begins == 0 else started.append(slice_._next().name)  # type: ignore[union-attr]
        assert len(started) == begins
    assert "the budget is 1,649" in said[0]


# A run of the study that writes a result, is cut once, or fails, by its name.
CHILD = """
import sys
from pathlib import Path
from benchmarks.study.results import Store
from benchmarks.study.plan import tasks
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
name = options["--only"]
mark = Path(options["--work"]) / f"{name}.cut"
if name.endswith("lr4e-3"):
    sys.exit(1)
if name.endswith("lr8e-3") and not mark.exists():
    mark.touch()
    sys.exit(75)
about = next(task.about() for task in tasks({}) if task.name == name)
result = {"about": about, "core_seconds": 7.0, "validation": {"loss": 4.0}}
Store(Path(options["--results"])).write(name, result)
"""


def test_a_slice_begins_runs_goes_on_with_cut_ones_and_names_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "child.py").write_text(CHILD)
    root = str(Path(pool.__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", root)
    begin = pool.subprocess.Popen

    def child(command: list[str], **options: Any) -> Any:
        assert command[1:4] == ["-m", "benchmarks.study", "one"]
        return begin([command[0], str(tmp_path / "child.py"), *command[4:]], **options)

    monkeypatch.setattr(pool.subprocess, "Popen", child)
    monkeypatch.setattr(pool, "POLL_S", 0.02)
    store, said = results.Store(tmp_path / "results"), []
    slice_ = pool.Pool(
        tmp_path, tmp_path, store, jobs=2, budget=1e9, only="tune-attention-*", say=said.append
    )
    assert slice_.run() == ["tune-attention-lr4e-3"]
    assert set(store.runs()) == {"tune-attention-lr2e-3", "tune-attention-lr8e-3"}
    assert "tune-attention-lr8e-3: saved, goes on next time" in said
    assert store.spent() == 14.0


def test_a_dry_run_prints_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--work", str(tmp_path), "--results", str(tmp_path / "results")]
    assert main(["run", "--dry-run", "--only", "tune-attention-*", *options]) == 0
    printed = capsys.readouterr().out
    assert [line.split()[-1] for line in printed.splitlines() if "tune-" in line] == [
        "tune-attention-lr2e-3",
        "tune-attention-lr4e-3",
        "tune-attention-lr8e-3",
    ]
    assert "0 of 86,400 core-seconds used" in printed


def test_core_seconds_go_on_where_an_earlier_start_ended_even_one_that_was_cut(tmp_path: Path) -> None:
    path, burn = tmp_path / "core-seconds" / "a.json", "sum(i * i for i in range(2_000_000))"

    def cut() -> None:
        with one.measured(path):
            subprocess.run([sys.executable, "-c", burn], check=True)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut()
    first = read_json(path)["seconds"]
    with one.measured(path) as meter:
        subprocess.run([sys.executable, "-c", burn], check=True)
    assert first > 0.05, "the child's seconds count"
    assert meter["seconds"] == read_json(path)["seconds"] > 1.4 * first


def test_runs_on_another_data_set_are_not_added_to() -> None:
    check_data("a" * 64, {"old": {"data": "a" * 64}, "recall": {}})
    with pytest.raises(ValueError, match=r"old was trained on the data set bbbb.* prepared here is aaaa"):
        check_data("a" * 64, {"old": {"data": "b" * 64}})


# The test books


def test_test_books_are_scored_once_with_what_is_frozen(
    tmp_path: Path, finished: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, calls = results.Store(tmp_path / "results"), []
    full = {name: found for name, found in finished.items() if name.startswith("full-gsa-")}
    for name, found in full.items():
        store.write(name, found)
        (tmp_path / "runs" / name).mkdir(parents=True)

    def scores(task: plan.Task, *, books: Path, work: Path) -> dict[str, Any]:
        calls.append(task.name)
        return {"loss": 4.0, "core_seconds": 10.0, "books": {}}

    monkeypatch.setattr(frozen, "test_scores", scores)
    for _ in range(2):  # the second time there is nothing left to score
        frozen.score_test(store, books=tmp_path, work=tmp_path, say=lambda line: None)
    assert calls == sorted(full)
    assert store.spent() == 100.0 * len(full) + 10.0 * len(full)
    changed = json.loads(json.dumps(full["full-gsa-s0"]))
    changed["about"]["settings"]["rate"] = 1.0
    for name in full:
        store.write(name, {**changed, "name": name})
    with pytest.raises(ValueError, match="scored once"):
        frozen.score_test(store, books=tmp_path, work=tmp_path)


def test_a_sealed_score_stands_in_for_a_checkpoint_that_is_gone(
    tmp_path: Path, finished: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = results.Store(tmp_path / "results")
    store.write("full-gsa-s0", finished["full-gsa-s0"])
    with pytest.raises(ValueError, match="is gone"):
        frozen.score_test(store, books=tmp_path, work=tmp_path)
    store.write("sealed/full-gsa-s0", {"loss": 3.5, "core_seconds": 10.0, "books": {}})
    monkeypatch.setattr(frozen, "test_scores", None)  # nothing is scored again
    assert store.spent() == 110.0
    assert list(store.runs()) == ["full-gsa-s0"]
    frozen.score_test(store, books=tmp_path, work=tmp_path, say=lambda line: None)
    assert store.once("test")["runs"]["full-gsa-s0"]["loss"] == 3.5
    assert store.spent() == 110.0, "a score counts once, sealed or told"


def test_a_full_run_seals_its_test_scores_and_a_tuning_run_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one, "_train", lambda task, *_: {"validation": {"loss": 4.0}})
    monkeypatch.setattr(one, "test_scores", lambda task, **_: {"loss": 3.5, "core_seconds": 1.0})
    store = results.Store(tmp_path / "results")
    for kind in ("tune", "full"):
        task = plan.Task(f"{kind}-x", kind, plan.Settings(model="gsa", rate=1e-3), seed=0, length=1024)
        assert one.do(task, books=tmp_path, work=tmp_path, store=store, minutes=None) == 0
    assert store.sealed("full-x") == {"loss": 3.5, "core_seconds": 1.0}
    assert store.sealed("tune-x") is None


# The page


NGRAMS = {
    split: {
        name: {
            "bytes": 25_600,
            "targets": 4000,
            "unigram": 24_000.0,
            "kneser_ney": 18_000.0,
            "unigram_order": 18_100.0,
        }
        for name in ("One", "Two")
    }
    for split in ("validation", "test")
}


def test_tables_rank_by_loss_and_refuse_what_fails_a_gate(finished: dict[str, Any]) -> None:
    rows = tables.ranking(finished, "full", NGRAMS)
    assert rows[0]["group"] == "trellis"
    assert [row["loss"] for row in rows] == sorted(row["loss"] for row in rows)
    by_name = {row["group"]: row for row in rows}
    gsa = by_name["gsa"]
    assert gsa["difference"]["estimate"] == pytest.approx(gsa["loss"] - rows[0]["loss"], abs=1e-5)
    assert (gsa["seeds"], gsa["difference"]["over"]) == (3, "books x seeds")
    assert by_name["abc"]["difference"]["over"] == "books only (one seed)"
    assert gsa["refused"] == []  # 4.5 is the bigram's
    strong = {name: {**book, "kneser_ney": 14_400.0} for name, book in NGRAMS["validation"].items()}
    refused = tables.ranking(finished, "full", {"validation": strong})
    assert all("bigram's 3.60" in row["refused"][0] for row in refused)


def test_ablations_are_paired_with_the_run_of_the_same_rate(finished: dict[str, Any]) -> None:
    rows = tables.ablations(finished)
    assert len(rows) == len(plan.plan()["variants"])
    assert {row["over"] for row in rows} == {"books only (one seed)"}
    assert all(
        abs(row["estimate"]) < 1e-9 for row in rows
    )  # the made-up losses differ by model and rate alone


def test_the_report_fills_the_page_and_draws(tmp_path: Path, finished: dict[str, Any]) -> None:
    store, page = results.Store(tmp_path / "results"), tmp_path / "study.md"
    page.write_text(report.PAGE.read_text())
    for name, found in finished.items():
        store.write(name, found)
    store.write("once/ngrams", NGRAMS)
    paths = report.write_report(store, page=page, output=tmp_path / "study.json")
    assert {path.name for path in paths} == {
        "study.json",
        "study.md",
        "study-positions.png",
        "study-ablations.png",
    }
    text = page.read_text()
    assert "| **Trellis** | 3 |" in text
    assert text.count(tables.EMPTY) == 2  # the test books
    twice = report.fill(text, report.sections(report.gather(store)))
    assert twice == text
    with pytest.raises(ValueError, match="study:budget"):
        report.fill("a page without markers", {"budget": "x"})


def test_without_runs_every_table_says_so(tmp_path: Path) -> None:
    made = report.sections(report.gather(results.Store(tmp_path)))
    assert {name for name, text in made.items() if text == tables.EMPTY} == set(made) - {"budget", "speed"}


def test_result_files_are_small_and_read_back(tmp_path: Path, finished: dict[str, Any]) -> None:
    store = results.Store(tmp_path)
    path = store.write("full-gsa-s0", finished["full-gsa-s0"])
    assert json.loads(path.read_text()) == json.loads(json.dumps(finished["full-gsa-s0"]))
    for path in results.FOLDER.glob("*.json"):
        assert path.stat().st_size < 20_000, path.name
