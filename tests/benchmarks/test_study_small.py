"""The study at the scale of one GPU: its own models, files and page, and no run where there is no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.study import __main__ as command
from benchmarks.study import expected, one, order, plan, pool, report, results, tables
from trellis_dist.models.counts import parameter_counts


@pytest.fixture(autouse=True)
def _small() -> Iterator[None]:
    plan.use("small")
    yield
    plan.use("tiny")


def task_of(name: str, *, kind: plan.Kind = "tune", length: int = 1024) -> plan.Task:
    settings = plan.Settings(name, 1e-3, plan.table(name))
    return plan.Task("x", kind, settings, tokens=10**6, length=length)


@pytest.mark.parametrize("name", plan.models())
def test_models_have_20_to_30_million_parameters_and_are_equally_large(name: str) -> None:
    wanted, found = (
        parameter_counts(task_of(model).spec(Path("w")).resolved.model).total for model in (plan.PAPER, name)
    )
    assert 20e6 <= found <= 30e6
    assert abs(found / wanted - 1) <= 0.02


@pytest.mark.parametrize(("length", "rows"), [(1024, 32), (4096, 8)])
def test_an_update_has_as_many_tokens_whatever_the_rows_length(length: int, rows: int) -> None:
    recipe = task_of("mamba2", length=length).spec(Path("w")).resolved
    assert (recipe.global_rows, recipe.training.micro_batch) == (rows, rows)
    assert recipe.training.precision == "bf16"
    assert (
        recipe.model.trellis.slots
        == recipe.model.baselines.slots
        == recipe.model.dim // recipe.model.num_heads
    )


def test_it_is_the_same_plan_where_nothing_is_changed() -> None:
    small = plan.plan()
    plan.use("tiny")
    tiny = plan.plan()
    for table in ("models", "variants", "noise", "stale", "recall", "long", "combined"):
        assert small[table] == tiny[table]
    assert tiny["base"] == {}
    assert {**tiny["full"]["seeds"], **small["full"]["seeds"]} == small["full"]["seeds"]
    assert small["search"]["optimizer.beta2"] == tiny["search"]["optimizer.beta2"]


def test_a_run_of_a_name_is_another_one_at_another_scale() -> None:
    small = task_of("gsa")
    digests = {small.spec(Path("w")).digest, order._digest(small)}
    plan.use("tiny")
    assert order._digest(small) not in digests
    assert small.spec(Path("w")).digest not in digests


def test_half_the_slots_are_half_of_this_scales() -> None:
    whole = plan.Settings("trellis-paper", 1e-3)
    base = task_of(plan.PAPER).spec(Path("w")).resolved.model.trellis.slots
    assert order._half(whole)[order.SLOTS] == base // 2
    plan.use("tiny")
    assert order._half(whole)[order.SLOTS] == base // 4


def test_the_whole_plan_can_be_gone_through_and_fits_the_budget() -> None:
    left = expected.rehearsed({})
    assert {task.kind for task in left} == {"tune", "noise", "vary", "search", "recall", "full", "long"}
    names = [task.name for task in left]
    assert len(set(names)) == len(names)
    full = [task.name for task in left if task.kind == "full"]
    assert {f"full-{name}-s{seed}" for name in ("gsa", "attention", "trellis") for seed in range(3)} <= {
        *full
    }
    cost = sum(pool.estimate(task, {}) for task in left)
    assert 1800 < cost < 3600 * plan.plan()["computes"]["budget_hours"]


def test_it_counts_seconds_and_not_those_of_a_cpu() -> None:
    import time

    before, cpu = one.used(), time.process_time()
    time.sleep(0.05)
    assert one.used() - before >= 0.05 > time.process_time() - cpu


@pytest.mark.parametrize(
    "arguments", [["run", "--books", "b"], ["speed"], ["try", "n", "--model", "gsa", "--books", "b"]]
)
def test_without_a_gpu_it_says_so_and_begins_nothing(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert command.main([*arguments, "--scale", "small"]) == 1
    assert "--scale small computes on a GPU and torch finds none" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_needs_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["run", "--dry-run", "--scale", "small"]) == 0
    said = capsys.readouterr().out
    assert "tune-trellis-tied-lr4e-3" in said
    assert f"of {3600 * 3:,} core-seconds" in said


def test_it_has_a_page_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results" / "study")
    store = results.Store(results.folder_of("small"))
    store.folder.mkdir(parents=True)
    written = report.write_report(store, docs=tmp_path)
    assert written == [tmp_path / "results" / "study-small.json", tmp_path / "study-small.md"]
    text = (tmp_path / "study-small.md").read_text()
    assert text.startswith("# The study, --scale small\n")
    assert text.count(tables.EMPTY) > 10
    assert "## Test books, T = 1,024\n" in text
    report.write_report(store, docs=tmp_path)
    assert (tmp_path / "study-small.md").read_text() == text
