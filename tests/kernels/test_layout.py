"""Packed documents: the chunk grid, independence of neighbours, and cutting a sequence into segments."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from kernels import CompressState, PackedLayout, compress_kv, stages
from kernels.types import Memories, Operands, Rule
from tests.kernels.helpers import assert_close, assert_equal, make_memories, make_operands, run

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


@pytest.mark.parametrize("lengths", ((64, 1, 65, 7), (16, 16, 16), (5,), (1, 1, 40)))
def test_packed_equals_alone(lengths: tuple[int, ...]) -> None:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    operands = make_operands(1, sum(lengths), d=4, v=5, m=6)
    memories = make_memories(operands, len(lengths))
    layout = PackedLayout.from_cu_seqlens(cu_seqlens, 16)
    packed = run(operands, memories, chunk_size=16, layout=layout)
    y, final = [], []
    for n, (begin, end) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)):
        alone = {name: x[:, begin:end] for name, x in operands.items()}
        state = CompressState(**{name: x[n : n + 1] for name, x in memories.items()})
        out, end_state = compress_kv(**alone, chunk_size=16, initial_state=state, output_final_state=True)
        assert end_state is not None
        y.append(out)
        final.append(end_state)
    results = {"y": torch.cat(y, 1)}
    results |= {name: torch.cat([getattr(s, name) for s in final]) for name in memories}
    inputs = dict(operands) | memories
    g = torch.Generator().manual_seed(2)
    upstream = [torch.randn(x.shape, generator=g, dtype=torch.float64) for x in results.values()]
    grads = torch.autograd.grad(
        list(results.values()), list(inputs.values()), upstream, allow_unused=True, materialize_grads=True
    )
    assert_close(packed, results | {f"d{n}": x for n, x in zip(inputs, grads, strict=True)}, 1e-12)


@pytest.mark.parametrize("poison", (float("nan"), float("inf"), 1e30))
def test_no_document_sees_another(poison: float) -> None:
    cu_seqlens = torch.tensor([0, 13, 40, 57, 64])
    inside = slice(13, 40)
    clean = make_operands(1, 64, dtype=torch.float32, d=16, v=16, m=16)
    spoiled = {name: x.detach().clone() for name, x in clean.items()}
    for name in ("q", "k", "v", "alpha"):
        spoiled[name][:, inside] = poison
    results = []
    for operands in (clean, spoiled):
        operands = {name: x.detach().requires_grad_() for name, x in operands.items()}
        y, _ = compress_kv(**operands, chunk_size=16, cu_seqlens=cu_seqlens)
        grads = torch.autograd.grad(y, list(operands.values()), torch.ones_like(y))
        results.append({"y": y} | dict(zip(operands, grads, strict=True)))
    for part in (slice(0, 13), slice(40, 64)):
        assert_equal(*({name: x[:, part] for name, x in r.items()} for r in reversed(results)))


@few
@hypothesis.given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 9), st.integers(0, 8))
def test_two_calls_equal_one_wherever_it_is_cut(
    first: int, second: int, chunk_size: int, offset: int
) -> None:
    operands = make_operands(1, first + second, 1, d=3, v=2, m=4)
    memories = make_memories(operands)
    options = {"chunk_size": chunk_size, "output_final_state": True}
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
    assert_close(results[1], results[0], 1e-12)


SIZES = {"heads": 2, "d": 16, "v": 32, "m": 16}


@pytest.mark.parametrize("phi", ("silu", "tanh", "ln_silu", "softmax"))
@pytest.mark.parametrize(
    "readout, update", [("ln_silu", "stale"), ("l2_silu", "corrected"), ("silu_rms", "corrected")]
)
def test_segments_at_chunk_multiples_are_bitwise_the_whole(phi: str, readout: str, update: str) -> None:
    """State passing, forward and backward, by the stages alone: what sp ranks compute."""
    chunk_size, length, batch = 8, 64, 3
    operands = {n: x.detach() for n, x in make_operands(batch, length, dtype=torch.float32, **SIZES).items()}
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
        scan = stages.scan_backward(inputs, states, local, adjoint)
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
