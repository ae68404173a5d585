import dataclasses
import functools
import json
import math
import shlex
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean

import pytest

from evals.ruler.catalogue import RULER
from evals.suites.catalogue import SUITES
from launch.cli import main
from launch.experiments.children import Slice, run_command
from launch.experiments.costs import Cost, cost_lines
from launch.experiments.expand import Options, expand, write_essay
from launch.experiments.pictures import can_draw
from launch.experiments.pool import default_jobs
from launch.experiments.render import NOT_COMPARABLE, make_page, write_page
from launch.experiments.tables import experiment_names, models, read_experiment, read_scale
from launch.experiments.values import value_of
from launch.recipe import resolve
from tests.launch.experiment_text import TINY, write_text
from trellis_dist.models.counts import parameter_counts
from trellis_dist.models.registry import MIXERS

NAMES = (
    "table1",
    "table2",
    "table3",
    "table4",
    "figure2",
    "figure3",
    "baselines",
    "slots",
    "chunks",
    "gates",
    "retention",
)
SCALES = ("tiny", "small", "paper")


@functools.cache
def tiny(name):
    """The whole of an experiment at the smallest scale."""
    return expand(name, "tiny", Options(essay=Path("essay.txt")))


def test_every_table_of_the_issue_is_there():
    assert set(NAMES) <= set(experiment_names())


@pytest.mark.parametrize("name", NAMES)
def test_a_table_is_consistent_at_every_scale(name):
    experiment = read_experiment(name)
    paper = [group for group in experiment.groups if group.paper]
    assert len({row.name for row in experiment.rows}) == len(experiment.rows)
    for row in experiment.rows:
        assert row.trained is models()[row.model or row.name]
        assert bool(row.paper) == bool(paper)
        if paper:
            missing = sum(column.setting in row.without for column in paper[0].columns)
            assert len(row.paper) == len(paper[0].columns) - missing
    for scale in map(read_scale, SCALES):
        for setting in experiment.settings():
            assert scale.settings[setting] in scale.runs
        values = [c.value for g in experiment.groups for c in g.columns]
        values += [p.value for chart in experiment.charts for p in chart.points]
        assert not any("{" in scale.expand(value) for value in values)
    for chart in experiment.charts:
        assert len(chart.points) == {"bars": 1, "pareto": 2}.get(chart.kind, len(chart.points))


def _scalars_of(tasks, lengths, mqar):
    """Names of what the tasks give, as the evaluation writes them."""
    found = {f"{name}/{metric}" for name, suite in SUITES.items() for metric in suite.metrics}
    found |= {"lambada/perplexity"} | {f"mqar/{pairs}/{length}" for pairs, length in mqar}
    found |= {f"{task}/{way}/{n}" for task in RULER for way in ("generation", "choice") for n in lengths}
    return {name for name in found if name.partition("/")[0] in tasks}


@pytest.mark.parametrize("name", NAMES)
def test_every_number_that_is_shown_is_one_that_its_tasks_give(name):
    found = tiny(name)
    evals = next(iter(found.specs.values())).resolved.evals
    mqar = [(pairs, length) for pairs in evals.mqar_pairs for length in evals.mqar_length]
    given = _scalars_of(evals.tasks, evals.ruler_lengths, mqar)
    shown = [c.value for g in found.experiment.groups for c in g.columns]
    shown += [p.value for chart in found.experiment.charts for p in chart.points]
    for value in map(found.scale.expand, shown):
        parts = value.removeprefix("mean(").removesuffix(")").split(",") if "," in value else [value]
        strangers = [part for part in parts if "/" in part and part not in given]
        assert not strangers, value
        assert all("/" in part or value_of(RESULT, part) is not None for part in parts), value


@pytest.mark.parametrize("name", NAMES)
def test_an_expansion_holds_a_run_for_every_number_it_shows(name):
    found = tiny(name)
    for row in found.rows:
        for setting in found.experiment.settings():
            key = (row.name, found.scale.settings[setting], 0)
            assert (key in found.specs) == (setting not in row.without)
    assert len({spec.name for spec in found.specs.values()}) == len(found.specs)
    assert len({spec.digest for spec in found.specs.values()}) == len(found.specs)


@pytest.mark.parametrize(("name", "scale"), [("figure2", "tiny"), ("table1", "small"), ("table3", "paper")])
def test_the_models_of_a_table_are_equally_large(name, scale, tmp_path):
    found = expand(name, scale, Options(essay=tmp_path / "essay.txt"))
    assert len(found.specs) >= 5
    sizes = {spec.name: parameter_counts(spec.resolved.model).total for spec in found.specs.values()}
    assert max(sizes.values()) <= 1.02 * min(sizes.values())
    assert {spec.resolved.tokens() for spec in found.specs.values()} == {
        next(iter(found.specs.values())).resolved.tokens()
    }


def test_figure_2_trains_one_model_for_each_context():
    specs = expand("figure2", "paper", Options(only=("transformer", "trellis"))).specs
    lengths = {(row, run): spec.resolved.data.sequence_length for (row, run, _), spec in specs.items()}
    assert len(lengths) == 4 * (3 + 4)  # four panels; the Transformer stops at 8K
    assert sorted({n for (row, _), n in lengths.items() if row == "transformer"}) == [2048, 4096, 8192]
    assert max(n for (row, _), n in lengths.items() if row == "trellis") == 16384
    gates = {row: spec.resolved.model.trellis.gates for (row, _, _), spec in tiny("figure2").specs.items()}
    assert (gates["trellis"], gates["trellis-no-gate"]) == (("learned",), ("off",))


def test_table_2_is_the_papers_form_whatever_the_defaults_are():
    models_of = {row: spec.resolved.model.trellis for (row, _, _), spec in tiny("table2").specs.items()}
    for row, trellis in models_of.items():
        if row.startswith("trellis"):
            assert (trellis.update, trellis.step_bound) == ("stale", "chunk"), row
    assert models_of["trellis-paper"].readout == "ln_silu"
    assert models_of["trellis-paper-phi-linear"].readout == "ln_silu"
    assert models_of["trellis-paper-phi-linear-f-softmax"].phi == "identity"
    assert models_of["trellis-paper-no-gate"].gates == ("off",)


def test_needles_are_asked_at_the_scales_lengths(tmp_path):
    (spec,) = expand("table3", "tiny", Options(only=("trellis",), essay=tmp_path / "e.txt")).specs.values()
    assert spec.resolved.evals.ruler_lengths == (320, 512, 1024, 2048)
    assert spec.resolved.evals.ruler_essay == str(tmp_path / "e.txt")


def test_overrides_come_last_and_seeds_are_runs_of_their_own():
    options = Options(
        only=("trellis-slots-64", "trellis-slots-32"), seeds=2, overrides=("training.steps=77",)
    )
    specs = expand("slots", "tiny", options).specs
    assert len(specs) == 4
    assert {spec.resolved.training.steps for spec in specs.values()} == {77}
    recipes = {seed: spec.resolved for (_, _, seed), spec in specs.items()}
    assert {seed: (r.training.seed, r.data.seed) for seed, r in recipes.items()} == {0: (0, 0), 1: (1, 1)}


def test_only_names_rows():
    rows = expand("table2", "tiny", Options(only=("trellis-paper-m32", "trellis-paper"))).rows
    assert [row.name for row in rows] == ["trellis-paper", "trellis-paper-m32"]
    with pytest.raises(ValueError, match=r"no row of this table is called 'tretis': use trellis-paper"):
        expand("table2", "tiny", Options(only=("tretis",)))
    with pytest.raises(ValueError, match="no experiment is called 'table9'"):
        expand("table9", "tiny", Options())


def test_a_layer_kind_that_is_missing_is_said_before_anything_starts(monkeypatch):
    monkeypatch.delitem(MIXERS, "deltanet")
    found = expand("table2", "tiny", Options())
    assert found.absent["deltanet"] == "deltanet"
    assert "deltanet" not in {row.name for row in found.rows}
    with pytest.raises(ValueError, match="deltanet needs the layer kind 'deltanet'") as refused:
        expand("table2", "tiny", Options(only=("trellis-paper", "deltanet")))
    assert "\n" not in str(refused.value)


RESULT = {
    "training": {
        "seconds_per_token": 1e-4,
        "seconds": 360.0,
        "tokens": 1000,
        "steps": 10,
        "train_losses": [[5, 3.0], [10, 2.0]],
        "gradient_norm": {"mean": 0.5, "variance": 0.25},
        "probes": {
            "trellis/layer_00/stale_error_key": 0.1,
            "trellis/layer_01/stale_error_key": 0.3,
            "trellis/layer_00/stale_error_value": 0.2,
        },
    },
    "model": {"parameters": 100, "state_bytes": 640, "flops_per_token": 6e5},
    "validation": {"loss": 2.0, "bits_per_byte": 1.5, "bigram": {"bits_per_byte": 1.7, "loss": 3.0}},
    "scalars": {"mqar/4/512": 25.0, "niah_single_1/choice/1024": 10.0},
    "machine": {"processor": "a machine"},
    "commit": "0123456789abcdef",
}


def test_values_by_name():
    expected = {
        "perplexity": math.exp(2.0),
        "bits_per_byte": 1.5,
        "tokens_per_second": 1e4,
        "state_bytes": 640,
        "gradient_norm_variance": 0.25,
        "probe(stale_error_key)": 0.2,
        "mqar/4/512": 25.0,
        "mean(mqar/4/512,niah_single_1/choice/1024)": 17.5,
    }
    for name, value in expected.items():
        assert value_of(RESULT, name) == pytest.approx(value), name
    for name in ("probe(none)", "mqar/9/512", "mean(mqar/4/512,mqar/9/512)"):
        assert value_of(RESULT, name) is None


def _results(expansion, *, leave_out=()):
    """A result per run; its loss tells them apart."""
    found = {}
    for index, spec in enumerate(expansion.specs.values()):
        result = {**RESULT, "name": spec.name, "recipe": resolve(spec.resolved)}
        result["validation"] = {**RESULT["validation"], "loss": 2.0 + index / 64, "bits_per_byte": 1 + index}
        if spec.name not in leave_out:
            found[spec.name] = result
    return found


class _Page(HTMLParser):
    """Tables as lists of rows of cells; counts of charts."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.charts, self._cell, self.sources = [], 0, None, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        self.sources += [named[key] for key in ("src", "href") if key in named]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._cell = ""
        elif tag == "svg" and named.get("role") == "img":
            self.charts += 1

    def handle_data(self, data):
        if self._cell is not None:
            self._cell += data

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.tables[-1][-1].append(self._cell)
            self._cell = None


def test_ours_stands_beside_the_papers(tmp_path):
    expansion = tiny("table2")
    results = _results(expansion, leave_out=("512-trellis-paper-c1",))
    page = make_page(expansion, results)
    parsed = _Page(page.html())
    header, *rows = parsed.tables[0]
    assert len(header) == 3
    assert NOT_COMPARABLE in header[2]
    shown = {row[0]: row[1:] for row in rows}
    losses = {spec.about["row"]: results[spec.name]["validation"]["loss"] for spec in expansion.specs.values()
              if spec.name in results}  # fmt: skip
    assert shown["Trellis"] == [f"{math.exp(losses['trellis-paper']):.3f}", "10.87"]
    assert shown["Trellis, M = 32"] == [f"{math.exp(losses['trellis-paper-m32']):.3f}", "11.14"]
    assert shown["Trellis, C = 1"] == ["", "10.75"]
    assert "Not there yet: 512-trellis-paper-c1." in page.html()
    bits = parsed.tables[1]
    assert bits[-1] == ["interpolated bigram", "1.700"]
    assert parsed.sources == []  # nothing from a network
    assert parsed.charts == 1  # the losses; bars are no picture


def test_markdown_has_the_same_tables(tmp_path):
    expansion = expand("table4", "tiny", Options(only=("trellis", "gated_deltanet")))
    page = make_page(expansion, _results(expansion))
    parsed = _Page(page.html())
    blocks = [part for part in page.markdown().split("\n\n") if part.startswith("| ")]
    assert len(blocks) == len(parsed.tables)
    for block, table in zip(blocks, parsed.tables):
        lines = [line for i, line in enumerate(block.splitlines()) if i != 1]
        assert [[cell.strip() for cell in line.strip("|").split("|")] for line in lines] == [
            [cell.strip() for cell in row] for row in table
        ]


def test_columns_that_are_one_run_are_shown_once():
    expansion = expand("table4", "tiny", Options(only=("trellis",)))
    ours, papers = _Page(make_page(expansion, _results(expansion)).html()).tables[:2]
    assert ours[0][1] == "Pile 2K = Books 2K (here 512)"
    assert len(ours[0]) == 1 + 7
    assert len(papers[0]) == 1 + 9
    assert papers[1] == [
        "Trellis", "10.87", "10.60", "19.09", "17.92", "17.19", "16.71", "16.56", "16.58", "17.18"
    ]  # fmt: skip


def test_the_papers_numbers_have_the_decimals_of_its_table():
    expansion = expand("table3", "tiny", Options(only=("trellis",), essay=Path("essay.txt")))
    tables = _Page(make_page(expansion, {}).html()).tables
    shown = [row for table in tables for row in table if row[0] == "Trellis"]
    assert any({"99.2", "95.2", "97.8"} <= set(row) for row in shown)
    assert not any("99.20" in row for row in shown)


def test_the_longest_chunk_is_no_whole_row():
    for scale in SCALES:
        for spec in expand("chunks", scale, Options()).specs.values():
            assert spec.resolved.data.sequence_length >= 4 * spec.resolved.model.trellis.chunk_size


def test_hours_count_no_more_runs_at_once_than_there_is_to_run_on():
    cost = Cost(name="a", done=False, steps_done=0, steps=1, tokens=1, parameters=1, hours=6.0)
    runs = [cost] * (4 * default_jobs())
    jobs = 64 * default_jobs()
    assert f" 24.0 hours on this machine, {jobs} at a time" in cost_lines(runs, jobs=jobs)[-1]
    slow = dataclasses.replace(cost, at_least=True)
    lines = cost_lines([slow], jobs=1)
    assert ">6.00" in lines[1]
    assert "at least 6.0 hours" in lines[-1]


def test_files_that_are_not_there_are_refused_before_anything_is_listed(tmp_path, capsys):
    for option, what in (("--essay", "file"), ("--suites", "folder")):
        assert main(["reproduce", "table3", "--dry-run", option, str(tmp_path / "none")]) == 1
        shown = capsys.readouterr()
        assert f"{option} {tmp_path / 'none'}: no such {what}" in shown.err
        assert shown.out == ""


def test_panels_that_are_one_experiment_here_are_one():
    page = make_page(found := expand("figure2", "tiny", Options(only=("trellis",))), _results(found))
    charts = [chart for chart in page.charts if chart.name.startswith("chart")]
    assert [chart.title for chart in charts] == ["Bits per byte by training context"]
    assert [x for x, _ in charts[0].series["Trellis"]] == [512, 1024, 2048, 4096]


def test_seeds_are_shown_as_mean_and_deviation():
    expansion = expand("table2", "tiny", Options(only=("deltanet",), seeds=2))
    results = _results(expansion)
    mean = fmean(math.exp(result["validation"]["loss"]) for result in results.values())
    cell = _Page(make_page(expansion, results).html()).tables[0][1][1]
    assert cell.startswith(f"{mean:.3f} +- 0.08")


def test_what_the_command_line_changed_and_runs_near_the_bigram_are_named():
    changed = Options(only=("deltanet", "trellis-paper"), overrides=("training.steps=60",))
    expansion = expand("table2", "tiny", changed)
    results = _results(expansion)
    page = make_page(expansion, results).markdown()
    assert "Changed by --set: training.steps=60." in page
    assert "No ranking" not in page
    results["512-trellis-paper"]["validation"]["loss"] = 2.81  # the bigram's is 3
    page = make_page(expansion, results).markdown()
    assert "No ranking: 1 of 2 runs are not 0.2 nats per token below" in page
    assert "(512-trellis-paper)" in page


def test_points_of_a_row_chart_and_of_a_pareto_plot():
    slots = make_page(found := tiny("slots"), _results(found))
    chart = next(chart for chart in slots.charts if chart.title == "Bits per byte by slots")
    assert [x for x, _ in chart.series["bits per byte"]] == [16, 32, 64, 128]
    chunks = make_page(found := tiny("chunks"), _results(found))
    pareto = next(chart for chart in chunks.charts if chart.title.startswith("Throughput"))
    assert pareto.series["Trellis, C = 128"] == [(2.0, 1e4)]


def test_the_files_of_a_page(tmp_path):
    expansion = expand("table4", "tiny", Options(only=("trellis",)))
    files = write_page(make_page(expansion, _results(expansion)), tmp_path / "new", "table4")
    assert [path.name for path in files[:2]] == ["table4.html", "table4.md"]
    if can_draw():
        pictures = {path.name: path for path in files[2:]}
        assert pictures["table4-chart-1.png"].read_bytes().startswith(b"\x89PNG")
        assert "<svg" in pictures["table4-learning.svg"].read_text()
        assert "![Bits per byte by context, books](table4-chart-1.png)" in files[1].read_text()


def test_the_essay_is_prose_that_python_brings_along(tmp_path):
    write_essay(tmp_path / "new" / "essay.txt")
    text = (tmp_path / "new" / "essay.txt").read_text(encoding="utf-8")
    assert len(text) > 200_000
    assert text.count(" the ") > 2_000


def test_a_dry_run_lists_runs_and_costs_and_starts_nothing(tmp_path, capsys):
    root = tmp_path / "root"
    assert main(["reproduce", "table3", "--only", "trellis", "--dry-run", "--root", str(root)]) == 0
    shown = capsys.readouterr().out
    assert "512-trellis " in shown
    assert "1 of 1 runs are missing: 4,096,000 tokens to train" in shown
    assert not root.exists()


def test_the_command_from_text_to_page(tmp_path, capsys, monkeypatch):
    """Two rows of a table, one trained by its printed command, then scored; a second call finds both."""
    monkeypatch.chdir(tmp_path)
    corpus, root = write_text(tmp_path / "text"), tmp_path / "root"
    changes = [f"--set={change}" for change in TINY if "evals.tasks" not in change]
    command = ["reproduce", "table2", "--only", "trellis-paper-no-gate,deltanet", "--root", str(root)]
    command += ["--corpus", str(corpus), "--jobs", "2", *changes]
    assert main([*command, "--minutes", "0"]) == 75
    assert "2 runs are left" in capsys.readouterr().out
    assert main([*command, "--commands"]) == 0
    prepare, elsewhere, _ = map(shlex.split, capsys.readouterr().out.splitlines())
    for arguments in (prepare[1:], elsewhere[1:]):
        run_command(arguments, log=tmp_path / "log", slice_=Slice(), threads=1)
    saved = list((root / "runs").glob("*/checkpoints/step-*"))
    assert len(saved) == 1
    before = saved[0].stat().st_mtime_ns
    assert main(command) == 0, capsys.readouterr()
    assert saved[0].stat().st_mtime_ns == before
    results = [json.loads(path.read_text()) for path in (root / "results" / "table2").glob("*.json")]
    assert {result["name"] for result in results} == {
        "512-trellis-paper-no-gate",
        "512-deltanet-as-trellis-paper",
    }
    shown = {row[0]: row[1] for row in _Page((root / "table2.html").read_text()).tables[0][1:]}
    for result in results:
        label = "DeltaNet" if "deltanet" in result["name"] else "Trellis, no forget gate"
        perplexity = math.exp(result["validation"]["loss"])
        assert float(shown[label].replace(",", "")) == pytest.approx(perplexity, rel=1e-2)
    capsys.readouterr()
    (root / "table2.html").unlink()
    assert main([*command, "--render-only"]) == 0
    assert "0 of 2 runs are missing" in capsys.readouterr().out
    assert (root / "table2.html").is_file()
