"""The chunkwise backend against the token recurrence at every size, in fp64 and below, and by gradcheck."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from kernels import CompressState, chunkwise, compress_kv
from kernels.activations import UPDATE
from tests.kernels.helpers import (
    AFFINE,
    MEMORIES,
    OWN_GATES,
    assert_close,
    assert_equal,
    assert_matches_reference,
    case_seed,
    detached,
    error,
    make_memories,
    make_operands,
    run,
    slowed,
)

EVERYTHING = (*OWN_GATES, *AFFINE)
DEFAULT: dict[str, Any] = {}
CORRECTED: dict[str, Any] = {"phi": "tanh", "readout": "silu_rms", "update": "corrected"}


@pytest.fixture(autouse=True)
def _poisoned_scratch() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    yield
    torch.use_deterministic_algorithms(False)


def test_scratch_is_poisoned_here() -> None:
    assert torch.empty(64).isnan().all()


@pytest.mark.parametrize("length", (1, 63, 64, 65, 600))  # 600: whole chunks of every size and a part
@pytest.mark.parametrize("chunk_size", (1, 16, 64, 128, 512))
@pytest.mark.parametrize("rule", (DEFAULT, CORRECTED), ids=("default", "corrected"))
def test_equals_the_recurrence_at_every_length(rule: dict[str, Any], chunk_size: int, length: int) -> None:
    seed = case_seed(rule, chunk_size, length)
    operands = make_operands(1, length, 2, d=6, v=4, m=5, seed=seed, extra=EVERYTHING if rule else ())
    scale = 16 / max(16, chunk_size)  # a chunk decays by some e, and its stale steps add up to about 2
    operands = slowed(operands, decay=scale, step=1 if rule else scale)
    memories = make_memories(operands, seed=seed + 1)
    assert_matches_reference(operands, memories, seed=seed + 2, chunk_size=chunk_size, **rule)


@pytest.mark.parametrize("offset", (0, 3, (5, 0), (7, 2)))
@pytest.mark.parametrize("length", (1, 2, 5, 19))
@pytest.mark.parametrize("update", UPDATE)
def test_continues_a_state_at_any_offset(update: str, length: int, offset: int | tuple[int, ...]) -> None:
    seed = case_seed(update, length, offset)
    operands = make_operands(length=length, seed=seed, extra=EVERYTHING)
    memories = make_memories(operands, seed=seed + 1)
    rule = {"phi": "softmax", "readout": "l2_silu", "update": update}
    assert_matches_reference(operands, memories, seed=seed + 2, offset=offset, chunk_size=8, **rule)


@pytest.mark.parametrize("update", UPDATE)
def test_packed_documents_equal_the_recurrence(update: str) -> None:
    """Documents of every kind at once: of one token, within a chunk, ending with one, entered inside one."""
    lengths, offsets = (1, 3, 13, 40, 2, 8), (7, 0, 3, 0, 4, 0)
    operands = make_operands(1, sum(lengths), seed=case_seed(update), extra=EVERYTHING)
    assert_matches_reference(
        operands,
        make_memories(operands, len(lengths)),
        offset=offsets,
        chunk_size=8,
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
        phi="tanh",
        readout="silu_rms",
        update=update,
    )


@pytest.mark.parametrize("update", UPDATE)
def test_the_size_of_the_pieces_changes_no_bit(update: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operands = make_operands(3, 100, 2, d=16, v=16, m=16, dtype=torch.float32, extra=OWN_GATES)
    memories = make_memories(operands)
    results = []
    for matrices in (1, 12, 10_000):
        monkeypatch.setattr(chunkwise, "MATRICES", matrices)
        monkeypatch.setattr(chunkwise, "TOKENS", 16)
        results.append(run(operands, memories, offset=(3, 0, 9), chunk_size=16, update=update))
    assert_equal(results[1], results[0])
    assert_equal(results[2], results[0])


@pytest.mark.parametrize("update", UPDATE)
def test_fp32_is_fp32_and_bf16_keeps_fp32_memories(update: str) -> None:
    operands = make_operands(d=16, v=16, m=16, extra=EVERYTHING)
    options = {"chunk_size": 16, "update": update}
    single = {name: x.detach().float().requires_grad_() for name, x in operands.items()}
    assert_close(run(single, **options), run(operands, **options), 5e-6)
    low = {name: x.detach().bfloat16().requires_grad_() for name, x in operands.items()}
    rounded = {name: x.detach().double().requires_grad_() for name, x in low.items()}
    actual, expected = run(low, **options), run(rounded, **options)
    assert {actual[name].dtype for name in ("y", *(f"d{name}" for name in operands))} == {torch.bfloat16}
    assert_close(actual, expected, 2e-2)
    memories = {name: actual[name] for name in MEMORIES}
    assert {x.dtype for x in memories.values()} == {torch.float32}
    assert_close(memories, {name: expected[name] for name in MEMORIES}, 5e-6)


@pytest.mark.parametrize("gates", (torch.float16, torch.bfloat16, torch.float32, torch.float64))
def test_gates_of_any_dtype_are_computed_in_fp32(gates: torch.dtype) -> None:
    operands = make_operands(1, 40, d=16, v=16, m=16, dtype=torch.float32, extra=EVERYTHING)
    mixed, exact = dict(operands), dict(operands)
    for name in ("log_decay", "step_size", *EVERYTHING):
        mixed[name] = operands[name].detach().to(gates).requires_grad_()
        exact[name] = mixed[name].detach().float().requires_grad_()
    actual, expected = run(mixed, chunk_size=16), run(exact, chunk_size=16)
    assert all(actual[f"d{name}"].dtype == mixed[name].dtype for name in operands)
    assert_equal(actual, {name: x.to(actual[name].dtype) for name, x in expected.items()})


def test_an_fp64_gate_is_not_rounded_where_the_call_is_fp64() -> None:
    operands = make_operands(1, 20)
    exact = run(operands, chunk_size=8)
    operands["log_decay"] = operands["log_decay"].detach().float().requires_grad_()
    assert 1e-12 < error(run(operands, chunk_size=8)["y"], exact["y"]) < 1e-5


def test_strides_and_repeated_arguments_do_not_matter() -> None:
    operands = make_operands(2, 20)
    expected = run(operands, chunk_size=8)
    strided = {name: x.detach().transpose(0, 1).contiguous().transpose(0, 1) for name, x in operands.items()}
    assert not strided["q"].is_contiguous()
    assert_equal(run({name: x.requires_grad_() for name, x in strided.items()}, chunk_size=8), expected)
    copies = detached(operands) | {"v": operands["k"].detach().clone().requires_grad_()}
    copies["value_step_size"] = copies["step_size"].detach().clone().requires_grad_()
    apart = run(copies, chunk_size=8)
    shared = copies | {"v": copies["k"], "value_step_size": copies["step_size"]}
    together = run(shared, chunk_size=8)
    assert_equal({"dk": together["dk"]}, {"dk": apart["dk"] + apart["dv"]})
    assert_equal({"d": together["dstep_size"]}, {"d": apart["dstep_size"] + apart["dvalue_step_size"]})


def test_gradients_only_where_asked_and_none_where_no_output_needs_them() -> None:
    operands = {name: x.detach() for name, x in make_operands(1, 10).items()}
    operands["v"].requires_grad_()
    _, state = compress_kv(**operands, chunk_size=4, output_final_state=True)
    assert state is not None
    state.key_memory.sum().backward()  # the key memory does not see v
    assert operands["v"].grad is not None
    assert operands["v"].grad.abs().amax() == 0
    assert operands["q"].grad is None


def test_without_gradients_nothing_is_kept() -> None:
    operands = make_operands(1, 10)
    with torch.no_grad():
        y, _ = compress_kv(**operands, chunk_size=4)
    assert y.grad_fn is None
    y, _ = compress_kv(**{name: x.detach() for name, x in operands.items()}, chunk_size=4)
    assert y.grad_fn is None


@pytest.mark.parametrize("update", UPDATE)
@pytest.mark.parametrize(
    "phi, readout",
    [
        ("silu", "silu_rms"),
        ("tanh", "ln_silu"),
        ("ln_silu", "l2_silu"),
        ("softmax", "softmax"),
        ("identity", "silu"),
    ],
)
def test_gradcheck(phi: str, readout: str, update: str) -> None:
    """Nothing but differences of the function itself: own gates, affine, states on both ends."""
    operands = make_operands(1, 5, 1, d=2, v=3, m=3, seed=case_seed(phi, update), extra=EVERYTHING)
    memories = make_memories(operands)

    def call(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        named = dict(zip(operands, tensors, strict=False))
        y, final = compress_kv(
            **named,
            chunk_size=3,
            phi=phi,
            readout=readout,
            update=update,
            initial_state=CompressState(*tensors[len(operands) :], offset=1),
            output_final_state=True,
            check_values=False,  # differences may leave the range of the gates
        )
        assert final is not None
        return y, *(getattr(final, name) for name in MEMORIES)

    assert torch.autograd.gradcheck(call, (*operands.values(), *memories.values()))
