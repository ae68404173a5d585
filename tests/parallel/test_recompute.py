"""Recomputed activations: the same bits, fewer bytes kept, and not one transfer in a recomputation."""

from __future__ import annotations

import contextlib
import functools
import gc
import traceback
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.parallel.cases import mesh_of, ranks
from tests.parallel.test_model import LENGTH, ROWS, TINY, global_batch, rows_of
from trellis_dist.models.config import ModelConfig
from trellis_dist.models.language_model import LanguageModel, build_language_model
from trellis_dist.parallel.apply import apply_parallelism
from trellis_dist.parallel.config import MeshConfig, TensorConfig
from trellis_dist.parallel.mesh import Mesh, build_mesh
from trellis_dist.parallel.segments import Segments
from trellis_dist.parallel.tape import Tape

MODES = ("selective", "full")
HYBRID = replace(TINY, num_layers=4, pattern=("trellis", "attention"))
COMMUNICATION = ("isend", "irecv", "all_to_all_single")


def make(config: ModelConfig, mesh: Mesh, mode: str) -> tuple[LanguageModel, Segments]:
    """A model over ``mesh`` whose activations are recomputed unless ``mode`` is "none"."""
    model = build_language_model(config, seed=5)
    return model, apply_parallelism(model, mesh, recompute=mode)


def batches(mesh: Mesh, count: int, *, packed: bool) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """This replica's rows of ``count`` batches; when packed, each has other documents."""
    found = [rows_of(mesh, global_batch(index, packed=packed)) for index in range(count)]
    return [(tokens, labels, moved(bounds, index)) for index, (tokens, labels, bounds) in enumerate(found)]


def moved(bounds: Tensor | None, index: int) -> Tensor | None:
    """Every second batch starts its documents 8 tokens earlier (and has no document of 8 tokens)."""
    if bounds is None or index % 2 == 0:
        return bounds
    inside = bounds[1:-1] - torch.where(bounds[1:-1] % LENGTH == 0, 0, 8)
    return torch.unique(torch.cat([bounds[:1], inside, bounds[-1:]]))


def run(
    model: LanguageModel, segments: Segments, micro: list[tuple[Tensor, Tensor, Tensor | None]]
) -> list[Tensor]:
    """Losses, then every gradient: all forward passes first, then all backward passes."""
    losses = []
    for batch in micro:
        tokens, labels, bounds = segments.cut(*batch)
        losses.append(model.loss_sum(tokens, labels, cu_seqlens=bounds))
    for loss in losses:
        loss.backward()
    return [*(loss.detach() for loss in losses), *(p.grad for p in model.parameters())]


def same(ours: list[Tensor], expected: list[Tensor]) -> bool:
    return len(ours) == len(expected) and all(map(torch.equal, ours, expected))


@contextlib.contextmanager
def watched(*names: str) -> Iterator[dict[str, int]]:
    """Calls of each name of ``torch.distributed``, and of Tape.received, made while a part is recomputed.

    Read off the call stack, so that nothing of what is tested has a say in it.
    """
    counts = dict.fromkeys((*names, "replayed"), 0)

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += recomputing()
            return function(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(dist, name, counting(name, getattr(dist, name)))
        patch.setattr(Tape, "received", counting("replayed", Tape.received))
        yield counts


def recomputing() -> bool:
    frames = (frame.f_code for frame, _ in traceback.walk_stack(None))
    return any(code.co_name == "recompute_fn" and "checkpoint" in code.co_filename for code in frames)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_one_process_computes_the_same_bits(mode: str, packed: bool):
    micro = batches(Mesh(), 2, packed=packed)
    expected = run(*make(HYBRID, Mesh(), "none"), micro)
    assert same(run(*make(HYBRID, Mesh(), mode), micro), expected)


def split_over_the_sequence(sp: int, mode: str, packed: bool, exchange: str) -> dict[str, Any]:
    mesh = replace(mesh_of(sp), sequence_mode=exchange)
    config = TINY if exchange == "state_passing" else HYBRID
    micro = batches(mesh, 3, packed=packed)
    expected = run(*make(config, mesh, "none"), micro)
    model, segments = make(config, mesh, mode)
    with watched(*COMMUNICATION) as counts:
        same_bits = same(run(model, segments, micro), expected)
    dist.barrier()
    return {"same": same_bits, **counts}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("sp", "packed", "exchange"),
    [
        (2, False, "state_passing"),
        (2, True, "state_passing"),
        (4, True, "state_passing"),
        (2, True, "all_to_all"),
    ],
)
def test_segments_compute_the_same_bits_and_send_nothing_again(
    sp: int, mode: str, packed: bool, exchange: str
):
    """Three micro-batches with other documents each, their backward passes after all forward passes."""
    for rank, found in enumerate(ranks().run(split_over_the_sequence, sp, mode, packed, exchange)):
        assert found["same"], f"rank {rank}"
        assert [found[name] for name in COMMUNICATION] == [0, 0, 0], found
        assert found["replayed"] > 0


@functools.cache
def tensor_mesh(scattered: bool) -> Mesh:
    return build_mesh(MeshConfig(sp=2, tp=2), tensor=TensorConfig(sequence_parallel=scattered))


def split_over_both(mode: str, scattered: bool) -> dict[str, Any]:
    mesh = tensor_mesh(scattered)
    micro = batches(mesh, 2, packed=True)
    expected = run(*make(TINY, mesh, "none"), micro)
    model, segments = make(TINY, mesh, mode)
    with watched(*COMMUNICATION) as counts:
        same_bits = same(run(model, segments, micro), expected)
    dist.barrier()
    return {"same": same_bits, **counts}


@pytest.mark.parametrize("scattered", [False, True], ids=["tp", "tp-scattered"])
@pytest.mark.parametrize("mode", MODES)
def test_tensor_shards_compute_the_same_bits(mode: str, scattered: bool):
    for found in ranks().run(split_over_both, mode, scattered):
        assert found["same"]
        assert [found[name] for name in COMMUNICATION] == [0, 0, 0], found


def bytes_kept(config: ModelConfig, mesh: Mesh, mode: str) -> int:
    """Bytes that the forward pass of one batch keeps for the backward pass: storages, parameters aside."""
    model, segments = make(config, mesh, mode)
    owned = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x  # which keeps it alive, so no address comes twice
        return x

    tokens, labels, bounds = segments.cut(*batches(mesh, 1, packed=False)[0])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model.loss_sum(tokens, labels, cu_seqlens=bounds)
    total = sum(x.untyped_storage().nbytes() for address, x in kept.items() if address not in owned)
    loss.backward()
    return total


def test_selective_keeps_less_than_none_and_full_less_than_selective():
    none, selective, full = (bytes_kept(TINY, Mesh(), mode) for mode in ("none", *MODES))
    # What none keeps of a layer's SwiGLU alone is 3 hidden widths per token.
    swiglu = TINY.num_layers * ROWS * LENGTH * 3 * TINY.mlp_hidden * 4
    assert none - selective > swiglu
    # Between the two lie at least the operation's operands and output, q, k, v, y of one width each.
    operands = TINY.num_layers * ROWS * LENGTH * 4 * TINY.dim * 4
    assert selective - full > operands


def segments_keep() -> list[int]:
    found = [bytes_kept(TINY, mesh_of(2), mode) for mode in ("none", *MODES)]
    dist.barrier()
    return found


def test_so_it_is_with_segments():
    for none, selective, full in ranks().run(segments_keep):
        assert none > 1.3 * selective > 1.3 * 1.3 * full


def tapes_alive() -> dict[str, int]:
    """Tapes after two forward passes, after each backward pass, and after one without gradients."""
    mesh, alive = mesh_of(2), {}
    tapes: weakref.WeakSet[Tape] = weakref.WeakSet()
    model, segments = make(TINY, mesh, "full")
    recorded = Tape.__init__

    def noted(tape: Tape) -> None:
        recorded(tape)
        tapes.add(tape)

    gc.collect()
    gc.disable()  # what only the collector finds would stay for an unknown time
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tape, "__init__", noted)
        losses = []
        for batch in batches(mesh, 2, packed=True):
            tokens, labels, bounds = segments.cut(*batch)
            losses.append(model.loss_sum(tokens, labels, cu_seqlens=bounds))
        alive["forward"] = len(tapes)
        for index in range(2):
            losses[index].backward()
            alive[f"backward {index}"] = len(tapes)
        with torch.no_grad():
            model.loss_sum(tokens, labels, cu_seqlens=bounds)
        alive["evaluation"] = len(tapes)
    gc.enable()
    dist.barrier()
    return alive


def test_a_tape_lives_as_long_as_the_graph_that_may_read_it():
    layers = TINY.num_layers
    for alive in ranks().run(tapes_alive):
        assert alive == {"forward": 2 * layers, "backward 0": layers, "backward 1": 0, "evaluation": 0}
