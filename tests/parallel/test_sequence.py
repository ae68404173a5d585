"""State passing against one process: torch.equal in outputs, input gradients and memory adjoints."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from kernels import CompressState, PackedLayout, compress_kv, stages
from tests.largest import largest
from tests.parallel.cases import (
    RecordingTransfers,
    counted_sends,
    gradients_of,
    leaf,
    mesh_of,
    ranks,
    relative,
    segment,
)
from trellis_dist.parallel.mesh import Mesh
from trellis_dist.parallel.segments import Segments, row_ends
from trellis_dist.parallel.sequence import StatePassing
from trellis_dist.parallel.transfers import Arrival, Transfers


@dataclass(frozen=True)
class Sizes:
    """B L H a multiple of 32 and widths multiples of 8 in every case, see ``parallel.sequence``."""

    batch: int = 2
    length: int = 64
    heads: int = 2
    width: int = 8
    value_width: int = 16
    slots: int = 24
    chunk: int = 8
    phi: str = "silu"
    readout: str = "ln_silu"
    update: str = "stale"
    own_gates: bool = False
    affine: bool = False
    dtype: torch.dtype = torch.float32


CORRECTED = Sizes(
    update="corrected", phi="tanh", readout="silu_rms", own_gates=True, affine=True, chunk=16, slots=32
)


def make(sizes: Sizes, seed: int) -> tuple[dict[str, Tensor], list[Tensor], list[Tensor]]:
    """Operands by name, initial memories, and upstream gradients of (y, S, R)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=sizes.dtype)

    b, t, h = sizes.batch, sizes.length, sizes.heads
    largest_step = 1 if sizes.update == "corrected" else 2 / sizes.chunk
    q, k = (torch.nn.functional.normalize(draw(b, t, h, sizes.width), dim=-1) for _ in range(2))
    v = torch.nn.functional.normalize(draw(b, t, h, sizes.value_width), dim=-1)
    operands = {"q": q, "k": k, "v": v, "alpha": draw(b, t, h, sizes.slots)}
    for prefix in ("", "value_") if sizes.own_gates else ("",):
        operands[f"{prefix}log_decay"] = torch.nn.functional.logsigmoid(draw(b, t, h) + 3)
        operands[f"{prefix}step_size"] = torch.sigmoid(draw(b, t, h)) * largest_step
    memories = [draw(b, h, sizes.slots, width) for width in (sizes.width, sizes.value_width)]
    upstream = [draw(b, t, h, sizes.value_width), *(draw(*m.shape) for m in memories)]
    if sizes.affine:
        operands |= {f"readout_{name}": draw(h, sizes.slots) for name in ("weight", "bias")}
    return operands, memories, upstream


def local_part(operands: dict[str, Tensor], mesh: Mesh) -> dict[str, Tensor]:
    """This rank's tokens; the affine has none and is whole everywhere."""
    return {name: x if "readout" in name else segment(x, mesh) for name, x in operands.items()}


def leaves(operands: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: leaf(x) for name, x in operands.items()}


def settings(sizes: Sizes) -> dict:
    names = ("phi", "readout", "update")
    return {"chunk_size": sizes.chunk, **{name: getattr(sizes, name) for name in names}}


def parity(sp: int, sizes: Sizes) -> dict[str, bool]:
    """One call on this rank's segment, and what one process gets on the whole sequence, bit by bit."""
    mesh = mesh_of(sp)
    operands, memories, upstream = make(sizes, seed=mesh.dp_rank)
    expected = whole(operands, memories, upstream, sizes)
    boundaries = boundary_adjoints(operands, memories, upstream, sizes, sp)

    transfers = RecordingTransfers(mesh)
    operation = StatePassing(transfers, Segments(mesh, chunk_size=sizes.chunk))
    local, initial = leaves(local_part(operands, mesh)), [leaf(m) for m in memories]
    y, state = operation(
        **local, **settings(sizes), initial_state=CompressState(*initial), output_final_state=True
    )
    loss = (y * segment(upstream[0], mesh)).sum()
    if mesh.right is None:
        loss = loss + (state.key_memory * upstream[1]).sum() + (state.value_memory * upstream[2]).sum()
    *grads, initial_key, initial_value = gradients_of(loss, [*local.values(), *initial])
    dist.barrier()

    same = {"y": torch.equal(y, segment(expected["y"], mesh))}
    for name, grad in zip(local, grads, strict=True):
        if "readout" in name:  # a sum over all tokens, so cutting the sequence rounds it differently
            dist.all_reduce(grad, group=mesh.sp_group)
            same[f"d{name}"] = relative(grad, expected[f"d{name}"]) < 1e-6
        else:
            same[f"d{name}"] = torch.equal(grad, segment(expected[f"d{name}"], mesh))
    for name, grad in (("dS0", initial_key), ("dR0", initial_value)):
        same[name] = torch.equal(grad, expected[name] if mesh.left is None else torch.zeros_like(grad))
    if mesh.right is None:
        same["S"] = torch.equal(state.key_memory, expected["S"])
        same["R"] = torch.equal(state.value_memory, expected["R"])
    if mesh.left is not None:
        sent = transfers.sent_left[0]
        same["adjoints"] = all(
            torch.equal(a, b) for a, b in zip(sent, boundaries[mesh.sp_rank - 1], strict=True)
        )
    return same


def whole(
    operands: dict[str, Tensor], memories: list[Tensor], upstream: list[Tensor], sizes: Sizes
) -> dict[str, Tensor]:
    inputs, initial = leaves(operands), [leaf(m) for m in memories]
    y, state = compress_kv(
        **inputs,
        **settings(sizes),
        initial_state=CompressState(*initial),
        output_final_state=True,
        backend="chunkwise",
    )
    outputs = (y, state.key_memory, state.value_memory)
    loss = sum((out * up).sum() for out, up in zip(outputs, upstream, strict=True))
    names = [*(f"d{name}" for name in inputs), "dS0", "dR0"]
    grads = dict(zip(names, gradients_of(loss, [*inputs.values(), *initial]), strict=True))
    return {"y": y, "S": state.key_memory, "R": state.value_memory, **grads}


def boundary_adjoints(
    operands: dict[str, Tensor], memories: list[Tensor], upstream: list[Tensor], sizes: Sizes, pieces: int
) -> list[list[Tensor]]:
    """Adjoints of the memories between ``pieces`` consecutive calls in one process."""
    state, outputs, between = CompressState(*(leaf(m) for m in memories)), [], []
    for piece in range(pieces):
        part = {n: x if "readout" in n else x.chunk(pieces, dim=1)[piece] for n, x in operands.items()}
        y, state = compress_kv(
            **part, **settings(sizes), initial_state=state, output_final_state=True, backend="chunkwise"
        )
        outputs.append(y)
        between.append((state.key_memory, state.value_memory))
    outputs = [torch.cat(outputs, dim=1), state.key_memory, state.value_memory]
    loss = sum((out * up).sum() for out, up in zip(outputs, upstream, strict=True))
    flat = [memory for pair in between[:-1] for memory in pair]
    grads = gradients_of(loss, flat)
    return [grads[i : i + 2] for i in range(0, len(grads), 2)]


@pytest.mark.parametrize("sp", [2, 4])
@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(),
        Sizes(batch=1, chunk=1),
        Sizes(phi="ln_silu", readout="softmax", chunk=16, heads=3),
        Sizes(phi="tanh", readout="l2_silu", dtype=torch.float64, slots=32),
        Sizes(length=256, chunk=32, heads=4, width=32, value_width=32, slots=64),
        Sizes(own_gates=True, affine=True),
        CORRECTED,
        Sizes(update="corrected", phi="ln_silu", dtype=torch.float64, heads=4),
    ],
    ids=["default", "chunk1", "ln_silu", "fp64", "larger", "own-gates", "corrected", "corrected-ln_silu"],
)
def test_the_operation_is_bitwise_that_of_one_process(sp: int, sizes: Sizes):
    for rank, same in enumerate(ranks().run(parity, sp, sizes)):
        assert all(same.values()), f"rank {rank}: differs in {[name for name, ok in same.items() if not ok]}"


def packed_parity(sp: int, starts: list[int], sizes: Sizes) -> dict[str, float]:
    """Documents that start at ``starts`` of the flattened stream; largest difference to one process."""
    mesh = mesh_of(sp)
    operands, memories, upstream = make(sizes, seed=3)
    total = sizes.batch * sizes.length
    bounds = torch.tensor([*starts, total])
    learned = [leaf(m[:1]) for m in memories]
    state = CompressState(*(m.expand(len(starts), -1, -1, -1) for m in learned))
    stream = leaves(in_one_row(operands))
    y, _ = compress_kv(
        **stream,
        **settings(sizes),
        initial_state=state,
        layout=PackedLayout.from_cu_seqlens(bounds, sizes.chunk),
    )
    loss = (y.view_as(upstream[0]) * upstream[0]).sum()
    *expected, want_key, want_value = gradients_of(loss, [*stream.values(), *learned])

    segments = Segments(mesh, chunk_size=sizes.chunk)
    marks = torch.arange(total).view(sizes.batch, -1)
    _, _, local_bounds = segments.cut(marks, marks, bounds)
    local, layout = local_part(operands, mesh), None
    if local_bounds is not None:
        layout = PackedLayout.from_cu_seqlens(local_bounds, sizes.chunk)
        local = in_one_row(local)
    documents = sizes.batch if layout is None else layout.num_documents
    local, own = leaves(local), [leaf(m[:1]) for m in memories]
    state = CompressState(*(m.expand(documents, -1, -1, -1) for m in own))
    operation = StatePassing(Transfers(mesh), segments)
    y_local, _ = operation(**local, **settings(sizes), initial_state=state, layout=layout)
    up = segment(upstream[0], mesh)
    *grads, key, value = gradients_of((y_local.reshape(up.shape) * up).sum(), [*local.values(), *own])
    worst = {"y": (y_local.reshape(up.shape) - segment(y.view_as(upstream[0]), mesh)).abs().max()}
    pairs = {name: [grad, want] for name, grad, want in zip(local, grads, expected, strict=True)}
    pairs |= {"learned key": [key, want_key], "learned value": [value, want_value]}
    for name, (grad, want) in pairs.items():
        if name in operands and "readout" not in name:
            want = segment(want.view_as(operands[name]), mesh)
        else:
            dist.all_reduce(grad, group=mesh.sp_group)
        worst[name] = (grad.reshape(want.shape) - want).abs().max()
    dist.barrier()
    return {name: float(value) for name, value in worst.items()}


def in_one_row(operands: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: x if "readout" in n else x.flatten(0, 1).unsqueeze(0) for n, x in operands.items()}


@pytest.mark.parametrize("sp", [2, 4])
@pytest.mark.parametrize(
    "starts",
    [[0, 64], [0, 8, 24, 64, 112], [0, 32, 64, 96], [0, 16, 32, 40, 48, 64, 72]],
    ids=["rows", "ragged", "at-boundaries", "short-documents"],
)
def test_documents_cross_ranks_when_they_start_at_multiples_of_the_chunk_size(sp: int, starts: list[int]):
    for sizes in (Sizes(), replace(CORRECTED, chunk=8)):
        for worst in ranks().run(packed_parity, sp, starts, replace(sizes, dtype=torch.float64)):
            assert largest(worst.values()) < 1e-12, worst


def bytes_sent(sp: int, sizes: Sizes) -> tuple[list[int], list[int]]:
    """Sends of one forward and of one backward."""
    mesh = mesh_of(sp)
    operands, _, upstream = make(sizes, seed=0)
    operation = StatePassing(Transfers(mesh), Segments(mesh, chunk_size=sizes.chunk))
    local = leaves(local_part(operands, mesh))
    with counted_sends() as forward:
        y, _ = operation(**local, **settings(sizes))
    with counted_sends() as backward:
        gradients_of((y * segment(upstream[0], mesh)).sum(), list(local.values()))
    dist.barrier()
    return forward, backward


def test_bytes_sent_are_those_of_two_memories_and_constant_in_the_length():
    for length in (32, 128):
        sizes = Sizes(length=length, value_width=8)
        message = 2 * sizes.heads * sizes.slots * sizes.width * 4 * sizes.batch
        sent = ranks().run(bytes_sent, 4, sizes)
        assert [forward for forward, _ in sent] == [[message]] * 3 + [[]]
        assert [backward for _, backward in sent] == [[]] + [[message]] * 3


def zero_gradients_and_no_gradients(sp: int) -> float:
    """An evaluation without a graph between two backward passes, one of them with a zero gradient."""
    mesh, sizes = mesh_of(sp), Sizes()
    operands, _, upstream = make(sizes, seed=0)
    operation = StatePassing(Transfers(mesh), Segments(mesh, chunk_size=sizes.chunk))
    total = 0.0
    for factor in (0.0, 1.0):
        local = leaves(local_part(operands, mesh))
        with torch.no_grad():
            for _ in range(12):
                operation(**local, **settings(sizes))
        y, _ = operation(**local, **settings(sizes))
        # The last segment's loss ignores every token in the first pass.
        scale = factor if mesh.right is None else 1.0
        grads = gradients_of((y * segment(upstream[0], mesh)).sum() * scale, list(local.values()))
        total += float(grads[1].abs().sum())
    dist.barrier()
    return total


def test_every_rank_takes_part_when_its_gradient_is_zero_or_absent():
    assert all(total > 0 for total in ranks().run(zero_gradients_and_no_gradients, 4))


def order_of_events() -> list[str]:
    """What a middle rank does in one forward and backward, in order."""
    events: list[str] = []
    mesh, sizes = mesh_of(4), Sizes()

    def noted(name: str, function):
        def call(*args, **kwargs):
            events.append(name)
            return function(*args, **kwargs)

        return call

    transfers = Transfers(mesh)
    for name in ("expect_left", "send_right", "expect_right", "send_left"):
        setattr(transfers, name, noted(name, getattr(transfers, name)))
    operands, _, upstream = make(sizes, seed=0)
    local = leaves(local_part(operands, mesh))
    with pytest.MonkeyPatch.context() as patch:
        for name in (
            "scan_forward",
            "readout_forward",
            "readout_backward",
            "scan_backward",
            "input_backward",
        ):
            patch.setattr(stages, name, noted(name, getattr(stages, name)))
        patch.setattr(Arrival, "wait", noted("wait", Arrival.wait))
        y, _ = StatePassing(transfers, Segments(mesh, chunk_size=sizes.chunk))(**local, **settings(sizes))
        gradients_of((y * segment(upstream[0], mesh)).sum(), list(local.values()))
    dist.barrier()
    return events


def test_a_neighbour_waits_for_the_scans_only():
    forward = ["expect_left", "wait", "scan_forward", "send_right", "readout_forward"]
    backward = ["expect_right", "scan_forward", "readout_backward"]
    backward += ["wait", "scan_backward", "send_left", "input_backward"]
    assert ranks().run(order_of_events)[1] == forward + backward


def refused(sp: int) -> list[str]:
    mesh, messages = mesh_of(sp), []
    operands, memories, _ = make(Sizes(length=32), seed=0)
    operation = StatePassing(Transfers(mesh), Segments(mesh, chunk_size=8))
    inside = CompressState(*memories, *memories, offset=3)
    layout = PackedLayout.from_cu_seqlens(torch.tensor([0, 64]), 8)
    flat = in_one_row(operands)
    for inputs, options in (
        (operands, {"chunk_size": 5}),
        (operands, {"chunk_size": 8, "initial_state": inside}),
        (flat, {"chunk_size": 8, "layout": layout}),
        (operands, {"chunk_size": 8, "initial_state": CompressState(memories[0][:, :, 1:], memories[1])}),
        (operands, {"chunk_size": 8, "layout": PackedLayout.uniform(1, 16, 8)}),
        (operands, {"chunk_size": 8, "phi": "sine"}),
    ):
        try:
            operation(**inputs, **options)
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_what_cannot_be_passed_is_refused_before_anything_is_sent():
    for messages in ranks().run(refused, 4):
        assert len(messages) == 6
        assert "no multiple of the chunk size 5" in messages[0]
        assert "offset 3" in messages[1]
        assert "Segments.cut" in messages[2]
        assert "initial_state.key_memory has shape" in messages[3]
        assert "Segments.cut" in messages[4]
        assert "phi = 'sine'" in messages[5]


def tables_of_a_second_layer() -> int:
    """Tables that are made for a layer after the first one of a packed batch, forward and backward."""
    mesh, made = mesh_of(4), []
    sizes = Sizes()
    segments, transfers = Segments(mesh, chunk_size=sizes.chunk), Transfers(mesh)
    operands, _, _ = make(sizes, seed=0)
    bounds = torch.tensor([0, 8, 24, 64, 80, 128])
    tokens = torch.zeros(2, 64, dtype=torch.int64)
    _, _, local_bounds = segments.cut(tokens, tokens, bounds)
    local = leaves(local_part(operands, mesh))
    layout = None
    if local_bounds is not None:
        layout = PackedLayout.from_cu_seqlens(local_bounds, sizes.chunk)
        local = leaves(in_one_row(local))
    real = torch.tensor
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "tensor", lambda *args, **kwargs: made.append(args) or real(*args, **kwargs))
        for _ in range(2):
            made.clear()
            y, _ = StatePassing(transfers, segments)(**local, **settings(sizes), layout=layout)
            gradients_of(y.sum(), list(local.values()))
    dist.barrier()
    return len(made)


def test_layers_of_a_batch_share_their_tables():
    """On a GPU each would wait for the device, and that for a neighbour."""
    assert ranks().run(tables_of_a_second_layer) == [0] * 4


def test_row_ends_name_the_outer_documents_of_each_row():
    assert row_ends((4, 4, 8, 2, 6), 3) == ((0, 2, 3), (1, 2, 4))
