"""The custom operators: opcheck, torch.compile, checkpoints, autocast, fake tensors; what backward keeps."""

from __future__ import annotations

import functools
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch._inductor.config
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from kernels import CompressState, PackedLayout, chunkwise, compress_kv
from kernels.activations import UPDATE
from tests.kernels.helpers import (
    AFFINE,
    MEMORIES,
    OWN_GATES,
    assert_equal,
    case_seed,
    detached,
    make_memories,
    make_operands,
    run,
)

EVERYTHING = (*OWN_GATES, *AFFINE)
FORWARD = torch.ops.trellis.compress.default
BACKWARD = torch.ops.trellis.compress_backward.default


class Call(NamedTuple):
    """What the operator is called with, apart from the rule."""

    extra: tuple[str, ...] = ()
    batch: int = 2
    length: int = 10
    bounds: tuple[int, ...] | None = None
    offsets: tuple[int, ...] = (0,)
    pair: bool = False
    dtype: torch.dtype = torch.float64


LEAST = Call()
EVERY = Call(EVERYTHING, offsets=(1,), pair=True)
SOME = Call((OWN_GATES[0], AFFINE[0]), length=1, dtype=torch.float32)
OTHERS = Call((OWN_GATES[1], AFFINE[1]), offsets=(3, 0), pair=True)
PACKED = Call(batch=1, length=20, bounds=(0, 7, 20))
PACKED_EVERY = Call(EVERYTHING, 1, 21, (0, 7, 8, 21), (1, 0, 3), True, torch.bfloat16)


def forward_arguments(call: Call, phi: str, readout: str, update: str) -> tuple[Any, ...]:
    seed = case_seed(call, phi, update)
    operands = make_operands(call.batch, call.length, extra=call.extra, seed=seed, dtype=call.dtype)
    documents = call.batch if call.bounds is None else len(call.bounds) - 1
    memories = make_memories(operands, documents, seed=seed + 1)
    bounds = None if call.bounds is None else torch.tensor(call.bounds)
    return (
        *(operands.get(name) for name in ("q", "k", "v", "alpha", "log_decay", "step_size", *EVERYTHING)),
        *(memories[name] if call.pair or "memory" in name else None for name in MEMORIES),
        *(bounds, list(call.offsets), 4, phi, readout, update, "chunkwise"),
    )


@pytest.mark.parametrize(
    "call, phi, update",
    [
        (LEAST, "identity", "stale"),
        (LEAST, "silu", "corrected"),
        (EVERY, "silu", "stale"),
        (EVERY, "identity", "corrected"),
        (SOME, "softmax", "stale"),
        (OTHERS, "tanh", "corrected"),
        (PACKED, "ln_silu", "stale"),
        (PACKED_EVERY, "silu", "corrected"),
    ],
)
def test_opcheck(call: Call, phi: str, update: str) -> None:
    """Schema, autograd registration, fake kernels and dynamic shapes, of forward and of backward."""
    arguments = forward_arguments(call, phi, "silu_rms", update)
    torch.library.opcheck(FORWARD, arguments)
    tensors = [None if x is None else x.detach() for x in arguments[:15]]
    with torch.no_grad():
        y, *memories = FORWARD(*tensors, *arguments[15:])
    g = torch.Generator().manual_seed(3)
    upstream = [torch.randn(x.shape, generator=g).to(x.dtype) for x in (y, *memories[:4])]
    missing: list[tuple[int, ...]] = [(), (0,), (1, 2, 4)] if call is LEAST else [()]
    for absent in missing:
        grads = [None if i in absent else x for i, x in enumerate(upstream)]
        slots = (*tensors[:10], *tensors[12:14], *memories[4:], tensors[14], *grads)
        present = [x is not None for x in slots]
        torch.library.opcheck(BACKWARD, ([x for x in slots if x is not None], present, *arguments[15:]))


@pytest.fixture
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._inductor.config.patch(compile_threads=1):
        yield
    torch._dynamo.reset()


def outputs_and_gradients(
    function: Callable[..., tuple[Tensor, ...]], inputs: dict[str, Tensor], *rest: object
) -> dict[str, Tensor]:
    """Of a function of named inputs, for the upstream gradients cos(output)."""
    outputs = function(inputs, *rest)
    grads = torch.autograd.grad([x.float().sin().sum() for x in outputs], list(inputs.values()))
    return {str(i): x for i, x in enumerate(outputs)} | {
        f"d{name}": x for name, x in zip(inputs, grads, strict=True)
    }


def block(inputs: dict[str, Tensor], layout: PackedLayout | None = None) -> tuple[Tensor, ...]:
    """The operation between other ones, as in a model; all its options."""
    operands = {name: x for name, x in inputs.items() if name not in MEMORIES}
    operands["alpha"] = operands["alpha"] * 2
    memories = {name: x for name, x in inputs.items() if name in MEMORIES}
    state = CompressState(**memories, offset=1) if memories else None
    y, final = compress_kv(
        **operands,  # type: ignore[arg-type]
        chunk_size=4,
        update="corrected",
        readout="silu_rms",
        initial_state=state,
        layout=layout,
        output_final_state=state is not None,
    )
    return (y + 1, *(getattr(final, name) for name in MEMORIES if final is not None))


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("dynamic", (None, True))
def test_compiled_rows_are_bitwise_the_eager_ones(dynamic: bool | None) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, backend=counter, dynamic=dynamic)
    for length in (12, 20, 21):
        operands = make_operands(2, length, extra=EVERYTHING, seed=length)
        inputs = operands | make_memories(operands)
        assert_equal(outputs_and_gradients(compiled, inputs), outputs_and_gradients(block, inputs))
    assert counter.frame_count == (1 if dynamic else 2), "12, then any length"


@pytest.mark.usefixtures("_fresh_dynamo")
def test_another_packing_of_as_many_tokens_is_not_compiled_again() -> None:
    """With inductor where it can run; what sees the operator is the same without it."""
    headers = Path(sysconfig.get_path("include"), "Python.h")
    counter = CompileCounterWithBackend(
        "inductor" if shutil.which("g++") and headers.exists() else "aot_eager"
    )
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    operands = make_operands(1, 20, extra=EVERYTHING, dtype=torch.float32)
    for bounds in ([0, 7, 20], [0, 11, 20], [0, 19, 20]):
        layout = PackedLayout.from_cu_seqlens(torch.tensor(bounds), 4)
        expected = outputs_and_gradients(block, operands, layout)
        assert_equal(outputs_and_gradients(compiled, operands, layout), expected)
    assert counter.frame_count == 1


@pytest.mark.usefixtures("_fresh_dynamo")
def test_with_dynamic_shapes_no_packing_is_compiled_again() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, backend=counter, dynamic=True)
    for length, bounds in ((20, [0, 7, 20]), (20, [0, 3, 9, 20]), (24, [0, 4, 5, 20, 24])):
        operands = make_operands(1, length, extra=EVERYTHING, seed=length)
        layout = PackedLayout.from_cu_seqlens(torch.tensor(bounds), 4)
        expected = outputs_and_gradients(block, operands, layout)
        assert_equal(outputs_and_gradients(compiled, operands, layout), expected)
    assert counter.frame_count == 1


@pytest.mark.usefixtures("_fresh_dynamo")
def test_a_graph_refuses_a_layout_that_is_not_its_operands() -> None:
    """Tokens that no document holds would come out as whatever lay in memory."""
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    operands = make_operands(1, 20, extra=EVERYTHING)
    for bounds in ([0, 7, 16], [0, 7, 24]):
        layout = PackedLayout.from_cu_seqlens(torch.tensor(bounds), 4)
        with pytest.raises(ValueError, match=f"layout counts {bounds[-1]} tokens, the operands 20"):
            compiled(operands, layout)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="layout has chunk_size 5, the call 4"):
        compiled(operands, PackedLayout.from_cu_seqlens(torch.tensor([0, 7, 20]), 5))


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("update", UPDATE)
def test_autocast_changes_neither_memories_nor_gates(update: str) -> None:
    """Eager and compiled: operands are taken as they come, everything inside is fp32."""
    operands = make_operands(2, 40, d=16, v=16, m=16, dtype=torch.float32, extra=EVERYTHING)
    memories = make_memories(operands)
    options = {"chunk_size": 16, "update": update, "offset": 3}
    plain = run(operands, memories, **options)
    with torch.autocast("cpu", torch.bfloat16):
        for backend in ("chunkwise", "reference"):
            expected = run(operands, memories, backend=backend, **options)
            assert expected["key_memory"].dtype == torch.float32
            if backend == "chunkwise":
                assert_equal(expected, plain)
    inputs = operands | memories
    expected = outputs_and_gradients(block, inputs)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(outputs_and_gradients(compiled, inputs), expected)


def three(*tensors: Tensor) -> tuple[Tensor, ...]:
    y, state = compress_kv(*tensors, chunk_size=4, update="corrected", output_final_state=True)  # type: ignore[misc]
    assert state is not None
    assert state.value_chunk_start is not None
    return y, state.key_memory, state.value_chunk_start


def gradients(outputs: tuple[Tensor, ...], operands: dict[str, Tensor]) -> dict[str, Tensor]:
    """By way of backward(), the only one that reentrant checkpointing has."""
    sum(x.sin().sum() for x in outputs).backward()  # type: ignore[union-attr]
    return {name: x.grad for name, x in operands.items() if x.grad is not None}


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each run of the chunkwise forward."""
    calls: list[int] = []
    whole = chunkwise.forward

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return whole(*args, **options)

    monkeypatch.setattr(chunkwise, "forward", counted)
    return calls


@pytest.mark.parametrize("reentrant", (False, True))
def test_a_checkpointed_call_is_bitwise_the_plain_one(reentrant: bool, forwards: list[int]) -> None:
    operands = make_operands(2, 21, dtype=torch.float32)
    plain, again = detached(operands), detached(operands)
    outputs = three(*plain.values())
    expected = gradients(outputs, plain)
    assert len(forwards) == 1
    recomputed = checkpoint(three, *again.values(), use_reentrant=reentrant)
    assert all(torch.equal(a, b) for a, b in zip(recomputed, outputs, strict=True))
    assert_equal(gradients(recomputed, again), expected)
    assert len(forwards) == 3


def test_a_selective_policy_keeps_the_operators_outputs(forwards: list[int]) -> None:
    operands = make_operands(2, 21, dtype=torch.float32)
    plain, again = detached(operands), detached(operands)
    expected = gradients(three(*plain.values()), plain)
    policy = functools.partial(create_selective_checkpoint_contexts, [FORWARD])
    outputs = checkpoint(three, *again.values(), use_reentrant=False, context_fn=policy)
    assert_equal(gradients(outputs, again), expected)
    assert len(forwards) == 2, "one run of each"


def test_double_backward_is_refused() -> None:
    operands = make_operands(1, 9)
    y, _ = compress_kv(**operands, chunk_size=4)  # type: ignore[arg-type]
    (dq,) = torch.autograd.grad(y.sum(), operands["q"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"trellis\.compress_backward.*no autograd formula"):
        torch.autograd.grad(dq.sum(), operands["k"])


def test_backward_keeps_operands_and_memories_at_starts_of_pieces_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chunkwise, "MATRICES", 1)
    monkeypatch.setattr(chunkwise, "TOKENS", 16)
    operands = make_operands(2, 64, 1, extra=EVERYTHING)
    memories = make_memories(operands)
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        state = CompressState(**memories, offset=1)
        compress_kv(**operands, chunk_size=4, initial_state=state)  # type: ignore[arg-type]
    inputs = {x.data_ptr() for x in (operands | memories).values()}
    others = [tuple(x.shape) for x in kept if x.data_ptr() not in inputs]
    pieces = -(-65 // 16)
    assert others == [(2 * pieces, 1, 6, 5), (2 * pieces, 1, 6, 7)]


def test_shapes_are_known_without_values() -> None:
    operands = make_operands(2, 21, extra=EVERYTHING, dtype=torch.bfloat16)
    meta = {name: x.detach().to("meta").requires_grad_() for name, x in operands.items()}
    found = run_shapes(meta)
    assert found == run_shapes(operands)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {name: mode.from_tensor(x) for name, x in operands.items()}
        assert run_shapes(fake) == found


def run_shapes(operands: dict[str, Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of outputs and gradients; gate values cannot be looked at everywhere."""
    y, final = compress_kv(**operands, chunk_size=4, output_final_state=True, check_values=False)  # type: ignore[arg-type]
    assert final is not None
    grads = torch.autograd.grad(y.sum() + final.key_memory.sum(), list(operands.values()))
    results = {"y": y, **{name: getattr(final, name) for name in MEMORIES}, **dict(zip(operands, grads))}
    return {name: (tuple(x.shape), x.dtype) for name, x in results.items()}
