"""The study's plan, its budget, its test books and its page."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.study import (
    expected,
    frozen,
    known,
    one,
    order,
    plan,
    pool,
    recall,
    report,
    results,
    score,
    tables,
    tried,
)
from benchmarks.study.__main__ import check_data, main
from launch.experiments.spec import what_fixes
from launch.recipe import resolve
from trellis_dist.files import digest, read_json

# The plan

FOLDER = Path(__file__).parent / "study"


@pytest.fixture(scope="module", autouse=True)
def _own_plan() -> Iterator[None]:
    """One that stays, whatever the study has found by now."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "FOLDER", FOLDER)
        yield


def result(task: plan.Task, loss: float, *, core_seconds: float = 100.0) -> dict[str, Any]:
    """A result file as a finished run leaves it, with losses that fall with the position."""
    found: dict[str, Any] = {"name": task.name, "about": task.about(), "core_seconds": core_seconds}
    if task.kind == "recall":
        pairs = {str(count): 0.5 for count in plan.plan()["recall"]["pairs"]}
        choosing = 0.5 + 10 * task.settings.rate
        return found | {"accuracy": pairs, "choosing": choosing, "state_bytes": 1000, "parameters": 1}
    slope = [0.3, 0.2, 0.1, 0.0, -0.1, -0.1, -0.1]
    ranges = [[100 * (loss + more), 100] for _, more in zip(score.edges_up_to(task.length), slope)]
    scored = {name: {"bytes": 3200, "parts": [ranges] * score.PARTS} for name in ("One", "Two")}
    model = {"parameters": 1, "state_bytes": 200_000, "flops_per_token": 1e6}
    validation = {"loss": loss, "bits_per_byte": loss / 3, "books": scored}
    return found | {"validation": validation, "model": model, "training": {"seconds_per_token": 1e-4}}


def go_through(losses: Mapping[str, float]) -> dict[str, Any]:
    """Finish every run that can be named until there is none: losses are the models', less at high rates."""
    done: dict[str, Any] = {}
    while left := pool.pending(done):
        for task in left:
            loss = losses.get(task.group, losses.get(task.settings.model, 4.0))
            bonus = 0.01 * task.settings.rate / 2e-3 + 0.1 * (task.kind in ("full", "long"))
            done[task.name] = result(task, loss - bonus + 0.001 * task.seed)
    return done


def sealed_with_its_recipe(task: plan.Task, loss: float) -> dict[str, Any]:
    """A result that `known.check_results` accepts."""
    fixed = what_fixes(resolve(task.spec(Path("w")).resolved))
    return result(task, loss) | {"recipe": fixed, "digest": digest(fixed)}


@pytest.fixture(scope="module")
def every_kind() -> Any:
    """Every model's layers are there, whatever this checkout has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "registered", lambda name: True)
        yield


# Nats per token by model or variant; everything else has 4.
LOSSES = {
    "trellis-corrected": 3.5,
    "gated_deltanet": 3.6,
    "gsa": 3.7,
    "attention": 3.65,
    "corrected-value-gates": 3.48,
    "corrected-conv-values": 3.45,
    "corrected-silu": 3.49,
    "corrected-value-gates-rates": 3.47,
    "corrected-identity": 3.6,
    "corrected-rates": 3.6,
    "corrected-conv-targets": 3.6,
    "combined-1": 3.4,
    "combined-2": 3.42,
    "trellis": 3.4,
}


@pytest.fixture(scope="module")
def finished(every_kind: None) -> dict[str, Any]:
    return go_through(LOSSES)


def test_a_form_left_behind_has_rates_of_its_own_and_one_of_recall(finished: dict[str, Any]) -> None:
    tuned = {name for name in finished if name.startswith("tune-trellis-")}
    assert {name for name in tuned if "through" in name} == {"tune-trellis-through-lr2e-3"}
    assert len(tuned) == 1 + 2 * 4
    assert not [name for name in finished if name.startswith("recall-trellis-through-lr1")]
    assert {"recall-trellis-through-lr3e-3", "recall-trellis-paper-lr1e-3"} <= set(finished)


def test_a_change_is_chosen_where_it_is_better_by_more_than_twice_the_noise(every_kind: None) -> None:
    base = dict.fromkeys(LOSSES, 3.5)
    noise = order.noise_level(go_through(base))
    assert noise == pytest.approx(0.001)
    for better, changed in ((0.0019, False), (0.0021, True)):
        done = go_through({**base, "corrected-silu": 3.5 - better})
        found = order.chosen(plan.OURS, done)
        assert found is not None
        assert (found.set["model.trellis.phi"] == "silu") is changed
        assert ("recall-trellis-lr3e-3" in done) is changed  # unchanged, it is the form's own


def test_the_best_changes_are_combined_one_by_one(finished: dict[str, Any]) -> None:
    """conv-values, then value-gates with rates; value-gates adds nothing, and then SiLU."""
    first, second = (
        finished[f"vary-combined-{place}"]["about"]["settings"]["set"].items()
        - plan.table("trellis-corrected").items()
        for place in (1, 2)
    )
    own = {"model.trellis.conv_values": True, "model.trellis.value_gates": "own"}
    assert dict(first) == {**own, "model.trellis.gate_form": "rate"}
    assert dict(second) == {**dict(first), "model.trellis.phi": "silu"}


def test_what_makes_trellis_win_is_trained_in_full(finished: dict[str, Any]) -> None:
    def settings(name: str) -> dict[str, Any]:
        return dict(finished[f"full-{name}-s0"]["about"]["settings"]["set"])

    whole = settings("trellis")
    assert whole == finished["vary-combined-1"]["about"]["settings"]["set"]
    assert settings("trellis-half") == {**whole, "model.trellis.slots": 16}
    own = {"model.trellis.update": "stale", "model.trellis.step_bound": "chunk"}
    assert settings("trellis-stale") == {**whole, **own}
    assert settings("trellis-paper") == {}


def test_half_the_slots_have_targets_of_their_own_where_values_are_targets(
    finished: dict[str, Any],
) -> None:
    whole = finished["full-trellis-s0"]["about"]["settings"]
    tied = {**whole["set"], "model.trellis.targets": "values", "model.trellis.conv_values": True}
    changed = {
        **finished["full-trellis-s0"],
        "about": finished["full-trellis-s0"]["about"] | {"settings": {**whole, "set": tied}},
    }
    left = {name: found for name, found in finished.items() if name != "full-trellis-half-s0"}
    (half,) = (task for task in order.tasks({**left, "full-trellis-s0": changed}) if "half" in task.name)
    own = {"model.trellis.slots": 16, "model.trellis.targets": "own", "model.trellis.conv_targets": True}
    assert half.settings.set == {**tied, **own}
    assert half.spec(Path("w")).resolved.model.trellis.slots == 16


def test_the_rest_have_the_best_rate_of_gated_deltanet_and_one_seed(finished: dict[str, Any]) -> None:
    for name in plan.models("rest"):
        recalls = [f"recall-{name}-lr{rate}" for rate in ("3e-3", "9e-3")]
        again = ["recall-abc-lr9e-3-s1"] if name == "abc" else []
        assert [run for run in finished if f"-{name}-" in run] == [*recalls, *again, f"full-{name}-s0"]
        assert finished[f"full-{name}-s0"]["about"]["settings"]["rate"] == 8e-3
    names = [task.name for task in order.tasks(finished) if task.kind == "full"]
    assert names[-2:] == ["full-mamba2-s2", "full-ttt_linear-s2"]
    assert [name.split("-")[1] for name in names[-8:-2]] == list(plan.models("rest"))


def test_learning_rates_go_on_where_the_best_is_the_last_one(finished: dict[str, Any]) -> None:
    """The made-up losses fall with the rate, so it doubles until the plan's bound."""
    rates = [
        found["about"]["settings"]["rate"] for name, found in finished.items() if name.startswith("tune-gsa-")
    ]
    assert sorted(rates) == [1e-3, 2e-3, 4e-3, 8e-3]
    assert finished["full-gsa-s0"]["about"]["settings"]["rate"] == 8e-3


def test_the_two_strongest_baselines_have_as_many_runs_as_trellis(finished: dict[str, Any]) -> None:
    def runs(*models: str) -> int:
        short = ("tune", "vary", "search")
        abouts = [found["about"] for found in finished.values()]
        return sum(about["kind"] in short and about["settings"]["model"] in models for about in abouts)

    ours = runs(*plan.models("ours"))
    assert ours == runs("gated_deltanet") == runs("attention") > runs("gsa") == 4


def test_further_settings_are_near_the_best_rate_and_all_different(finished: dict[str, Any]) -> None:
    for name in ("gated_deltanet", "attention"):
        found = [
            task
            for task in order.tasks(finished)
            if task.kind in ("tune", "search") and task.settings.model == name
        ]
        digests = {task.spec(Path("w")).digest for task in found}
        assert len(digests) == len(found)
        searched = [task.settings for task in found if task.kind == "search"]
        assert {round(one.rate / 8e-3, 3) for one in searched} <= {0.707, 1.0, 1.414}
        for key in ("conv_values", "skip_values"):
            drawn = {one.set.get(f"model.baselines.{key}") for one in searched}
            assert drawn == ({None} if name == "attention" else {True, False})


def test_no_key_is_drawn_that_a_model_does_not_read(every_kind: None) -> None:
    """Mamba2 has a skip without being asked: the same model would be trained again under another digest."""
    done = go_through({**LOSSES, "mamba2": 3.5})
    drawn = [
        one["about"]["settings"]["set"] for name, one in done.items() if name.startswith("search-mamba2")
    ]
    assert drawn
    assert all("model.baselines.conv_values" in one for one in drawn)
    assert not any("model.baselines.skip_values" in one for one in drawn)


def test_full_runs_have_the_best_settings_and_the_seeds_of_their_role(finished: dict[str, Any]) -> None:
    seeds = {name: [f"full-{name}-s{s}" in finished for s in (0, 1, 2)] for name in ("trellis", "abc")}
    assert seeds == {"trellis": [True] * 3, "abc": [True, False, False]}
    place = [task.name for task in order.tasks(finished)].index
    assert (
        place("full-gsa-s0")
        < place("long-trellis-s0")
        < place("full-trellis-s1")
        < place("full-gsa-s2")
        < place("full-mamba2-s2")
    )
    chosen = finished["full-trellis-s0"]["about"]["settings"]
    assert chosen["model"] == "trellis-corrected"
    assert finished["full-trellis-half-s0"]["about"]["settings"]["set"] == {
        **chosen["set"],
        "model.trellis.slots": 16,
    }
    longer = {name for name in finished if name.startswith("long-")}
    assert longer == {"long-trellis-s0", "long-gated_deltanet-s0", "long-attention-s0"}


def test_of_rates_that_are_level_the_lowest_is_trained_in_full(finished: dict[str, Any]) -> None:
    short = {name: found for name, found in finished.items() if not name.startswith(("full-", "long-"))}
    best, noise = order.loss_of(short["tune-gsa-lr8e-3"]), order.noise_level(short)
    assert noise is not None
    for times, rate in ((0.9, 4e-3), (1.1, 8e-3)):
        level = {**short["tune-gsa-lr4e-3"]["validation"], "loss": best + times * noise}
        found = order.chosen(
            "gsa", {**short, "tune-gsa-lr4e-3": {**short["tune-gsa-lr4e-3"], "validation": level}}
        )
        assert found is not None
        assert found.rate == rate


def test_what_a_full_run_was_trained_with_stays(finished: dict[str, Any]) -> None:
    before = dict(finished)
    del before["full-gsa-s1"]
    name = "tune-gsa-lr1e-3"
    before[name] = {**before[name], "validation": {**before[name]["validation"], "loss": 1.0}}
    (task,) = (task for task in order.tasks(before) if task.name == "full-gsa-s1")
    assert task.settings.rate == 8e-3


def test_layers_that_are_not_there_are_left_out_with_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "registered", lambda name: name != "rwkv7")
    monkeypatch.setattr(pool, "registered", lambda name: name != "rwkv7")
    assert [line.partition(":")[0] for line in pool.unregistered()] == ["rwkv7"]
    assert not any("rwkv7" in task.name for task in order.tasks({}))


# The budget


def test_core_seconds_of_results_add_up_and_bound_what_is_begun(
    tmp_path: Path, every_kind: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, first, said = results.Store(tmp_path / "results"), order.tasks({})[1], []
    monkeypatch.setattr(pool, "pending", lambda results, only: order.tasks({})[2:])
    store.write(first.name, result(first, 4.0, core_seconds=800.0))
    begun = tmp_path / "core-seconds" / f"{order.tasks({})[2].name}.json"
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
from benchmarks.study import plan
from benchmarks.study.results import Store
from benchmarks.study.order import tasks
plan.FOLDER = Path(FOLDER)
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
name = options["--only"]
mark = Path(options["--work"]) / (name + ".cut")
if name.endswith("lr2e-3"):
    sys.exit(1)
if name.endswith("lr4e-3") and not mark.exists():
    mark.touch()
    sys.exit(75)
about = next(task.about() for task in tasks({}) if task.name == name)
result = {"about": about, "core_seconds": 7.0, "validation": {"loss": 4.0}}
Store(Path(options["--results"])).write(name, result)
""".replace("FOLDER)", f"{str(FOLDER)!r})")


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
    assert slice_.run() == ["tune-attention-lr2e-3"]
    assert set(store.runs()) == {"tune-attention-lr1e-3", "tune-attention-lr4e-3"}
    assert "tune-attention-lr4e-3: saved, goes on next time" in said
    assert store.spent() == 14.0


def test_a_dry_run_prints_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--work", str(tmp_path), "--results", str(tmp_path / "results")]
    assert main(["run", "--dry-run", "--only", "tune-attention-*", *options]) == 0
    printed = capsys.readouterr().out
    assert [
        line.split()[-1] for line in printed.splitlines() if line.lstrip()[:1].isdigit() and "tune-" in line
    ] == [
        "tune-attention-lr1e-3",
        "tune-attention-lr2e-3",
        "tune-attention-lr4e-3",
    ]
    assert "0 of 86,400 core-seconds used" in printed
    (total,) = (line for line in printed.splitlines() if line.startswith("the whole plan"))
    hours = float(total.split()[-4])
    assert f"{len(expected.rehearsed({}))} runs left" in total
    assert 15 < hours < 60


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
        return {"loss": 4.0, "books": {}}

    monkeypatch.setattr(frozen, "used", iter(range(0, 1000, 10)).__next__)
    monkeypatch.setattr(frozen, "test_scores", scores)
    for _ in range(2):  # the second time there is nothing left to score
        frozen.score_test(store, books=tmp_path, work=tmp_path, say=lambda line: None)
    assert calls == sorted(full)
    assert store.spent() == 100.0 * len(full) + 10.0 * len(full)
    # A model that is finished later is added; another choice of one that was scored is refused.
    store.write("full-abc-s0", finished["full-abc-s0"])
    (tmp_path / "runs/full-abc-s0").mkdir()
    frozen.score_test(store, books=tmp_path, work=tmp_path, say=lambda line: None)
    assert calls[-1] == "full-abc-s0"
    assert set(store.once("test")["choices"]) == {"full-gsa", "full-abc"}  # type: ignore[index]
    changed = json.loads(json.dumps(full["full-gsa-s0"]))
    changed["about"]["settings"]["rate"] = 1.0
    for name in full:
        store.write(name, {**changed, "name": name})
    with pytest.raises(ValueError, match=r"settings of full-gsa.*scored once"):
        frozen.score_test(store, books=tmp_path, work=tmp_path)


def test_a_sealed_score_stands_in_for_a_checkpoint_that_is_gone(
    tmp_path: Path, finished: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = results.Store(tmp_path / "results")
    store.write("full-gsa-s0", finished["full-gsa-s0"])
    with pytest.raises(ValueError, match="is gone"):
        frozen.score_test(store, books=tmp_path, work=tmp_path)
    store.write("sealed/full-gsa-s0", {"loss": 3.5, "books": {}})
    monkeypatch.setattr(frozen, "test_scores", None)  # nothing is scored again
    assert list(store.runs()) == ["full-gsa-s0"]
    frozen.score_test(store, books=tmp_path, work=tmp_path, say=lambda line: None)
    assert store.once("test")["runs"]["full-gsa-s0"]["loss"] == 3.5
    assert store.spent() == 100.0, "the run's own core-seconds hold its scoring"


def test_a_full_run_seals_its_test_scores_and_a_tuning_run_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one, "train", lambda task, **_: {"validation": {"loss": 4.0}})
    monkeypatch.setattr(one, "test_scores", lambda task, **_: {"loss": 3.5})
    store = results.Store(tmp_path / "results")
    for kind in ("tune", "full"):
        task = plan.Task(f"{kind}-x", kind, plan.Settings(model="gsa", rate=1e-3), seed=0, length=1024)
        assert one.do(task, books=tmp_path, work=tmp_path, store=store, minutes=None) == 0
    assert store.sealed("full-x") == {"loss": 3.5}
    assert store.sealed("tune-x") is None


def test_a_run_that_is_cut_while_it_scores_the_test_books_goes_on_and_what_it_took_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(task: plan.Task, **_: Any) -> None:
        sum(i * i for i in range(2_000_000))
        raise KeyboardInterrupt

    monkeypatch.setattr(one, "train", lambda task, **_: {"validation": {"loss": 4.0}})
    monkeypatch.setattr(one, "test_scores", cut)
    task = plan.Task("full-x", "full", plan.Settings(model="gsa", rate=1e-3))
    store = results.Store(tmp_path / "results")
    assert one.do(task, books=tmp_path, work=tmp_path, store=store, minutes=None) == one.EXIT_CUT
    assert store.runs() == {}
    assert pool.spent(store, tmp_path) > 0.05


# Runs by hand


def test_a_run_by_hand_is_kept_and_counted_and_chooses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[plan.Task] = []

    def trained(task: plan.Task, **_: Any) -> dict[str, Any]:
        seen.append(task)
        return {"validation": {"loss": 4.25, "bits_per_byte": 2.0}}

    monkeypatch.setattr(tried, "train", trained)
    store = results.Store(tmp_path / "results")
    command = ["try", "louder", "--books", str(tmp_path), "--model", "trellis-through", "--tokens", "9000"]
    changes = ["--set", "model.trellis.head_norm_eps=1e-6", "--set", 'model.trellis.readout="silu_rms"']
    places = ["--work", str(tmp_path), "--results", str(store.folder)]
    assert main([*command, *changes, *places]) == 0
    resolved = seen[0].spec(tmp_path).resolved
    assert (resolved.model.trellis.head_norm_eps, resolved.training.steps) == (1e-6, 4)
    assert store.runs() == {}
    assert store.spent() == store.tried()["louder"]["core_seconds"]
    (row,) = tables.tried(store.tried())
    assert (row["tokens"], row["loss"], row["set"]["model.trellis.readout"]) == (8192, 4.25, "silu_rms")


def test_a_run_by_hand_that_the_plan_comes_to_name_is_the_plan_s(tmp_path: Path) -> None:
    store = results.Store(tmp_path)
    first, other = [task for task in order.tasks({}) if task.kind == "tune"][:2]
    for name, task, rate in (("same", first, first.settings.rate), ("slower", other, 1e-7)):
        about = {"model": task.settings.model, "rate": rate, "tokens": task.about()["tokens"], "set": {}}
        done = sealed_with_its_recipe(task, 4.0)
        del done["about"]
        done["validation"]["characters"] = task.characters
        store.write(f"tried/{name}", done | {"name": name, "tried": about, "core_seconds": 50.0})
    (tmp_path / "core-seconds").mkdir()
    (tmp_path / "core-seconds" / f"{tried.run_name('same')}.json").write_text('{"seconds": 50.0}')
    before = pool.spent(store, tmp_path)
    (line,) = tried.adopt(store)
    assert line == f"{first.name}: run by hand before, as same"
    known.check_results(store.runs())
    assert store.runs()[first.name]["tried_as"] == "same"
    assert set(store.tried()) == {"slower"}
    assert before == pool.spent(store, tmp_path) == 100.0
    assert tried.adopt(store) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--model", "gru"], "--model gru: use one of trellis-paper, "),
        (["--model", "gsa", "--set", "model.dim"], "--set model.dim: write KEY=VALUE"),
        (["--model", "gsa", "--set", "model.dim=wide"], "--set model.dim=wide: write KEY=VALUE"),
        (["--model", "gsa", "--tokens", "100"], "--tokens 100: an update has 2048, use as many or more"),
    ],
)
def test_runs_by_hand_that_cannot_be_are_refused(
    given: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = ["--books", str(tmp_path), "--work", str(tmp_path), "--results", str(tmp_path)]
    assert main(["try", "x", *given, *places]) == 1
    assert message in capsys.readouterr().err


# Results


def test_a_result_of_other_settings_tokens_or_recipe_is_refused() -> None:
    task = next(task for task in order.tasks({}) if task.kind == "tune")
    good = sealed_with_its_recipe(task, 4.0)
    known.check_results({task.name: good})

    def changed(**about: Any) -> dict[str, Any]:
        return {task.name: {**good, "about": {**good["about"], **about}}}

    for about in ({"tokens": 8192}, {"settings": {**good["about"]["settings"], "rate": 1.0}}, {"seed": 1}):
        with pytest.raises(ValueError, match=f"{task.name} has {next(iter(about))} .* the plan has"):
            known.check_results(changed(**about))
    wider = {**good["recipe"], "model.dim": 256}
    with pytest.raises(ValueError, match="another recipe"):
        known.check_results({task.name: {**good, "recipe": wider, "digest": digest(wider)}})
    with pytest.raises(ValueError, match="another recipe"):
        known.check_results({task.name: {**good, "digest": "0" * 64}})


def test_a_key_that_a_later_version_added_counts_with_its_default() -> None:
    task = next(task for task in order.tasks({}) if task.kind == "tune")
    good = sealed_with_its_recipe(task, 4.0)
    older = {key: value for key, value in good["recipe"].items() if key != "model.attention.sliding_window"}
    known.check_results({task.name: {**good, "recipe": older, "digest": digest(older)}})


def test_a_recall_result_has_the_digest_of_its_model_and_rate() -> None:
    task = next(task for task in order.tasks({}) if task.kind == "recall")
    good = result(task, 4.0) | {"digest": recall.mark(task.settings, seed=0)}
    known.check_results({task.name: good})
    with pytest.raises(ValueError, match="another recipe"):
        known.check_results({task.name: {**good, "digest": recall.mark(task.settings, seed=1)}})


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
    for split in ("validation", "validation-300000", "test")
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
    strong = {name: {**book, "kneser_ney": 13_600.0} for name, book in NGRAMS["validation"].items()}
    refused = tables.ranking(finished, "full", {"validation": strong})
    assert all("bigram's 3.40" in row["refused"][0] for row in refused)


def test_nothing_counts_beside_a_trellis_that_does_not(finished: dict[str, Any]) -> None:
    """Its own row's gate is everyone's: every difference is to it."""
    rows = tables.ranking(finished, "full", NGRAMS)
    found: dict[str, Any] = {
        "full-test": rows,
        "full-validation": [],
        "tuning": [],
        "tried": [],
        "ablations": [],
        "left": [],
    }
    found |= {
        "bigram": {"test": 4.5},
        "short_bigram": None,
        "noise": None,
        "recall": [],
        "speed": None,
        "places": None,
        "reach": None,
    }
    found |= {"runs": 0, "core_seconds": 0.0, "budget": 1.0}
    assert "| yes |" in report.sections(found)["full-test"]
    rows[0]["refused"] = ["it is a bigram"]
    made = report.sections(found)
    assert "| yes |" not in made["full-test"]
    assert made["refused"] == f"- {rows[0]['title']}, test books, T = 1,024: it is a bigram"


def test_ablations_are_paired_with_the_run_of_the_same_rate(finished: dict[str, Any]) -> None:
    rows = {row["variant"]: row for row in tables.ablations(finished)}
    assert len(rows) == len(plan.plan()["variants"]) + 2
    assert {row["over"] for row in rows.values()} == {"books only (one seed)"}
    assert rows["corrected-conv-values"]["estimate"] == pytest.approx(-0.05)
    assert rows["paper-chunk-16"]["estimate"] == pytest.approx(0.0)
    through = {name for name, entry in plan.plan()["variants"].items() if entry["of"] == "trellis-through"}
    assert {name for name, row in rows.items() if row["within"]} == {"paper-chunk-16", *through}
    assert "conv_values True" in rows["combined-1"]["title"]


def test_short_runs_that_are_not_below_the_bigram_are_marked(finished: dict[str, Any]) -> None:
    """It has 4.5 nats per token here, then 3.6."""
    rows, tuning = tables.ablations(finished), tables.tuned(finished)
    bigram = tables.short_bigram(NGRAMS)
    assert bigram == pytest.approx(4.5)
    text = report._ablations(rows, bigram, 0.001) + report._tuning(tuning, bigram)
    assert "4.5000 nats per token" in text
    assert " **^** |" not in text
    for marked in (report._ablations(rows, 3.6, 0.001), report._tuning(tuning, 3.6)):
        above = [line for line in marked.splitlines() if " **^** |" in line]
        assert above
        assert len(above) < marked.count("\n| ") - 1


def test_models_of_equal_state_are_compared_with_the_half_slot_trellis(finished: dict[str, Any]) -> None:
    by_name = {row["group"]: row for row in tables.ranking(finished, "full", NGRAMS)}
    half, gated = by_name["trellis-half"], by_name["gated_deltanet"]
    assert half["difference_half"] is None
    first = gated["loss"] - 0.001  # of the three seeds; the half-slot Trellis has the first alone
    assert gated["difference_half"]["estimate"] == pytest.approx(first - half["loss"], abs=1e-5)
    rows = [
        {**by_name["gsa"], "memory_bytes": 100, "difference_half": {**gated["difference"], "estimate": 0.25}},
        {**half, "memory_bytes": 100},
        {**gated, "memory_bytes": 100},
        {**by_name["trellis"], "memory_bytes": 200},
    ]
    text = report._equal_state(rows)
    assert "+0.2500" in text
    assert "**Trellis**" not in text


def test_a_speed_is_of_the_very_model(finished: dict[str, Any]) -> None:
    rows = {
        name: {"seconds_per_token": 1.0, "set": list(plan.model_keys(plan.table(name)))}
        for name in plan.models()
    }
    found = {
        row["group"]: row["in_turns"]
        for row in tables.ranking(finished, "full", NGRAMS, speeds={"lengths": {"1024": rows}})
    }
    assert found["trellis-paper"]
    assert not found["trellis"]  # its changes were not measured in turns
    assert not found["trellis-half"]


def test_recall_tries_higher_rates_while_the_best_is_the_highest(finished: dict[str, Any]) -> None:
    """The made-up accuracies rise with the rate; the next after 9e-3 is beyond the plan's bound."""
    rates = [name for name in finished if name.startswith("recall-gsa-")]
    assert rates == ["recall-gsa-lr3e-3", "recall-gsa-lr1e-3", "recall-gsa-lr9e-3"]
    low = {**finished, "recall-gsa-lr1e-3": finished["recall-gsa-lr1e-3"] | {"choosing": 0.99}}
    assert [task.name for task in order._recall("gsa", low)] == rates[:2]


def test_recall_has_forms_of_its_own(finished: dict[str, Any]) -> None:
    """What they change, at the first rate alone; the table names them."""
    found = {name: run["about"] for name, run in finished.items() if "corrected-open" in name}
    (about,) = found.values()
    assert list(found) == ["recall-corrected-open-lr3e-3"]
    asked = about["settings"]["set"]
    assert asked.items() >= (plan.table("trellis-corrected") | {"model.trellis.gates": ["off"]}).items()
    assert "no forget gate" in {row["title"] for row in tables.recalls(finished)}


def test_recall_has_its_further_seeds_at_the_best_rate(finished: dict[str, Any]) -> None:
    again = {name: found for name, found in finished.items() if name[:6] == "recall" and "-s" in name[-3:]}
    assert set(again) == {
        "recall-trellis-paper-lr9e-3-s1",
        "recall-trellis-paper-lr9e-3-s2",
        "recall-abc-lr9e-3-s1",
    }
    first = finished["recall-abc-lr9e-3"]["about"]
    assert again["recall-abc-lr9e-3-s1"]["about"] == {**first, "seed": 1}


def test_recall_is_the_mean_over_the_seeds_of_the_rate_that_the_first_chose(finished: dict[str, Any]) -> None:
    runs = {name: dict(found) for name, found in finished.items() if name.startswith("recall-trellis-paper-")}
    for name, found in runs.items():
        high = 1.0 if name.endswith("s1") else 0.4
        found["accuracy"] = dict.fromkeys(found["accuracy"], high)
    (row,) = tables.recalls(runs)
    assert (row["rate"], row["rates"], row["seeds"], row["highest"]) == (9e-3, 3, 3, True)
    assert row["mean"] == pytest.approx(0.6)
    assert row["accuracy"]["128"] == pytest.approx(0.6)
    assert row["deviation"] == pytest.approx(0.12**0.5)


def test_a_learning_rate_of_recall_is_chosen_on_other_rows(finished: dict[str, Any]) -> None:
    runs = {name: dict(found) for name, found in finished.items() if name.startswith("recall-gsa-")}
    assert len(runs) == 3
    first, second, last = runs.values()
    last["choosing"] = 0.0
    first["choosing"], second["choosing"] = 0.9, 0.1
    second["accuracy"] = dict.fromkeys(second["accuracy"], 1.0)
    (row,) = tables.recalls(runs)
    assert (row["mean"], row["rates"], row["highest"]) == (0.5, 3, False)
    assert [name for name in finished if name.startswith("recall-trellis-lr")] == [
        "recall-trellis-lr3e-3",
        "recall-trellis-lr1e-3",
        "recall-trellis-lr9e-3",
    ]
    asked = finished["recall-trellis-lr3e-3"]["about"]["settings"]["set"]
    assert asked.items() >= finished["full-trellis-s0"]["about"]["settings"]["set"].items()
    assert not {"model.trellis.gate_bias", "model.trellis.chunk_size"} & set(plan.plan()["recall"]["set"])


def test_the_report_fills_the_page_and_draws(
    tmp_path: Path, finished: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "check_results", lambda runs: None)  # the made-up ones have no recipes
    store, page = results.Store(tmp_path / "results"), tmp_path / "study.md"
    page.write_text((report.DOCS / page.name).read_text())
    for name, found in finished.items():
        store.write(name, found)
    store.write("once/ngrams", NGRAMS)
    paths = report.write_report(store, docs=tmp_path, output=tmp_path / "study.json")
    assert {path.name for path in paths} == {
        "study.json",
        "study.md",
        "study-positions.png",
        "study-ablations.png",
    }
    text = page.read_text()
    assert "| **Trellis** | 3 |" in text
    assert text.count(tables.EMPTY) == 6  # the test books, runs by hand, places in a chunk, reach
    assert "Every run of the plan is done." in text
    twice = report.fill(text, report.sections(report.gather(store)))
    assert twice == text
    with pytest.raises(ValueError, match="study:budget"):
        report.fill("a page without markers", {"budget": "x"})


def test_without_runs_every_table_says_so(tmp_path: Path) -> None:
    made = report.sections(report.gather(results.Store(tmp_path)))
    assert {name for name, text in made.items() if text == tables.EMPTY} == set(made) - {
        "budget",
        "speed",
        "left",
    }
    assert "`full-trellis-half-s0`" in made["left"]


def test_reach_is_shown_by_context_and_by_layer() -> None:
    interval = {"estimate": 0.25, "low": 0.2, "high": 0.3, "over": "books only (one seed)"}
    run = {
        "contexts": [{"context": 16, "loss": 4.25, **interval}, {"context": 32, "loss": 4.0, **interval}],
        "half_lives": {"memory": [[0.5, 1.25, 9.0, 80.0], [1.0, None]], "value memory": []},
    }
    found = {"full-trellis-s0": run, "full-attention-s0": run | {"half_lives": {"memory": []}}}
    context = tables.reach_table(found).splitlines()
    assert context[0] == "| model | 32 to 63 | 16 to 31 |"
    assert context[2] == "| **Trellis** | 4.0000 | +0.2500 [+0.2000, +0.3000] * |"
    lives = tables.lives_table(found).splitlines()
    assert lives[2:] == ["| **Trellis** | memory | 0.5 / 1.25 / 80 | 1 / 1 / never |"]


def test_result_files_are_small_and_read_back(tmp_path: Path, finished: dict[str, Any]) -> None:
    store = results.Store(tmp_path)
    path = store.write("full-gsa-s0", finished["full-gsa-s0"])
    assert json.loads(path.read_text()) == json.loads(json.dumps(finished["full-gsa-s0"]))
    for path in results.FOLDER.glob("*.json"):
        assert path.stat().st_size < 20_000, path.name
