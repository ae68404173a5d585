"""Packed documents: the chunk grid, independence of neighbours, and cutting a sequence into segments."""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from kernels import CompressState, PackedLayout, compress_kv, stages
from kernels.activations import PHI, UPDATE
from kernels.types import Memories, Operands, Rule
from tests.kernels.helpers import (
    AFFINE,
    MEMORIES,
    OWN_GATES,
    TOLERANCE,
    assert_close,
    assert_equal,
    case_seed,
    detached,
    make_memories,
    make_operands,
    run,
)

few = hypothesis.settings(max_examples=40, deadline=None, derandomize=True)


@few
@hypothesis.given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(0, 5)), min_size=1, max_size=6), st.integers(6, 8)
)
def test_every_token_has_one_slot_and_pads_read_their_own_chunk(
    documents: list[tuple[int, int]], chunk_size: int
) -> None:
    lengths, offsets = zip(*documents, strict=True)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    layout = PackedLayout.from_cu_seqlens(bounds, chunk_size, offsets=offsets)
    tokens = torch.arange(layout.num_tokens, dtype=torch.float64)
    x = torch.stack((tokens, 1000 + tokens)).T.reshape(1, -1, 2, 1)  # [1, T, H = 2, 1]
    chunks = layout.to_chunks(x)
    assert torch.equal(layout.from_chunks(chunks, 1), x)
    document = torch.bucketize(chunks[:, 0, :, 0].long(), bounds, right=True)
    assert bool((document == document[:, :1]).all()), "a chunk reads two documents"
    spans = layout.spans(2)
    assert torch.equal(torch.cat([span.to_chunks(x) for span in spans]), chunks)
    assert sum(span.steps[-1][1] for span in spans) == layout.num_chunks
    sizes = [end - begin for begin, end in layout.steps]
    assert sizes == sorted(sizes, reverse=True), "running documents are a prefix"


LENGTHS = ((64, 1, 65, 7), (16, 16, 16), (5,), (1, 1, 40), (64, 32, 16))


def each_alone(
    operands: dict[str, Tensor], memories: dict[str, Tensor], lengths: tuple[int, ...], **options: Any
) -> dict[str, Tensor]:
    """What ``run`` gives for the documents together, from one call for each; the affine is shared."""
    y, final, begin = [], [], 0
    for n, length in enumerate(lengths):
        part = slice(begin, begin + length)
        begin += length
        alone = {name: x if name in AFFINE else x[:, part] for name, x in operands.items()}
        state = CompressState(**{name: x[n : n + 1] for name, x in memories.items()})
        out, end_state = compress_kv(**alone, initial_state=state, output_final_state=True, **options)
        assert end_state is not None
        y.append(out)
        final.append(end_state)
    results = {"y": torch.cat(y, 1)} | {
        name: torch.cat([getattr(s, name) for s in final]) for name in memories
    }
    inputs = operands | memories
    g = torch.Generator().manual_seed(2)
    upstream = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x) for x in results.values()]
    grads = torch.autograd.grad(
        list(results.values()), list(inputs.values()), upstream, allow_unused=True, materialize_grads=True
    )
    return results | {f"d{name}": x for name, x in zip(inputs, grads, strict=True)}


@pytest.mark.parametrize("update", UPDATE)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_packed_equals_alone(lengths: tuple[int, ...], update: str) -> None:
    seed = case_seed(lengths, update)
    operands = make_operands(1, sum(lengths), d=4, v=5, m=6, seed=seed, extra=(*OWN_GATES, *AFFINE))
    memories = make_memories(operands, len(lengths), seed=seed + 1)
    layout = PackedLayout.of(lengths, 16)
    options = {"chunk_size": 16, "update": update, "readout": "silu_rms"}
    packed = run(operands, memories, layout=layout, **options)
    assert_close(packed, each_alone(operands, memories, lengths, **options), TOLERANCE)


@few
@hypothesis.given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 5)), min_size=1, max_size=6),
    st.integers(6, 8),
    st.integers(1, 4),
)
def test_tables_of_chunks_and_runs(documents: list[tuple[int, int]], chunk_size: int, run: int) -> None:
    """Counted document by document: chunk(i, rank) = base[i] + rank holds tokens that follow each other."""
    lengths, offsets = zip(*documents, strict=True)
    layout = PackedLayout.of(lengths, chunk_size, offsets=offsets)
    begins = [sum(lengths[:n]) for n in range(len(lengths))]
    order = range(len(lengths)) if layout.order is None else layout.order.tolist()
    (first, count), (base, counts) = layout.chunk_tokens, layout.rank_chunks
    runs = []
    for rank, n in enumerate(order):
        token, room, chunks = begins[n], chunk_size - offsets[n], 0
        while token < begins[n] + lengths[n]:
            chunk = int(base[chunks]) + rank
            tokens = min(room, begins[n] + lengths[n] - token)
            assert (int(first[chunk]), int(count[chunk])) == (token, tokens)
            token, room, chunks = token + tokens, chunk_size, chunks + 1
        assert int(counts[rank]) == chunks
        for step in range(0, chunks, run):
            runs.append((rank, step, min(run, chunks - step), int(base[step]) + rank))
    if layout.valid is not None:
        prefix = torch.arange(chunk_size) < count[:, None]
        assert torch.equal(layout.valid, prefix), "tokens come before pads"
    found = layout.segments(run)
    assert (
        sorted(zip(*(x.tolist() for x in (found.rank, found.first_step, found.count, found.chunk)))) == runs
    )
    assert layout.segments(run) is found


@pytest.mark.parametrize("update", UPDATE)
@pytest.mark.parametrize("phi", PHI)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_packed_is_bitwise_alone_where_stages_run_per_chunk(
    lengths: tuple[int, ...], phi: str, update: str
) -> None:
    """fp32 at sizes that fill a vector; all but the affine's gradients, which are sums over documents."""
    seed = case_seed(lengths, phi, update)
    sizes = {"d": 16, "v": 32, "m": 16, "dtype": torch.float32}
    operands = make_operands(1, sum(lengths), 2, seed=seed, extra=(*OWN_GATES, *AFFINE), **sizes)
    memories = make_memories(operands, len(lengths), seed=seed + 1)
    layout = PackedLayout.of(lengths, 16)
    options = {"chunk_size": 16, "phi": phi, "update": update, "readout": "silu_rms"}
    packed = run(operands, memories, layout=layout, **options)
    alone = each_alone(operands, memories, lengths, **options)
    affine = {f"d{name}": alone.pop(f"d{name}") for name in AFFINE}
    assert_equal(packed, alone)
    assert_close({name: packed[name] for name in affine}, affine, 1e-5)


@pytest.mark.parametrize("update", UPDATE)
@pytest.mark.parametrize("phi", PHI)
@pytest.mark.parametrize("poison", (float("nan"), float("inf"), 1e30))
def test_no_document_sees_another(poison: float, phi: str, update: str) -> None:
    """Tokens, memories and upstream gradients of one document are spoiled; the others keep every bit."""
    lengths, bad = (13, 27, 17, 7), 1
    inside = slice(13, 40)
    clean = make_operands(1, 64, dtype=torch.float32, d=16, v=16, m=16, extra=OWN_GATES)
    memories = make_memories(clean, 4)
    spoiled, spoiled_memories = (
        {name: x.detach().clone() for name, x in tensors.items()} for tensors in (clean, memories)
    )
    for name in ("q", "k", "v", "alpha"):
        spoiled[name][:, inside] = poison
    for x in spoiled_memories.values():
        x[bad] = poison
    layout = PackedLayout.of(lengths, 16, offsets=(0, 3, 5, 0))
    results = []
    for operands, initial in ((clean, memories), (spoiled, spoiled_memories)):
        inputs = detached(operands | initial)
        state = CompressState(**{name: inputs[name] for name in initial}, offset=layout.offsets)
        y, final = compress_kv(
            **{name: inputs[name] for name in operands},
            **{"chunk_size": 16, "layout": layout, "phi": phi, "update": update},
            initial_state=state,
            output_final_state=True,
        )
        assert final is not None
        found = {"y": y} | {name: getattr(final, name) for name in initial}
        upstream = [torch.ones_like(x) for x in found.values()]
        upstream[0][:, inside] = poison if operands is spoiled else 1
        grads = torch.autograd.grad(list(found.values()), list(inputs.values()), upstream)
        results.append(found | {f"d{name}": x for name, x in zip(inputs, grads, strict=True)})
    others = {name: without(x, name, inside, bad) for name, x in results[0].items()}
    assert all(x.isfinite().all() for x in others.values())
    assert_equal({name: without(x, name, inside, bad) for name, x in results[1].items()}, others)


def without(x: Tensor, name: str, inside: slice, document: int) -> Tensor:
    """Tokens [1, T, ...] or memories [N, ...] of all other documents."""
    if name.removeprefix("d") in MEMORIES:
        return torch.cat((x[:document], x[document + 1 :]))
    return torch.cat((x[:, : inside.start], x[:, inside.stop :]), 1)


@few
@hypothesis.given(
    st.integers(1, 30), st.integers(1, 30), st.integers(1, 9), st.integers(0, 8), st.sampled_from(UPDATE)
)
def test_two_calls_equal_one_wherever_it_is_cut(
    first: int, second: int, chunk_size: int, offset: int, update: str
) -> None:
    seed = case_seed(first, second, chunk_size)
    operands = make_operands(1, first + second, 1, d=3, v=2, m=4, seed=seed, extra=OWN_GATES)
    memories = make_memories(operands)
    options = {"chunk_size": chunk_size, "output_final_state": True, "update": update, "phi": "tanh"}
    start = CompressState(**memories, offset=offset % chunk_size)
    whole, end = compress_kv(**operands, initial_state=start, **options)
    head = {name: x[:, :first] for name, x in operands.items()}
    tail = {name: x[:, first:] for name, x in operands.items()}
    y1, middle = compress_kv(**head, initial_state=start, **options)
    y2, last = compress_kv(**tail, initial_state=middle, **options)
    assert end is not None
    assert last is not None
    assert end.offset == last.offset == (offset % chunk_size + first + second) % chunk_size
    inputs = [*operands.values(), *memories.values()]
    results = []
    for outputs in ((whole, end), (torch.cat((y1, y2), 1), last)):
        y, state = outputs
        tensors = {"y": y} | {name: getattr(state, name) for name in memories}
        loss = sum(
            (x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)).sum() for x in tensors.values()
        )
        grads = torch.autograd.grad(
            loss, inputs, allow_unused=True, materialize_grads=True, retain_graph=True
        )
        results.append(tensors | {str(i): x for i, x in enumerate(grads)})
    assert_close(results[1], results[0], TOLERANCE)


@pytest.mark.parametrize("update", UPDATE)
@pytest.mark.parametrize("phi", PHI)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_calls_cut_at_chunk_multiples_are_bitwise_the_whole(
    dtype: torch.dtype, phi: str, update: str
) -> None:
    """Outputs and states, in both precisions, over rows and over packed documents."""
    operands = {
        name: x.detach()
        for name, x in make_operands(2, 80, 2, d=16, v=32, m=16, dtype=dtype, extra=OWN_GATES).items()
    }
    options = {"chunk_size": 16, "phi": phi, "update": update, "output_final_state": True}
    whole, end = compress_kv(**operands, **options)
    outputs, state, begin = [], None, 0
    for length in (16, 48, 16):
        part = {name: x[:, begin : begin + length] for name, x in operands.items()}
        y, state = compress_kv(**part, initial_state=state, **options)
        outputs.append(y)
        begin += length
    assert torch.equal(torch.cat(outputs, 1), whole)
    assert end is not None
    assert state is not None
    assert_equal(*({name: getattr(s, name) for name in MEMORIES} for s in (state, end)))


SIZES = {"heads": 2, "d": 16, "v": 32, "m": 16, "dtype": torch.float32, "extra": OWN_GATES}


@pytest.mark.parametrize("phi", ("silu", "tanh", "ln_silu", "softmax"))
@pytest.mark.parametrize(
    "readout, update", [("ln_silu", "stale"), ("l2_silu", "corrected"), ("silu_rms", "corrected")]
)
def test_segments_at_chunk_multiples_are_bitwise_the_whole(phi: str, readout: str, update: str) -> None:
    """State passing, forward and backward, by the stages alone: what sp ranks compute."""
    chunk_size, length, batch = 8, 64, 3
    operands = {n: x.detach() for n, x in make_operands(batch, length, **SIZES).items()}
    dy = torch.randn(batch, length, 2, 32, generator=torch.Generator().manual_seed(3))
    rule = Rule(phi, readout, update)
    whole = composed(operands, dy, [length], chunk_size, rule)
    assert_equal(composed(operands, dy, [24, 40], chunk_size, rule), whole)
    assert_equal(composed(operands, dy, [8] * 8, chunk_size, rule), whole)
    memories = make_memories(operands)
    state = CompressState(memories["key_memory"], memories["value_memory"])
    options = {"phi": phi, "readout": readout, "update": update}
    y, _ = compress_kv(**operands, chunk_size=chunk_size, initial_state=state, **options)
    assert torch.equal(y, whole["y"])


def composed(
    operands: dict[str, Tensor], dy: Tensor, lengths: list[int], chunk_size: int, rule: Rule
) -> dict[str, Tensor]:
    """Run segments one after the other, the adjoints in reverse; random initial memories and end adjoints."""
    batch = dy.shape[0]
    memories = make_memories(operands)
    state = Memories(memories["key_memory"].detach(), memories["value_memory"].detach())
    adjoint = Memories(memories["key_chunk_start"].detach(), memories["value_chunk_start"].detach())
    kept: list[tuple[stages.Inputs, stages.States, Tensor]] = []
    y, begin = [], 0
    for length in lengths:
        part = slice(begin, begin + length)
        layout = PackedLayout.uniform(batch, length, chunk_size)
        cut = Operands(*(x[:, part] for x in operands.values()))
        inputs = stages.arrange(cut, layout=layout, rule=rule)
        states, state = stages.scan_forward(inputs, state)
        begin += length
        y.append(layout.from_chunks(stages.readout_forward(inputs, states), batch))
        kept.append((inputs, states, dy[:, part]))
    grads = []
    for inputs, states, dy_part in reversed(kept):
        local = stages.readout_backward(inputs, states, inputs.layout.to_chunks(dy_part))
        scan = stages.scan_backward(inputs, states, local, (adjoint.key, adjoint.value))
        rest = stages.input_backward(inputs, states, local, scan)
        adjoint = scan.initial
        grads.append([inputs.layout.from_chunks(x, batch) for x in rest if x is not None])
    gradients = [torch.cat(x, 1) for x in zip(*reversed(grads), strict=True)]
    results = {"y": torch.cat(y, 1), "S": state.key, "R": state.value, "dS": adjoint.key, "dR": adjoint.value}
    return results | {f"d{name}": x for name, x in zip(operands, gradients, strict=True)}


def test_a_layout_is_built_once_and_shared() -> None:
    layout = PackedLayout.from_cu_seqlens(torch.tensor([0, 5, 9]), 4)
    assert layout.to("cpu") is layout
    assert layout.spans(2) is layout.spans(2)
    assert PackedLayout.uniform(2, 8, 4).token_of_slot is None, "an even batch needs no gather"


def test_who_builds_a_shared_layout_first_does_not_matter() -> None:
    """Inference mode would leave tensors no gradient may pass, another default device tables out of reach."""
    operands = make_operands(1, 23)
    bounds = torch.tensor([0, 6, 23])
    with torch.inference_mode(), torch.device("meta"):
        early = PackedLayout.from_cu_seqlens(bounds, 5)
        assert early.segments(2).chunk.device == early.bounds.device == torch.device("cpu")
    layout = PackedLayout.from_cu_seqlens(bounds, 5)
    assert layout is early
    y, _ = compress_kv(**operands, chunk_size=5, layout=layout)
    assert torch.autograd.grad(y.sum(), operands["q"])[0].isfinite().all()


def test_one_long_document_beside_many_short_ones_takes_memory_for_its_tokens_only() -> None:
    """Tables by scan step and document would have 10^8 entries, 800 MB."""
    lengths = (20_000, *(1,) * 5_000)
    limit = 100 * sum(lengths)  # bytes; the tables need 34 a token
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        layout = PackedLayout.of(lengths, 2)
        base, counts = layout.rank_chunks
        segments = layout.segments(3)
    largest = max(event.cpu_memory_usage for event in profiler.events())
    assert largest < limit, f"{largest} bytes at once"
    assert (len(base), counts[:2].tolist()) == (10_000, [10_000, 1])
    assert len(segments.rank) == 5_000 + -(-10_000 // 3)
