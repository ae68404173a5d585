"""Initial values come from (seed, name, index) alone, and every parameter says how it shards."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from trellis_dist.models.baseline_config import BASELINES
from trellis_dist.models.init import (
    Constant,
    InverseSoftplus,
    LogUniform,
    Normal,
    Ramp,
    initialise,
    new_parameter,
)
from trellis_dist.models.parallel_kind import ParallelKind, keep_shard, kind_of, shard_dim, undeclared

EVERYTHING = {
    "learned_initial_memory": True,
    "conv_values": True,
    "conv_targets": True,
    "value_gates": "own",
    "readout_affine": True,
    "skip_values": True,
}


def values(model):
    return dict(model.named_parameters())


class Pair(nn.Module):
    def __init__(self, names):
        super().__init__()
        for name in names:
            weight = new_parameter(5, 7, initial=Normal(1.0), kind=ParallelKind.REPLICATED)
            self.register_parameter(name, weight)


def test_same_seed_same_weights(tiny):
    first, second, other = values(tiny(seed=3)), values(tiny(seed=3)), values(tiny(seed=4))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["embedding_weight"], other["embedding_weight"])


def test_order_of_construction_and_neighbours_do_not_matter():
    forwards, backwards, alone = Pair(["a", "b"]), Pair(["b", "a"]), Pair(["b"])
    for model in (forwards, backwards, alone):
        initialise(model, 1)
    assert torch.equal(forwards.a, backwards.a)
    assert torch.equal(forwards.b, backwards.b)
    assert torch.equal(forwards.b, alone.b)
    assert not torch.equal(forwards.a, forwards.b)


def test_layers_keep_their_weights_when_the_model_deepens(tiny):
    shallow, deep = values(tiny(num_layers=2)), values(tiny(num_layers=4))
    assert torch.equal(shallow["blocks.1.mixer.q_weight"], deep["blocks.1.mixer.q_weight"])


def test_options_do_not_move_the_other_weights(tiny):
    plain, more = values(tiny()), values(tiny(trellis=EVERYTHING))
    assert set(plain) < set(more)
    assert all(torch.equal(plain[name], more[name]) for name in plain)


def test_global_random_state_is_neither_read_nor_moved(tiny):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    tiny()
    assert torch.equal(before, torch.get_rng_state())


def test_lower_precision_is_the_rounded_draw(tiny):
    wide, narrow = values(tiny(dtype=torch.float32)), values(tiny(dtype=torch.bfloat16))
    assert all(torch.equal(wide[name].bfloat16(), narrow[name]) for name in wide)


def test_output_projections_are_scaled_by_depth(tiny):
    model = values(tiny(num_layers=8, dim=64, init_std=0.1))
    assert model["blocks.0.mixer.q_weight"].std().item() == pytest.approx(0.1, rel=0.05)
    for name in ("mixer.out_weight", "mlp.down_weight"):
        assert model[f"blocks.0.{name}"].std().item() == pytest.approx(0.1 / 4, rel=0.05)


@pytest.mark.parametrize("kind", sorted({"trellis", "attention", *BASELINES}))
def test_mixers_that_begin_at_zero_add_nothing(tiny, kind):
    model = values(tiny(pattern=(kind,), mixer_out_init="zero", dim=64, num_layers=8, init_std=0.1))
    scaled = values(tiny(pattern=(kind,), dim=64, num_layers=8, init_std=0.1))
    changed = [name for name in model if not torch.equal(model[name], scaled[name])]
    assert changed == [f"blocks.{layer}.mixer.out_weight" for layer in range(8)]
    assert not any(model[name].any() for name in changed)


def test_a_foreign_parameter_is_refused_and_listed():
    model = nn.Linear(2, 2)
    assert undeclared(model) == ["weight", "bias"]
    with pytest.raises(ValueError, match="weight has no initial distribution"):
        initialise(model, 0)


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_declares_its_kind(tiny, tied):
    model = tiny(pattern=("trellis", "attention"), tie_embeddings=tied, trellis=EVERYTHING)
    assert undeclared(model) == []
    for name, parameter in model.named_parameters():
        sharded = kind_of(parameter) is ParallelKind.SHARDED
        assert sharded == (shard_dim(parameter) is not None), name
        assert sharded != name.endswith("norm.weight"), name


def test_sharded_parameters_split_by_heads_columns_or_vocabulary(tiny):
    model = tiny(pattern=("trellis", "attention"), trellis=EVERYTHING)
    sharded = {name: p.shape[shard_dim(p)] for name, p in values(model).items() if shard_dim(p) is not None}
    assert all(size % model.config.num_heads == 0 for name, size in sharded.items() if "mixer" in name)


def test_tied_embeddings_share_storage(tiny):
    tied, untied = tiny(), tiny(tie_embeddings=False)
    assert tied.output_weight is tied.embedding_weight
    assert untied.output_weight is not untied.embedding_weight
    assert "head_weight" not in tied.state_dict()
    assert untied.state_dict()["head_weight"].shape == untied.embedding_weight.shape


def test_the_biases_of_rwkv7_are_those_of_its_authors():
    """Channel by channel, as BlinkDL/RWKV-LM writes w0 for layer 2 of 5, 3 heads of 4 channels."""
    width, channels, ratio = 4, 12, 2 / 4
    expected = []
    for n in range(channels):
        zigzag = ((n % width) - ((width - 1) / 2)) / ((width - 1) / 2)
        start = -6 + 6 * (n / (channels - 1)) ** (1 + 1 * ratio**0.3)
        expected.append(start + 0.5 + zigzag * abs(zigzag) * 2.5)
    ramp = Ramp(-5.5, 0.5, width, power=1 + ratio**0.3, zigzag=2.5)
    drawn = ramp.draw(torch.Size([channels]), torch.Generator())
    torch.testing.assert_close(drawn, torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_rates_and_steps_begin_where_mamba2_has_them():
    generator = torch.Generator().manual_seed(0)
    rates = LogUniform(1.0, 16.0).draw(torch.Size([20_000]), generator).exp()
    assert 1 <= rates.min() < 1.01
    assert 15.98 < rates.max() <= 16
    assert rates.mean().item() == pytest.approx(8.5, rel=0.02)  # uniform, not uniform in its logarithm
    steps = torch.nn.functional.softplus(InverseSoftplus(0.001, 0.1).draw(torch.Size([20_000]), generator))
    assert steps.min().item() == pytest.approx(0.001, rel=0.01)
    assert steps.max().item() == pytest.approx(0.1, rel=0.01)
    assert steps.log().mean().item() == pytest.approx(math.log(0.01), rel=0.01)


@pytest.mark.parametrize("kind", BASELINES)
def test_a_baselines_parameters_split_by_heads_and_a_slice_is_the_whole_ones(tiny, kind):
    whole, split = (tiny(pattern=(kind,), num_heads=4, seed=2) for _ in range(2))
    assert undeclared(whole) == []
    for name, parameter in values(whole).items():
        if kind_of(parameter) is not ParallelKind.SHARDED:
            assert "norm" in name, name
            continue
        piece, size = values(split)[name], parameter.shape[shard_dim(parameter)]
        assert size % 4 == 0 or "mixer" not in name, name
        if "mixer" in name:
            keep_shard(piece, index=1, count=4)
            assert torch.equal(piece, parameter.chunk(4, dim=shard_dim(parameter))[1]), name


def test_constants_are_exact(tiny):
    model = tiny(trellis={"gate_bias": 4.0, "step_size_bias": -1.0})
    assert Constant(2.0).draw(torch.Size([3]), torch.Generator()).tolist() == [2.0, 2.0, 2.0]
    mixer = model.blocks[0].mixer
    assert set(mixer.decay_bias.tolist()) == {4.0}
    assert set(mixer.step_bias.tolist()) == {-1.0}
    assert set(mixer.norm_weight.flatten().tolist()) == {1.0}
