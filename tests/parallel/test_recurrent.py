"""The recurrent baselines over segments and shards: outputs and gradients of one process, in fp64."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from kernels import PackedLayout
from kernels.baselines.delta_rule import gated_delta_rule
from tests.distributed import gloo_pool
from tests.parallel.cases import counted_sends, gradients_of, leaf, mesh_of, ranks, relative, segment
from tests.parallel.test_recompute import COMMUNICATION, run, same, watched
from trellis_dist.models.baseline_config import BASELINES, MINI_BATCH_KINDS, BaselineConfig
from trellis_dist.models.config import AttentionConfig, ModelConfig, TrellisConfig
from trellis_dist.models.language_model import LanguageModel, build_language_model
from trellis_dist.models.mixers.recurrent import RecurrentMixer
from trellis_dist.models.parallel_kind import shard_of
from trellis_dist.models.registry import MIXERS
from trellis_dist.parallel.apply import apply_parallelism
from trellis_dist.parallel.config import MeshConfig, TensorConfig
from trellis_dist.parallel.gradients import sum_tensor_gradients
from trellis_dist.parallel.mesh import Mesh, build_mesh
from trellis_dist.parallel.recurrent import AllToAllRecurrent, PassMemory
from trellis_dist.parallel.segments import Segments
from trellis_dist.parallel.transfers import Transfers

KINDS = tuple(kind for kind in BASELINES if kind in MIXERS)
MODES = ("state_passing", "all_to_all")
ROWS, LENGTH, EXACT = 2, 64, 1e-11
# Documents that end at a segment's end, go over one or two of them, and lie inside: sp = 4 cuts at 16.
PACKED = [0, 16, 24, 64, 64 + 8, 64 + 56]


def config(*pattern: str, layers: int | None = None, **baselines: Any) -> ModelConfig:
    """Four heads, so that four ranks have one each in all-to-all mode."""
    options = {"chunk_size": 8, "mini_batch": 4, "slots": 4, **baselines}
    return ModelConfig(
        vocab_size=24,
        num_layers=layers or max(2, len(pattern)),
        dim=16,
        num_heads=4,
        mlp_hidden=16,
        pattern=pattern,
        trellis=TrellisConfig(slots=4, chunk_size=8),
        attention=AttentionConfig(sliding_window=12),
        baselines=BaselineConfig(**options),
    )


MINI_BATCHES = [kind for kind in MINI_BATCH_KINDS if kind in MIXERS][:1]
# Mini-batches of 4 beside chunks of 8, and layers that exchange between layers that pass states.
HYBRID = config("gated_deltanet", "trellis", "sliding_window", *MINI_BATCHES)
# Every option that changes what goes over segments or heads: a skip beside the operation, no tail to fetch,
# more matrices to pass.
OPTIONS = config(
    "gated_deltanet", "gsa", "titans", skip_values=True, conv_kernel=0, titans_depth=2, titans_step=0.5
)


def batch(seed: int, *, packed: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Whole rows; the last row's tail has no labels, so some segments have no loss at all."""
    stream = torch.randint(0, 24, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(seed))
    labels = stream[:, 1:].clone()
    labels[-1, 5:] = -100
    return stream[:, :-1], labels, torch.tensor([*PACKED, ROWS * LENGTH]) if packed else None


def made(
    model_config: ModelConfig, mesh: Mesh | None, recompute: str = "none"
) -> tuple[LanguageModel, Segments]:
    model = build_language_model(model_config, seed=3, dtype=torch.float64)
    with torch.no_grad():  # norms and biases that start alike would hide a head in another's place
        for name, parameter in model.named_parameters():
            noise = torch.Generator().manual_seed(len(name))
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise, dtype=torch.float64))
    return model, apply_parallelism(model, mesh or Mesh(), recompute=recompute)


def named(model: LanguageModel, results: list[Tensor]) -> dict[str, Tensor]:
    """What ``run`` returns for one batch."""
    return dict(zip(["loss", *(name for name, _ in model.named_parameters())], results, strict=True))


def over_segments(sp: int, mode: str, packed: bool, options: ModelConfig) -> dict[str, float]:
    """Relative errors of the loss and every gradient, summed over the segments."""
    mesh = replace(mesh_of(sp), sequence_mode=mode)
    micro = [batch(mesh.dp_rank, packed=packed)]
    model, segments = made(options, None)
    expected = named(model, run(model, segments, micro))
    found = named(model, run(*made(options, mesh), micro))
    for x in found.values():
        dist.all_reduce(x, group=mesh.sp_group)
    return {name: relative(found[name], want) for name, want in expected.items()}


def assert_exact(found: list[dict[str, float]]) -> None:
    for rank, errors in enumerate(found):
        assert errors, "nothing was compared"
        wrong = {name: error for name, error in errors.items() if not error < EXACT}
        assert not wrong, f"rank {rank}: {wrong}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_segments_compute_what_one_process_does(kind: str, packed: bool):
    for sp, mode in ((2, MODES[0]), (4, MODES[0]), (2, MODES[1]), (4, MODES[1])):
        assert_exact(ranks().run(over_segments, sp, mode, packed, config(kind)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("options", [HYBRID, OPTIONS], ids=["hybrid", "options"])
def test_patterns_of_several_grains_and_options_do_too(mode: str, packed: bool, options: ModelConfig):
    assert options.grain == 8
    for sp in (2, 4):
        assert_exact(ranks().run(over_segments, sp, mode, packed, options))


def recomputed(sp: int, mode: str, recompute: str) -> dict[str, Any]:
    """Three micro-batches with other documents each, their backward passes after all forward passes."""
    mesh = replace(mesh_of(sp), sequence_mode=mode)
    micro = [batch(index, packed=index != 1) for index in range(3)]
    expected = run(*made(HYBRID, mesh), micro)
    model, segments = made(HYBRID, mesh, recompute)
    with watched(*COMMUNICATION) as counts:
        same_bits = same(run(model, segments, micro), expected)
    dist.barrier()
    return {"same": same_bits, **counts}


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize(("sp", "mode"), [(2, MODES[0]), (4, MODES[0]), (2, MODES[1])])
def test_recomputation_has_the_same_bits_and_sends_nothing_again(sp: int, mode: str, recompute: str):
    for found in ranks().run(recomputed, sp, mode, recompute):
        assert found["same"]
        assert [found[name] for name in COMMUNICATION] == [0, 0, 0], found
        assert found["replayed"] > 0


@functools.cache
def tensor_mesh(sp: int, scattered: bool) -> Mesh:
    return build_mesh(MeshConfig(sp=sp, tp=2), tensor=TensorConfig(sequence_parallel=scattered))


def over_heads(sp: int, mode: str, scattered: bool, options: ModelConfig) -> dict[str, float]:
    """Relative errors of the loss and of the gradients of this rank's shards."""
    mesh = replace(tensor_mesh(sp, scattered), sequence_mode=mode)
    micro = [batch(mesh.dp_rank, packed=True)]
    whole, segments = made(options, None)
    expected = named(whole, run(whole, segments, micro))
    model, segments = made(options, mesh)
    results = run(model, segments, micro)
    if mesh.sp > 1:
        for x in results:
            dist.all_reduce(x, group=mesh.sp_group)
    sum_tensor_gradients(((p, p.grad) for p in model.parameters()), mesh)
    errors = {"loss": relative(results[0], expected["loss"])}
    for name, parameter in model.named_parameters():
        place = shard_of(parameter)
        here = [slice(begin, begin + size) for begin, size in zip(place.offset, parameter.shape, strict=True)]
        errors[name] = relative(parameter.grad, expected[name][tuple(here)])
    return errors


@pytest.mark.parametrize("kind", KINDS)
def test_shards_of_heads_compute_what_one_process_does(kind: str):
    for scattered in (False, True):
        assert_exact(gloo_pool(2).run(over_heads, 1, MODES[0], scattered, config(kind)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [HYBRID, OPTIONS], ids=["hybrid", "options"])
def test_shards_and_segments_together_do_too(mode: str, options: ModelConfig):
    assert_exact(ranks().run(over_heads, 2, mode, True, options))


def drawn(heads: int = 4, width: int = 4) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Tokens of one head width, memories of two documents, and an upstream gradient."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, upstream = torch.randn(4, ROWS, LENGTH, heads, width, generator=generator, dtype=torch.float64)
    beta = torch.rand(ROWS, LENGTH, heads, generator=generator, dtype=torch.float64)
    memory = torch.randn(1, heads, width, width, generator=generator, dtype=torch.float64)
    unit = torch.nn.functional.normalize
    return {"q": unit(q, dim=-1), "k": unit(k, dim=-1), "v": v, "beta": beta}, memory, upstream


def with_frozen_inputs(mode: str, trained: tuple[str, ...]) -> dict[str, float]:
    """The operation alone where only ``trained`` need gradients; "memory" is one learned for all rows."""
    mesh = mesh_of(2)
    tokens, memory, upstream = drawn()
    whole = PackedLayout.uniform(ROWS, LENGTH, 8)
    expected = trained_gradients(gated_delta_rule, tokens, memory, upstream, whole, trained)
    segments = Segments(mesh, chunk_size=8)
    operation = (
        PassMemory(gated_delta_rule, Transfers(mesh), segments)
        if mode == "state_passing"
        else AllToAllRecurrent(gated_delta_rule, mesh, segments)
    )
    local = {name: segment(x, mesh) for name, x in tokens.items()}
    layout = PackedLayout.uniform(ROWS, LENGTH // 2, 8)
    found = trained_gradients(operation, local, memory, segment(upstream, mesh), layout, trained)
    if "memory" in found:
        dist.all_reduce(found["memory"], group=mesh.sp_group)
    dist.barrier()
    wanted = {name: x if name == "memory" else segment(x, mesh) for name, x in expected.items()}
    return {name: relative(found[name], want) for name, want in wanted.items()}


def trained_gradients(
    operation: Any,
    tokens: dict[str, Tensor],
    memory: Tensor,
    upstream: Tensor,
    layout: PackedLayout,
    trained: tuple[str, ...],
) -> dict[str, Tensor]:
    """Outputs and the gradients of ``trained``."""
    inputs = {**tokens, "memory": memory}
    leaves = {name: leaf(inputs[name]) for name in trained}
    given = {**inputs, **leaves}
    entering = (given.pop("memory").expand(ROWS, -1, -1, -1),)
    y, _ = operation(given, {}, entering, layout)
    grads = gradients_of((y * upstream).sum(), list(leaves.values()))
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("trained", [("v",), ("beta", "memory"), ("q",), ("memory",)], ids="+".join)
def test_inputs_that_need_no_gradient_break_no_transfer(mode: str, trained: tuple[str, ...]):
    """Every rank makes every transfer of the backward pass, whatever autograd leaves out."""
    assert_exact(ranks().run(with_frozen_inputs, mode, trained))


def bytes_sent(length: int) -> tuple[int, int]:
    """(forward, backward) bytes that this rank sends in one layer."""
    mesh = mesh_of(4)
    model, segments = made(config("gated_deltanet", layers=1), mesh)
    tokens = torch.zeros(ROWS, length, dtype=torch.int64)
    parts = segments.cut(tokens, tokens, None)
    with counted_sends() as forward:
        total = model.loss_sum(parts[0], parts[1])
    with counted_sends() as backward:
        total.backward()
    dist.barrier()
    return sum(forward), sum(backward)


def test_a_layer_sends_its_memory_and_a_halo_whatever_the_length():
    options = config("gated_deltanet")
    memory = ROWS * options.num_heads * options.head_dim**2 * 8
    halo = ROWS * (options.baselines.conv_kernel - 1) * 3 * options.dim * 8
    for length in (64, 256):
        found = ranks().run(bytes_sent, length)
        assert found[1] == found[2] == (memory + halo, memory + halo)
        assert (found[0], found[3]) == ((memory + halo, 0), (0, memory + halo))


def refused() -> str:
    mesh = mesh_of(2)
    operation = PassMemory(gated_delta_rule, Transfers(mesh), Segments(mesh, chunk_size=8))
    tokens, memory, _ = drawn()
    layout = PackedLayout.uniform(ROWS, LENGTH, 24)
    with pytest.raises(ValueError) as refusal:
        operation(tokens, {}, (memory.expand(ROWS, -1, -1, -1),), layout)
    return str(refusal.value)


def test_a_segment_that_ends_inside_a_chunk_is_refused():
    assert all("a document of 64 tokens in a segment" in message for message in ranks().run(refused))


def test_every_baseline_is_a_recurrent_mixer():
    for kind in KINDS:
        assert issubclass(MIXERS[kind], RecurrentMixer), f"{kind}: parallel/apply.py would leave it whole"
