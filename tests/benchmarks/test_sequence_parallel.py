"""The sequence-parallel benchmark: the simulation by hand, bytes on real ranks, a whole small run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, astuple, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.kernels.record import Case
from benchmarks.sequence_parallel import __main__ as command
from benchmarks.sequence_parallel import pacing, traffic
from benchmarks.sequence_parallel.extrapolate import extrapolate, quarter_scan
from benchmarks.sequence_parallel.memory import fit_line, longest_fitting
from benchmarks.sequence_parallel.pacing import Pacer, watch
from benchmarks.sequence_parallel.plan import Plan, WavePlan
from benchmarks.sequence_parallel.ranks import Ranks
from benchmarks.sequence_parallel.simulate import Link, Span, StageTimes, Step, efficiency, ideal, simulate
from benchmarks.sequence_parallel.stages import _cut, measure_stages
from benchmarks.sequence_parallel.subject import make_batches
from benchmarks.sequence_parallel.tables import render
from benchmarks.sequence_parallel.targets import all_targets
from benchmarks.sequence_parallel.traffic import halo_bytes, measure_traffic, state_bytes
from benchmarks.sequence_parallel.wavefront import span_rows, spans_of
from trellis_dist.models.baseline_config import BaselineConfig
from trellis_dist.models.config import AttentionConfig, ModelConfig, TrellisConfig
from trellis_dist.models.language_model import build_language_model

ROOT = Path(__file__).resolve().parents[2]
TINY = ModelConfig(
    vocab_size=64, num_layers=2, dim=32, num_heads=2, trellis=TrellisConfig(slots=8, chunk_size=16)
)
# Forward 1 with a scan of 0.25, backward 3 with one of 0.5.
TIMES = StageTimes(
    project=0.1,
    convolve=0.05,
    arrange=0.05,
    scan=0.25,
    readout=0.3,
    finish=0.25,
    finish_back=0.5,
    rescan=0.2,
    readout_back=0.8,
    scan_back=0.5,
    inputs_back=0.4,
    convolve_back=0.1,
    project_back=0.5,
)
FORWARD_ONLY = replace(TIMES, **dict.fromkeys(list(StageTimes.__dataclass_fields__)[6:], 0.0))
PLAN = Plan(
    tiny=TINY,
    traffic_sp=2,
    traffic_lengths=(64, 128),
    layer=replace(TINY, num_layers=1),
    layer_length=64,
    stage_repetitions=2,
    waves=(WavePlan(2, "measured", 1), WavePlan(2, "quarter", 2, forwards_first=2)),
    wave_layers=2,
    wave_repetitions=1,
    layer_seconds=0.05,
    slots=16,
    meshes=(1, 2, 4),
    lengths=(1024,),
    small=TINY,
    sp_lengths=(64,),
    dp_length=32,
    dp_rows=1,
    engines=(("local", 0),),
    repetitions=1,
    memory_sp=(1, 2),
    memory_lengths=(256, 512),
    memory_budget=4 << 20,
    memory_tries=1,
)


# -- the simulation


def test_one_rank_does_its_work_and_waits_for_nobody() -> None:
    step = Step(TIMES, layers=3, sp=1, micro_batches=2, update=0.5, link=Link(latency=9.0), halo=1, state=1)
    outcome = simulate(step)
    assert outcome.makespan == pytest.approx(2 * 3 * (1 + 3) + 0.5)
    assert efficiency(step) == pytest.approx(1.0)
    assert all(span.waited == 0 for span in outcome.spans)
    order = [(span.micro_batch, span.layer, span.phase[0]) for span in outcome.spans]
    assert order[:6] == [(0, x, "f") for x in (0, 1, 2)] + [(0, x, "b") for x in (2, 1, 0)]


def test_two_ranks_and_one_layer_by_hand() -> None:
    # Rank 0 scans from 0.2 to 0.45; rank 1 is ready at 0.2, waits, and is done forward at 0.45 + 0.25 + 0.55.
    # It goes on: finish, rescan and readout (1.5) to 2.75, reverse scan to 3.25, the rest (1.0) to 4.25.
    # Rank 0 is ready for its reverse scan at 1.0 + 1.5, waits until 3.25, scans to 3.75 and is done at 4.75.
    outcome = simulate(Step(TIMES, layers=1, sp=2))
    spans = {(span.rank, span.phase): span for span in outcome.spans}
    assert outcome.makespan == pytest.approx(4.75)
    assert spans[1, "forward"].waited == pytest.approx(0.25)
    assert spans[1, "forward"].scan_begin == pytest.approx(0.45)
    assert spans[1, "backward"].end == pytest.approx(4.25)
    assert spans[0, "backward"].waited == pytest.approx(0.75)
    assert spans[0, "backward"].scan_begin == pytest.approx(3.25)


@pytest.mark.parametrize(("layers", "sp"), [(1, 2), (3, 4), (24, 8), (2, 64)])
def test_a_forward_pass_costs_its_layers_and_one_scan_for_each_further_rank(layers: int, sp: int) -> None:
    found = simulate(Step(FORWARD_ONLY, layers=layers, sp=sp)).makespan
    assert found == pytest.approx(layers * 1.0 + (sp - 1) * 0.25)


@pytest.mark.parametrize(("forwards_first", "groups"), [(1, 4), (2, 2), (3, 2), (4, 1)])
def test_every_group_of_forwards_pays_both_scans_once_for_each_further_rank(
    forwards_first: int, groups: int
) -> None:
    step = Step(TIMES, layers=24, sp=8, micro_batches=4, forwards_first=forwards_first)
    assert simulate(step).makespan == pytest.approx(4 * 24 * 4.0 + groups * 7 * (0.25 + 0.5))


def test_a_collective_in_every_layer_pays_the_scans_in_every_layer() -> None:
    step = Step(TIMES, layers=5, sp=4, lock_step=True)
    assert simulate(step).makespan == pytest.approx(5 * (1 + 3 * 0.25 + 3 + 3 * 0.5))


def test_a_message_travels_from_when_it_is_sent_and_expected() -> None:
    # A state of 10 bytes takes 0.1 + 0.1 s. Rank 1 posts at 0.15, rank 0 sends at 0.45: there at 0.65.
    link = Link(latency=0.1, bandwidth=100.0)
    step = Step(FORWARD_ONLY, layers=1, sp=2, state=10, link=link)
    (waiting,) = (span for span in simulate(step).spans if (span.rank, span.phase) == (1, "forward"))
    assert waiting.scan_begin == pytest.approx(0.65)
    # In later layers the receive is posted 0.05 before the scan, so 0.15 of the 0.2 show in each.
    ends = [s.end for s in simulate(replace(step, layers=9)).spans if (s.rank, s.phase) == (1, "forward")]
    assert ends[-1] - ends[-2] == pytest.approx(1.0 + 0.15)


def test_a_halo_waits_for_nobody_behind() -> None:
    without, with_halo = (Step(TIMES, layers=4, sp=3, halo=halo) for halo in (0, 1))
    assert simulate(with_halo).makespan == pytest.approx(simulate(without).makespan)


def test_ranks_may_be_ahead_by_as_many_sends_as_the_window_holds() -> None:
    slow = Link(latency=10.0)
    step = Step(FORWARD_ONLY, layers=4, sp=2, state=1, link=slow)
    first = [s for s in simulate(step).spans if s.rank == 0 and s.phase == "forward"]
    assert first[-1].end == pytest.approx(4.0)
    held = [s for s in simulate(replace(step, window=1)).spans if s.rank == 0 and s.phase == "forward"]
    assert held[-1].end > 20.0


def test_all_ranks_meet_in_the_gradient_sum() -> None:
    step = Step(TIMES, layers=2, sp=4)
    assert simulate(replace(step, gradients=7.0)).makespan == pytest.approx(simulate(step).makespan + 7.0)
    assert Link(latency=1.0, bandwidth=4.0).all_reduce_seconds(16, 4) == 2 * 3 * (1.0 + 1.0)
    assert Link(latency=1.0).all_reduce_seconds(16, 1) == 0


def test_the_design_s_example() -> None:
    assert 24 / simulate(Step(FORWARD_ONLY, layers=24, sp=8)).makespan == pytest.approx(0.93, abs=0.005)
    assert 12 / simulate(Step(FORWARD_ONLY, layers=12, sp=8)).makespan == pytest.approx(0.87, abs=0.005)
    locked = Step(FORWARD_ONLY, layers=24, sp=8, lock_step=True)
    assert ideal(locked) / simulate(locked).makespan == pytest.approx(0.36, abs=0.005)


def test_a_quarter_scan_keeps_the_time_of_both_passes() -> None:
    changed = quarter_scan(replace(TIMES, scan=0.1, scan_back=0.9))
    was = replace(TIMES, scan=0.1, scan_back=0.9)
    assert changed.forward == pytest.approx(was.forward)
    assert changed.backward == pytest.approx(was.backward)
    assert changed.scan / changed.forward == pytest.approx(0.25)
    assert changed.scan_back / changed.backward == pytest.approx(0.25)
    assert changed.finish / changed.readout == pytest.approx(was.finish / was.readout)


def test_the_extrapolation_is_the_simulation_on_other_segments() -> None:
    found = extrapolate(
        TIMES,
        Link(latency=1e-3, bandwidth=1e9),
        model=TINY,
        measured_length=64,
        layers=3,
        meshes=(1, 4),
        lengths=(512,),
    )
    by_schedule = found["efficiency"]["core"]["512"]
    step = Step(
        TIMES.scaled(2.0),
        layers=3,
        sp=4,
        micro_batches=4,
        state=state_bytes(TINY),
        halo=halo_bytes(TINY),
        link=Link(latency=1e-3, bandwidth=1e9),
    )
    assert by_schedule["in turn"]["4"][0] == pytest.approx(efficiency(step), abs=1e-4)
    assert by_schedule["in turn"]["1"] == [1.0, 1.0]
    first, together, locked = (
        by_schedule[name]["4"][0] for name in ("in turn", "4 forwards first", "lock-step")
    )
    assert locked < first < together
    sums = step.link.all_reduce_seconds(found["gradient_bytes"], 4)
    assert by_schedule["in turn"]["4"][1] == pytest.approx(
        ideal(step) / (simulate(step).makespan + sums), abs=1e-4
    )
    parameters = sum(x.numel() for x in build_language_model(TINY, seed=0).blocks[0].parameters())
    assert found["gradient_bytes"] == pytest.approx(3 * 4 * parameters, rel=0.01)


# -- bytes


def test_bytes_by_hand() -> None:
    big = ModelConfig(vocab_size=64, num_layers=1, dim=768, num_heads=12)
    assert state_bytes(big) == 2 * 12 * 64 * 64 * 4
    assert halo_bytes(big, rows=2) == 3 * 2 * 768 * 4 * 2
    assert halo_bytes(replace(big, trellis=TrellisConfig(conv_kernel=0))) == 0
    # 2 rows of 8 tokens a rank, 1 head a rank: q, k, v, y of 16, alpha of 8, two gates, forward and backward.
    per_peer = 2 * 8 * 4 * (4 * 16 + 8 + 2)
    assert traffic.FORMULAS["all_to_all"](TINY, 2, 16, 2, 0)["exchanged"] == 2 * per_peer


@pytest.mark.parametrize("mode", ["state_passing", "all_to_all"])
def test_bytes_on_real_ranks_are_those_of_the_formula(mode: str) -> None:
    found = measure_traffic(TINY, mode=mode, sp=2, rows=2, lengths=(64, 128), micro_batches=2)
    assert all(one["equal"] for one in found["lengths"].values()), found
    short, long = (found["lengths"][length]["per_layer"] for length in ("64", "128"))
    assert long[0]["right"] == short[0]["right"] > 0
    assert long[1]["left"] == short[1]["left"] > 0
    assert long[0]["exchanged"] == 2 * short[0]["exchanged"]
    assert (short[0]["exchanged"] > 0) == (mode == "all_to_all")
    once = found["lengths"]["64"]["once_a_step"]
    assert once == {"summed": found["gradient_bytes"], "scalars": 8, "other": 0}


def test_another_formula_is_not_that_of_real_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(traffic.FORMULAS, "state_passing", traffic.FORMULAS["all_to_all"])
    found = measure_traffic(TINY, mode="state_passing", sp=2, rows=1, lengths=(64,), micro_batches=1)
    assert not found["lengths"]["64"]["equal"]
    (target,) = (t for t in all_targets({"bytes/state_passing": found}) if t.name.startswith("state_passing"))
    assert target.met is False


# -- stages on the clock


class Time:
    """A clock that moves when somebody sleeps, or by ``tick`` at every look."""

    def __init__(self, tick: float = 0.0) -> None:
        self.now, self.tick = 0.0, tick

    def monotonic(self) -> float:
        self.now += self.tick
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def passes(blocks_watched: bool, pacer: Pacer) -> list[torch.Tensor]:
    model = build_language_model(TINY, seed=1)
    _cut(model)
    batch = make_batches(TINY.vocab_size, rows=2, length=32)[0]
    if blocks_watched:
        with watch(model.blocks, pacer):
            loss = model.loss_sum(batch.tokens, batch.labels)
            loss.backward()
    else:
        loss = model.loss_sum(batch.tokens, batch.labels)
        loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


def test_watching_a_model_changes_no_bit_and_sees_every_stage_once() -> None:
    pacer = Pacer()
    watched, alone = passes(True, pacer), passes(False, pacer)
    assert all(torch.equal(a, b) for a, b in zip(watched, alone, strict=True))
    assert {name: len(found) for name, found in pacer.seconds.items()} == dict.fromkeys(
        StageTimes.__dataclass_fields__, TINY.num_layers
    )
    assert [(span.layer, span.phase) for span in pacer.spans] == [
        (0, "forward"),
        (1, "forward"),
        (1, "backward"),
        (0, "backward"),
    ]


def test_padded_stages_take_exactly_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pacing, "time", Time())
    pacer = Pacer()
    pacer.pad(TIMES)
    passes(True, pacer)
    for name, seconds in pacer.seconds.items():
        assert seconds == pytest.approx([getattr(TIMES, name)] * TINY.num_layers)
    assert [span.end - span.begin for span in pacer.spans] == pytest.approx([1, 1, 3, 3])
    assert pacer.overrun == 0
    last = pacer.spans[-1]
    assert (last.scan_begin - last.begin, last.scan_end - last.begin) == pytest.approx((1.5, 2.0))


def test_a_stage_longer_than_its_padding_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pacing, "time", Time(tick=10.0))
    pacer = Pacer()
    pacer.pad(TIMES)
    passes(True, pacer)
    assert pacer.overrun == pytest.approx(sum(10.0 - x for x in astuple(TIMES)) * TINY.num_layers)


def test_a_wait_belongs_to_no_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Time()
    monkeypatch.setattr(pacing, "time", clock)
    pacer = Pacer(rank=3)
    pacer.begin(0, 1, "forward")
    clock.now = 1.0
    pacer.stage("arrange")
    clock.now = 6.0
    pacer.waited(since=1.5)
    clock.now = 6.25
    pacer.stage("scan")
    pacer.end()
    assert pacer.seconds == {"arrange": [1.0], "scan": [0.75]}
    assert pacer.spans == [Span(3, 0, 1, "forward", 0.0, 4.5, 5.5, 6.25, 6.25)]


def test_spans_come_back_from_their_lines() -> None:
    spans = [Span(1, 0, 2, "backward", 1.5, 0.25, 1.75, 2.0, 2.5), Span(0, 1, 3, "forward", 3, 0, 4, 5, 6)]
    assert spans_of(span_rows(spans, start=0.0)) == [spans[1], spans[0]]
    assert span_rows(spans[:1], start=1.0) == ["1 0 2 backward 500.0 250.0 750.0 1000.0 1500.0"]


def test_stages_are_measured_without_their_first_round() -> None:
    found = measure_stages(TINY, rows=1, length=32, repetitions=2)
    assert found.keys() == set(StageTimes.__dataclass_fields__)
    assert {one["runs"] for one in found.values()} == {2 * TINY.num_layers}


# -- memory


def test_the_longest_that_fits_is_found_and_measured() -> None:
    def peak(length: int) -> int:
        asked.append(length)
        return 1000 + 7 * length + length * length // 5000

    asked: list[int] = []
    points = {n: peak(n) for n in (1000, 2000, 4000)}
    found = longest_fitting(points, peak, budget=60000, unit=64, tries=4)
    assert found["too_long"] is not None
    assert points[found["fits"]] <= 60000 < points[found["too_long"]]
    assert found["too_long"] - found["fits"] <= found["too_long"] / 20
    assert len(asked) <= 7
    assert all(length % 64 == 0 for length in asked[3:])


def test_a_line_through_points() -> None:
    assert fit_line({1: 5, 2: 7, 4: 11}) == pytest.approx((3.0, 2.0))


# -- processes


def _fail(message: str) -> None:
    raise ValueError(message)


def test_a_rank_that_fails_is_told_in_its_line(capfd: pytest.CaptureFixture[str]) -> None:
    with Ranks(2, joined=False) as ranks, pytest.raises(RuntimeError, match="_fail: ValueError: no good"):
        ranks.run(_fail, "no good")


# -- the command


def test_a_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, picture = tmp_path / "results" / "out.json", tmp_path / "out.png"
    status = command.measure(path, picture, PLAN)
    said = capsys.readouterr().out
    assert status == 0, said
    record = json.loads(path.read_text())
    assert record["complete"]
    assert {"machine", "versions", "source", "settings", "cases", "targets"} <= record.keys()
    assert record["settings"] == PLAN.as_json()
    assert set(record["cases"]) == {case.name for case in command.all_cases(PLAN, {})}
    wave = record["cases"]["wavefront/sp 2, quarter scan, 2 micro-batches, 2 forwards first"]
    spans = spans_of(wave["spans"])
    assert len(spans) == 2 * 2 * 2 * 2  # ranks, micro-batches, layers, phases
    assert all(s.begin <= s.scan_begin <= s.scan_end <= s.end for s in spans)
    order = [(s.micro_batch, s.layer, s.phase[0]) for s in spans if s.rank == 0]
    forwards, backwards = ([(m, x) for m in (0, 1) for x in layers] for layers in ((0, 1), (1, 0)))
    assert order == [(*who, "f") for who in forwards] + [(*who, "b") for who in backwards]
    assert picture.stat().st_size > 10_000
    assert render(record) in said
    assert command.main(["--show", str(path)]) == 0
    assert capsys.readouterr().out == render(record)


def fake_cases(calls: list[str], fails: set[str]) -> Callable[..., list[Case]]:
    def measure(name: str) -> dict[str, Any]:
        calls.append(name)
        if name in fails:
            raise RuntimeError("no luck\nand more")
        return {}

    names = ("bytes/a", "memory/b", "throughput/c")
    return lambda plan, results: [Case(name, lambda name=name: measure(name)) for name in names]


def test_a_run_resumes_and_measures_again_what_failed_or_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[str] = []
    fails = {"memory/b"}
    monkeypatch.setattr(command, "all_cases", fake_cases(calls, fails))
    monkeypatch.setattr(command, "draw", lambda record, path: None)
    run = lambda **how: command.measure(tmp_path / "r.json", tmp_path / "p.png", PLAN, **how)  # noqa: E731
    assert run(only="bytes") == 1
    assert calls == ["bytes/a"]
    assert "left: memory/b, throughput/c" in capsys.readouterr().out
    assert run() == 1
    assert calls == ["bytes/a", "memory/b", "throughput/c"]
    assert "failed: memory/b: RuntimeError: no luck" in capsys.readouterr().out
    fails.clear()
    assert run(only="memory") == 0
    assert calls[3:] == ["memory/b"]
    assert run(only="throughput", again=True) == 0
    assert calls[4:] == ["throughput/c"]
    assert json.loads((tmp_path / "r.json").read_text())["complete"]
    assert run() == 0
    assert calls[5:] == ["bytes/a", "memory/b", "throughput/c"]


def test_targets_without_results_say_why() -> None:
    (longest,) = all_targets({})
    assert (longest.measured, longest.note) == (None, "not run")
    failed = {"throughput/dp 2": {"error": "RuntimeError: no luck", "optional": False}}
    assert all_targets(failed)[0].note == "RuntimeError: no luck"


def test_targets_by_hand() -> None:
    wave = {"off": -0.2, "efficiency": 0.95, "sp": 8, "layers": 24}
    cases = {
        "wavefront/w": wave,
        "throughput/sp 2, T 64": {"length": 64, "ratio": {"sp 2, local": {"median": 0.79}}},
        "throughput/dp 2": {"length": 32, "ratio": {"dp 2, local": {"median": 0.86}}},
        "memory/sp 1": {"longest": {"fits": 100}},
        "memory/sp 4": {"longest": {"fits": 390}},
    }
    found = {target.name: target for target in all_targets(cases)}
    assert found["w: simulated beside traced time, off by"].met is False
    assert found["w: of the ideal time"].met is True
    assert found["sp 2, local, T 64 / two alone"].met is False
    assert found["dp 2, local, T 32 / two alone"].met is True
    assert found["longest T at sp 4 / at sp 1, same budget of a rank"].measured == 3.9


@pytest.mark.parametrize("arguments", [["--fast"], ["--show", "no such file"]])
def test_a_wrong_option_is_one_line_and_a_failure(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = command.main(arguments)
    except SystemExit as ended:
        status = ended.code  # type: ignore[assignment]
    error = capsys.readouterr().err
    assert status == 2
    assert error.startswith("python -m benchmarks.sequence_parallel: ")
    assert error.count("\n") == 1


def test_showing_what_is_no_record_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.json").write_text("[]")
    assert command.main(["--show", str(tmp_path / "other.json")]) == 2
    assert "no record of python -m benchmarks.sequence_parallel" in capsys.readouterr().err


def completed_models(settings: dict[str, Any]) -> dict[str, Any]:
    """The model sections of a record with the defaults of options that came after it."""
    models = {
        name: value for name, value in settings.items() if isinstance(value, dict) and "pattern" in value
    }
    inner = {"trellis": TrellisConfig(), "attention": AttentionConfig(), "baselines": BaselineConfig()}
    defaults = {name: json.loads(json.dumps(asdict(section))) for name, section in inner.items()}
    outer = {field.name: field.default for field in fields(ModelConfig) if isinstance(field.default, str)}
    return {
        name: {**outer, **model, **{key: {**defaults[key], **model.get(key, {})} for key in defaults}}
        for name, model in models.items()
    }


def test_the_committed_record_is_of_a_finished_run_of_this_plan() -> None:
    record = json.loads(command.RESULT.read_text())
    assert record["complete"]
    assert {**record["settings"], **completed_models(record["settings"])} == Plan().as_json()
    assert set(record["cases"]) == {case.name for case in command.all_cases(Plan(), {})}
    assert not [name for name, case in record["cases"].items() if "error" in case]
    assert command.PICTURE.is_file()
