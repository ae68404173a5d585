"""The study's models at the scale of one GPU take training steps there, and learn to recall."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.study import plan, recall, speed

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _small() -> Iterator[None]:
    plan.use("small")
    yield
    plan.use("tiny")


@pytest.mark.parametrize("name", plan.models("ours", "main"))
def test_a_model_takes_steps_in_bf16(name: str) -> None:
    settings = plan.Settings(name, 1e-3, plan.table(name))
    config = plan.Task("x", "tune", settings, tokens=10**6).spec(Path("w")).resolved.model
    step = speed.step_of(config, length=1024)
    assert all(step() > 0 for _ in range(3))


def test_a_small_model_learns_to_recall_on_a_gpu() -> None:
    settings = plan.Settings(
        "gated_deltanet", 3e-3, plan.table("gated_deltanet") | plan.plan()["recall"]["set"]
    )
    model = recall.train(recall.model_config(settings), rate=3e-3, seed=0, steps=200, tokens=4096)
    assert next(model.parameters()).device.type == "cuda"
    assert recall.accuracy(model, 4) > 0.1  # chance is 0.004
