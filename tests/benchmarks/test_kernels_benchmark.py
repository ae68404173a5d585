"""The kernel benchmark: it measures what it says; every path runs on a CPU, small, with a counting clock."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.kernels import __main__ as command
from benchmarks.kernels import cpu, memory, warm
from benchmarks.kernels.contenders import compress_call, cpu_call, rival_call
from benchmarks.kernels.cpu import CpuPlan
from benchmarks.kernels.device import Device, Job, warm_in_processes
from benchmarks.kernels.gpu import GpuPlan
from benchmarks.kernels.record import Case, Deadline, Record
from benchmarks.kernels.sizes import Shape, arithmetic, floor_bytes
from benchmarks.kernels.tables import floor_table, render
from benchmarks.kernels.targets import floors
from benchmarks.kernels.timing import in_turns, summary

ROOT = Path(__file__).resolve().parents[2]
SMALL = Shape(1, 32, 2, 16, slots=16, chunk=16)
CPU_PLAN = CpuPlan(
    shape=SMALL,
    lengths=(32, 64),
    layer=SMALL,
    chunks=(16, 32),
    positions=(0, 32),
    threads=(1,),
    repetitions=2,
    processes=1,
)
GPU_PLAN = GpuPlan(
    shapes=((1, 32, 2, 16), (1, 48, 1, 16)),
    chunks=(16, 8),
    slots=16,
    latency=(1, 48, 2),
    decode_batches=(1, 2),
    decode_layers=2,
    sets=2,
    repetitions=2,
)


class Ticks:
    """A clock whose every stamp is one step later, so that medians are known; may end the process."""

    def __init__(self, step: float = 1.0, *, dies_at: int | None = None) -> None:
        self.step, self.dies_at, self.stamps = step, dies_at, 0

    def prepare(self) -> None:
        pass

    def stamp(self) -> float:
        self.stamps += 1
        if self.stamps == self.dies_at:
            raise KeyboardInterrupt
        return self.stamps * self.step

    def milliseconds(self, begin: float, end: float) -> float:
        return end - begin


def kernel_times(work: Callable[[], object]) -> dict[str, float]:
    work()
    return {"scan_forward_kernel": 3.0, "scan_backward_kernel": 6.0}


def device(clock: Ticks, warmed: list[Job] | None = None) -> Device:
    def warm_none(jobs: Sequence[Job], seconds: float) -> dict[str, Any]:
        (warmed if warmed is not None else []).extend(jobs)
        return {"jobs": {}, "limit": seconds}

    return Device(
        name="none",
        device=torch.device("cpu"),
        backend="chunkwise",
        clock=clock,
        capture=lambda work: work,
        kernel_times=kernel_times,
        warm=warm_none,
        copy_bytes=1 << 12,
        matmul_width=16,
    )


@pytest.fixture
def no_fla(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where flash-linear-attention is not installed, whatever is here."""
    # A submodule that another test has imported is found without a look at its package.
    for name in {"fla", *(loaded for loaded in sys.modules if loaded.startswith("fla."))}:
        monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak memory without the processes; one test starts a real one."""
    monkeypatch.setattr(
        cpu,
        "measured_in_own_process",
        lambda name, shape, times: {k: [v] * times for k, v in memory.peak_of_pass(name, shape).items()},
    )


def verdicts(record: dict[str, Any]) -> dict[str, Any]:
    return {target["name"]: target for target in record["targets"]}


# -- what is measured


@pytest.mark.parametrize("name", ["plain_loop", "plain_loop_indexed"])
def test_a_plain_loop_computes_what_chunkwise_does(name: str) -> None:
    calls = [cpu_call(who, SMALL, dtype=torch.float64) for who in ("chunkwise", name)]
    outputs = [call.forward(call.operands) for call in calls]
    assert_near(outputs[1], outputs[0])
    dy = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for ours, theirs in zip(*(c.gradients(y, dy) for c, y in zip(calls, outputs)), strict=True):
        assert_near(theirs, ours)


def assert_near(found: Tensor, expected: Tensor) -> None:
    """By the whole tensor: a single element may be a small difference of large terms."""
    assert float((found - expected).norm()) <= 1e-12 * float(expected.norm())


def test_a_plain_loop_asks_for_whole_chunks() -> None:
    call = cpu_call("plain_loop", dataclasses.replace(SMALL, length=33), dtype=torch.float32)
    with pytest.raises(ValueError, match="T = 33 is no multiple of chunk_size = 16"):
        call.forward(call.operands)


def test_contenders_that_disagree_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    real = cpu.cpu_call
    other = dataclasses.replace(SMALL, chunk=8)
    monkeypatch.setattr(
        cpu, "cpu_call", lambda name, shape, **how: real(name, other if "loop" in name else shape, **how)
    )
    with pytest.raises((ValueError, RuntimeError), match=r"differs from chunkwise|must match"):
        cpu._agreement(SMALL)


def test_bytes_saved_for_backward_are_counted_once_per_storage() -> None:
    x = torch.randn(8, requires_grad=True)
    call = compress_call(SMALL, backend="chunkwise", dtype=torch.float32)
    found = memory.saved_bytes(dataclasses.replace(call, operands={"x": x}, forward=_saves_two))
    assert found == {"operands": 8 * 4, "own": 8 * 4}


def _saves_two(operands: Any) -> Tensor:
    x = operands["x"]
    squared = x.view(2, 4) * x.view(2, 4)  # x twice, by views
    return torch.exp(squared).sum()  # its own result


def test_attention_saves_q_k_v_out_and_one_number_a_token() -> None:
    shape = Shape(1, 64, 2, 64)
    found = memory.saved_bytes(rival_call("attention", shape, dtype=torch.float32))
    assert sum(found.values()) == shape.tokens * shape.heads * (4 * 64 * 4 + 4)


def test_peak_memory_is_that_of_a_process_of_its_own() -> None:
    found = memory.measured_in_own_process("plain_loop", Shape(1, 256, 4, 64), times=1)
    saved = sum(
        memory.saved_bytes(cpu_call("plain_loop", Shape(1, 256, 4, 64), dtype=torch.float32)).values()
    )
    assert saved * 0.5 < found["after_forward"][0] <= found["peak"][0] < 20 * saved


def test_a_process_that_fails_is_told_with_its_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="the process that measures chunkwise failed: no message"):
        memory.measured_in_own_process("chunkwise", SMALL, times=1)


def test_floors_by_hand() -> None:
    shape = Shape(8, 2048, 12, 64)
    per = {
        part: {kind: x / (shape.tokens * 12) for kind, x in kinds.items()}
        for part, kinds in floor_bytes(shape, 2).items()
    }
    # bf16: rows of 128 bytes; gates 8; both memories of a chunk 2 * 64 * 128 / 64 = 256 a token.
    assert per["forward"] == {"least": 5 * 128 + 8, "staged": (3 * 128 + 8 + 256) + (5 * 128 + 8 + 256)}
    assert per["backward"]["least"] == 5 * 128 + 8 + 4 * 128 + 8
    stages = (648, 904 + 128 + 256 + 256, 392 + 256 + 3 * 256, 5 * 128 + 8 + 2 * 256 + 3 * 128 + 8)
    assert per["backward"]["staged"] == sum(stages)
    flops = arithmetic(shape)["forward"] / (shape.tokens * 12)
    assert flops == 8 * 64 * 128 + 64 * (64 + 128 + 64)


@pytest.mark.parametrize("largest", ["bytes", "arithmetic", "scan"])
def test_the_floor_is_the_largest_of_bytes_arithmetic_and_the_scan(largest: str) -> None:
    shape = Shape(1, 128, 1, 64, chunk=32)  # 4 chunks
    slow = {name: 10.0 if name == largest else 1.0 for name in ("bytes", "arithmetic", "scan")}
    parts = ("forward", "backward")
    cases: dict[str, Any] = {
        "ceilings": {"bytes_per_second": 1e9, "flops_per_second": 1e12},
        "compress/1x128x1x64/C 32/stale": {
            "floor_bytes": {part: {"staged": 1e6 * slow["bytes"]} for part in parts},
            "flops": dict.fromkeys(parts, 1000000000.0 * slow["arithmetic"]),
        },
        "scan latency/1x512x16x64/C 32/stale": {
            "microseconds_per_chunk": {
                "forward": 250 * slow["scan"],
                "again": 50 * slow["scan"],
                "reverse": 200 * slow["scan"],
            }
        },
        "scan latency/1x512x16x64/C 32/corrected": {"error": "none"},
    }
    assert floors(cases, shape) == pytest.approx({"forward": 10, "backward": 10, "both": 20})
    assert floors({}, shape) is None


def test_contenders_take_turns_and_warm_up_rounds_are_dropped() -> None:
    order: list[tuple[str, int]] = []
    found = in_turns(
        {name: lambda i, name=name: order.append((name, i)) or i for name in "ab"}, repetitions=2, warmup=1
    )
    assert order == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert found == {"a": [1, 2], "b": [1, 2]}


def test_a_summary_has_median_and_spread() -> None:
    found = summary([float(i) for i in range(11)])
    assert (found["median"], found["p10"], found["p90"], found["runs"]) == (5, 1, 9, 11)
    assert summary([2.0])["p10"] == 2


# -- the record


def cases_that_count(calls: list[str], fails: str = "") -> list[Case]:
    def measure(name: str) -> dict[str, Any]:
        calls.append(name)
        if name == fails:
            raise ImportError("No module named 'fla'\nand more")
        return {"value": 1}

    return [Case(name, lambda name=name: measure(name), optional=True) for name in "abc"]


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path, calls, now = tmp_path / "r.json", [], iter([0.0, 1.0, 2.0, 3.0, 4.0])
    record = Record(path, {"part": "cpu"}, say=lambda _: None)
    left = record.run(cases_that_count(calls), Deadline(2.5, now=lambda: next(now)))
    assert (calls, left) == (["a", "b"], ["c"])
    again = Record(path, {"part": "cpu"}, say=lambda _: None)
    assert again.run(cases_that_count(calls), Deadline()) == []
    assert calls == ["a", "b", "c"]


@pytest.mark.parametrize("change", ["identity", "complete"])
def test_another_run_or_a_finished_one_is_begun_afresh(tmp_path: Path, change: str) -> None:
    path, calls = tmp_path / "r.json", []
    record = Record(path, {"source": "1"}, say=lambda _: None)
    record.run(cases_that_count(calls), Deadline())
    if change == "complete":
        record.finish()
    said: list[str] = []
    again = Record(path, {"source": "2" if change == "identity" else "1"}, say=said.append)
    assert again.cases == {}
    assert said == (
        ["r.json is of another run (source differ): begun afresh"] if change == "identity" else []
    )


def test_a_failure_is_recorded_in_one_line_and_ends_nothing(tmp_path: Path) -> None:
    record = Record(tmp_path / "r.json", {}, say=lambda _: None)
    record.run(cases_that_count([], fails="b"), Deadline())
    assert record.cases["b"]["error"] == "ImportError: No module named 'fla'"
    assert record.cases["c"]["value"] == 1


# -- whole runs


def test_a_run_on_the_cpu(tmp_path: Path, in_process: None, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results" / "kernels_cpu.json"
    assert command.run_cpu(path, CPU_PLAN, Deadline(), clock=Ticks()) == 0
    record = json.loads(path.read_text())
    assert record["complete"]
    assert {"machine", "versions", "source", "settings", "cases", "targets"} <= record.keys()
    both = record["cases"]["side by side/threads 1"]["ms"]["plain_loop"]["both"]
    assert (both["median"], both["runs"]) == (2.0, 2)
    found = verdicts(record)
    assert found["forward + backward, times faster than plain_loop, threads 1"]["met"] is False  # 1, not 3
    assert found["decode step over positions, slowest / fastest"]["measured"] == 1
    for name in ("bf16", "fp32"):
        saved = record["cases"][f"saved for backward/layer in {name}"]
        for sizes in saved["bytes_per_token"].values():
            assert sizes["measured"]["operands"] == sizes["formula"]["operands"]
            assert sizes["measured"]["own"] == sizes["formula"]["own"]
    assert render(record) in capsys.readouterr().out


def test_a_run_on_a_gpu(tmp_path: Path, no_fla: None, capsys: pytest.CaptureFixture[str]) -> None:
    path, warmed = tmp_path / "kernels_none.json", []
    assert command.run_gpu(path, GPU_PLAN, Deadline(), device(Ticks(), warmed)) == 0
    record = json.loads(path.read_text())
    assert record["complete"]
    cases = record["cases"]
    own = cases["compress/1x32x2x16/C 16/corrected"]
    assert own["exact"]
    assert own["bitwise_repeatable"]
    assert own["ms"]["both"]["median"] == 2
    assert own["kernels_ms"] == {"scan_forward_kernel": 3.0, "scan_backward_kernel": 6.0}
    assert cases["scan latency/1x48x2x16/C 8/stale"]["microseconds_per_chunk"] == {
        "forward": 500.0,
        "again": 0.0,
        "reverse": 1000.0,
    }
    assert cases["decode/B 2"]["microseconds"]["graph"]["median"] == 500
    assert cases["attention/1x32x2x16"]["finite"]
    for rival in ("chunk_gsa/1x32x2x16", "ttt_linear/1x48x1x16/C 8", "chunk_gated_delta_rule/1x48x1x16"):
        assert cases[rival]["error"].startswith("ModuleNotFoundError: ")
    found = verdicts(record)
    assert found["forward ms at 1x32x2x16, C 16"] == {
        "name": "forward ms at 1x32x2x16, C 16",
        "measured": 1.0,
        "bound": 0.2,
        "of_bound": 5.0,
        "met": False,
        "note": "",
    }
    beside = found["forward + backward / chunk_gsa at 1x32x2x16, C 16"]
    assert beside["met"] is None
    assert beside["note"].startswith("chunk_gsa/1x32x2x16: ModuleNotFoundError")
    assert found["corrected / stale at 1x48x1x16, C 8"]["met"]
    floor = floors(cases, GPU_PLAN.shape((1, 32, 2, 16), 16))
    assert floor is not None
    assert found["forward + backward / floor at 1x32x2x16, C 16"]["measured"] == 2 / floor["both"]
    assert {job.contender for job in warmed} == {
        "compress",
        "decode",
        "chunk_gsa",
        "ttt_linear",
        "chunk_gated_delta_rule",
    }
    assert render(record) in capsys.readouterr().out


def test_a_killed_run_on_a_gpu_resumes(tmp_path: Path, no_fla: None) -> None:
    path, warmed = tmp_path / "kernels_none.json", []
    with pytest.raises(KeyboardInterrupt):
        command.run_gpu(path, GPU_PLAN, Deadline(), device(Ticks(dies_at=70), warmed))
    before = json.loads(path.read_text())
    assert not before["complete"]
    assert "compress/1x32x2x16/C 16/stale" in before["cases"]
    jobs = len(warmed)
    assert command.run_gpu(path, GPU_PLAN, Deadline(), device(Ticks(step=7), warmed)) == 0
    after = json.loads(path.read_text())
    assert after["complete"]
    assert len(warmed) == jobs
    for name, case in before["cases"].items():
        assert after["cases"][name] == case


def test_a_run_out_of_time_says_what_is_left(
    tmp_path: Path, no_fla: None, capsys: pytest.CaptureFixture[str]
) -> None:
    path, now = tmp_path / "kernels_none.json", iter(float(i) for i in range(1000))
    assert command.run_gpu(path, GPU_PLAN, Deadline(5, now=lambda: next(now)), device(Ticks())) == 1
    record = json.loads(path.read_text())
    assert not record["complete"]
    assert "cases left at the time limit: start again to go on (" in capsys.readouterr().out
    assert verdicts(record)["decode step, microseconds per layer at B 1"]["note"] == "decode/B 1: not run"


def test_a_wrong_result_is_marked_and_missed(
    tmp_path: Path, no_fla: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.kernels.gpu.OUTPUT_ERROR", 0.0)
    path = tmp_path / "kernels_none.json"
    plan = dataclasses.replace(GPU_PLAN, shapes=GPU_PLAN.shapes[:1], chunks=(16,))
    command.run_gpu(path, plan, Deadline(), device(Ticks()))
    record = json.loads(path.read_text())
    target = verdicts(record)["sizes with results outside the tolerances"]
    assert (target["measured"], target["met"]) == (2, False)
    ratio = verdicts(record)["corrected / stale at 1x32x2x16, C 16"]
    assert (ratio["met"], ratio["note"]) == (None, "compress/1x32x2x16/C 16/stale: its results are wrong")
    assert "WRONG" in render(record)


def test_a_failing_case_of_our_own_fails_the_run(tmp_path: Path, no_fla: None) -> None:
    broken = dataclasses.replace(device(Ticks()), kernel_times=lambda work: {"something": 1.0})
    path = tmp_path / "kernels_none.json"
    plan = dataclasses.replace(GPU_PLAN, shapes=GPU_PLAN.shapes[:1], chunks=(16,))
    assert command.run_gpu(path, plan, Deadline(), broken) == 1
    error = json.loads(path.read_text())["cases"]["scan latency/1x48x2x16/C 16/stale"]["error"]
    assert error == "ValueError: no kernel named like scan_forward ran, only something"


# -- rivals


def as_published(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """fla's functions with the signatures of its release 0.6.0; each notes that it was called."""
    called: list[str] = []

    def chunk_gsa(
        q, k, v, s, g=None, scale=None, initial_state=None, output_final_state=False, checkpoint_level=2
    ):
        assert s.shape == g.shape == (*q.shape[:3], 16)
        assert bool((g <= 0).all())
        called.append("chunk_gsa")
        return q * k * v * (s + g).sum(-1, keepdim=True), (None, None)

    def chunk_gated_delta_rule(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False):
        assert g.shape == beta.shape == q.shape[:3]
        called.append("chunk_gated_delta_rule")
        return q * k * v * (g + beta)[..., None], None

    def chunk_ttt_linear(q, k, v, w, b, eta, scale=None, eps=1e-6, chunk_size=16, initial_state=None):
        assert q.dtype == k.dtype == v.dtype
        assert w.shape == b.shape == q.shape[2:]
        assert eta.shape == (*q.shape[:3], 1)
        called.append(f"chunk_ttt_linear {chunk_size}")
        return q * k * v * w * eta + b, None, None

    for module, function in (
        ("gsa", chunk_gsa),
        ("gated_delta_rule", chunk_gated_delta_rule),
        ("ttt", chunk_ttt_linear),
    ):
        fake = types.ModuleType(f"fla.ops.{module}")
        setattr(fake, function.__name__, function)
        monkeypatch.setitem(sys.modules, f"fla.ops.{module}", fake)
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    return called


@pytest.mark.parametrize("name", ["attention", "chunk_gsa", "chunk_gated_delta_rule", "ttt_linear"])
def test_a_rival_is_called_as_it_is_published(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = as_published(monkeypatch)
    call = rival_call(name, SMALL, dtype=torch.bfloat16, device="cpu")
    y = call.forward(call.operands)
    gradients = call.gradients(y, torch.ones_like(y))
    assert all(bool(torch.isfinite(x.float()).all()) for x in (y, *gradients))
    assert all(x.is_leaf and x.requires_grad for x in call.operands.values())
    wanted = {"attention": [], "ttt_linear": ["chunk_ttt_linear 16"]}
    assert called == wanted.get(name, [name])


def test_with_the_rivals_installed_the_targets_have_verdicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_published(monkeypatch)
    path = tmp_path / "kernels_none.json"
    plan = dataclasses.replace(GPU_PLAN, shapes=GPU_PLAN.shapes[:1])
    assert command.run_gpu(path, plan, Deadline(), device(Ticks())) == 0
    found = verdicts(json.loads(path.read_text()))
    for chunk in (16, 8):
        for rival in ("chunk_gsa", "ttt_linear"):
            assert found[f"forward + backward / {rival} at 1x32x2x16, C {chunk}"]["met"]


# -- compiling ahead


def test_jobs_run_in_processes_of_their_own_and_end_at_the_limit() -> None:
    endless = Job("while True: pass", ())
    found = warm_in_processes([endless], 0.5, module="timeit", width=1)
    assert found == {"jobs": {"while True: pass": "stopped at the time limit"}}
    done = warm_in_processes([Job("pass", ()), Job("1 +", ())], 30.0, module="timeit", width=2)
    assert done["jobs"]["pass"] == "ready"
    assert "SyntaxError" in done["jobs"]["1 +"]


def test_a_job_runs_every_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, list[Shape]]] = []
    monkeypatch.setattr(warm, "run", lambda contender, shapes: seen.append((contender, shapes)))
    shapes = (SMALL, dataclasses.replace(SMALL, update="corrected"))
    monkeypatch.setattr(sys, "argv", ["warm", *Job("compress", shapes).arguments])
    warm.main()
    assert seen == [("compress", list(shapes))]


@pytest.mark.parametrize("contender", ["compress", "decode", "attention"])
def test_warming_runs_the_contender(contender: str) -> None:
    warm.run(contender, [SMALL], device="cpu", backend="chunkwise")


# -- the command


@pytest.mark.parametrize(
    "arguments",
    [
        ["--device", "tpu"],
        ["--minutes", "0"],
        ["--repetitions", "-1"],
        ["--fast"],
        ["--show", "no such file"],
    ],
)
def test_a_wrong_option_is_one_line_and_a_failure(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = command.main(arguments)
    except SystemExit as ended:
        status = ended.code
    error = capsys.readouterr().err
    assert status == 2
    assert error.startswith("python -m benchmarks.kernels: ")
    assert error.count("\n") == 1


def test_cuda_without_a_gpu_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["--device", "cuda"]) == 2
    line = (
        "python -m benchmarks.kernels: --device cuda, but torch sees no CUDA device here: use --device cpu\n"
    )
    assert capsys.readouterr().err == line


def test_showing_what_is_no_record_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.json").write_text("[]")
    assert command.main(["--show", str(tmp_path / "other.json")]) == 2
    assert "no record of python -m benchmarks.kernels" in capsys.readouterr().err


def test_the_page_shows_the_committed_numbers() -> None:
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert floor_table(GpuPlan(), **command.H200) in page, (
        "python -m benchmarks.kernels --floors prints another"
    )
    for path in sorted((ROOT / "benchmarks" / "results").glob("kernels_*.json")):
        record = json.loads(path.read_text())
        assert record["complete"], f"{path.name} is of a run that was not finished"
        assert render(record) in page, f"python -m benchmarks.kernels --show {path} prints other tables"


def test_a_record_holds_no_number_that_json_does_not_have() -> None:
    from benchmarks.kernels.gpu import _rms_ratio

    assert math.isfinite(_rms_ratio(torch.tensor([float("nan")]), torch.ones(1, dtype=torch.float64)))
