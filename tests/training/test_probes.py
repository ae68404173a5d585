"""Looks into the memories: the numbers are those of plain loops in fp64, and nothing that trains changes."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import PackedLayout, compress_kv
from tests.training.small_run import exact_rows, make_job, state, write_dataset
from trellis_dist.parallel.mesh import Mesh
from trellis_dist.training import probes, probes_sample
from trellis_dist.training.loop import run
from trellis_dist.training.metrics import read_rows
from trellis_dist.training.probes_measure import USED, effective_rank, measure
from trellis_dist.training.probes_sample import Tap, looks, sample, sample_bounds

H, M, D, C = 2, 6, 5, 4
LENGTHS = (7, 18, 3)
PHI = {"silu": torch.nn.functional.silu, "tanh": torch.tanh, "identity": lambda z: z}


def operation_inputs(update: str, phi: str, *, own_gates: bool = False) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(1, sum(LENGTHS), H, *shape, generator=generator, dtype=torch.float64)

    gates = {"log_decay": -draw().abs() / 5, "step_size": draw().sigmoid()}
    if own_gates:
        gates |= {"value_log_decay": -draw().abs() / 3, "value_step_size": draw().sigmoid() / 2}
    return {
        "q": draw(D),
        "k": torch.nn.functional.normalize(draw(D), dim=-1),
        "v": torch.nn.functional.normalize(draw(D), dim=-1),
        "alpha": draw(M),
        **gates,
        "chunk_size": C,
        "phi": phi,
        "readout": "softmax",
        "update": update,
        "layout": PackedLayout.of(LENGTHS, C),
    }


def gradient(z: Tensor, alpha: Tensor, phi: str) -> Tensor:
    z = z.clone().requires_grad_()
    return torch.autograd.grad((PHI[phi](z) - alpha).square().sum() / 2, z)[0]


class Recurrence:
    """One head's memory token by token, in chunks of ``size``; plain loops."""

    def __init__(self, x: Tensor, alpha: Tensor, beta: Tensor, gamma: Tensor, *, phi: str, corrected: bool):
        self.tokens = list(zip(x, alpha, beta, gamma, strict=True))
        self.phi, self.corrected = phi, corrected

    def run(self, memory: Tensor, begin: int, end: int, size: int) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Memory after the tokens, their inner gradients [n, M], and the memory after each of them."""
        found, memories, decayed = [], [], memory
        for t in range(begin, end):
            x, alpha, beta, gamma = self.tokens[t]
            if (t - begin) % size == 0:
                decayed = memory
            decayed = beta * decayed if self.corrected else decayed
            z = decayed @ x
            u = gradient(z, alpha, self.phi)
            if self.corrected:
                u = u + beta * memory @ x - z
            memory = beta * memory - gamma * torch.outer(u, x)
            found.append(u)
            memories.append(memory)
        return memory, torch.stack(found), memories


@pytest.mark.parametrize(
    "update, phi, own",
    [("stale", "silu", False), ("stale", "identity", True), ("corrected", "tanh", True)],
)
def test_the_numbers_of_a_look_are_those_of_plain_loops(update: str, phi: str, own: bool):
    inputs = operation_inputs(update, phi, own_gates=own)
    _, final = compress_kv(**inputs, output_final_state=True)
    taken = sample(inputs, final, layer=3, first_head=4)
    (numbers,) = measure([taken])
    first, begin, end = LENGTHS[0], 12, 16  # the longest document is the second, of four chunks and a half
    for head in range(H):
        passes = {}
        for name, x in (("key", inputs["k"]), ("value", inputs["v"])):
            prefix = "value_" if own and name == "value" else ""
            gates = (inputs[f"{prefix}log_decay"].exp(), inputs[f"{prefix}step_size"])
            parts = [y[0, first : first + 18, head] for y in (x, inputs["alpha"], *gates)]
            passes[name] = Recurrence(*parts, phi=phi, corrected=update == "corrected")
        for name, one in passes.items():
            start, _, _ = one.run(torch.zeros(M, D, dtype=torch.float64), 0, begin, C)
            after, stale, memories = one.run(start, begin, end, C)
            last, _, _ = one.run(after, end, 18, C)
            _, true, _ = one.run(start, begin, end, 1)
            sigma = torch.linalg.svdvals(last)
            p = sigma / sigma.sum()
            error = torch.stack([PHI[phi](after @ x) - alpha for x, alpha, *_ in one.tokens[begin:end]])
            expected = {
                "norm": last.square().sum().sqrt(),
                "rank": torch.exp(-(p * p.log()).sum()),
                "inner_loss": error.square().mean(),
                "stale_error": (stale - true).norm() / true.norm(),
                "stale_cosine": (stale * true).sum() / stale.norm() / true.norm(),
            }
            for key, value in expected.items():
                assert float(numbers[f"{key}_{name}"][head]) == pytest.approx(float(value), rel=1e-6), key
            if name == "key":
                reads = [
                    torch.softmax(memory @ q, -1)
                    for memory, q in zip(memories, inputs["q"][0, first + begin : first + end, head])
                ]
        usage = torch.stack(reads).abs().sum(0) / torch.stack(reads).abs().sum()
        entropy = -(usage * usage.log()).sum() / math.log(M)
        assert float(numbers["slot_entropy"][head]) == pytest.approx(float(entropy), rel=1e-9)
        used = sum(float(share) >= USED / M for share in usage) / M
        assert float(numbers["slots_used"][head]) == pytest.approx(used)
    assert taken.gates["forget_gate"].shape == (sum(LENGTHS), H)
    torch.testing.assert_close(
        taken.gates["forget_gate"].double(), inputs["log_decay"][0].exp(), rtol=1e-6, atol=0
    )
    assert ("value_step_size" in taken.gates) == own


def test_chunks_of_one_token_have_no_stale_error():
    inputs = {**operation_inputs("stale", "silu"), "chunk_size": 1, "layout": PackedLayout.of(LENGTHS, 1)}
    _, final = compress_kv(**inputs, output_final_state=True)
    (numbers,) = measure([sample(inputs, final, layer=0)])
    assert float(numbers["stale_error_key"].max()) < 1e-12
    assert float(numbers["stale_cosine_value"].min()) > 1 - 1e-12


def test_a_document_that_enters_inside_a_chunk_is_read_from_its_own_state():
    """The same chunk, whether the call began with it or the call before ended inside another."""
    inputs = operation_inputs("corrected", "silu")
    alone = {**inputs, "layout": None}
    alone |= {name: x[:, 7:25] for name, x in inputs.items() if isinstance(x, Tensor)}
    _, final = compress_kv(**alone, output_final_state=True)
    (expected,) = measure([sample(alone, final, layer=0)])
    cut = {name: x[:, :6] if isinstance(x, Tensor) else x for name, x in alone.items()}
    _, middle = compress_kv(**cut, output_final_state=True)
    rest = {name: x[:, 6:] if isinstance(x, Tensor) else x for name, x in alone.items()}
    rest["initial_state"] = middle
    _, final = compress_kv(**rest, output_final_state=True)
    (numbers,) = measure([sample(rest, final, layer=0)])
    for name, value in expected.items():
        torch.testing.assert_close(numbers[name], value, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "length, offset, expected",
    [(18, 0, (12, 16)), (3, 0, (0, 3)), (10, 3, (5, 9)), (3, 2, (2, 3)), (2, 1, (0, 2)), (400, 0, (60, 64))],
)
def test_the_last_whole_chunk_of_the_first_ones_is_looked_at(length: int, offset: int, expected: Any):
    assert sample_bounds(length, offset, 4) == expected


def test_the_effective_rank_counts_equal_directions():
    eye = torch.eye(4, dtype=torch.float64)
    matrices = torch.stack([eye, torch.diag(torch.tensor([2.0, 2, 0, 0]).double()), 0 * eye, eye / 0])
    rank = effective_rank(matrices)
    torch.testing.assert_close(rank[:3], torch.tensor([4.0, 2.0, 0.0]).double(), rtol=1e-6, atol=1e-6)
    assert rank[3].isnan()


def test_one_replica_looks_and_the_last_segment_or_all_heads():
    assert looks(Mesh())
    assert [looks(Mesh(dp=2, rank=rank, dp_rank=rank)) for rank in range(2)] == [True, False]


@pytest.mark.parametrize(
    "changes",
    [
        {"training": {"activation_checkpointing": "full"}},
        {"rows": {"carry_rows": 4, "packing": "concat"}, "training": {"forwards_first": 2}},
        {
            "training": {"compile": "aot_eager"},
            "model": {"pattern": ("trellis", "attention"), "num_layers": 2},
        },
    ],
    ids=["recomputed", "carried", "compiled"],
)
def test_a_run_that_is_looked_at_trains_to_the_same_bits(changes: dict[str, Any], tmp_path: Path):
    data = write_dataset(tmp_path / "set")
    changes = {"training": {}, **changes}
    changes["training"] = {"steps": 4, "validation_interval": 0, **changes["training"]}
    for name, interval in (("with", 2), ("without", 0)):
        sections = {"checkpoint": {"interval": 1}, "logging": {"probe_interval": interval}, **changes}
        rows_as = sections.pop("rows", {})
        job = make_job(data, **sections)
        job = dataclasses.replace(job, data=dataclasses.replace(job.data, **rows_as))
        torch.manual_seed(0)
        run(job, tmp_path / name)
    assert exact_rows(tmp_path / "with") == exact_rows(tmp_path / "without")
    assert state(tmp_path / "with", 4) == state(tmp_path / "without", 4)
    rows = read_rows(tmp_path / "with" / "metrics.jsonl")
    looked = [row["step"] for row in rows if "trellis/layer_00/forget_gate" in row]
    assert looked == [2, 4]
    assert not any(
        key.startswith("trellis/") for row in read_rows(tmp_path / "without" / "metrics.jsonl") for key in row
    )
    assert 0 < rows[1]["trellis/layer_00/forget_gate"] < 1
    assert not any("layer_01" in key for row in rows for key in row)
    assert rows[3]["optim/update_to_weight"] == pytest.approx(update_ratio(tmp_path / "with", 4), rel=1e-6)


def test_a_look_at_a_model_without_trellis_layers_has_the_update_ratio_alone(tmp_path: Path):
    data = write_dataset(tmp_path / "set")
    sections = {"model": {"pattern": ("gated_deltanet", "sliding_window"), "num_layers": 2}}
    training = {"steps": 2, "validation_interval": 0}
    run(make_job(data, training=training, logging={"probe_interval": 2}, **sections), tmp_path / "run")
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert rows[1]["optim/update_to_weight"] > 0
    assert not [key for row in rows for key in row if key.startswith("trellis/")]


def update_ratio(run_dir: Path, step: int) -> float:
    """From the checkpoints before and after the step, in fp64."""
    before, after = (
        {name: torch.frombuffer(bytearray(raw), dtype=torch.float32).double() for name, raw in found.items()}
        for found in (weights_of(run_dir, step - 1), weights_of(run_dir, step))
    )
    update = sum(float((after[name] - before[name]).square().sum()) for name in before)
    return math.sqrt(update / sum(float(x.square().sum()) for x in before.values()))


def weights_of(run_dir: Path, step: int) -> dict[str, bytes]:
    return {name: raw for name, raw in state(run_dir, step).items() if name.startswith("model/")}


def test_a_look_that_fails_is_a_line_and_no_end(tmp_path: Path, monkeypatch, capsys):
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no memory left to look with")

    monkeypatch.setattr(probes_sample, "sample", broken)
    job = make_job(write_dataset(tmp_path / "set"), training={"steps": 2}, logging={"probe_interval": 2})
    assert run(job, tmp_path / "run").outcome == "finished"
    said = capsys.readouterr().err
    assert "alert: no look into the memories at step 2: RuntimeError: no memory left to look with" in said
    assert "optim/update_to_weight" in read_rows(tmp_path / "run" / "metrics.jsonl")[-1]


def test_a_tap_gives_back_what_it_replaced():
    from tests.training.model_cases import MODEL
    from trellis_dist.models.mixers.trellis import TrellisMixer

    mixer = TrellisMixer(MODEL, 0)
    before = mixer.operation
    tap = Tap(mixer, Mesh())
    assert mixer.operation is tap
    tap.remove()
    assert mixer.operation is before


def test_only_a_sample_of_many_weights_is_copied(monkeypatch):
    class Engine:
        weights = torch.arange(1.0, 1001.0)

        def own_weights(self):
            yield self.weights

    monkeypatch.setattr(probes, "WEIGHTS", 100)
    engine = Engine()
    ratio = probes.UpdateRatio(engine)  # type: ignore[arg-type]
    assert [len(part) for _, part in ratio._before] == [100]
    engine.weights = engine.weights * 1.01
    assert quotient(ratio) == pytest.approx(0.01, rel=1e-4)


def quotient(ratio: probes.UpdateRatio) -> float:
    update, weight = ratio.squares()
    return math.sqrt(update / weight)


def test_a_sample_of_weights_stands_for_all_columns_and_for_small_tensors(monkeypatch):
    """One of 64 columns moves, of which every 64th weight is all or none; beside it are small tensors."""

    class Engine:
        def __init__(self) -> None:
            self.parts = [torch.ones(1024, 64), *(torch.ones(3) for _ in range(200))]

        def own_weights(self):
            yield from (part.view(-1) for part in self.parts)

    monkeypatch.setattr(probes, "WEIGHTS", 1030)
    engine = Engine()
    ratio = probes.UpdateRatio(engine)  # type: ignore[arg-type]
    engine.parts[0][:, 0] += 0.5
    _, weight = ratio.squares()
    assert weight == pytest.approx(1024 * 64 + 600, rel=1e-9)  # each tensor's sample for its own numbers
    assert quotient(ratio) == pytest.approx(0.5 / 8, rel=0.6)
    engine.parts[0][:, 0] -= 0.5
    engine.parts[0][:, 1] += 0.5
    assert quotient(ratio) == pytest.approx(0.5 / 8, rel=0.6)


@pytest.mark.parametrize("broken", ["__init__", "squares"])
def test_a_ratio_that_fails_is_a_line_and_no_end(broken: str, tmp_path: Path, monkeypatch, capsys):
    def fails(*_: Any) -> None:
        raise RuntimeError("no memory left for a copy")

    monkeypatch.setattr(probes.UpdateRatio, broken, fails)
    job = make_job(write_dataset(tmp_path / "set"), training={"steps": 2}, logging={"probe_interval": 2})
    assert run(job, tmp_path / "run").outcome == "finished"
    said = capsys.readouterr().err
    alert = "alert: no ratio of update to weights at step 2: RuntimeError: no memory left for a copy"
    assert said.count(alert) == 1
    last = read_rows(tmp_path / "run" / "metrics.jsonl")[-1]
    assert "optim/update_to_weight" not in last
    assert "trellis/layer_00/norm_key" in last


def test_numbers_that_cannot_be_merged_are_a_line_and_no_end(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(probes, "merge", lambda looks: looks[0].nothing)
    job = make_job(write_dataset(tmp_path / "set"), training={"steps": 2}, logging={"probe_interval": 2})
    assert run(job, tmp_path / "run").outcome == "finished"
    assert "alert: no look into the memories at step 2: AttributeError" in capsys.readouterr().err
    assert "optim/update_to_weight" in read_rows(tmp_path / "run" / "metrics.jsonl")[-1]
