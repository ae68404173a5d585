"""The chunkwise backend against the token recurrence in fp64: outputs, states and every gradient."""

from __future__ import annotations

import pytest
import torch

from kernels import CompressState, chunkwise, compress_kv, decode_step
from kernels.activations import PHI, READOUT
from tests.kernels.helpers import assert_close, assert_equal, make_memories, make_operands, run

TOLERANCE = 1e-12


@pytest.mark.parametrize("readout", READOUT)
@pytest.mark.parametrize("phi", PHI)
def test_equals_the_recurrence_for_every_activation(phi: str, readout: str) -> None:
    operands = make_operands(length=37)
    memories = make_memories(operands)
    options = {"chunk_size": 8, "phi": phi, "readout": readout}
    expected = run(operands, memories, backend="reference", **options)
    assert_close(run(operands, memories, backend="chunkwise", **options), expected, TOLERANCE)


@pytest.mark.parametrize("length", (1, 63, 64, 65, 200))
@pytest.mark.parametrize("chunk_size", (1, 16, 64))
def test_equals_the_recurrence_at_every_length(chunk_size: int, length: int) -> None:
    operands = make_operands(1, length, 2, d=6, v=4, m=5, seed=length)
    memories = make_memories(operands)
    expected = run(operands, memories, backend="reference", chunk_size=chunk_size)
    assert_close(run(operands, memories, backend="chunkwise", chunk_size=chunk_size), expected, TOLERANCE)


@pytest.mark.parametrize("offset", (0, 3, (5, 0)))
@pytest.mark.parametrize("length", (2, 5, 19))
def test_continues_a_state_at_any_offset(length: int, offset: int | tuple[int, ...]) -> None:
    operands = make_operands(length=length, seed=5)
    memories = make_memories(operands)
    options = {"offset": offset, "chunk_size": 8, "phi": "tanh", "readout": "l2_silu"}
    expected = run(operands, memories, backend="reference", **options)
    assert_close(run(operands, memories, backend="chunkwise", **options), expected, TOLERANCE)


@pytest.mark.parametrize("wrong", ("dq", "dk", "dv", "dalpha", "dlog_decay", "dstep_size", "dkey_memory"))
def test_the_comparison_sees_a_gradient_that_is_twice_too_large(wrong: str) -> None:
    operands = make_operands(1, 9)
    memories = make_memories(operands)
    expected = run(operands, memories, backend="reference", chunk_size=4)
    assert expected[wrong].abs().amax() > 1e-3, "the case does not exercise this gradient"
    actual = expected | {wrong: 2 * expected[wrong]}
    with pytest.raises(AssertionError, match=wrong):
        assert_close(actual, expected, TOLERANCE)


def test_fp32_is_fp32_and_bf16_keeps_fp32_memories() -> None:
    expected = run(make_operands(d=16, v=16, m=16), chunk_size=16)
    actual = run(make_operands(d=16, v=16, m=16, dtype=torch.float32), chunk_size=16)
    assert_close(actual, expected, 5e-6)
    low = {
        name: x.detach().bfloat16().requires_grad_() for name, x in make_operands(d=16, v=16, m=16).items()
    }
    rounded = {name: x.detach().double().requires_grad_() for name, x in low.items()}
    actual, expected = run(low, chunk_size=16), run(rounded, chunk_size=16)
    assert actual["y"].dtype == actual["dk"].dtype == torch.bfloat16
    assert actual["key_memory"].dtype == torch.float32
    assert_close(actual, expected, 2e-2)
    assert_close({"S": actual["key_memory"]}, {"S": expected["key_memory"]}, 5e-6)


def test_autocast_does_not_reach_memories_or_gates() -> None:
    operands = make_operands(dtype=torch.float32)
    plain = run(operands, chunk_size=16)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(run(operands, chunk_size=16), plain)


@pytest.mark.parametrize("decay", (-80.0, -1e-30, 0.0))
def test_extreme_decay_stays_finite_and_exact(decay: float) -> None:
    operands = make_operands(1, 40)
    operands["log_decay"] = torch.full_like(operands["log_decay"], decay).requires_grad_()
    options = {"chunk_size": 16}
    expected = run(operands, backend="reference", **options)
    actual = run(operands, backend="chunkwise", **options)
    if decay == -80.0:  # the true gradient of log beta is about e^-80: what is left is rounding
        assert actual.pop("dlog_decay").abs().amax() < 1e-14
        assert expected.pop("dlog_decay").abs().amax() < 1e-14
    assert_close(actual, expected, TOLERANCE)
    single = {name: x.detach().float().requires_grad_() for name, x in operands.items()}
    assert all(x.isfinite().all() for x in run(single, **options).values())


def test_equal_keys_stay_exact() -> None:
    operands = make_operands(1, 50)
    for name in ("k", "v"):
        operands[name] = operands[name].detach()[:, :1].expand_as(operands[name]).clone().requires_grad_()
    expected = run(operands, backend="reference", chunk_size=16)
    assert_close(run(operands, backend="chunkwise", chunk_size=16), expected, TOLERANCE)


def test_zero_steps_leave_only_decay() -> None:
    operands = make_operands(1, 20)
    memories = make_memories(operands)
    operands["step_size"] = torch.zeros_like(operands["step_size"]).requires_grad_()
    final = run(operands, memories, chunk_size=8)
    factor = operands["log_decay"].sum(1).exp()[..., None, None]
    torch.testing.assert_close(final["key_memory"], memories["key_memory"] * factor, rtol=1e-13, atol=0)


def test_the_size_of_the_pieces_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    operands = make_operands(3, 100, 2, d=16, v=16, m=16, dtype=torch.float32)
    memories = make_memories(operands)
    results = []
    for matrices in (1, 12, 10_000):
        monkeypatch.setattr(chunkwise, "MATRICES", matrices)
        results.append(run(operands, memories, offset=(3, 0, 9), chunk_size=16))
    assert_equal(results[1], results[0])
    assert_equal(results[2], results[0])


def test_gradients_only_where_asked_and_none_where_no_output_needs_them() -> None:
    operands = {name: x.detach() for name, x in make_operands(1, 10).items()}
    operands["v"].requires_grad_()
    _, state = compress_kv(**operands, chunk_size=4, output_final_state=True)
    assert state is not None
    state.key_memory.sum().backward()  # the key memory does not see v
    assert operands["v"].grad is not None
    assert operands["v"].grad.abs().amax() == 0
    assert operands["q"].grad is None


def test_identity_with_single_token_chunks_is_deltanet() -> None:
    """phi = identity, C = 1, beta = 1, alpha as the target: two delta-rule memories in a row."""
    operands = {name: x.detach() for name, x in make_operands(2, 33).items()}
    operands["log_decay"] = torch.zeros_like(operands["log_decay"])
    y, state = compress_kv(
        **operands, chunk_size=1, phi="identity", readout="softmax", output_final_state=True
    )
    assert state is not None
    hidden, keys = delta_rule(operands["q"], operands["k"], operands["alpha"], operands["step_size"])
    torch.testing.assert_close(state.key_memory, keys, rtol=1e-12, atol=1e-13)
    memory = torch.zeros(*state.value_memory.shape, dtype=torch.float64)
    for t in range(33):
        v, gamma = operands["v"][:, t], operands["step_size"][:, t, :, None, None]
        residual = operands["alpha"][:, t] - torch.einsum("bhmv,bhv->bhm", memory, v)
        memory = memory + gamma * residual[..., :, None] * v[..., None, :]
        expected = torch.einsum("bhmv,bhm->bhv", memory, torch.softmax(hidden[:, t], -1))
        torch.testing.assert_close(y[:, t], expected, rtol=1e-11, atol=1e-13)


def delta_rule(
    q: torch.Tensor, k: torch.Tensor, target: torch.Tensor, step: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """DeltaNet in its textbook form W (I - g k k^T) + g target k^T, with outputs W q."""
    batch, length, heads, width = k.shape
    outputs = torch.empty_like(target)
    memories = torch.zeros(batch, heads, target.shape[-1], width, dtype=k.dtype)
    for b in range(batch):
        for h in range(heads):
            for t in range(length):
                key, g = k[b, t, h], step[b, t, h]
                erase = torch.eye(width, dtype=k.dtype) - g * torch.outer(key, key)
                memories[b, h] = memories[b, h] @ erase + g * torch.outer(target[b, t, h], key)
                outputs[b, t, h] = memories[b, h] @ q[b, t, h]
    return outputs, memories


def test_gradcheck() -> None:
    operands = make_operands(1, 5, 1, d=2, v=3, m=3)
    memories = make_memories(operands)

    def call(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        state = CompressState(*tensors[6:], offset=1)
        y, final = compress_kv(*tensors[:6], chunk_size=3, initial_state=state, output_final_state=True)
        assert final is not None
        return y, final.key_memory, final.value_memory

    assert torch.autograd.gradcheck(call, (*operands.values(), *memories.values()))


@pytest.mark.parametrize("phi", PHI)
@pytest.mark.parametrize("prefill", (0, 5, 8))
def test_prefill_and_decode_equal_the_parallel_form(prefill: int, phi: str) -> None:
    operands = {name: x.detach() for name, x in make_operands(2, 21).items()}
    memories = {name: x.detach() for name, x in make_memories(operands).items()}
    options = {"chunk_size": 8, "phi": phi, "readout": "ln_silu"}
    state = CompressState(memories["key_memory"], memories["value_memory"])
    whole, end = compress_kv(**operands, initial_state=state, output_final_state=True, **options)
    if prefill:
        head = {name: x[:, :prefill] for name, x in operands.items()}
        _, after = compress_kv(**head, initial_state=state, output_final_state=True, **options)
        assert after is not None
        state = after
    for t in range(prefill, 21):
        y, state = decode_step(*(x[:, t] for x in operands.values()), state, **options)
        torch.testing.assert_close(y, whole[:, t], rtol=1e-11, atol=1e-13)
    assert end is not None
    assert state.offset == end.offset == 5
    for name in ("key_memory", "value_memory", "key_chunk_start", "value_chunk_start"):
        torch.testing.assert_close(getattr(state, name), getattr(end, name), rtol=1e-11, atol=1e-13)


def test_decode_follows_documents_at_different_offsets() -> None:
    operands = {name: x.detach() for name, x in make_operands(1, 12).items()}
    cu_seqlens = torch.tensor([0, 4, 12])
    _, state = compress_kv(**operands, chunk_size=5, cu_seqlens=cu_seqlens, output_final_state=True)
    assert state is not None
    assert state.offset == (4, 3)
    token = [
        x[:, :2].transpose(0, 1).squeeze(1) for x in operands.values()
    ]  # one more token for each document
    for _ in range(3):
        y, state = decode_step(*token, state, chunk_size=5)
    for n, (begin, end) in enumerate(((0, 4), (4, 12))):
        more = [
            torch.cat((x[:, begin:end], *[t[None, None, n]] * 3), 1) for x, t in zip(operands.values(), token)
        ]
        alone, _ = compress_kv(*more, chunk_size=5)
        torch.testing.assert_close(y[n], alone[0, -1], rtol=1e-11, atol=1e-13)


def test_decode_backward_matches_the_parallel_form() -> None:
    operands = make_operands(1, 1)
    memories = make_memories(operands)
    state = CompressState(**memories, offset=2)
    inputs = [*operands.values(), *memories.values()]
    y, _ = decode_step(*(x[:, 0] for x in operands.values()), state, chunk_size=4, phi="softmax")
    expected, _ = compress_kv(**operands, initial_state=state, chunk_size=4, phi="softmax")
    torch.testing.assert_close(y, expected[:, 0], rtol=1e-12, atol=1e-14)
    for a, b in zip(
        torch.autograd.grad(y.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
