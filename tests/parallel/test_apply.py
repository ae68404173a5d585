"""What apply_parallelism does to a model: the same full weights on any mesh, and its refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.parallel.cases import ranks
from trellis_dist.models.config import ModelConfig, TrellisConfig
from trellis_dist.models.language_model import LanguageModel, build_language_model
from trellis_dist.models.parallel_kind import ParallelKind, keep_shard, kind_of, shard_of
from trellis_dist.parallel.apply import apply_parallelism
from trellis_dist.parallel.config import MeshConfig
from trellis_dist.parallel.mesh import Mesh, build_mesh

TINY = ModelConfig(
    vocab_size=40,
    num_layers=2,
    dim=32,
    num_heads=4,
    mlp_hidden=48,
    pattern=("trellis", "attention"),
    tie_embeddings=False,
    trellis=TrellisConfig(
        slots=8,
        chunk_size=8,
        learned_initial_memory=True,
        value_gates="own",
        readout_affine=True,
    ),
)


def shards(config: MeshConfig) -> dict[str, tuple]:
    model = build_language_model(TINY, seed=5)
    mesh = build_mesh(config)
    apply_parallelism(model, mesh)
    return {
        name: (shard_of(p).shape, shard_of(p).offset, p.detach(), hasattr(p, "tensor_model_parallel"))
        for name, p in model.named_parameters()
    }


@pytest.mark.parametrize(("sp", "tp"), [(1, 1), (4, 1), (2, 2), (1, 4)])
def test_every_mesh_starts_from_the_same_full_weights(sp: int, tp: int):
    whole = dict(build_language_model(TINY, seed=5).named_parameters())
    found = ranks().run(shards, MeshConfig(sp=sp, tp=tp))
    for rank in found:
        assert rank.keys() == whole.keys()
        for name, (shape, offset, local, tagged) in rank.items():
            here = tuple(slice(start, start + n) for start, n in zip(offset, local.shape, strict=True))
            assert shape == whole[name].shape
            assert torch.equal(local, whole[name][here])
            sharded = kind_of(whole[name]) is ParallelKind.SHARDED
            assert local.numel() * (tp if sharded else 1) == whole[name].numel()
            assert tagged == (sharded and tp > 1), "clipping counts parameters by this name"
    offsets = {tuple(rank["blocks.0.mixer.out_weight"][1]) for rank in found}
    assert offsets == {(0, shard * TINY.dim // tp) for shard in range(tp)}, "output columns by heads"


def test_a_dimension_that_does_not_divide_is_refused():
    parameter = build_language_model(TINY, seed=0).blocks[0].mixer.step_weight
    with pytest.raises(ValueError, match=r"dimension 0 of \[4, 32\] does not divide into 3"):
        keep_shard(parameter, index=0, count=3)


def test_an_undeclared_parameter_is_refused():
    model = build_language_model(TINY, seed=0)
    model.extra = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match=r"parameter extra .* declares no parallel kind"):
        apply_parallelism(model, Mesh())


def test_one_process_keeps_its_own_functions():
    model = build_language_model(replace(TINY, pattern=("trellis",)), seed=0)
    before = dict(vars(model.blocks[0].mixer))
    apply_parallelism(model, Mesh())
    assert vars(model.blocks[0].mixer) == before
    assert isinstance(model, LanguageModel)
