"""With phi = identity the operation is two delta rules in a row, written here in their textbook form.

    DeltaNet           S_t = S_{t-1} (I - gamma_t k_t k_t^T) + gamma_t alpha_t k_t^T
    gated delta rule   S_t = S_{t-1} (beta_t (I - gamma_t k_t k_t^T)) + gamma_t alpha_t k_t^T

R is the same with v for k; y_t = R_t^T f(S_t q_t). Nothing is imported from ``kernels`` but the operation:
states, outputs and, through autograd, every gradient are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from kernels import CompressState, compress_kv
from tests.kernels.helpers import OWN_GATES, assert_close, case_seed, make_memories, make_operands

LENGTH = 70
CHUNK_SIZES = (1, 2, 7, 16, 64)
STATES = ("key_memory", "value_memory")


def delta_rule(x: Tensor, target: Tensor, decay: Tensor, step: Tensor, memory: Tensor) -> Tensor:
    """Memories after every token [T, B, H, M, F] for x [B, T, H, F], target [B, T, H, M], gates [B, T, H]."""
    identity = torch.eye(x.shape[-1], dtype=x.dtype)
    memories = []
    for t in range(x.shape[1]):
        gamma = step[:, t, :, None, None]
        erase = identity - gamma * torch.einsum("bhi,bhj->bhij", x[:, t], x[:, t])
        write = gamma * torch.einsum("bhm,bhf->bhmf", target[:, t], x[:, t])
        memory = memory @ (decay[:, t].exp()[:, :, None, None] * erase) + write
        memories.append(memory)
    return torch.stack(memories)


def two_delta_rules(
    operands: Mapping[str, Tensor], memories: Mapping[str, Tensor], f: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Outputs and final memories of both passes."""
    alpha, decay, step = operands["alpha"], operands["log_decay"], operands["step_size"]
    value_gates = operands.get("value_log_decay", decay), operands.get("value_step_size", step)
    S = delta_rule(operands["k"], alpha, decay, step, memories["key_memory"])
    R = delta_rule(operands["v"], alpha, *value_gates, memories["value_memory"])
    hidden = torch.einsum("tbhmd,bthd->bthm", S, operands["q"])
    y = torch.einsum("tbhmv,bthm->bthv", R, f(hidden))
    return {"y": y, "key_memory": S[-1], "value_memory": R[-1]}


def compressed(
    operands: Mapping[str, Tensor], memories: Mapping[str, Tensor], **options: object
) -> dict[str, Tensor]:
    state = CompressState(**memories)
    y, final = compress_kv(
        **operands, initial_state=state, output_final_state=True, phi="identity", **options
    )  # type: ignore[arg-type]
    assert final is not None
    return {"y": y, "key_memory": final.key_memory, "value_memory": final.value_memory}


def with_gradients(results: dict[str, Tensor], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The results and the gradients of a fixed random functional of them."""
    g = torch.Generator().manual_seed(9)
    upstream = [torch.randn(x.shape, generator=g, dtype=x.dtype) for x in results.values()]
    grads = torch.autograd.grad(list(results.values()), list(inputs.values()), upstream)
    return results | {f"d{name}": x for name, x in zip(inputs, grads, strict=True)}


def case(*names: object, extra: tuple[str, ...] = ()) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    operands = make_operands(2, LENGTH, 2, d=6, v=5, m=4, seed=case_seed(*names), extra=extra)
    memories = make_memories(operands, seed=case_seed(*names, "memories"))
    return operands, {name: memories[name] for name in STATES}


@pytest.mark.parametrize("backend", ("chunkwise", "reference"))
def test_stale_with_single_token_chunks_and_no_decay_is_deltanet(backend: str) -> None:
    operands, memories = case(backend)
    operands["log_decay"] = torch.zeros_like(operands["log_decay"])
    inputs = {name: x for name, x in (operands | memories).items() if x.requires_grad}
    assert len(inputs) == 7
    expected = with_gradients(two_delta_rules(operands, memories, lambda x: x.softmax(-1)), inputs)
    actual = compressed(operands, memories, readout="softmax", chunk_size=1, backend=backend)
    assert_close(with_gradients(actual, inputs), expected, 1e-12)


@pytest.mark.parametrize("extra", [(), OWN_GATES], ids=("shared gates", "own gates"))
@pytest.mark.parametrize("backend", ("chunkwise", "reference"))
def test_corrected_is_the_gated_delta_rule_at_every_chunk_size(backend: str, extra: tuple[str, ...]) -> None:
    operands, memories = case(backend, extra, extra=extra)
    inputs = operands | memories
    expected = with_gradients(two_delta_rules(operands, memories, lambda x: x.softmax(-1)), inputs)
    assert expected["dlog_decay"].abs().amax() > 1e-2
    options = {"readout": "softmax", "update": "corrected", "backend": backend}
    for chunk_size in CHUNK_SIZES:
        actual = compressed(operands, memories, chunk_size=chunk_size, **options)
        assert_close(with_gradients(actual, inputs), expected, 1e-12)


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
def test_corrected_with_unbounded_steps_is_the_gated_delta_rule(chunk_size: int) -> None:
    """Steps up to 1 and readout silu_rms with its affine: the rule as a model uses it."""
    operands, memories = case(chunk_size, extra=("readout_weight", "readout_bias"))
    operands["step_size"] = (operands["step_size"].detach() / 0.3).requires_grad_()
    inputs = operands | memories

    def silu_rms(x: Tensor) -> Tensor:
        scaled = operands["readout_weight"] * x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        a = scaled + operands["readout_bias"]
        return a / (1 + torch.exp(-a))

    expected = with_gradients(two_delta_rules(operands, memories, silu_rms), inputs)
    actual = compressed(operands, memories, readout="silu_rms", update="corrected", chunk_size=chunk_size)
    assert_close(with_gradients(actual, inputs), expected, 1e-12)


def test_stale_is_neither_in_longer_chunks_or_under_decay() -> None:
    """The comparison above would see it."""
    operands, memories = case("neither")
    expected = two_delta_rules(operands, memories, lambda x: x.softmax(-1))
    for chunk_size in (1, 2):
        actual = compressed(operands, memories, readout="softmax", chunk_size=chunk_size)
        assert (actual["key_memory"] - expected["key_memory"]).abs().amax() > 1e-3
