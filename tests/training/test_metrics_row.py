"""Rows on one process and on meshes: every key with its meaning, and the numbers of one process."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import sys
import threading
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.hand_made import BOS, EOS, write_documents
from checkpoints.state import CheckpointReader
from data_pipeline.loader import BatchLoader, TokenDataset
from tests.distributed import gloo_pool
from tests.training.small_run import VOCAB, make_job
from trellis_dist.files import read_json
from trellis_dist.models.counts import flops_per_token
from trellis_dist.models.language_model import build_language_model
from trellis_dist.parallel import env
from trellis_dist.parallel.config import MeshConfig, SequenceConfig, TensorConfig
from trellis_dist.training import writers
from trellis_dist.training.config import OptimizerConfig
from trellis_dist.training.engines.common import CommonEngine
from trellis_dist.training.evaluate import PositionLosses
from trellis_dist.training.job import Job
from trellis_dist.training.loop import run
from trellis_dist.training.metrics import MetricsWriter, read_rows
from trellis_dist.training.peak import peak_flops
from trellis_dist.training.probes import Probes
from trellis_dist.training.saving import Saver
from trellis_dist.training.step_times import slept_seconds
from trellis_dist.training.writers import Histogram, check_wandb

ROW, STEPS = 128, 4
MESHES: dict[str, dict[str, Any]] = {
    "tp, sequence-parallel": {"mesh": MeshConfig(tp=2), "tensor": TensorConfig(sequence_parallel=True)},
    "sp, ZeRO 1": {"mesh": MeshConfig(sp=2), "training": {"engine": "deepspeed"}},
    "sp, all-to-all, FSDP2": {
        "mesh": MeshConfig(sp=2),
        "sequence": SequenceConfig(mode="all_to_all"),
        "training": {"engine": "fsdp2"},
    },
    "dp, ZeRO 2": {"training": {"engine": "deepspeed", "zero_stage": 2}},
    "dp, ZeRO 3": {"training": {"engine": "deepspeed", "zero_stage": 3}},
    "dp, FSDP2": {"training": {"engine": "fsdp2", "activation_checkpointing": "full"}},
    "dp, local": {},
}
PARTS = [f"perf/{part}_seconds" for part in ("data", "forward", "backward", "reduction", "update")]

CLIP = 0.0575  # between the norms of the steps
HEALTH = ("skipped_steps", "rollbacks", "slow_ranks", "failed_saves")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Long documents to train on, so that a row is one; to validate on, documents of any length."""
    draw = np.random.default_rng(0)

    def documents(sizes: tuple[int, ...]) -> list[np.ndarray]:
        return [np.array([BOS, *draw.integers(3, VOCAB, size=size), EOS]) for size in sizes]

    splits = {
        "train": {"a": [documents((3000,) * 3)], "b": [documents((3000,))]},
        "validation": {"a": [documents((5, 100, 300, 40, 70, 20))]},
    }
    return write_documents(tmp_path_factory.mktemp("data") / "set", splits, vocab_size=VOCAB)


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    run(small_job(data, tensorboard=True), folder)
    return folder


def small_job(
    data: Path, *, training: dict[str, Any] | None = None, tensorboard: bool = False, **sections: Any
) -> Job:
    settings = {
        "steps": STEPS,
        "global_batch_tokens": 4 * ROW,
        "micro_batch": 1,
        "validation_interval": 0,
        **(training or {}),
    }
    job = make_job(
        data,
        model={"norm_eps": 1e-2, "vocab_size": 18, "num_layers": 2},
        optimizer={"kind": "sgd", "lr": 0.02, "clip_norm": 0.5},
        training=settings,
        checkpoint={"interval": 1},
        logging={"probe_interval": 2, "tensorboard": tensorboard, "peak_tflops": 0.001},
    )
    rows = dataclasses.replace(job.data, chunk_aligned=True, sequence_length=ROW)
    return dataclasses.replace(job, data=rows, **sections)


def run_case(job: Job, folder: Path) -> None:
    run(job, folder)


def rows_of(folder: Path) -> list[dict[str, float]]:
    return read_rows(folder / "metrics.jsonl")


def update_ratio(folder: Path, step: int) -> float:
    """Of the checkpoints before and after a step, in fp64."""
    readers = [CheckpointReader(folder / "checkpoints" / f"step-{number:08d}") for number in (step - 1, step)]
    update = weight = 0.0
    for name in (name for name in readers[0].names() if name.startswith("model/")):
        before, after = (reader.read(name).double() for reader in readers)
        update += float((after - before).square().sum())
        weight += float(before.square().sum())
    return math.sqrt(update / weight)


@pytest.mark.parametrize("name", MESHES)
def test_the_rows_of_a_mesh_are_those_of_one_process(name: str, data: Path, alone: Path, tmp_path: Path):
    gloo_pool(2).run(run_case, small_job(data, **MESHES[name]), tmp_path, timeout_s=120.0)
    rows = rows_of(tmp_path)
    for mine, theirs in zip(rows, rows_of(alone), strict=True):
        parallel = mine.keys() - theirs.keys()
        assert parallel <= {"perf/communication_share"}
        assert theirs.keys() <= mine.keys()
        exact = [key for key in theirs if key.startswith(("loss/", "optim/", "data/"))]
        # The last segment's gates are those of half of the tokens.
        half = name == "sp, ZeRO 1"
        gates = ("forget_gate", "step_size")
        exact += [key for key in theirs if key.startswith("trellis/") and not (half and key.endswith(gates))]
        for key in exact:
            assert mine[key] == pytest.approx(theirs[key], rel=2e-4, abs=1e-7), key
    assert rows[1]["optim/update_to_weight"] == pytest.approx(update_ratio(tmp_path, 2), rel=1e-5)
    assert 0 <= rows[-1]["perf/communication_share"] <= 1


def run_slowly(job: Job, folder: Path, *, passes: float, copies: float) -> None:
    """Rank 1 computes ``passes`` seconds longer in every step; all wait ``copies`` seconds for saves."""
    import time

    def slow(self: Any, batch: Any) -> Any:
        end = time.thread_time() + passes * (env.rank() == 1) / 2  # two micro-batches a step
        while time.thread_time() < end:
            pass
        return forward(self, batch)

    def wait(self: Any) -> None:
        time.sleep(copies)
        waited(self)

    forward, waited = CommonEngine._forward, Saver._wait_copied
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(CommonEngine, "_forward", slow)
        patched.setattr(Saver, "_wait_copied", wait)
        run(job, folder)


def test_waiting_for_a_slow_rank_is_exchange_and_not_the_backward_pass(data: Path, tmp_path: Path):
    job = small_job(data, training={"steps": 3})
    gloo_pool(2).run(partial_case, run_slowly, job, tmp_path, {"passes": 0.4, "copies": 0.0}, timeout_s=120.0)
    for row in rows_of(tmp_path)[1:]:
        assert row["perf/reduction_seconds"] > 0.2
        assert row["perf/reduction_seconds"] > row["perf/backward_seconds"]
        # The mean over a rank that waits most of the step, and one that hardly does.
        assert 0.2 < row["perf/communication_share"] < 0.9


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_waiting_for_the_copies_of_a_save_is_no_exchange(data: Path, tmp_path: Path):
    job = small_job(data, training={"steps": 3})
    gloo_pool(2).run(partial_case, run_slowly, job, tmp_path, {"passes": 0.0, "copies": 0.6}, timeout_s=120.0)
    for row in rows_of(tmp_path)[1:]:  # before the first step nothing is saved
        assert row["perf/step_seconds"] > 0.6
        assert row["perf/communication_share"] < 0.5
        assert sum(row[key] for key in PARTS) < row["perf/step_seconds"] - 0.5


def test_what_a_look_prepares_is_in_no_part_of_a_step(data: Path, tmp_path: Path, monkeypatch):
    """With torch.compile it evaluates a micro-batch before the step."""
    import time

    def evaluates(self: Probes, step: int, batches: Any) -> None:
        prepared(self, step, batches)
        self._session.engine.evaluate(batches[:1])
        time.sleep(0.3)

    prepared = Probes.before_step
    monkeypatch.setattr(Probes, "before_step", evaluates)
    run(small_job(data, training={"steps": 2}), tmp_path)
    for row in rows_of(tmp_path):
        assert sum(row[key] for key in PARTS) < row["perf/step_seconds"] - 0.25


def partial_case(case: Any, job: Job, folder: Path, options: dict[str, float]) -> None:
    case(job, folder, **options)


def test_a_row_says_what_a_step_took_and_read(data: Path, alone: Path):
    rows = rows_of(alone)
    for row in rows:
        assert all(row[key] >= 0 for key in PARTS)
        assert min(row["perf/forward_seconds"], row["perf/backward_seconds"], row["perf/update_seconds"]) > 0
        assert sum(row[key] for key in PARTS) <= row["perf/step_seconds"]
        assert row["optim/clip_fraction"] == float(row["optim/gradient_norm"] > 0.5)
        assert 0 < row["memory/used_bytes"] <= row["memory/peak_bytes"]
        assert row["data/mixture/a"] + row["data/mixture/b"] == pytest.approx(1)
        assert row["data/rows_skipped"] == 0
        assert row["perf/mfu"] > 0
        assert row["perf/save_stall_seconds"] >= 0
        # Written while there is nothing to say too: a gauge that is left out stays at its last value.
        assert [row[f"health/{name}"] for name in HEALTH] == [0.0] * len(HEALTH)
    assert "perf/eta_seconds" not in rows[0]
    assert [row["perf/eta_seconds"] > 0 for row in rows[1:]] == [True] * (STEPS - 2) + [False]
    dataset = TokenDataset(data, "train", sequence_length=ROW, seed=0, align=8, verify=False)
    (first,) = BatchLoader(dataset, global_batch=4, micro_batch=4).micro_batches(0)
    assert rows[0]["data/utilisation"] == first.valid_tokens / (4 * ROW)
    assert rows[-1]["data/tokens_seen"] == STEPS * 4 * ROW
    assert rows[-1]["data/epoch"] == pytest.approx(STEPS * 4 / 94, rel=0.05)
    looked = [row["step"] for row in rows if "optim/update_to_weight" in row]
    assert looked == [2, 4]


def test_a_row_of_several_steps_is_their_mean(data: Path, tmp_path: Path):
    """The same run with a row per step and with a row in three; what the second says, from the first."""
    optimizer = OptimizerConfig(kind="sgd", lr=0.02, clip_norm=CLIP)
    job = small_job(data, training={"steps": 7}, optimizer=optimizer)
    for name, interval in (("each", 1), ("third", 3)):
        logging = dataclasses.replace(job.logging, interval=interval, probe_interval=0)
        run(dataclasses.replace(job, logging=logging), tmp_path / name)
    each, third = rows_of(tmp_path / "each"), rows_of(tmp_path / "third")
    assert [row["step"] for row in third] == [1, 3, 6, 7]
    flops = flops_per_token(job.model, sequence_length=ROW)
    begin, clipped = 0, set()
    for row in third:
        steps = each[begin : int(row["step"])]
        begin = int(row["step"])
        above = sum(one["optim/gradient_norm"] > CLIP for one in steps)
        assert row["optim/clip_fraction"] == above / len(steps)
        for key in ("data/utilisation", "data/mixture/a", "data/mixture/b"):
            assert row[key] == pytest.approx(sum(one[key] for one in steps) / len(steps), rel=1e-12), key
        assert row["loss/train"] == steps[-1]["loss/train"]
        assert row["perf/tokens_per_second"] * row["perf/step_seconds"] == pytest.approx(4 * ROW, rel=1e-12)
        expected = flops * row["perf/tokens_per_second"] / 0.001e12
        assert row["perf/mfu"] == pytest.approx(expected, rel=1e-12)
        clipped.add(row["optim/clip_fraction"])
    assert len({one["data/mixture/a"] for one in each}) > 1
    assert len(clipped) > 2, "a fraction of 0, of 1 and one between"


def test_losses_by_position_are_those_of_the_whole_rows(data: Path, alone: Path):
    """By hand, in fp64: every validation row through the model of the last checkpoint."""
    job = small_job(data)
    model = build_language_model(job.model, seed=0).double()
    reader = CheckpointReader(alone / "checkpoints" / f"step-{STEPS:08d}")
    model.load_state_dict({name: reader.read(f"model/{name}").double() for name in model.state_dict()})
    dataset = TokenDataset(data, "validation", sequence_length=ROW, seed=0, align=8, verify=False)
    loader = BatchLoader(dataset, global_batch=1, micro_batch=1, shuffle=False)
    sums = {"0000_0063": [0.0, 0], "0064_0127": [0.0, 0]}
    for counter in range(dataset.num_samples):
        (batch,) = loader.micro_batches(counter)
        log_p = model(batch.tokens, cu_seqlens=batch.cu_seqlens).detach().log_softmax(-1)
        starts = batch.cu_seqlens.tolist()
        for place, label in enumerate(batch.labels[0].tolist()):
            if label != -100:
                before = place - max(start for start in starts if start <= place)
                entry = sums["0000_0063" if before < 64 else "0064_0127"]
                entry[0] -= float(log_p[0, place, label])
                entry[1] += 1
    last = rows_of(alone)[-1]
    for name, (nats, tokens) in sums.items():
        assert tokens > 20
        assert last[f"loss/position_{name}"] == pytest.approx(nats / tokens, rel=1e-5)
    total, count = (sum(column) for column in zip(*sums.values(), strict=True))
    assert last["loss/validation"] == pytest.approx(total / count, rel=1e-5)


def test_buckets_double_and_short_rows_have_one():
    def of(length: int) -> dict[str, float]:
        positions = torch.arange(length)
        found = PositionLosses(length, device=torch.device("cpu"))
        found.add(torch.where(positions == 3, -100, 1), positions, positions.float())
        return PositionLosses.row(found.sums())

    assert of(16) == {"loss/position_0000_0063": pytest.approx((sum(range(16)) - 3) / 15)}
    assert list(of(64)) == ["loss/position_0000_0063"]
    whole = of(300)
    edges = ["0000_0063", "0064_0127", "0128_0255", "0256_0511"]
    assert list(whole) == [f"loss/position_{edge}" for edge in edges]
    assert whole["loss/position_0128_0255"] == pytest.approx(sum(range(128, 256)) / 128)


def test_peaks_are_known_by_name_or_given(monkeypatch: pytest.MonkeyPatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert peak_flops(cpu, bf16=False) is None
    assert peak_flops(cpu, bf16=False, override_tflops=2.5) == 2.5e12
    names = {
        "NVIDIA H100 80GB HBM3": 989.4,
        "NVIDIA H100 PCIe": 756.0,
        "NVIDIA H200": 989.4,
        "NVIDIA H200 NVL": 835.5,
        "NVIDIA A100-SXM4-80GB": 312.0,
        "NVIDIA L4": 121.0,
        "NVIDIA L40": 181.0,
        "NVIDIA L40S": 362.0,
        "NVIDIA GeForce RTX 4090": 165.2,
        "NVIDIA GeForce RTX 4090 Laptop GPU": None,
        "NVIDIA GeForce RTX 3090 Ti": None,
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb": None,
        "NVIDIA RTX A1000": None,
        "NVIDIA GH200 480GB": None,
        "Some GPU": None,
    }
    for name, expected in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert peak_flops(gpu, bf16=True) == (None if expected is None else expected * 1e12), name
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100-SXM4-80GB")
    assert peak_flops(gpu, bf16=False) == 19.5e12


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_the_clock_of_sleep_stands_still_while_this_thread_computes():
    import time

    def passed(work: Any) -> float:
        before = slept_seconds()
        work()
        after = slept_seconds()
        assert before is not None
        assert after is not None
        return after - before

    def compute() -> None:
        end = time.thread_time() + 0.2
        while time.thread_time() < end:
            pass

    # Whoever takes the core between the two readings of the clock spoils a try.
    assert max(passed(lambda: time.sleep(0.2)) for _ in range(3)) >= 0.15
    assert min(passed(compute) for _ in range(3)) < 0.1


class FakeWandb(types.ModuleType):
    """The calls of wandb 0.31 that a run makes, with its argument names."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.calls: list[Any] = []
        self.fails = False
        self.blocks: threading.Event | None = None  # finish waits for it

    def init(
        self,
        entity: str | None = None,
        project: str | None = None,
        dir: str | None = None,
        id: str | None = None,
        name: str | None = None,
        notes: str | None = None,
        tags: Any = None,
        config: dict[str, Any] | None = None,
        resume: bool | str | None = None,
    ) -> FakeWandb:
        self.calls.append(("init", project, name, id, resume, dir, config))
        return self

    def log(self, data: dict[str, Any], step: int | None = None, commit: bool | None = None) -> None:
        if self.fails:
            raise RuntimeError("the service is away")
        self.calls.append(("log", data, step))

    def finish(self, exit_code: int | None = None, quiet: bool | None = None) -> None:
        if self.blocks is not None:
            self.blocks.wait(60.0)
        self.calls.append(("finish",))

    class Histogram:
        def __init__(self, sequence: Any = None, np_histogram: Any = None, num_bins: int = 64) -> None:
            counts, edges = np_histogram
            assert len(edges) == len(counts) + 1
            self.counts = counts


def open_writer(folder: Path) -> MetricsWriter:
    return MetricsWriter(
        folder,
        main=True,
        resumed_step=0,
        steps=9,
        tensorboard=False,
        progress=False,
        wandb="trellis",
        config={"model": {"dim": 8}},
    )


@pytest.fixture
def fake_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeWandb:
    module = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return module


def test_a_run_is_one_run_of_wandb_in_all_its_starts(tmp_path: Path, fake_wandb: FakeWandb):
    import os

    ones = Histogram.of(np.ones(5))
    assert ones is not None
    for _ in range(2):
        writer = open_writer(tmp_path / "run")
        writer.write({"step": 3, "loss/train": 2.0})
        writer.histograms(3, {"trellis/layer_00/forget_gate/head_00": ones})
        writer.rewind(2)
        writer.close()
    first, second = (call for call in fake_wandb.calls if call[0] == "init")
    assert first == second
    assert first[3] == read_json(tmp_path / "run" / "wandb_id.json")["id"]
    assert first[1:3] == ("trellis", "run")
    assert first[4:] == ("allow", str(tmp_path / "run"), {"model": {"dim": 8}})
    assert ("log", {"loss/train": 2.0}, 3) in fake_wandb.calls
    (histogram,) = fake_wandb.calls[2][1].values()
    assert int(histogram.counts.sum()) == 5
    assert fake_wandb.calls[-1] == ("finish",)
    assert os.environ["WANDB_MODE"] == "offline"  # without a key nothing is asked for


def test_a_folder_that_is_begun_anew_is_another_run_of_wandb(tmp_path: Path, fake_wandb: FakeWandb):
    for _ in range(2):
        open_writer(tmp_path / "run").close()
        shutil.rmtree(tmp_path / "run")
    first, second = (call[3] for call in fake_wandb.calls if call[0] == "init")
    assert first != second
    assert len(first) == len(second) == 16


def test_a_service_that_takes_nothing_does_not_keep_a_run_that_ends(
    tmp_path: Path, fake_wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.setattr(writers, "FINISH_S", 0.1)
    fake_wandb.blocks = threading.Event()
    writer = open_writer(tmp_path / "run")
    writer.close()
    fake_wandb.blocks.set()
    said = capsys.readouterr().err
    assert "alert: W&B has not taken everything within 0 s: `wandb sync` of the newest folder" in said
    assert str(tmp_path / "run" / "wandb") in said


def test_a_service_that_goes_away_ends_no_run(tmp_path: Path, fake_wandb: FakeWandb, capsys):
    writer = open_writer(tmp_path / "run")
    fake_wandb.fails = True
    for step in (1, 2):
        writer.write({"step": step, "loss/train": 2.0})
    writer.close()
    said = capsys.readouterr().err
    assert said.count("alert: no W&B from step 1 on, until the next start: the service is away") == 1
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [1, 2]


def test_wandb_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_wandb("")
    with pytest.raises(ValueError, match=r'logging.wandb = "lab", and the package wandb is not installed'):
        check_wandb("lab")


def test_a_histogram_counts_what_is_finite():
    found = Histogram.of(np.array([0.0, 0.5, 1.0, np.nan, np.inf]), bins=2)
    assert found is not None
    assert found.counts.tolist() == [1, 2]
    assert (found.total, found.squares) == (1.5, 1.25)
    same = Histogram.of(np.full(7, 0.25))
    assert same is not None
    assert int(same.counts.sum()) == 7
    assert np.all(np.diff(same.edges) > 0)
    assert Histogram.of(np.array([np.nan])) is None


def test_every_row_is_json_that_a_browser_reads(alone: Path):
    for line in (alone / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


# Tags that a run of one process on a CPU with shared gates and without trouble does not have.
ELSEWHERE = {
    "perf/communication_share",
    "memory/reserved_bytes",
    *(f"trellis/layer_NN/value_{gate}" for gate in ("forget_gate", "step_size")),
    *(f"trellis/layer_NN/value_{gate}/head_NN" for gate in ("forget_gate", "step_size")),
}
PAGE = Path(__file__).resolve().parents[2] / "docs" / "monitoring.md"


def documented() -> set[str]:
    """Tags in the first column of the page's tables."""
    rows = [line.split("|")[1] for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:3] == "| `"]
    return {tag for row in rows for tag in re.findall(r"`([a-z]+/[^`]+)`", row)}


def general(tag: str) -> str:
    """A tag as the page has it."""
    tag = re.sub(r"(layer|head)_\d+", r"\1_NN", tag)
    tag = re.sub(r"position_\d+_\d+", "position_FIRST_LAST", tag)
    return re.sub(r"data/mixture/.*", "data/mixture/NAME", tag)


def test_what_the_page_names_is_in_the_events_of_a_run_and_the_other_way_round(alone: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(alone / "tensorboard"), size_guidance={"histograms": 0})
    events.Reload()
    tags = events.Tags()
    written = {general(tag) for tag in [*tags["scalars"], *tags["histograms"]]} - {"tokens"}
    assert written - documented() == set()
    assert documented() - written - ELSEWHERE == set()
    assert {general(key) for row in rows_of(alone) for key in row} - written == {"step", "tokens"}
    heads = [tag for tag in tags["histograms"] if tag.startswith("trellis/layer_01/forget_gate/")]
    assert heads == [f"trellis/layer_01/forget_gate/head_{head:02d}" for head in range(2)]
    counted = events.Histograms(heads[0])
    assert [event.step for event in counted] == [2, 4]
    assert counted[0].histogram_value.num == ROW
    mean = counted[0].histogram_value.sum / ROW
    assert 0 < mean < 1
