"""Tensor parallelism in fp64 against the whole operation: column, row, embedding, logits, loss; both ways."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tests.distributed import gloo_pool
from tests.largest import largest
from tests.parallel.cases import leaf, relative
from trellis_dist.models.config import ModelConfig, TrellisConfig
from trellis_dist.models.language_model import LMState, build_language_model
from trellis_dist.models.linear import linear, linear_joined
from trellis_dist.models.loss import linear_cross_entropy_sum
from trellis_dist.parallel.apply import apply_parallelism
from trellis_dist.parallel.config import MeshConfig, TensorConfig
from trellis_dist.parallel.mesh import Mesh, build_mesh
from trellis_dist.parallel.tensor import TensorParallel

B, T, DIM, HIDDEN, VOCAB = 2, 6, 8, 12, 16
EXACT = 1e-12
TINY = ModelConfig(
    vocab_size=VOCAB,
    num_layers=1,
    dim=DIM,
    num_heads=2,
    mlp_hidden=HIDDEN,
    trellis=TrellisConfig(slots=4, chunk_size=3),
)
SIDES = pytest.mark.parametrize("scattered", [False, True], ids=["all-reduce", "sequence-parallel"])


@functools.cache
def mesh_of(scattered: bool) -> Mesh:
    return build_mesh(MeshConfig(tp=2), tensor=TensorConfig(sequence_parallel=scattered))


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def shard(x: Tensor, mesh: Mesh, dim: int) -> Tensor:
    return leaf(x.chunk(mesh.tp, dim=dim)[mesh.tp_rank])


def stream(x: Tensor, mesh: Mesh) -> Tensor:
    """The tokens of [B, T, F] that this rank holds between a row and a column."""
    if not mesh.sequence_parallel:
        return leaf(x)
    flat = x.reshape(-1, x.shape[-1]).chunk(mesh.tp)[mesh.tp_rank]
    return leaf(flat.reshape(len(x), -1, x.shape[-1]))


def compare(pairs: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    return {name: relative(actual, expected) for name, (actual, expected) in pairs.items()}


def check(found: list[dict[str, float]]) -> None:
    for rank in found:
        assert largest(rank.values()) < EXACT, found


# Cases that run on the ranks of the pool.


def column_case(scattered: bool) -> dict[str, float]:
    mesh = mesh_of(scattered)
    x, weights = leaf(draw(B, T, DIM)), [leaf(draw(HIDDEN, DIM, seed=1)), leaf(draw(4, DIM, seed=2))]
    dy = [draw(B, T, len(weight), seed=3) for weight in weights]
    whole = torch.autograd.grad(linear_joined(x, weights), [x, *weights], torch.cat(dy, dim=-1))
    mine, shards = stream(x, mesh), [shard(weight, mesh, 0) for weight in weights]
    y = TensorParallel(mesh).column(mine, shards)
    dy_mine = torch.cat([shard(d, mesh, -1) for d in dy], dim=-1)
    parts = torch.autograd.grad(y, [mine, *shards], dy_mine)
    expected = torch.cat([shard(linear(x, weight), mesh, -1) for weight in weights], dim=-1)
    return compare(
        {
            "y": (y, expected),
            "dx": (parts[0], stream(whole[0], mesh)),
            **{f"dw{i}": (parts[i], shard(whole[i], mesh, 0)) for i in (1, 2)},
        }
    )


def row_case(scattered: bool) -> dict[str, float]:
    mesh = mesh_of(scattered)
    x, weight, dy = leaf(draw(B, T, HIDDEN)), leaf(draw(DIM, HIDDEN, seed=1)), draw(B, T, DIM, seed=2)
    whole = torch.autograd.grad(linear(x, weight), [x, weight], dy)
    x_mine, weight_mine = shard(x, mesh, -1), torch.nn.Parameter(shard(weight, mesh, 1))
    y = TensorParallel(mesh).row(x_mine, weight_mine)
    parts = torch.autograd.grad(y, [x_mine, weight_mine], stream(dy, mesh))
    return compare(
        {
            "y": (y, stream(linear(x, weight), mesh)),
            "dx": (parts[0], shard(whole[0], mesh, -1)),
            "dw": (parts[1], shard(whole[1], mesh, 1)),
        }
    )


def embedding_case(scattered: bool) -> dict[str, float]:
    mesh = mesh_of(scattered)
    tokens = torch.randint(VOCAB, (B, T), generator=torch.Generator().manual_seed(0))
    weight, dy = leaf(draw(VOCAB, DIM)), draw(B, T, DIM, seed=1)
    (whole,) = torch.autograd.grad(F.embedding(tokens, weight), [weight], dy)
    mine = torch.nn.Parameter(shard(weight, mesh, 0))
    x = TensorParallel(mesh).embed(tokens, mine)
    (part,) = torch.autograd.grad(x, [mine], stream(dy, mesh))
    return compare({"x": (x, stream(F.embedding(tokens, weight), mesh)), "dw": (part, shard(whole, mesh, 0))})


def logits_case(scattered: bool) -> dict[str, float]:
    mesh = mesh_of(scattered)
    x, weight = leaf(draw(B, T, DIM)), leaf(draw(VOCAB, DIM, seed=1))
    return compare(
        {
            "y": (
                TensorParallel(mesh).project(stream(x, mesh), shard(weight, mesh, 0)),
                linear(x, weight),
            )
        }
    )


def loss_case(scattered: bool, z_loss: float) -> dict[str, float]:
    """A third of the rows have no label; logits reach far enough that a missing maximum would overflow."""
    mesh = mesh_of(scattered)
    hidden, weight = leaf(300 * draw(B, T, DIM)), leaf(draw(VOCAB, DIM, seed=1))
    labels = torch.randint(VOCAB, (B * T,), generator=torch.Generator().manual_seed(2))
    labels[::3] = -100
    total = linear_cross_entropy_sum(hidden.flatten(0, 1), weight, labels, z_loss=z_loss)
    whole = torch.autograd.grad(total, [hidden, weight])
    mine, rows = stream(hidden, mesh), shard(weight, mesh, 0)
    part = TensorParallel(mesh).token_loss(mine.flatten(0, 1), rows, labels, z_loss=z_loss)
    assert part.dtype == torch.float64
    parts = torch.autograd.grad(part, [mine, rows])
    return compare(
        {
            "loss": (part, total),
            "dhidden": (parts[0], stream(whole[0], mesh)),
            "dweight": (parts[1], shard(whole[1], mesh, 0)),
        }
    )


def memory_case() -> int:
    """Tokens of the residual stream on one rank."""
    mesh = mesh_of(True)
    tokens = torch.zeros(B, T, dtype=torch.int64)
    return TensorParallel(mesh).embed(tokens, torch.nn.Parameter(draw(VOCAB // 2, DIM))).shape[:2].numel()


def traffic_case(scattered: bool) -> list[str]:
    """The collectives of one column and one row, forward and backward."""
    mesh, called = mesh_of(scattered), []
    names = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor")
    real = {name: getattr(dist, name) for name in names}
    tensor = TensorParallel(mesh)
    x, up, down = stream(draw(B, T, DIM), mesh), draw(HIDDEN // 2, DIM), draw(DIM, HIDDEN // 2)
    weights = [torch.nn.Parameter(up), torch.nn.Parameter(down)]

    def counting(name: str):
        def call(*args: object, **kwargs: object) -> object:
            called.append(name)
            return real[name](*args, **kwargs)

        return call

    from megatron.core.tensor_parallel import layers, mappings

    modules = [(dist, names[0], names[0])]
    for module in (layers, mappings):
        modules += [
            (module, "dist_all_gather_func", names[1]),
            (module, "dist_reduce_scatter_func", names[2]),
        ]
    before = [(module, attribute, getattr(module, attribute)) for module, attribute, _ in modules]
    for module, attribute, name in modules:
        setattr(module, attribute, counting(name))
    try:
        tensor.row(tensor.column(x, weights[:1]), weights[1]).sum().backward()
    finally:
        for module, attribute, value in before:
            setattr(module, attribute, value)
    return called


def refusals_case(mesh_config: MeshConfig, scattered: bool) -> tuple[list[str], float]:
    """What a split model answers to those who want a whole one; its loss, less that of the whole model."""
    mesh = build_mesh(mesh_config, tensor=TensorConfig(sequence_parallel=scattered))
    tokens = torch.randint(VOCAB, (B, T), generator=torch.Generator().manual_seed(0))
    whole = build_language_model(TINY, seed=0, dtype=torch.float64)
    model = build_language_model(TINY, seed=0, dtype=torch.float64)
    state, asked = whole.init_state(B), []
    segments = apply_parallelism(model, mesh)
    for ask in (
        lambda: model.hidden(tokens),
        lambda: model.init_state(B),
        lambda: model.prefill(tokens, state),
        lambda: model.decode_step(tokens[:, 0], LMState(state.layers, T, B)),
    ):
        with pytest.raises(ValueError) as refusal:
            ask()
        asked.append(str(refusal.value))
    mine, labels, _ = segments.cut(tokens, tokens, None)
    total = model.loss_sum(mine, labels).detach()
    if mesh.sp > 1:
        dist.all_reduce(total, group=mesh.sp_group)
    return asked, float(total - whole.loss_sum(tokens, tokens))


@SIDES
@pytest.mark.parametrize("case", [column_case, row_case, embedding_case, logits_case])
def test_a_split_layer_is_the_whole_one(case, scattered: bool):
    check(gloo_pool(2).run(case, scattered))


@SIDES
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_a_split_vocabulary_gives_the_whole_loss(scattered: bool, z_loss: float):
    check(gloo_pool(2).run(loss_case, scattered, z_loss))


def test_sequence_parallelism_halves_the_residual_stream():
    assert gloo_pool(2).run(memory_case) == [B * T // 2] * 2


def test_a_block_half_takes_one_collective_each_way():
    assert gloo_pool(2).run(traffic_case, False)[0] == ["all_reduce"] * 2
    scattered = gloo_pool(2).run(traffic_case, True)[0]
    assert sorted(scattered) == ["all_gather_into_tensor"] * 3 + ["reduce_scatter_tensor"] * 2


@pytest.mark.parametrize("axis, scattered", [("tp", False), ("tp", True), ("sp", False)])
def test_a_split_model_trains_but_does_not_generate(axis: str, scattered: bool):
    for asked, difference in gloo_pool(2).run(refusals_case, MeshConfig(**{axis: 2}), scattered):
        assert len(asked) == 4
        assert all(f"split over {axis} = 2 ranks: load its checkpoint in one process" in it for it in asked)
        assert abs(difference) < EXACT * B * T * 10
