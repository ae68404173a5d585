"""Sizes of configurations, among them the paper's."""

from __future__ import annotations

import pytest

from trellis_dist.models.config import AttentionConfig, ModelConfig, TrellisConfig
from trellis_dist.models.counts import flops_per_token, parameter_counts, state_bytes

# name: parameters named, configuration (paper, table 5; 170M unties its embeddings, 1B is ours)
PAPER = {
    "125m": (125e6, {"num_layers": 12, "dim": 768, "num_heads": 12}),
    "170m": (
        170e6,
        {"num_layers": 12, "dim": 768, "num_heads": 16, "vocab_size": 50_304, "tie_embeddings": False},
    ),
    "350m": (350e6, {"num_layers": 24, "dim": 1024, "num_heads": 16, "mlp_hidden": 2688}),
    "780m": (780e6, {"num_layers": 24, "dim": 1536, "num_heads": 16}),
    "1b": (1e9, {"num_layers": 20, "dim": 1920, "num_heads": 20}),
}


def paper_config(name):
    return ModelConfig(**{"vocab_size": 32_000, **PAPER[name][1]})


@pytest.mark.parametrize("name", PAPER)
def test_paper_sizes_are_within_ten_percent(name):
    counts = parameter_counts(paper_config(name))
    assert counts.total == pytest.approx(PAPER[name][0], rel=0.10)
    assert counts.total == counts.embedding + counts.non_embedding


def test_170m_is_179m():
    assert parameter_counts(paper_config("170m")).total == pytest.approx(179e6, rel=0.01)


def test_a_block_is_about_fourteen_squares():
    config = paper_config("125m")
    assert parameter_counts(config).non_embedding == pytest.approx(12 * 14 * 768**2, rel=0.01)


@pytest.mark.parametrize("tied", [True, False])
def test_counts_equal_the_built_model(tiny, tied):
    model = tiny(pattern=("trellis", "attention"), tie_embeddings=tied, trellis={"gates": ("off", "learned")})
    counts = parameter_counts(model.config)
    assert counts.total == sum(p.numel() for p in model.parameters())
    tables = [p for name, p in model.named_parameters() if name in ("embedding_weight", "head_weight")]
    assert counts.embedding == sum(p.numel() for p in tables)


def test_gates_and_affine_of_the_new_options_are_counted():
    def total(**options):
        config = ModelConfig(
            vocab_size=10, num_layers=2, dim=64, num_heads=2, trellis=TrellisConfig(**{"slots": 8, **options})
        )
        return parameter_counts(config).total

    layers, heads, dim, slots = 2, 2, 64, 8
    gate, affine = layers * heads * (dim + 1), layers * heads * slots * 2
    assert total(value_gates="own") - total() == 2 * gate
    assert total(value_gates="own", gates=("off",)) - total(gates=("off",)) == gate
    assert total(readout_affine=True) - total() == total(readout="silu_rms") - total() == affine
    assert total(update="corrected") == total()
    assert total(slots=32) - total(slots=32, targets="values") == layers * dim * dim


def test_corrected_counts_its_triangular_systems():
    def flops(**options):
        config = ModelConfig(
            vocab_size=10,
            num_layers=1,
            dim=64,
            num_heads=2,
            trellis=TrellisConfig(slots=16, chunk_size=24, **options),
        )
        return flops_per_token(config, sequence_length=512)

    # per head and token: X X^T (C D) and L^-1 B (C M) twice, two inverses of C^3 / 6 per chunk
    extra = 2 * (2 * (24 * 32 + 24 * 16) + 2 * 24**2 / 6)
    assert flops(update="corrected") - flops() == 3 * 2 * extra
    assert flops(value_gates="own") - flops() == 3 * 2 * 2 * 64 * 2
    assert flops() - flops(gates=("off",)) == 3 * 2 * 64 * 2


def test_flops_are_six_per_parameter_plus_the_operation():
    config = paper_config("125m")
    dense = 6 * parameter_counts(config).total
    assert flops_per_token(config, sequence_length=2048) == pytest.approx(dense, rel=0.10)


def test_trellis_flops_ignore_the_length_and_attention_flops_do_not():
    trellis = ModelConfig(vocab_size=10, num_layers=2, dim=64, num_heads=2)
    attention = ModelConfig(vocab_size=10, num_layers=2, dim=64, num_heads=2, pattern=("attention",))
    assert flops_per_token(trellis, sequence_length=512) == flops_per_token(trellis, sequence_length=8192)
    growth = flops_per_token(attention, sequence_length=1025) - flops_per_token(attention, sequence_length=1)
    assert growth == 3 * 2 * 2 * 2 * 64 * 512  # backward, layers, multiply-add, two matmuls, width, tokens


def test_window_bounds_attention_flops_and_state():
    fields = {"vocab_size": 10, "num_layers": 1, "dim": 8, "num_heads": 1, "pattern": ("attention",)}
    config = ModelConfig(**fields, attention=AttentionConfig(window=3))
    # contexts of 1, 2, 3, 3, 3 tokens: 2.4 on average
    per_token = flops_per_token(config, sequence_length=5) - flops_per_token(config, sequence_length=1)
    assert per_token == pytest.approx(3 * 2 * 2 * 8 * (2.4 - 1))
    assert state_bytes(config, position=100) == state_bytes(config, position=3) == 2 * 3 * 8 * 4


def test_state_bytes_are_constant_for_trellis():
    options = TrellisConfig(slots=32)
    config = ModelConfig(vocab_size=10, num_layers=2, dim=64, num_heads=2, trellis=options)
    assert state_bytes(config, position=1024) == state_bytes(config, position=65_536)
