"""The all-to-all mode against one process and against state passing, and the exchange against slicing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from kernels import CompressState, PackedLayout, compress_kv
from tests.parallel.cases import gradients_of, leaf, mesh_of, ranks, segment
from tests.parallel.test_sequence import Sizes, in_one_row, leaves, local_part, make, settings
from trellis_dist.models.context import SequenceContext, packed_context
from trellis_dist.models.mixers.attention import causal_attention
from trellis_dist.parallel import all_to_all
from trellis_dist.parallel.all_to_all import AllToAllAttention, AllToAllCompress, exchange
from trellis_dist.parallel.mesh import Mesh
from trellis_dist.parallel.segments import Segments
from trellis_dist.parallel.sequence import StatePassing
from trellis_dist.parallel.tape import Tape
from trellis_dist.parallel.transfers import Transfers

FOUR = Sizes(heads=4)
CORRECTED = Sizes(
    heads=4, update="corrected", phi="tanh", readout="silu_rms", own_gates=True, affine=True, slots=32
)
# Of two rows of 64 tokens. With sp = 4 the ranks' own segments are packed on none of them, on some, on all.
STARTS = {
    "rows": None,
    "row-documents": [0, 64],
    "ragged": [0, 8, 24, 64, 112],
    "at-boundaries": [0, 32, 64, 96],
    "everywhere": [0, 8, 24, 40, 56, 64, 72, 80],
}


@contextlib.contextmanager
def counted_exchanges() -> Iterator[list[int]]:
    """Bytes that each all-to-all of this rank sends to other ranks, one entry per call."""
    sizes: list[int] = []
    real = dist.all_to_all_single

    def call(output: Tensor, sent: Tensor, *, group: dist.ProcessGroup) -> None:
        others = dist.get_world_size(group) - 1
        sizes.append(sent[0].numel() * sent.element_size() * others)
        real(output, sent, group=group)

    all_to_all.dist.all_to_all_single = call
    try:
        yield sizes
    finally:
        all_to_all.dist.all_to_all_single = real


def heads_of(x: Tensor, mesh: Mesh) -> Tensor:
    """This rank's heads of x [R, T, H, ...]."""
    return x.chunk(mesh.sp, dim=2)[mesh.sp_rank]


def exchanged(sp: int) -> dict[str, bool]:
    """Odd widths, three dtypes and strided operands in one call; one of them needs no gradient."""
    mesh = mesh_of(sp)
    generator = torch.Generator().manual_seed(mesh.dp_rank)

    def draw(*shape: int) -> Tensor:  # whole numbers: sums over them are exact in any order
        return torch.randint(-9, 9, shape, generator=generator, dtype=torch.int64).double()

    rows, length, heads = 3, 4 * sp, 4
    whole = [draw(rows, length, heads, 5), draw(rows, length, heads).float()]
    whole += [draw(rows, length, heads, 3).bfloat16(), draw(rows, length, 2, heads, 7)[:, :, 1]]
    fixed = draw(rows, length, heads)
    upstream = [draw(*x.shape).to(x.dtype) for x in whole]
    local = [leaf(segment(x, mesh)) for x in whole]
    with counted_exchanges() as sent:
        ys = exchange([*local, segment(fixed, mesh)], mesh, to_heads=True)
        forth = sent[0]
        grads = torch.autograd.grad(ys[:-1], local, [heads_of(up, mesh) for up in upstream])
    back = exchange([y.detach() for y in ys], mesh, to_heads=False)
    turned = [leaf(heads_of(x, mesh)) for x in whole]
    returned = exchange(turned, mesh, to_heads=False)
    turned_grads = torch.autograd.grad(returned, turned, [segment(up, mesh) for up in upstream])

    # <A x, u> = <x, A^T u>, each side summed over the ranks.
    forward = sum((y.double() * heads_of(up, mesh).double()).sum() for y, up in zip(ys, upstream))
    backward = sum((x.double() * grad.double()).sum() for x, grad in zip(local, grads))
    inner = torch.stack([forward, backward]).detach()
    dist.all_reduce(inner, group=mesh.sp_group)

    def same(found: Any, wanted: list[Tensor], part: Callable[[Tensor, Mesh], Tensor]) -> bool:
        pairs = zip(found, wanted, strict=True)
        return all(torch.equal(x, part(w, mesh)) and x.dtype == w.dtype for x, w in pairs)

    return {
        "to heads": same(ys, [*whole, fixed], heads_of),
        "back": same(back, [*whole, fixed], segment),
        "gradient to heads": same(grads, upstream, segment),
        "gradient back": same(turned_grads, upstream, heads_of),
        "adjoint": float(inner[0]) == float(inner[1]) != 0,
        "one call each way": len(sent) == 2,
        "without the fixed operand": forth - sent[1] == bytes_of([fixed], sp),
        "fixed": not ys[-1].requires_grad,
    }


def bytes_of(whole: list[Tensor], sp: int) -> int:
    """What one rank sends of its segment of ``whole``: (sp-1)/sp of it, in pieces of 16 bytes."""
    pieces = [-(-x.numel() * x.element_size() // sp**2 // 16) * 16 for x in whole]
    return sum(pieces) * (sp - 1)


@pytest.mark.parametrize("sp", [2, 4])
def test_the_exchange_moves_every_bit_and_its_gradient_moves_back(sp: int):
    for same in ranks().run(exchanged, sp):
        assert all(same.values()), same


def any_bits() -> bool:
    """Every bf16 bit pattern survives, signalling NaNs too."""
    mesh = mesh_of(4)
    whole = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(1, -1, 4, 1).view(torch.bfloat16)
    (y,) = exchange([segment(whole, mesh)], mesh, to_heads=True)
    return torch.equal(y.view(torch.int16), heads_of(whole, mesh).view(torch.int16))


def test_no_bit_of_a_half_precision_number_changes():
    assert all(ranks().run(any_bits))


def compressed(
    operation: Callable[..., Any],
    operands: dict[str, Tensor],
    memories: list[Tensor],
    upstream: Tensor,
    sizes: Sizes,
    layout: PackedLayout | None,
) -> dict[str, Tensor]:
    """Output and gradients of one call that starts every document from ``memories`` [1 or B, H, M, .]."""
    inputs, initial = leaves(operands), [leaf(m) for m in memories]
    documents = len(inputs["q"]) if layout is None else layout.num_documents
    state = CompressState(*(m.expand(documents, -1, -1, -1) for m in initial))
    y, _ = operation(**inputs, **settings(sizes), initial_state=state, layout=layout)
    y = y.view_as(upstream)
    names = [*inputs, "key memory", "value memory"]
    grads = gradients_of((y * upstream).sum(), [*inputs.values(), *initial])
    return {"y": y.detach(), **dict(zip(names, grads, strict=True))}


def cut_documents(
    segments: Segments, starts: list[int] | None, sizes: Sizes
) -> tuple[PackedLayout | None, PackedLayout | None]:
    """Layout of the whole rows, and of this segment after the cut."""
    marks = torch.arange(sizes.batch * sizes.length).view(sizes.batch, -1)
    whole = None if starts is None else torch.tensor([*starts, marks.numel()])
    bounds = [whole, segments.cut(marks, marks, whole)[2]]
    return tuple(None if b is None else PackedLayout.from_cu_seqlens(b, sizes.chunk) for b in bounds)


def compress_parity(
    sp: int, sizes: Sizes, starts: list[int] | None, learned: bool = True
) -> dict[str, tuple[bool, float]]:
    """Per output and gradient: whether it is that of one process bit by bit, and the largest difference."""
    mesh, segments = mesh_of(sp), Segments(mesh_of(sp), chunk_size=sizes.chunk)
    operands, memories, upstream = make(sizes, seed=7 + mesh.dp_rank)
    memories = [m[:1] for m in memories] if learned else memories
    layout, local_layout = cut_documents(segments, starts, sizes)
    whole = operands if layout is None else in_one_row(operands)
    expected = compressed(compress_kv, whole, memories, upstream[0], sizes, layout)
    local = local_part(operands, mesh)
    local = local if local_layout is None else in_one_row(local)
    operation = AllToAllCompress(mesh, segments)
    found = compressed(operation, local, memories, segment(upstream[0], mesh), sizes, local_layout)
    dist.barrier()
    return compare(found, expected, {**operands, "y": upstream[0]}, mesh)


def compare(
    found: dict[str, Tensor], expected: dict[str, Tensor], per_token: dict[str, Tensor], mesh: Mesh
) -> dict[str, tuple[bool, float]]:
    """Results per token are this segment's, those of parameters are summed over the ranks."""
    result = {}
    for name, want in expected.items():
        got = found[name]
        if name in per_token and "readout" not in name:
            want = segment(want.view_as(per_token[name]), mesh)
            got = got.view(want.shape)
        else:
            dist.all_reduce(got, group=mesh.sp_group)
        result[name] = (torch.equal(got, want), float((got - want).abs().max()))
    return result


def assert_close(found: list[dict[str, tuple[bool, float]]]) -> None:
    assert all(off < 1e-12 for rank in found for _, off in rank.values()), found


@pytest.mark.parametrize("starts", list(STARTS))
@pytest.mark.parametrize("sp", [2, 4])
def test_the_operation_is_that_of_one_process(sp: int, starts: str):
    for sizes in (FOUR, CORRECTED):
        double = replace(sizes, dtype=torch.float64)
        assert_close(ranks().run(compress_parity, sp, double, STARTS[starts]))


@pytest.mark.parametrize("starts", ["rows", "ragged"])
@pytest.mark.parametrize("sp", [2, 4])
def test_the_operation_is_bitwise_that_of_one_process(sp: int, starts: str):
    for sizes in (FOUR, CORRECTED, replace(FOUR, heads=8, width=16, value_width=8)):
        for rank in ranks().run(compress_parity, sp, sizes, STARTS[starts]):
            for name, (same, off) in rank.items():
                # Sums over tokens, which torch adds up in another order when there are fewer heads.
                assert same or ("readout" in name and off < 1e-4), (name, off)


def test_rows_may_start_from_a_memory_each():
    for starts in ("rows", "row-documents"):
        sizes = replace(FOUR, dtype=torch.float64)
        assert_close(ranks().run(compress_parity, 4, sizes, STARTS[starts], False))


def modes(sp: int, sizes: Sizes, starts: list[int] | None) -> dict[str, tuple[bool, float]]:
    """All-to-all beside state passing on the same segment."""
    mesh, segments = mesh_of(sp), Segments(mesh_of(sp), chunk_size=sizes.chunk)
    operands, memories, upstream = make(sizes, seed=1)
    _, layout = cut_documents(segments, starts, sizes)
    local = local_part(operands, mesh)
    local = local if layout is None else in_one_row(local)
    arguments = (local, [m[:1] for m in memories], segment(upstream[0], mesh), sizes, layout)
    passed = compressed(StatePassing(Transfers(mesh), segments), *arguments)
    exchanged = compressed(AllToAllCompress(mesh, segments), *arguments)
    dist.barrier()
    result = {}
    for name, want in passed.items():
        if name not in local or "readout" in name:
            for x in (want, exchanged[name]):
                dist.all_reduce(x, group=mesh.sp_group)
        result[name] = (torch.equal(want, exchanged[name]), float((want - exchanged[name]).abs().max()))
    return result


@pytest.mark.parametrize("starts", list(STARTS))
def test_both_modes_agree(starts: str):
    for sizes in (FOUR, CORRECTED):
        double = replace(sizes, dtype=torch.float64)
        assert_close(ranks().run(modes, 4, double, STARTS[starts]))


def attended(
    operation: Callable[..., Tensor], parts: list[Tensor], upstream: Tensor, bounds: Tensor | None, **options
) -> dict[str, Tensor]:
    """Output and gradients of attention on [R, T, H, D], the documents given as a mixer gives them."""
    rows, length = upstream.shape[:2]
    inputs, context = [leaf(x) for x in parts], SequenceContext()
    if bounds is not None:
        context = packed_context(bounds, rows=rows, length=length, chunk_sizes=[8], conv_kernel=0)
    shape = (1, rows * length) if context.packed else (rows, length)
    q, k, v = (x.view(*shape, *x.shape[2:]) for x in inputs)
    y = operation(q, k, v, theta=1e4, positions=context.positions, lengths=context.lengths, **options)
    grads = gradients_of((y.view_as(upstream) * upstream).sum(), inputs)
    return {"y": y.detach().view_as(upstream), **dict(zip("qkv", grads, strict=True))}


def attention_parity(
    sp: int, starts: list[int] | None, window: int | None, dtype: torch.dtype
) -> dict[str, tuple[bool, float]]:
    mesh, segments = mesh_of(sp), Segments(mesh_of(sp), chunk_size=8)
    generator = torch.Generator().manual_seed(mesh.dp_rank)
    *parts, upstream = torch.randn(4, 2, 64, 4, 8, generator=generator, dtype=dtype)
    bounds = None if starts is None else torch.tensor([*starts, 128])
    expected = attended(causal_attention, parts, upstream, bounds, window=window)
    _, _, local = segments.cut(upstream[..., 0, 0], upstream[..., 0, 0], bounds)
    operation = AllToAllAttention(mesh, segments)
    with counted_exchanges() as sent:
        local_parts = [segment(x, mesh) for x in parts]
        found = attended(operation, local_parts, segment(upstream, mesh), local, window=window)
    assert sent == [bytes_of(xs, sp) for xs in (parts, [upstream], [upstream], parts)]
    return compare(found, expected, expected, mesh)


@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize("starts", list(STARTS))
def test_attention_sees_the_whole_rows(starts: str, window: int | None):
    for sp in (2, 4):
        assert_close(ranks().run(attention_parity, sp, STARTS[starts], window, torch.float64))


def bytes_sent(sizes: Sizes) -> list[int]:
    mesh = mesh_of(4)
    operands, _, upstream = make(sizes, seed=0)
    operation = AllToAllCompress(mesh, Segments(mesh, chunk_size=sizes.chunk))
    local = leaves(local_part(operands, mesh))
    with counted_exchanges() as sent:
        y, _ = operation(**local, **settings(sizes))
        gradients_of((y * segment(upstream[0], mesh)).sum(), list(local.values()))
    return sent


def test_bytes_sent_are_a_share_of_the_segment():
    for length in (64, 256):
        sizes = Sizes(length=length, heads=4, own_gates=True)
        numbers = 2 * sizes.width + sizes.value_width + sizes.slots + 4
        per_number = 4 * sizes.batch * length * sizes.heads // 4 * 3 // 4  # (sp-1)/sp of T/sp tokens
        operands, y = numbers * per_number, sizes.value_width * per_number
        assert ranks().run(bytes_sent, sizes) == [[operands, y, y, operands]] * 4


def replayed(starts: list[int] | None) -> dict[str, bool]:
    """A forward pass that is recorded, then computed again after another batch was cut."""
    mesh, segments = mesh_of(4), Segments(mesh_of(4), chunk_size=FOUR.chunk)
    operands, memories, upstream = make(FOUR, seed=0)
    _, layout = cut_documents(segments, starts, FOUR)
    local = local_part(operands, mesh)
    local = local if layout is None else in_one_row(local)
    arguments = (local, [m[:1] for m in memories], segment(upstream[0], mesh), FOUR, layout)
    operation, tape = AllToAllCompress(mesh, segments), Tape()

    def forward(*args: Any, **kwargs: Any) -> Any:
        operation.tape = tape
        y = operation(*args, **kwargs)
        operation.tape = None
        return y

    expected = compressed(forward, *arguments)
    tape.rewind()
    documents = segments.documents
    cut_documents(segments, [0, 40, 64], FOUR)
    segments.documents = documents
    with counted_exchanges() as sent:
        found = compressed(forward, *arguments)
    same = {name: torch.equal(found[name], expected[name]) for name in expected}
    return {**same, "the backward pass exchanges, the replay does not": len(sent) == 2}


def test_a_recomputed_forward_pass_exchanges_nothing():
    for starts in ("rows", "ragged"):
        for same in ranks().run(replayed, STARTS[starts]):
            assert all(same.values()), same


def refused() -> list[str]:
    mesh, segments, messages = mesh_of(2), Segments(mesh_of(2), chunk_size=8), []
    operands, memories, _ = make(Sizes(), seed=0)
    local = local_part(operands, mesh)
    operation = AllToAllCompress(mesh, segments)
    inside = CompressState(*memories, *memories, offset=3)
    for inputs, options in (
        (local, {"output_final_state": True}),
        (local, {"initial_state": inside}),
        (local, {"phi": "relu"}),
        (local | {"v": local["v"][:, :-1]}, {}),
        (in_one_row(local), {"layout": PackedLayout.from_cu_seqlens(torch.tensor([0, 64]), 8)}),
    ):
        messages.append(message_of(operation, inputs, options))
    _, layout = cut_documents(segments, [0, 16, 48, 64, 80, 112], Sizes())
    own = CompressState(*(torch.cat([m, m]) for m in memories))
    messages.append(message_of(operation, in_one_row(local), {"layout": layout, "initial_state": own}))
    messages.append(message_of(operation, in_one_row(local), {"layout": layout, "chunk_size": 4}))
    return messages


def message_of(operation: Callable[..., Any], inputs: dict[str, Tensor], options: dict[str, Any]) -> str:
    try:
        operation(**inputs, **{"chunk_size": 8, **options})
    except ValueError as error:
        return str(error)
    return "accepted"


def test_what_cannot_be_served_is_refused_before_anything_is_sent():
    wanted = [
        "output_final_state with all-to-all",
        "initial_state has offset 3",
        "phi = 'relu'",
        "v has shape",
        "Segments.cut",
        "initial_state holds 4 memories for the 6 documents of 2 whole rows",
        "the batch was cut for chunk size 8, the call has 4",
    ]
    for messages in ranks().run(refused):
        for message, part in zip(messages, wanted, strict=True):
            assert part in message


def uneven() -> str:
    mesh = mesh_of(4)
    operands, _, _ = make(Sizes(heads=6), seed=0)
    try:
        AllToAllCompress(mesh, Segments(mesh, chunk_size=8))(**local_part(operands, mesh), chunk_size=8)
    except AssertionError as error:
        return str(error)
    return "accepted"


def test_heads_that_do_not_share_out_are_a_bug():
    assert ranks().run(uneven) == ["6 heads do not share out over sp = 4"] * 4
