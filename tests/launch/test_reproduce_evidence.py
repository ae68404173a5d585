"""What a page says of its numbers: differences around zero, intervals, saturation, looks, frontiers."""

import dataclasses
import re

import pytest

from launch.experiments.expand import Options, expand
from launch.experiments.page import Table, Text
from launch.experiments.pictures import can_draw, draw
from launch.experiments.plots import _frontier
from launch.experiments.render import make_page
from launch.experiments.result import _checkpoints, _looks, _spread
from launch.experiments.shares import over_seeds, share_of
from launch.experiments.values import error_of, value_of
from launch.figures.steps import steps_blocks
from launch.recipe import resolve
from launch.run_folder import recipe_of_run
from tests.evals.conftest import write_checkpoint
from tests.launch.scored_run import write_scored_run
from tests.launch.test_reproduce import RESULT
from trellis_dist.charts import Difference, difference_chart


def share(right, items):
    from evals.samples import share as scored

    return scored([1.0] * right + [0.0] * (items - right))


def results(expansion, change):
    """A result for every run, with what ``change`` says of its row and seed."""
    found = {}
    for spec in expansion.specs.values():
        result = {**RESULT, "name": spec.name, "recipe": resolve(spec.resolved)}
        found[spec.name] = result | change(result, spec.about["row"], spec.about["seed"])
    return found


def bits(values):
    """Results whose bits per byte are those of (row, seed)."""

    def change(result, row, seed):
        return {"validation": {**result["validation"], "bits_per_byte": values[row, seed]}}

    return change


def chart(page, start):
    return next(chart for chart in page.charts if chart.title.startswith(start))


def test_bars_are_differences_to_the_base_on_both_sides_of_zero():
    rows = ("trellis-paper", "deltanet", "trellis-paper-m128")
    expansion = expand("table2", "tiny", Options(only=rows))
    values = {("trellis-paper", 0): 1.9, ("deltanet", 0): 1.93, ("trellis-paper-m128", 0): 1.89}
    page = make_page(expansion, results(expansion, bits(values)))
    drawn = {bar.name: bar for bar in chart(page, "Bits per byte").bars}
    assert set(drawn) == {"DeltaNet", "Trellis, M = 128"}
    assert drawn["DeltaNet"].value == pytest.approx(0.03)
    assert drawn["Trellis, M = 128"].value == pytest.approx(-0.01)
    assert drawn["DeltaNet"].low is None
    assert "minus that of Trellis (1.9). One seed" in page.markdown() + page.html()
    less, more = (
        float(w) for w in re.findall(r'class="bar" style="left:[\d.]+%;width:([\d.]+)%', page.html())[::-1]
    )
    assert more / less == pytest.approx(3.0, rel=1e-2)  # what 1.93 / 1.89 would hide


def test_bars_hold_the_spread_over_paired_seeds():
    expansion = expand("table2", "tiny", Options(only=("trellis-paper", "deltanet"), seeds=2))
    values = {
        ("trellis-paper", 0): 1.9,
        ("trellis-paper", 1): 2.9,
        ("deltanet", 0): 1.93,
        ("deltanet", 1): 2.91,
    }
    (bar,) = chart(make_page(expansion, results(expansion, bits(values))), "Bits per byte").bars
    assert (bar.value, bar.low, bar.high) == pytest.approx(
        (0.02, 0.01, 0.03)
    )  # seeds differ by 1, pairs do not
    page = make_page(
        expansion, {k: v for k, v in results(expansion, bits(values)).items() if "deltanet" in k}
    )
    assert "differences to the row trellis-paper are drawn once it is there" in page.html()


@pytest.mark.parametrize("values", [(1.0, -3.0), (2.0, 5.0), (-2.0, -4.0), (0.0, 0.0)])
def test_the_zero_of_a_difference_chart_is_where_its_bars_begin(values):
    page = difference_chart("t", [Difference(str(v), v, f"{v}") for v in values])
    zeros = {float(x) for x in re.findall(r'class="zero" style="left:([\d.]+)%', page)}
    bars = [
        (float(a), float(b))
        for a, b in re.findall(r'class="bar" style="left:([\d.]+)%;width:([\d.]+)%', page)
    ]
    (zero,) = zeros
    for value, (left, width) in zip(values, bars):
        assert (left if value > 0 else left + width) == pytest.approx(zero, abs=0.02)
        assert 0 <= left <= left + width <= 100.01


def test_a_picture_of_differences_holds_both_sides(tmp_path):
    from launch.experiments.page import Differences

    bars = [Difference("more", 0.2, "+0.2", 0.1, 0.3), Difference("less", -0.1, "-0.1")]
    files = draw(Differences("bars", "Differences", bars), tmp_path / "bars")
    assert len(files) == (2 if can_draw() else 0)
    for file in files[1:]:
        assert {"+0.2", "-0.1"} <= set(re.findall(r"<!-- (.*?) -->", file.read_text()))


def recall(task, result, chance=None):
    return {task: {"result": result, **({} if chance is None else {"chance": chance})}}


def test_an_accuracy_stands_with_wilsons_interval_and_its_chance():
    needles = {"rows": [{"length": 512, "choice": share(3, 20), "generation": share(0, 20)}]}
    scores = recall("niah_single_1", {**needles, "chance": {"choice": 10.0, "generation": 0.0}})
    scores |= recall(
        "mqar", {"groups": {"4/512": share(25, 50), "16/512": share(1, 50)}}, {"mqar/4/512": 0.05}
    )
    scores |= recall("piqa", {"metrics": {"acc": share(70, 100)}}, {"piqa/acc": 50.0})
    result = {"scores": scores}
    assert str(share_of(result, "niah_single_1/choice/512")) == "15 (5 to 36)*"
    assert str(share_of(result, "niah_single_1/generation/512")) == "0 (0 to 16)*"
    assert str(share_of(result, "mqar/4/512")) == "50 (37 to 63)"
    assert share_of(result, "mqar/16/512").chance == 6.25  # a value of the row, not a piece of the vocabulary
    assert str(share_of(result, "piqa/acc")) == "70 (60 to 78)"
    both = share_of(result, "mean(piqa/acc,mqar/4/512)")
    assert (both.percent, both.items) == (60.0, 50)
    assert both.high - both.low == pytest.approx(0.5 * (18.7**2 + 26**2) ** 0.5, rel=0.05)
    for none in ("niah_single_1/choice/64", "perplexity", "piqa/perplexity", "mean(piqa/acc,lambada/acc)"):
        assert share_of(result, none) is None
    twice = over_seeds([share_of(result, "piqa/acc")] * 2)
    assert (twice.low, twice.items) == (share_of(result, "piqa/acc").low, 100)


def slots(mqar, *, seeds=1, losses=None):
    expansion = expand("slots", "tiny", Options(seeds=seeds))

    def change(result, row, seed):
        groups = {f"{pairs}/512": share(mqar[row], 50) for pairs in (4, 16, 64)}
        scalars = {f"mqar/{key}": part["score"] for key, part in groups.items()}
        own = {} if losses is None else {"bits_per_byte": losses[row] + seed / 1000}
        validation = {**result["validation"], **own}
        return {"scores": recall("mqar", {"groups": groups}), "scalars": scalars, "validation": validation}

    return make_page(expansion, results(expansion, change)).markdown()


ROWS = tuple(f"trellis-slots-{m}" for m in (16, 32, 64, 128))


def test_saturation_is_the_smallest_within_the_interval_of_the_best():
    page = slots(dict(zip(ROWS, (5, 30, 36, 38))), seeds=3, losses=dict(zip(ROWS, (1.4, 1.3, 1.2, 1.2))))
    assert "| MQAR 16 | 64 | 76 (62.59 to 85.7) at 128 |" in page  # 60% at 32 is outside
    assert "| bits per byte | 64 | 1.201" in page
    assert "10 (4 to 21)*" in page  # of 4 pairs; a guess among the row's values has 25
    assert "* not distinguishable from chance" in page


def test_saturation_that_cannot_be_told_is_said():
    page = slots(dict(zip(ROWS, (1, 1, 2, 2))))
    assert "| MQAR 4 | cannot be told | no row is distinguishable from chance" in page
    assert "| bits per byte | cannot be told | one seed" in page
    page = slots(dict(zip(ROWS, (20, 22, 24, 24))))
    assert "| MQAR 16 | cannot be told | 48" in page
    page = slots(dict(zip(ROWS, (5, 6, 7, 45))))
    assert "| MQAR 16 | not reached | 90" in page


def test_charts_of_accuracies_hold_their_intervals():
    expansion = expand("slots", "tiny", Options())
    groups = {f"{pairs}/512": share(10, 50) for pairs in (4, 16, 64)}
    scalars = {f"mqar/{key}": 20.0 for key in groups}
    found = results(expansion, lambda *_: {"scores": recall("mqar", {"groups": groups}), "scalars": scalars})
    page = make_page(expansion, found)
    spans = chart(page, "Recall by slots").spans["MQAR 16"]
    assert [x for x, _, _ in spans] == [16, 32, 64, 128]
    assert spans[0][1:] == pytest.approx((11.24, 33.04), abs=0.01)
    assert page.html().count("<title>16: 11.2") == 3


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder and recipe of a run with two checkpoints."""
    run = write_scored_run(tmp_path_factory.mktemp("saved"))
    write_checkpoint(run, step=3, seed=9)
    recipe = recipe_of_run(run)
    return run, dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, steps=7))


def test_gates_and_norms_of_every_checkpoint_are_part_of_a_result(saved):
    found = _checkpoints(*saved)
    assert found["layers"] == [0, 1]
    assert [row["step"] for row in found["steps"]] == [3, 7]
    assert [len(row["prose"]["positions"]["ends"]) for row in found["steps"]] == [16, 16]
    expansion = expand("gates", "tiny", Options())
    assert {spec.resolved.checkpoint.keep for spec in expansion.specs.values()} == {0}
    assert all(spec.trace for spec in expansion.specs.values())
    assert not any(spec.trace for spec in expand("slots", "tiny", Options()).specs.values())
    page = make_page(
        expansion, results(expansion, lambda _, row, __: {"checkpoints": found} if row == "trellis" else {})
    )
    names = [one.name for one in page.charts]
    assert len(set(names)) == len(names)
    drawn = next(one for one in page.charts if one.name == "trellis-positions-prose-gate-1")
    assert list(drawn.series) == ["step 3", "step 7"]
    gates = found["steps"][1]["prose"]["positions"]["gate"][1]
    assert [y for _, y in drawn.series["step 7"]] == gates
    assert "Of 512-trellis-no-gate one checkpoint is left" in page.markdown()


def steps(percents, retention):
    read = {"gate": [0.9], "key_norm": [1.0], "value_norm": [1.0]}
    positions = {"ends": [1], "texts": [1], **{name: [[value[0]]] for name, value in read.items()}}
    return [
        {
            "step": step,
            "needle": {**share_row(percent), "chance": 10.0},
            "retention": [kept],
            "prose": {**read, "positions": positions},
        }
        for step, (percent, kept) in enumerate(zip(percents, retention))
    ]


def share_row(percent):
    found = share(percent // 5, 20)
    return {"percent": found["score"], "low": found["low"], "high": found["high"]}


def of_recall(found):
    return [block for block in steps_blocks(found, [0]) if isinstance(block, Table | Text)]


def test_over_checkpoints_r_is_given_where_something_is_found():
    (_, said) = of_recall(steps((5, 10, 15, 10, 20), (-1, -2, -3, -4, -5)))
    assert "No checkpoint finds needles above chance" in said.text
    (_, said) = of_recall(steps((5, 50, 90), (-3, -2, -1)))
    assert "3 checkpoints: a correlation over fewer than 5" in said.text
    (_, said) = of_recall(steps((20, 25, 30, 35, 40), (-5, -4, -3, -2, -1)))
    assert "No checkpoint finds more needles than another" in said.text
    (_, said) = of_recall(steps((10, 30, 45, 75, 90), (0, 0, 0, 0, 0)))
    assert "Nothing is forgotten" in said.text
    (_, told, _) = of_recall(steps((10, 30, 45, 75, 90), (-6, -4, -3, -1.5, -1)))
    assert told.rows[0][0] == "layer 0"
    assert float(told.rows[0][1]) > 0.95
    assert float(told.rows[0][2]) < 0.9  # that it rises all the time is no relation of its changes


def test_looks_are_averaged_over_the_second_half():
    rows = [
        {
            "step": step,
            "trellis/layer_00/stale_error_key": step / 100,
            "trellis/layer_01/stale_error_key": 0.0,
        }
        for step in (20, 40, 60, 80, 100)
    ]
    found = _looks([*rows, {"step": 90, "loss/train": 1.0}], steps=100)["stale_error_key"]
    assert found["looks"] == 3
    assert found["mean"] == pytest.approx(0.4)
    assert found["error"] == pytest.approx(0.1 / 3**0.5)
    result = {"training": {"looks": {"stale_error_key": found}, "probes": {}}}
    assert value_of(result, "probe(stale_error_key)") == found["mean"]
    assert error_of(result, "probe(stale_error_key)") == found["error"]
    assert error_of(result, "perplexity") is None
    assert _looks(rows[-1:], steps=100)["stale_error_key"]["error"] is None


def test_the_variance_of_the_gradient_norm_is_free_of_its_trend():
    noise = [0.1 * (-1) ** (i // 2 % 2 + i % 2) for i in range(400)]
    level, falling = [1.0 + n for n in noise], [5.0 - i / 100 + n for i, n in enumerate(noise)]
    flat, trend = _spread(level), _spread(falling)
    assert trend["variance"] > 20 * flat["variance"]
    assert trend["detrended"] == pytest.approx(flat["detrended"], rel=0.02)
    result = {"training": {"gradient_norm": trend}}
    assert value_of(result, "gradient_norm_variance") == trend["detrended"]


def test_a_frontier_is_what_no_other_beats_in_both():
    places = [(1.0, 5.0), (1.0, 6.0), (2.0, 6.0), (3.0, 9.0), (2.5, 5.5), (4.0, 8.0)]
    assert _frontier(places) == [(1.0, 6.0), (3.0, 9.0)]


def test_the_chunk_page_has_three_pareto_plots_and_says_what_is_old():
    expansion = expand("chunks", "tiny", Options())

    def change(result, row, seed):
        looks = {f"stale_error_{of}": {"mean": 0.3, "error": 0.012, "looks": 5} for of in ("key", "value")}
        norm = {"mean": 1.0, "variance": 9.0, "detrended": 0.5}
        own = {} if row == "trellis" else {"looks": looks, "gradient_norm": norm}
        return {"training": {**result["training"], **own}}

    page = make_page(expansion, results(expansion, change))
    found = [c for c in page.charts if c.title.startswith("Throughput against")]
    assert len(found) == 3
    assert all("frontier" in one.series for one in found)
    assert found[2].series["Trellis, C = 128"] == [(0.5, 1e4)]
    text = page.markdown()
    assert "0.300 (se 0.012)" in text
    assert "Of the last look alone, with the trend in the variance: 2k-trellis, whose" in text
    assert "compare it only between runs of one --jobs 1" in text
