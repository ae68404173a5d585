"""The Triton kernels against fp64; test_triton.py and test_gpu.py run this file in a process of its own.

On a CPU triton has to be imported under TRITON_INTERPRET=1, which other tests' imports must not decide.
Scratch memory starts as NaN: whatever a kernel reads without having written it shows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import Tensor

from kernels import PackedLayout, compress_kv
from kernels.activations import ELEMENTWISE_PHI, PHI, READOUT, UPDATE
from kernels.triton import stages
from kernels.types import Memories, Operands, Rule
from tests.kernels.helpers import assert_equal, make_memories, make_operands, run

DEVICE = os.environ.get("KERNEL_TEST_DEVICE", "cpu")
TOLERANCE = 1e-5
BF16_OUTPUT, BF16_GRADIENT = 5e-3, 1e-2


@pytest.fixture(autouse=True)
def _poisoned_scratch() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    yield
    torch.use_deterministic_algorithms(False)


def make_all_operands(*shape: int, own: bool = True, affine: bool = True, **sizes: int) -> dict[str, Tensor]:
    """``make_operands`` with gates of the value pass and an affine readout."""
    operands = make_operands(*shape, **sizes)
    g = torch.Generator().manual_seed(sizes.get("seed", 0) + 100)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    (batch, length, heads), m = operands["q"].shape[:3], operands["alpha"].shape[3]
    if own:
        operands["value_log_decay"] = -0.1 * draw(batch, length, heads).abs()
        operands["value_step_size"] = 0.3 * torch.sigmoid(draw(batch, length, heads))
    if affine:
        operands["readout_weight"] = 1 + 0.3 * draw(heads, m)
        operands["readout_bias"] = 0.3 * draw(heads, m)
    return {name: x.detach().requires_grad_() for name, x in operands.items()}


def on_device(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: x.detach().to(DEVICE, dtype).requires_grad_() for name, x in tensors.items()}


def rms_ratios(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Root mean square of the difference over that of the expected tensor, for every tensor."""
    ratios = {}
    for name, want in expected.items():
        difference = (actual[name].cpu().double() - want).square().mean().sqrt()
        ratios[name] = (difference / want.square().mean().sqrt().clamp_min(1e-12)).item()
    return ratios


def compare(
    operands: Mapping[str, Tensor],
    memories: Mapping[str, Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    tolerance: float = TOLERANCE,
    gradients: float = TOLERANCE,
    **options: object,
) -> None:
    rounded = {name: x.detach().to(dtype).double().requires_grad_() for name, x in operands.items()}
    expected = run(rounded, memories, backend="chunkwise", **options)
    inputs = on_device(operands, dtype), on_device(memories, torch.float32)
    ratios = rms_ratios(run(*inputs, backend="triton", **options), expected)
    bound = {name: gradients if name.startswith("d") else tolerance for name in ratios}
    bad = {name: ratio for name, ratio in ratios.items() if not ratio <= bound[name]}
    assert not bad, f"RMS ratios over {tolerance} (gradients {gradients}): {bad}"


@pytest.mark.parametrize("readout", READOUT)
@pytest.mark.parametrize("phi", PHI)
def test_every_activation(phi: str, readout: str) -> None:
    operands = make_all_operands(1, 7, 1, d=16, v=16, m=24)
    compare(operands, make_memories(operands), chunk_size=4, offset=1, phi=phi, readout=readout)


@pytest.mark.parametrize("phi, readout", [("silu", "softmax"), ("tanh", "silu_rms"), ("identity", "silu")])
def test_every_activation_that_can_be_corrected(phi: str, readout: str) -> None:
    operands = make_all_operands(1, 7, 1, d=16, v=16, m=24)
    options = {"update": "corrected", "phi": phi, "readout": readout}
    compare(operands, make_memories(operands), chunk_size=4, offset=1, **options)


def test_corrected_is_refused_where_phi_mixes_slots() -> None:
    operands = Operands(**{name: x.float() for name, x in make_operands(1, 4).items()})
    layout = PackedLayout.uniform(1, 4, 4)
    for phi in set(PHI) - set(ELEMENTWISE_PHI):
        with pytest.raises(
            ValueError, match=f"update = 'corrected' with phi = '{phi}'.*use backend 'chunkwise'"
        ):
            stages.arrange(operands, layout=layout, rule=Rule(phi=phi, update="corrected"))


@pytest.mark.parametrize("update", UPDATE)
@pytest.mark.parametrize("length, chunk_size, offset", [(3, 1, 0), (16, 16, 0), (1, 16, 5), (110, 100, 7)])
def test_lengths_and_offsets(length: int, chunk_size: int, offset: int, update: str) -> None:
    operands = make_all_operands(1, length, 1, d=16, v=24, m=40)  # two blocks of slots
    options = {"chunk_size": chunk_size, "offset": offset, "phi": "tanh", "update": update}
    compare(operands, make_memories(operands), **options)


@pytest.mark.parametrize("update", UPDATE)
def test_chunks_of_several_tiles(update: str) -> None:
    operands = make_all_operands(1, 200, 1, d=16, v=16, m=16)  # the second chunk's last tile is empty
    compare(operands, make_memories(operands), chunk_size=130, update=update)


def test_without_own_gates_and_affine() -> None:
    operands = make_all_operands(2, 6, 2, own=False, affine=False, d=16, v=16, m=16)
    compare(operands, make_memories(operands), chunk_size=4)


@pytest.mark.parametrize(
    "missing", [("value_log_decay", "readout_bias"), ("value_step_size", "readout_weight")]
)
def test_one_of_each_pair_of_options(missing: tuple[str, ...]) -> None:
    operands = make_all_operands(1, 5, 1, d=16, v=16, m=16)
    for name in missing:
        del operands[name]
    compare(operands, make_memories(operands), chunk_size=4, readout="silu_rms")


@pytest.mark.parametrize("d, v, m", [(48, 96, 64), (64, 48, 16), (128, 20, 128)])
def test_widths(d: int, v: int, m: int) -> None:
    operands = make_all_operands(1, 20, 1, d=d, v=v, m=m)
    compare(operands, make_memories(operands), chunk_size=16)


@pytest.mark.parametrize("update", UPDATE)
def test_packed_documents_at_their_own_offsets(update: str) -> None:
    lengths, offsets = (5, 21, 1, 9), (0, 3, 7, 2)
    layout = PackedLayout.from_cu_seqlens(torch.tensor([0, *lengths]).cumsum(0), 8, offsets=offsets)
    operands = make_all_operands(1, sum(lengths), 1, d=16, v=16, m=16)
    options = {"chunk_size": 8, "layout": layout, "offset": offsets, "update": update}
    compare(operands, make_memories(operands, 4), **options)


def test_segments_of_several_chunks() -> None:
    """Backward scans every segment of 256 tokens again; this document ends in its third."""
    operands = make_all_operands(1, 530, 1, d=16, v=16, m=16)
    compare(operands, make_memories(operands), chunk_size=64)


@pytest.mark.parametrize("chunk_size", [64, 128])
@pytest.mark.parametrize("update", UPDATE)
def test_bf16(update: str, chunk_size: int) -> None:
    """Against fp64 on the same rounded inputs; memories, sums and the rounding points are the GPU's."""
    operands = make_all_operands(1, 192, 1, d=64, v=64, m=64)
    options = {"dtype": torch.bfloat16, "tolerance": BF16_OUTPUT, "gradients": BF16_GRADIENT}
    compare(operands, make_memories(operands), chunk_size=chunk_size, update=update, **options)


@pytest.mark.parametrize("update", UPDATE)
def test_bf16_with_small_chunks(update: str) -> None:
    operands = make_all_operands(1, 64, 1, d=16, v=16, m=16)
    options = {"dtype": torch.bfloat16, "tolerance": BF16_OUTPUT, "gradients": BF16_GRADIENT}
    compare(operands, make_memories(operands), chunk_size=16, update=update, phi="tanh", **options)


def test_fp16() -> None:
    """Gradients are rounded to fp16; the fp32 memories show what the kernels themselves lose."""
    operands = make_all_operands(1, 24, 1, d=16, v=16, m=16)
    options = {"dtype": torch.float16, "tolerance": 5e-4, "gradients": 1e-3}
    compare(operands, make_memories(operands), chunk_size=8, **options)


def test_upstream_on_the_final_state_alone() -> None:
    operands = {n: x.detach().float().to(DEVICE) for n, x in make_operands(1, 11, d=16, v=16, m=16).items()}
    gradients = []
    for backend in ("triton", "chunkwise"):
        leaves = {name: x.clone().requires_grad_() for name, x in operands.items()}
        _, state = compress_kv(**leaves, chunk_size=4, backend=backend, output_final_state=True)
        assert state is not None
        total = state.key_memory.square().sum() + state.value_memory.square().sum()
        gradients.append(torch.autograd.grad(total, [leaves[n] for n in ("k", "v", "alpha", "step_size")]))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("update", UPDATE)
def test_no_document_sees_another(update: str) -> None:
    clean = {
        name: x.detach().float().to(DEVICE) for name, x in make_operands(1, 30, 1, d=16, v=16, m=16).items()
    }
    spoiled = {name: x.clone() for name, x in clean.items()}
    for name in ("q", "k", "v", "alpha"):
        spoiled[name][:, 11:20] = float("nan")
    results = []
    for operands in (clean, spoiled):
        operands = {name: x.requires_grad_() for name, x in operands.items()}
        options = {"cu_seqlens": torch.tensor([0, 11, 20, 30]), "update": update, "backend": "triton"}
        y, _ = compress_kv(**operands, chunk_size=8, **options)
        grads = torch.autograd.grad(y, list(operands.values()), torch.ones_like(y))
        results.append({"y": y} | dict(zip(operands, grads, strict=True)))
    for part in (slice(0, 11), slice(20, 30)):
        assert_equal(*({name: x[:, part] for name, x in r.items()} for r in results))


@pytest.mark.parametrize("update, dtype", [("stale", torch.float32), ("corrected", torch.bfloat16)])
def test_segments_at_chunk_multiples_leave_the_same_bits(update: str, dtype: torch.dtype) -> None:
    operands = {n: x.detach().to(DEVICE, dtype) for n, x in make_operands(1, 32, d=16, v=16, m=16).items()}
    options = {"chunk_size": 8, "update": update, "backend": "triton", "output_final_state": True}
    whole, end = compress_kv(**operands, **options)
    head, middle = compress_kv(**{n: x[:, :24] for n, x in operands.items()}, **options)
    tail, last = compress_kv(**{n: x[:, 24:] for n, x in operands.items()}, initial_state=middle, **options)
    assert end is not None
    assert last is not None
    assert torch.equal(torch.cat((head, tail), 1), whole)
    assert torch.equal(last.key_memory, end.key_memory)
    assert torch.equal(last.value_memory, end.value_memory)


@pytest.mark.parametrize("phi, update", [("silu", "stale"), ("tanh", "corrected"), ("softmax", "stale")])
def test_segments_composed_from_the_stages_change_no_bit(phi: str, update: str) -> None:
    """State passing puts transfers between these stages."""
    operands, rule = make_operands(1, 24, 1, d=16, v=24, m=20), Rule(phi, "ln_silu", update)
    assert_equal(composed(operands, [8, 16], rule), composed(operands, [24], rule))


def composed(operands: Mapping[str, Tensor], lengths: list[int], rule: Rule) -> dict[str, Tensor]:
    """Run segments one after the other, the adjoints in reverse; memories and adjoints are strided."""
    memories = {n: x.to(DEVICE).float().mT.contiguous().mT for n, x in make_memories(operands).items()}
    state = Memories(memories["key_memory"].detach(), memories["value_memory"].detach())
    adjoint = Memories(memories["key_chunk_start"].detach(), memories["value_chunk_start"].detach())
    kept, y, begin = [], [], 0
    for length in lengths:
        layout = PackedLayout.uniform(1, length, 8).to(DEVICE)
        cut = Operands(*(x.detach().to(DEVICE).float()[:, begin : begin + length] for x in operands.values()))
        begin += length
        inputs = stages.arrange(cut, layout=layout, rule=rule)
        states, state = stages.scan_forward(inputs, state)
        assert states.saved is not None
        y.append(stages.to_tokens(inputs, stages.readout_forward(inputs, states), cut.v))
        kept.append((cut, layout, states.saved))
    grads = []
    for cut, layout, saved in reversed(kept):
        inputs = stages.arrange(cut, layout=layout, rule=rule)
        states = stages.rescan(inputs, saved)
        local = stages.readout_backward(inputs, states, stages.from_tokens(inputs, cut.v.cos()))
        scan = stages.scan_backward(inputs, states, local, (adjoint.key, adjoint.value))
        adjoint = scan.initial
        rest = stages.input_backward(inputs, states, local, scan)
        found = zip(rest, cut, strict=True)
        grads.append([stages.to_tokens(inputs, d, x) for d, x in found if d is not None and x is not None])
    gradients = [torch.cat(x, 1) for x in zip(*reversed(grads), strict=True)]
    results = {"y": torch.cat(y, 1), "S": state.key, "R": state.value, "dS": adjoint.key, "dR": adjoint.value}
    return results | {f"d{name}": x for name, x in zip(operands, gradients, strict=True)}


def test_runs_repeat_bitwise() -> None:
    operands = make_all_operands(1, 9, 1, d=16, v=16, m=16)
    inputs = on_device(operands, torch.bfloat16), on_device(make_memories(operands), torch.float32)
    options = {"chunk_size": 8, "offset": 3, "update": "corrected", "backend": "triton"}
    assert_equal(run(*inputs, **options), run(*inputs, **options))


def test_extremes() -> None:
    """Decays to e^-80 a token, and all keys alike: nothing overflows on the way to a gradient."""
    operands = make_all_operands(1, 20, 1, own=False, affine=False, d=16, v=16, m=16)
    with torch.no_grad():
        operands["log_decay"][:, ::3] = -80
        operands["k"][:] = operands["k"][:, :1]
    for update in UPDATE:
        compare(operands, make_memories(operands), chunk_size=8, update=update)


@pytest.mark.parametrize("update", UPDATE)
def test_registered_as_the_other_backend_is(update: str) -> None:
    """opcheck of forward and backward: the fake kernels know the shapes of what Triton saves."""
    operands = on_device(make_operands(1, 9, 1, d=16, v=16, m=16), torch.float32)
    memories = [x.detach().to(DEVICE) for x in make_memories(operands).values()][:2]
    choices = ([0], 4, "tanh", "ln_silu", update, "triton")
    arguments = (*operands.values(), None, None, None, None, *memories, None, None, None, *choices)
    found = torch.library.opcheck(torch.ops.trellis.compress.default, arguments)
    assert set(found.values()) == {"SUCCESS"}
    with torch.no_grad():
        y, *states = torch.ops.trellis.compress(*arguments)
    slots = [*operands.values(), *(None,) * 6, *states[4:], None, torch.ones_like(y), *(None,) * 4]
    given = [x.detach() for x in slots if x is not None]
    present = [x is not None for x in slots]
    found = torch.library.opcheck(
        torch.ops.trellis.compress_backward.default,
        (given, present, *choices),
        test_utils=("test_schema", "test_faketensor"),
    )
    assert set(found.values()) == {"SUCCESS"}
