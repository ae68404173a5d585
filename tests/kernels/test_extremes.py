"""Gates, scales and lengths at the edge of what they can be: finite, and as exact as elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.activations import ELEMENTWISE_PHI, READOUT, UPDATE, inner_backward, inner_gradient
from tests.kernels.helpers import (
    AFFINE,
    OWN_GATES,
    TOLERANCE,
    assert_close,
    assert_matches_reference,
    case_seed,
    make_memories,
    make_operands,
    run,
    slowed,
)

EVERYTHING = (*OWN_GATES, *AFFINE)


def single(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().float().requires_grad_() for name, x in tensors.items()}


def double(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().double().requires_grad_() for name, x in tensors.items()}


@pytest.mark.parametrize("update", UPDATE)
@pytest.mark.parametrize("decay", (-80.0, -1e-30, 0.0))
def test_extreme_decay_stays_finite_and_exact(decay: float, update: str) -> None:
    operands = make_operands(1, 40, seed=case_seed(decay, update))
    operands["log_decay"] = torch.full_like(operands["log_decay"], decay).requires_grad_()
    options = {"chunk_size": 16, "update": update}
    expected = run(operands, backend="reference", **options)
    actual = run(operands, backend="chunkwise", **options)
    if decay == -80.0:  # the true gradient of log beta is about e^-80: what is left is rounding
        assert actual.pop("dlog_decay").abs().amax() < 1e-14
        assert expected.pop("dlog_decay").abs().amax() < 1e-14
    assert_close(actual, expected, TOLERANCE)
    assert all(x.isfinite().all() for x in run(single(operands), **options).values())


@pytest.mark.parametrize("update", UPDATE)
def test_one_document_forgets_all_at_every_other_token(update: str) -> None:
    """Decays of 1 and e^-80 side by side: a difference of logs, never a quotient of products."""
    operands = make_operands(1, 40, seed=case_seed(update), extra=OWN_GATES)
    for name in ("log_decay", "value_log_decay"):
        steps = torch.zeros_like(operands[name])
        steps[:, (3 if "value" in name else 1) : 25 : 5] = -80  # not in the last chunk
        operands[name] = steps.requires_grad_()
    memories = make_memories(operands)
    assert_matches_reference(operands, memories, offset=5, chunk_size=16, update=update)


@pytest.mark.parametrize("update", UPDATE)
@pytest.mark.parametrize("chunk_size", (16, 128))
def test_equal_keys_and_values_stay_exact(chunk_size: int, update: str) -> None:
    """Every token reads and overwrites all that the others wrote; corrected with steps near 1, no decay."""
    operands = make_operands(1, 300, seed=case_seed(chunk_size, update))
    for name in ("k", "v"):
        operands[name] = operands[name].detach()[:, :1].expand_as(operands[name]).clone().requires_grad_()
    if update == "corrected":
        operands["step_size"] = (1 - 1e-3 * operands["step_size"].detach()).requires_grad_()
        operands["log_decay"] = (1e-3 * operands["log_decay"].detach()).requires_grad_()
    else:
        operands = slowed(operands, decay=1, step=16 / chunk_size)
    memories = make_memories(operands)
    options = {"chunk_size": chunk_size, "update": update, "phi": "tanh"}
    assert_matches_reference(operands, memories, **options)
    low, low_memories = single(operands), single(memories)
    actual = run(low, low_memories, **options)
    expected = run(double(low), double(low_memories), **options)
    # Steps near 1 onto one key are ill-conditioned: the recurrence itself in fp32 comes out with 1e-5.
    assert_close(actual, expected, 5e-5 if update == "corrected" else 5e-6)


@pytest.mark.parametrize("update", UPDATE)
def test_zero_steps_leave_only_decay(update: str) -> None:
    operands = make_operands(1, 20)
    memories = make_memories(operands)
    operands["step_size"] = torch.zeros_like(operands["step_size"]).requires_grad_()
    assert_matches_reference_but_writes(operands, memories, update)
    final = run(operands, memories, chunk_size=8, update=update)
    factor = operands["log_decay"].sum(1).exp()[..., None, None]
    assert_close(
        {"S": final["key_memory"], "R": final["value_memory"]},
        {"S": memories["key_memory"] * factor, "R": memories["value_memory"] * factor},
        1e-14,
    )


def assert_matches_reference_but_writes(
    operands: dict[str, Tensor], memories: dict[str, Tensor], update: str
) -> None:
    """Nothing is written, so keys, values and targets have no gradient."""
    results = [
        run(operands, memories, chunk_size=8, update=update, backend=b) for b in ("chunkwise", "reference")
    ]
    for found in results:
        for name in ("dk", "dv", "dalpha", "dkey_chunk_start", "dvalue_chunk_start"):
            assert found.pop(name).abs().amax() == 0, name
    assert_close(results[0], results[1], TOLERANCE)


@pytest.mark.parametrize("update", UPDATE)
@pytest.mark.parametrize(
    "name, scale", [("q", 1e-12), ("q", 1e12), ("k", 1e-9), ("v", 1e-9), ("alpha", 1e-9)]
)
def test_tiny_and_huge_operands(name: str, scale: float, update: str) -> None:
    for readout in READOUT:
        operands = make_operands(1, 14, seed=case_seed(name, scale, update, readout), extra=EVERYTHING)
        operands[name] = (scale * operands[name].detach()).requires_grad_()
        memories = make_memories(operands)
        options = {"chunk_size": 4, "update": update, "readout": readout, "phi": "silu", "offset": 1}
        expected = run(operands, memories, backend="reference", **options)
        assert_close(run(operands, memories, **options), expected, TOLERANCE)
        found = run(single(operands), single(memories), **options)
        assert all(x.isfinite().all() for x in found.values())


@pytest.mark.parametrize("update", UPDATE)
@pytest.mark.parametrize("phi", ("tanh", "softmax"))  # bounded: their steps do not grow with k and v
def test_huge_targets_and_tokens_stay_finite_in_fp32(phi: str, update: str) -> None:
    for readout in READOUT:
        operands = single(make_operands(1, 14, seed=case_seed(phi, update, readout), extra=EVERYTHING))
        for name, scale in (
            ("q", 1e6),
            ("alpha", 1e6),
            *((("k", 1e3), ("v", 1e3)) if update == "stale" else ()),
        ):
            operands[name] = (scale * operands[name].detach()).requires_grad_()
        found = run(operands, chunk_size=4, update=update, readout=readout, phi=phi)
        assert all(x.isfinite().all() for x in found.values())


@pytest.mark.parametrize("update", UPDATE)
@pytest.mark.parametrize("phi", ("silu", "tanh", "identity"))
def test_initial_memories_far_from_zero(phi: str, update: str) -> None:
    operands = make_operands(2, 21, seed=case_seed(phi, update), extra=EVERYTHING)
    memories = {name: (30 * x.detach()).requires_grad_() for name, x in make_memories(operands).items()}
    options = {"chunk_size": 4, "update": update, "phi": phi, "offset": 3}
    assert_matches_reference(operands, memories, **options)
    found = run(single(operands), single(memories), **options)
    assert all(x.isfinite().all() for x in found.values())


@pytest.mark.parametrize("update", UPDATE)
def test_65536_tokens_stay_finite_and_near_fp64(update: str) -> None:
    """Rounding does not add up over 1024 chunks; the same inputs, rounded once, in both precisions."""
    operands = make_operands(1, 65536, 1, d=8, v=8, m=8, seed=case_seed(update), dtype=torch.float32)
    operands = slowed(operands, decay=1 / 16, step=1 if update == "corrected" else 1 / 16)
    options = {"chunk_size": 64, "update": update}
    actual, expected = run(operands, **options), run(double(operands), **options)
    assert all(x.isfinite().all() for x in actual.values())
    assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize("phi", ELEMENTWISE_PHI)
def test_derivatives_of_phi_far_from_zero(phi: str) -> None:
    """fp32 at pre-activations from 1e-6 to 1e6, against autograd in fp64: no term cancels another."""
    size = torch.logspace(-6, 6, 400)
    z = torch.cat((size, -size)).requires_grad_()
    alpha, grad = torch.full_like(z, 0.25).requires_grad_(), torch.linspace(1, 2, len(z))
    f = {"silu": torch.nn.functional.silu, "tanh": torch.tanh, "identity": torch.clone}[phi]
    wide = z.detach().double().requires_grad_(), alpha.detach().double().requires_grad_()
    loss = ((f(wide[0]) - wide[1]) ** 2).sum() / 2
    (u,) = torch.autograd.grad(loss, wide[0], create_graph=True)
    dz, dalpha = torch.autograd.grad(u, wide, grad.double())
    found = torch.empty_like(z), torch.empty_like(z)
    with torch.no_grad():
        inner_backward(z, alpha, grad, phi, out=found)
        torch.testing.assert_close(inner_gradient(z, alpha, phi).double(), u, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found[0].double(), dz, rtol=3e-5, atol=2e-6)
    torch.testing.assert_close(found[1].double(), dalpha, rtol=3e-5, atol=2e-6)
