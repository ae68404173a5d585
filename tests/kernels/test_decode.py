"""Prefill and decode_step against the parallel form: positions, states, gradients; nothing grows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import CompressState, PackedLayout, compress_kv, decode_step, prefill
from kernels.activations import PHI, READOUT, UPDATE
from tests.kernels.helpers import (
    AFFINE,
    MEMORIES,
    OWN_GATES,
    TOLERANCE,
    assert_close,
    assert_equal,
    case_seed,
    make_memories,
    make_operands,
)

EVERYTHING = (*OWN_GATES, *AFFINE)
LENGTH = 21
CHUNK_SIZE = 8


def tokens(operands: Mapping[str, Tensor], part: slice | int) -> dict[str, Tensor]:
    """Some tokens of the operands, or one without the T dimension; the affine has none."""
    return {name: x if name in AFFINE else x[:, part] for name, x in operands.items()}


def parts(state: CompressState) -> dict[str, Tensor]:
    found = {name: getattr(state, name) for name in MEMORIES}
    assert all(x is not None for x in found.values())
    return found


def case(*names: object, **options: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Detached operands and memories."""
    operands = make_operands(2, LENGTH, seed=case_seed(*names), **options)
    memories = make_memories(operands, seed=case_seed(*names, "memories"))
    return {n: x.detach() for n, x in operands.items()}, {n: x.detach() for n, x in memories.items()}


@pytest.mark.parametrize("update", UPDATE)
@pytest.mark.parametrize("readout", READOUT)
@pytest.mark.parametrize("phi", PHI)
def test_every_rule_equals_the_parallel_form_at_every_position(phi: str, readout: str, update: str) -> None:
    """From a state inside a chunk; prefills of no, one ragged and one full chunk, then token by token."""
    extra = EVERYTHING[(PHI.index(phi) + READOUT.index(readout)) % 5 :]
    operands, memories = case(phi, readout, update, extra=extra)
    options = {"chunk_size": CHUNK_SIZE, "phi": phi, "readout": readout, "update": update}
    start = CompressState(**memories, offset=3)
    whole, end = compress_kv(**operands, initial_state=start, output_final_state=True, **options)
    assert end is not None
    for head in (0, 4, 5, 10):
        outputs, state = [], start
        if head:
            y, state = prefill(**tokens(operands, slice(0, head)), state=start, **options)
            outputs.append(y)
        for t in range(head, LENGTH):
            y, state = decode_step(**tokens(operands, t), state=state, **options)
            outputs.append(y[:, None])
        assert state.offset == end.offset == 0
        assert_close({"y": torch.cat(outputs, 1)} | parts(state), {"y": whole} | parts(end), TOLERANCE)


@pytest.mark.parametrize("update", UPDATE)
@pytest.mark.parametrize("chunk_size", (1, 2, 64))
def test_decoding_from_nothing_in_chunks_of_any_size(chunk_size: int, update: str) -> None:
    operands, _ = case(chunk_size, update, extra=OWN_GATES)
    options = {"chunk_size": chunk_size, "update": update, "phi": "tanh"}
    zeros = torch.zeros(2, 2, 6, 5, dtype=torch.float64), torch.zeros(2, 2, 6, 7, dtype=torch.float64)
    outputs, state = [], CompressState(*zeros)
    for t in range(LENGTH):
        y, state = decode_step(**tokens(operands, t), state=state, **options)
        outputs.append(y)
        whole, end = compress_kv(**tokens(operands, slice(0, t + 1)), output_final_state=True, **options)
        assert end is not None
        assert state.offset == end.offset
        results = {"y": torch.stack(outputs, 1)} | parts(state)
        assert_close(results, {"y": whole} | parts(end), TOLERANCE)


@pytest.mark.parametrize("update", UPDATE)
def test_decode_follows_documents_at_different_offsets(update: str) -> None:
    operands = {n: x.detach() for n, x in make_operands(1, 12, extra=OWN_GATES).items()}
    options = {"chunk_size": 5, "update": update}
    layout = PackedLayout.from_cu_seqlens(torch.tensor([0, 4, 12]), 5)
    _, state = prefill(**operands, layout=layout, **options)
    assert state.offset == (4, 3)
    more = {n: x.detach() for n, x in make_operands(2, 6, seed=1, extra=OWN_GATES).items()}
    for t in range(6):
        y, state = decode_step(**tokens(more, t), state=state, **options)
    assert state.offset == (0, 4)
    for n, (begin, end) in enumerate(((0, 4), (4, 12))):
        document = {
            name: torch.cat((x[:, begin:end], more[name][n : n + 1]), 1) for name, x in operands.items()
        }
        alone, last = compress_kv(**document, output_final_state=True, **options)
        assert last is not None
        names = MEMORIES if last.offset else MEMORIES[:2]  # between chunks the pair is ignored
        expected = {"y": alone[0, -1]} | {name: parts(last)[name][0] for name in names}
        assert_close({"y": y[n]} | {name: parts(state)[name][n] for name in names}, expected, TOLERANCE)


@pytest.mark.parametrize("update", UPDATE)
def test_a_state_never_grows_and_a_step_leaves_its_own_untouched(update: str) -> None:
    operands, memories = case(update, extra=EVERYTHING)
    options = {"chunk_size": 4, "update": update}
    _, state = prefill(**tokens(operands, slice(0, 6)), state=CompressState(**memories, offset=1), **options)
    sizes = {name: x.untyped_storage().nbytes() for name, x in parts(state).items()}
    assert sizes == {name: x.numel() * 8 for name, x in parts(state).items()}, "a part of something larger"
    for t in range(6, LENGTH):
        before = {name: x.clone() for name, x in parts(state).items()}
        offset = state.offset
        _, after = decode_step(**tokens(operands, t), state=state, **options)
        _, again = decode_step(**tokens(operands, t), state=state, **options)
        assert_equal(parts(state), before)
        assert_equal(parts(again), parts(after))
        assert state.offset == offset
        assert {name: x.untyped_storage().nbytes() for name, x in parts(after).items()} == sizes
        state = after


def test_prefill_is_the_parallel_form_without_a_graph() -> None:
    operands = make_operands(2, LENGTH, extra=EVERYTHING)
    memories = make_memories(operands)
    start = CompressState(**memories, offset=2)
    options = {"chunk_size": CHUNK_SIZE, "update": "corrected"}
    y, state = prefill(**operands, state=start, **options)
    whole, end = compress_kv(**operands, initial_state=start, output_final_state=True, **options)
    assert end is not None
    assert whole.requires_grad
    assert not any(x.requires_grad for x in (y, *parts(state).values()))
    assert_close({"y": y} | parts(state), {"y": whole} | parts(end), TOLERANCE)
    y1, middle = prefill(**tokens(operands, slice(0, 6)), state=start, **options)  # 2 + 6: a chunk's end
    y2, last = prefill(**tokens(operands, slice(6, LENGTH)), state=middle, **options)
    assert middle.offset == 0
    assert_close({"y": torch.cat((y1, y2), 1)} | parts(last), {"y": whole} | parts(end), TOLERANCE)


def test_a_prefill_inside_a_chunk_keeps_no_graph_of_the_state_it_entered() -> None:
    operands = make_operands(2, 3)
    memories = {name: x.requires_grad_() for name, x in make_memories(operands).items()}
    _, state = prefill(**operands, state=CompressState(**memories, offset=2), chunk_size=CHUNK_SIZE)
    assert state is not None
    assert state.offset == 5
    assert not any(x.requires_grad for x in parts(state).values())


@pytest.mark.parametrize("update", UPDATE)
@pytest.mark.parametrize("offset", (0, 3))
@pytest.mark.parametrize("length", (1, 5, 8, 13, 16, 21))
def test_a_prefill_cut_at_its_chunks_equals_the_whole_grid(length: int, offset: int, update: str) -> None:
    operands, memories = case(length, offset, update, extra=EVERYTHING)
    own = tokens(operands, slice(0, length))
    start = CompressState(**memories, offset=offset)
    options = {"chunk_size": CHUNK_SIZE, "update": update}
    whole, end = compress_kv(**own, initial_state=start, output_final_state=True, **options)
    y, state = prefill(**own, state=start, **options)
    assert end is not None
    assert state.offset == end.offset
    assert_close({"y": y} | parts(state), {"y": whole} | parts(end), TOLERANCE)


@pytest.mark.parametrize("update", UPDATE)
@pytest.mark.parametrize("learned", (False, True), ids=("zero", "given"))
@pytest.mark.parametrize(
    "pads, offset",
    [
        ((0, 1, 5), 0),  # all inside their first chunk
        ((3, 0, 6), (2, 1, 0)),  # two inside the chunk they enter, one exactly to its end
        ((0, 7, 2), (5, 4, 7)),  # one has no token, the others go on in the next chunk
        ((0, 0, 0), (0, 3, 7)),  # several offsets, no pads
        ((5, 4, 5), (1, 5, 6)),  # all rows are short, and inside
    ],
)
def test_rows_behind_pads_are_what_each_is_by_itself(
    pads: tuple[int, ...], offset: int | tuple[int, ...], learned: bool, update: str
) -> None:
    operands = make_operands(3, 7, seed=case_seed(*pads, update), extra=EVERYTHING)
    operands = {name: x.detach() for name, x in operands.items()}
    found = make_memories(operands)
    memories = {name: x.detach() if learned else torch.zeros_like(x) for name, x in found.items()}
    start, options = CompressState(**memories, offset=offset), {"chunk_size": CHUNK_SIZE, "update": update}
    y, state = prefill(**operands, state=start, pads=pads, **options)
    for row, pad in enumerate(pads):
        alone = start.select_rows([row])
        own = {name: x if name in AFFINE else x[row : row + 1, pad:] for name, x in operands.items()}
        at = offset if isinstance(offset, int) else offset[row]
        expected, end = (
            prefill(**own, state=replace(alone, offset=at), **options) if pad < 7 else (None, alone)
        )
        got = state.select_rows([row])
        after = (at + 7 - pad) % CHUNK_SIZE
        assert got.offset in (after, (after,))
        names = MEMORIES if after else MEMORIES[:2]  # at a chunk's start the pair says nothing
        assert_close({n: parts(got)[n] for n in names}, {n: parts(end)[n] for n in names}, TOLERANCE)
        if expected is not None:
            assert_close({"y": y[row : row + 1, pad:]}, {"y": expected}, TOLERANCE)


@pytest.mark.parametrize("pads", ((1,), (1, 8), (-1, 0)))
def test_pads_that_fit_no_row_are_refused(pads: tuple[int, ...]) -> None:
    operands, _ = case("pads")
    with pytest.raises(ValueError, match=r"give each of the 2 rows a number in \[0, 7\]"):
        prefill(**tokens(operands, slice(0, 7)), chunk_size=CHUNK_SIZE, pads=pads)


@pytest.mark.parametrize("update", UPDATE)
@pytest.mark.parametrize("phi, readout", zip(PHI, READOUT, strict=True))
def test_backward_through_decoding_is_that_of_the_parallel_form(phi: str, readout: str, update: str) -> None:
    """Five steps over a chunk boundary: gradients of operands, affine and the state that was entered."""
    operands = make_operands(2, 5, seed=case_seed(phi, update), extra=EVERYTHING)
    memories = make_memories(operands)
    start = CompressState(**memories, offset=2)
    options = {"chunk_size": 4, "phi": phi, "readout": readout, "update": update}
    outputs, state = [], start
    for t in range(5):
        y, state = decode_step(**tokens(operands, t), state=state, **options)
        outputs.append(y)
    whole, end = compress_kv(**operands, initial_state=start, output_final_state=True, **options)
    assert end is not None
    inputs = operands | memories
    found = []
    for results in ({"y": torch.stack(outputs, 1)} | parts(state), {"y": whole} | parts(end)):
        g = torch.Generator().manual_seed(4)
        upstream = [torch.randn(x.shape, generator=g, dtype=x.dtype) for x in results.values()]
        grads = torch.autograd.grad(list(results.values()), list(inputs.values()), upstream)
        found.append(results | {f"d{name}": x for name, x in zip(inputs, grads, strict=True)})
    assert_close(found[0], found[1], TOLERANCE)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
def test_low_precision_tokens_leave_memories_in_fp32(dtype: torch.dtype) -> None:
    operands, memories = case(dtype, extra=EVERYTHING)
    low = {name: x.to(dtype) for name, x in operands.items()}
    exact = {name: x.double() for name, x in low.items()}
    start = CompressState(**{name: x.float() for name, x in memories.items()}, offset=3)
    state = expected = start
    for t in range(LENGTH):
        with torch.autocast("cpu", torch.bfloat16):
            y, state = decode_step(**tokens(low, t), state=state, chunk_size=CHUNK_SIZE)
        y_exact, expected = decode_step(**tokens(exact, t), state=expected, chunk_size=CHUNK_SIZE)
        assert y.dtype == dtype
        assert {x.dtype for x in parts(state).values()} == {torch.float32}
    assert_close(parts(state), parts(expected), 1e-6)
    assert_close({"y": y}, {"y": y_exact.to(dtype)}, 1e-2)


def test_offsets_that_inference_met_first_train_afterwards():
    """What is kept of a set of offsets is no tensor of inference mode."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, alpha = (torch.randn(3, 5, 2, 4, generator=generator) for _ in range(4))
    decay, step = -torch.rand(2, 3, 5, 2, generator=generator)
    gates = {"log_decay": decay, "step_size": -step}
    memories = [torch.randn(3, 2, 4, 4, generator=generator, requires_grad=True) for _ in range(4)]
    state = CompressState(*memories, offset=(0, 3, 1))
    with torch.inference_mode():
        compress_kv(q, k, v, alpha, **gates, chunk_size=4, initial_state=state)
    y, _ = compress_kv(q, k, v, alpha, **gates, chunk_size=4, initial_state=state)
    y.sum().backward()
    assert all(bool(memory.grad.isfinite().all()) for memory in memories)
