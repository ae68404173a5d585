"""flash-linear-attention's kernels behind our operations: signatures and signs here, numbers on a GPU."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import PackedLayout
from kernels.baselines import fla
from kernels.baselines.delta_rule import gated_delta_rule
from kernels.baselines.grid import Memory, Operation
from kernels.baselines.linear_attention import decayed_linear_attention
from kernels.baselines.rwkv7 import generalised_delta_rule
from kernels.baselines.slots import bounded_memory_attention, gated_slot_attention

pytest.importorskip("fla", reason="flash-linear-attention is not installed here")

HEADS, WIDTH, SLOTS = 2, 32, 16
CASES = list(fla.FORMS)


def name_of(case: object) -> str:
    return getattr(case, "__name__", str(case))


def drawn(
    operation: Operation, decays: bool, *, rows: int, length: int, documents: int, **where: Any
) -> tuple[dict[str, Tensor], Memory]:
    """Tokens as the mixers make them, and memories."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(**where)

    vectors = operation in (gated_slot_attention, generalised_delta_rule)
    widths = {gated_slot_attention: SLOTS}.get(operation, WIDTH)
    q, k, v, key = (draw(rows, length, HEADS, WIDTH) for _ in range(4))
    q, k, key = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k, key))
    tokens = {"q": q, "k": k, "v": v}
    if operation is gated_delta_rule:
        tokens["beta"] = torch.sigmoid(draw(rows, length, HEADS).float())
    if decays:
        shape = (rows, length, HEADS, widths) if vectors else (rows, length, HEADS)
        tokens["log_decay"] = torch.nn.functional.logsigmoid(draw(*shape).float() + 3)
    if operation is gated_slot_attention:
        tokens["write"] = -torch.expm1(tokens["log_decay"])
    if operation is generalised_delta_rule:
        tokens |= {"key": key, "rate": torch.sigmoid(draw(rows, length, HEADS, WIDTH).float())}
    shapes = [(WIDTH, WIDTH)] if operation is not gated_slot_attention else [(WIDTH, SLOTS), (SLOTS, WIDTH)]
    device = where.get("device", "cpu")
    return tokens, tuple(0.3 * draw(documents, HEADS, *shape).float().to(device) for shape in shapes)


@pytest.mark.parametrize(("operation", "decays"), CASES, ids=name_of)
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_the_installed_functions_take_what_they_are_given(
    operation: Operation, decays: bool, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drift of a signature shows without a GPU."""
    form, called = fla.FORMS[operation, decays], []
    layout = PackedLayout.of((5, 11), 8) if packed else PackedLayout.uniform(2, 16, 8)
    rows, length = (1, 16) if packed else (2, 16)
    tokens, memory = drawn(operation, decays, rows=rows, length=length, documents=2)
    signature = inspect.signature(form.load())

    def load(self: fla.Form) -> Any:
        def function(**given: Any) -> Any:
            signature.bind(**given)
            unknown = set(given) - set(signature.parameters)
            assert not unknown, f"{form.function} swallows {unknown}"
            called.append(given)
            return given["v"], given["initial_state"]

        return function

    monkeypatch.setattr(fla.Form, "load", load)
    y, final = fla.run(form, tokens, memory, layout)
    (given,) = called
    assert y.shape == tokens["v"].shape
    assert [x.shape for x in final] == [x.shape for x in memory]
    assert given["scale"] == 1.0
    assert ("cu_seqlens" in given) == packed
    if packed:
        assert given["cu_seqlens"].tolist() == [0, 5, 16]


@pytest.mark.parametrize(("operation", "decays"), CASES, ids=name_of)
@pytest.mark.parametrize("wide", ["nothing", "q and k", "everything"])
def test_what_it_refuses_is_not_given(
    operation: Operation, decays: bool, wide: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Types that differ, as autocast leaves them beside raw values, and the delta rule in fp32."""
    given: dict[str, Any] = {}

    def load(self: fla.Form) -> Any:
        def function(**arguments: Any) -> Any:
            given.update(arguments, function=self.function)
            return arguments["v"], arguments["initial_state"]

        return function

    monkeypatch.setattr(fla.Form, "load", load)
    tokens, memory = drawn(operation, decays, rows=2, length=16, documents=2, dtype=torch.bfloat16)
    for name in {"nothing": (), "q and k": ("q", "k"), "everything": ("q", "k", "v")}[wide]:
        tokens[name] = tokens[name].float()
    y, _ = fla.run(*fla.choose(operation, tokens), memory, PackedLayout.uniform(2, 16, 8))
    dtype = torch.float32 if wide == "everything" else torch.bfloat16
    same = given.keys() & {"q", "r", "k", "v", "a", "b", "s", "beta"}
    assert {given[name].dtype for name in same} == {dtype} == {y.dtype}
    if operation is gated_delta_rule and not decays:
        expected = "chunk_gated_delta_rule" if dtype == torch.float32 else "chunk_delta_rule"
        assert given["function"] == expected
        assert ("g" in given) == (dtype == torch.float32)
        assert not given.get("g", torch.zeros(1)).any()


def test_signs_and_orders_are_those_of_its_own_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the forms whose arguments are not ours by name: RWKV-7's a and b, against its loop over tokens."""
    from fla.ops.generalized_delta_rule.dplr.naive import dplr_recurrence

    def load(self: fla.Form) -> Any:
        def function(r, w, k, v, a, b, scale, initial_state, output_final_state):
            by_head = [x.transpose(1, 2) for x in (r * WIDTH**0.5, k, v, a, b, w)]
            y, final = dplr_recurrence(*by_head, initial_state=initial_state)
            return y.transpose(1, 2), final

        return function

    monkeypatch.setattr(fla.Form, "load", load)
    tokens, memory = drawn(generalised_delta_rule, True, rows=2, length=24, documents=2)
    layout = PackedLayout.uniform(2, 24, 8)
    theirs = fla.run(fla.FORMS[generalised_delta_rule, True], tokens, memory, layout)
    ours = generalised_delta_rule(tokens, {}, memory, layout)
    torch.testing.assert_close(theirs[0], ours[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(theirs[1][0], ours[1][0], atol=1e-4, rtol=1e-4)


def test_on_a_cpu_and_for_other_operations_nothing_changes() -> None:
    assert fla.on_gpu(bounded_memory_attention) is bounded_memory_attention
    tokens, memory = drawn(decayed_linear_attention, True, rows=2, length=16, documents=2)
    layout = PackedLayout.uniform(2, 16, 8)
    ours = decayed_linear_attention(tokens, {}, memory, layout)
    other = fla.on_gpu(decayed_linear_attention)(tokens, {}, memory, layout)
    assert torch.equal(ours[0], other[0])
    assert torch.equal(ours[1][0], other[1][0])


def test_without_the_package_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fla.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install fla-core, or set model"):
        fla.FORMS[gated_delta_rule, True].load()
