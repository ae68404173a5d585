"""Every registered kind is counted as it is: FLOPs by torch's own counter, states by their bytes."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from trellis_dist.models.baseline_config import BASELINES, BaselineConfig
from trellis_dist.models.config import ATTENTION_KINDS, AttentionConfig, ModelConfig, TrellisConfig
from trellis_dist.models.counts import flops_per_token, memory_elements, parameter_counts, state_bytes
from trellis_dist.models.language_model import build_language_model
from trellis_dist.models.registry import MIXERS

LENGTH = 64


def config_of(kind: str, **changes) -> ModelConfig:
    fields = {"vocab_size": 40, "num_layers": 2, "dim": 64, "num_heads": 2, "pattern": (kind,)}
    options = {"slots": 16, "chunk_size": 16, "mini_batch": 16, **changes.pop("baselines", {})}
    return ModelConfig(
        **fields,
        **changes,
        trellis=TrellisConfig(slots=16, chunk_size=16),
        attention=AttentionConfig(sliding_window=24),
        baselines=BaselineConfig(**options),
    )


@pytest.mark.parametrize("kind", BASELINES)
def test_flops_are_those_of_the_products_that_run(kind: str):
    """Products alone: torch counts no convolution by shifts and no substitution, which take a few percent."""
    config = config_of(kind)
    model = build_language_model(
        config, seed=0, dtype=torch.float64
    )  # in fp32 a CPU calls what is not counted
    tokens = torch.zeros(1, LENGTH, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens)
    counted = counter.get_total_flops() / LENGTH
    assert flops_per_token(config, sequence_length=LENGTH) / 3 == pytest.approx(counted, rel=0.04)


@pytest.mark.parametrize("kind", sorted(set(MIXERS) - set(ATTENTION_KINDS)))  # whose caches keep room
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_bytes_are_those_of_the_state(kind: str, dtype: torch.dtype):
    config = config_of(kind)
    model = build_language_model(config, seed=0, dtype=dtype).eval()
    state = model.init_state(1)
    with torch.no_grad():
        for position, length in ((21, 21), (53, 32)):
            _, state = model.prefill(torch.zeros(1, length, dtype=torch.int64), state)
            counted = state_bytes(config, position=position, element_bytes=dtype.itemsize)
            assert sum(layer.bytes() for layer in state.layers) == counted


@pytest.mark.parametrize("kind", BASELINES)
def test_memories_and_parameters_are_counted_without_a_model(kind: str):
    for changes in ({}, {"baselines": {"conv_values": False}}, {"baselines": {"conv_kernel": 0}}):
        config = config_of(kind, **changes)
        model = build_language_model(config, seed=0)
        assert parameter_counts(config).total == sum(p.numel() for p in model.parameters())
        memory = model.blocks[0].mixer.first_memory(1)
        assert memory_elements(config, kind) == sum(x.numel() for x in memory)
        state = model.init_state(3)
        assert state.bytes() == 3 * state_bytes(config, position=0)


def test_attention_hands_no_memory_on():
    assert [memory_elements(config_of(kind), kind) for kind in ATTENTION_KINDS] == [0, 0]
    assert memory_elements(config_of("trellis"), "trellis") == 2 * 16 * 64
