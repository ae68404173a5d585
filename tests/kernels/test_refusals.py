"""Bad input is a ValueError that names the argument and what it should be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import CompressState, PackedLayout, compress_kv, decode_step, prefill
from tests.kernels.helpers import AFFINE, MEMORIES, OWN_GATES, make_memories, make_operands

TOKENS = ("q", "k", "v", "alpha", "log_decay", "step_size", *OWN_GATES)
INPUTS = (*TOKENS, *AFFINE)
NAN, INF = float("nan"), float("inf")


def operands(device: str = "cpu") -> dict[str, Any]:
    """B 2, T 10, H 2, D 5, V 7, M 6."""
    made = make_operands(2, 10, extra=(*OWN_GATES, *AFFINE))
    return {name: x.detach().to(device) for name, x in made.items()}


def call(**changes: Any) -> Any:
    return compress_kv(**(operands() | {"chunk_size": 4} | changes))


def state(offset: Any = 0, **changes: Tensor | None) -> CompressState:
    memories = {name: x.detach() for name, x in make_memories(operands()).items()}
    return CompressState(**(memories | changes), offset=offset)


@pytest.mark.parametrize(
    "name, shape, message",
    [
        ("q", (2, 10, 2), r"q has shape \(2, 10, 2\): it should be \[B, T, H, D\]"),
        ("q", (2, 0, 2, 5), "q has shape .* none of them 0"),
        ("q", (2, 10, 2, 0), "q has shape .* none of them 0"),
        ("k", (2, 10, 2, 4), r"k has shape \(2, 10, 2, 4\).*should be \[2, 10, 2, 5\]"),
        ("k", (2, 10, 2), r"k has shape \(2, 10, 2\).*should be \[2, 10, 2, 5\]"),
        ("v", (2, 9, 2, 7), r"v has shape .*should be \[2, 10, 2, V\]"),
        ("v", (2, 10, 2, 0), r"v has shape .*should be \[2, 10, 2, V\]"),
        ("alpha", (2, 10, 3, 6), r"alpha has shape .*should be \[2, 10, 2, M\]"),
        ("alpha", (2, 10, 2), r"alpha has shape .*should be \[2, 10, 2, M\]"),
        ("log_decay", (2, 10, 2, 1), r"log_decay has shape .*should be \[2, 10, 2\]"),
        ("log_decay", (2, 1, 2), r"log_decay has shape .*should be \[2, 10, 2\]"),
        ("step_size", (2, 10), r"step_size has shape .*should be \[2, 10, 2\]"),
        ("value_log_decay", (2, 10, 3), r"value_log_decay has shape .*should be \[2, 10, 2\]"),
        ("value_step_size", (10, 2), r"value_step_size has shape .*should be \[2, 10, 2\]"),
        ("readout_weight", (6,), r"readout_weight has shape \(6,\): it should be \[H, M\] = \[2, 6\]"),
        ("readout_weight", (2, 7), r"readout_weight has shape \(2, 7\): it should be \[H, M\]"),
        ("readout_bias", (2, 1), r"readout_bias has shape \(2, 1\): it should be \[H, M\] = \[2, 6\]"),
    ],
)
def test_shapes(name: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        call(**{name: torch.zeros(shape, dtype=torch.float64)})


@pytest.mark.parametrize("dtype", (torch.int64, torch.bool, torch.complex64))
@pytest.mark.parametrize("name", INPUTS)
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"^{name} has dtype {dtype}: it should be a floating point type"):
        call(**{name: operands()[name].to(dtype)})


@pytest.mark.parametrize("name", INPUTS[1:])
def test_devices(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} is on meta and q on cpu: move them to one device"):
        call(**{name: operands("meta")[name]})


BAD_GATES = [
    (name, value) for name in TOKENS[4:] for value in (0.5 if "decay" in name else -1.0, NAN, INF, -INF)
]


@pytest.mark.parametrize("name, value", BAD_GATES)
def test_gates_out_of_range(name: str, value: float) -> None:
    """One entry is enough; whoever says that values are fine is believed."""
    x = operands()[name]
    x[1, 3, 1] = value
    wanted = "<= 0" if "decay" in name else ">= 0"
    message = rf"^{name} reaches {value:g}: it should be finite and {wanted} everywhere"
    for check in (None, True):
        with pytest.raises(ValueError, match=message):
            call(**{name: x}, check_values=check)
    call(**{name: x}, check_values=False)
    token = {n: y if n in AFFINE else y[:, 0] for n, y in (operands() | {name: x.roll(-3, 1)}).items()}
    with pytest.raises(ValueError, match=message):
        decode_step(**token, state=state(), chunk_size=4)
    decode_step(**token, state=state(), chunk_size=4, check_values=False)
    with pytest.raises(ValueError, match=message):
        prefill(**(operands() | {name: x}), chunk_size=4)


class NoValueIsRead(TorchDispatchMode):
    """Fails where the host asks for a number that a device holds: on a GPU it would wait for it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value is read"
        return func(*args, **(kwargs or {}))


def test_values_on_other_devices_are_read_only_when_asked_for() -> None:
    """The meta device has no values to read, as a GPU has none without waiting."""
    elsewhere = operands("meta")
    with NoValueIsRead():
        y, _ = compress_kv(**elsewhere, chunk_size=4)
        assert y.shape == (2, 10, 2, 7)
        compress_kv(**elsewhere, chunk_size=4, check_values=False)
        with pytest.raises(AssertionError, match="a value is read"):
            call()
        call(check_values=False)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        compress_kv(**elsewhere, chunk_size=4, check_values=True)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"chunk_size": 0}, "chunk_size = 0: use 1 or more"),
        ({"chunk_size": -3}, "chunk_size = -3: use 1 or more"),
        ({"chunk_size": 4.0}, r"chunk_size = 4\.0: use 1 or more tokens, an int"),
        ({"layout": torch.tensor([0, 20])}, "layout is of type Tensor: it should be a PackedLayout"),
        ({"layout": PackedLayout.of((7, 13), 4)}, "layout holds 2 documents, the operands B = 2 rows of 10"),
        ({"initial_state": (1, 2)}, "the state is of type tuple: it should be a CompressState"),
        ({"phi": "relu"}, "phi = 'relu': use one of silu, tanh, identity, ln_silu, softmax"),
        ({"readout": "relu"}, "readout = 'relu': use one of ln_silu, l2_silu, softmax, silu, silu_rms"),
        ({"update": "fresh"}, "update = 'fresh': use one of stale, corrected"),
        ({"backend": "cuda"}, "backend = 'cuda': use one of auto, reference, chunkwise, triton"),
        ({"cu_seqlens": torch.tensor([0, 20])}, "cu_seqlens with B = 2"),
        ({"layout": PackedLayout.uniform(2, 9, 4)}, "layout counts 18 tokens, the operands 20"),
        ({"layout": PackedLayout.uniform(2, 10, 5)}, "layout has chunk_size 5, the call 4"),
        ({"layout": PackedLayout.uniform(2, 10, 4, offset=1)}, "layout is built for offset"),
        (
            {"layout": PackedLayout.uniform(2, 10, 4), "cu_seqlens": torch.tensor([0, 20])},
            "layout and cu_seqlens are both given",
        ),
    ],
)
def test_choices_and_grids(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        call(**changes)


@pytest.mark.parametrize(
    "initial, message",
    [
        ({"key_memory": None}, r"key_memory is None: it should be a tensor of shape \(2, 2, 6, 5\)"),
        ({"offset": torch.tensor(3)}, "offset is of type Tensor: it should be an int or a tuple"),
        ({"key_memory": torch.zeros(2, 2, 6, 4)}, r"key_memory has shape .*should be \(2, 2, 6, 5\)"),
        ({"key_memory": torch.zeros(1, 2, 6, 5)}, r"key_memory has shape .*should be \(2, 2, 6, 5\)"),
        ({"value_memory": torch.zeros(2, 2, 5, 7)}, r"value_memory has shape .*should be \(2, 2, 6, 7\)"),
        ({"key_chunk_start": torch.zeros(2, 2, 6, 7)}, r"key_chunk_start has shape .*be \(2, 2, 6, 5\)"),
        ({"value_chunk_start": torch.zeros(2, 6, 7)}, r"value_chunk_start has shape .*be \(2, 2, 6, 7\)"),
        (
            {"offset": 3, "key_chunk_start": None},
            "key_chunk_start is None at offset 3: carry the chunk-start",
        ),
        ({"offset": (0, 1), "value_chunk_start": None}, r"value_chunk_start is None at offset \(0, 1\)"),
        *(
            (
                {name: torch.zeros(2, 2, 6, 7 if "value" in name else 5, dtype=torch.int64)},
                f"{name} is torch.int64",
            )
            for name in MEMORIES
        ),
        *(
            (
                {name: torch.zeros(2, 2, 6, 7 if "value" in name else 5, device="meta")},
                f"{name} is .* on meta",
            )
            for name in MEMORIES
        ),
    ],
)
def test_states(initial: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^initial_state\.{message}"):
        call(initial_state=state(**initial))


@pytest.mark.parametrize(
    "offset, message",
    [
        (4, r"offset = \(4, 4\).*it is in \[0, 4\)"),
        (-1, r"offset = \(-1, -1\).*it is in \[0, 4\)"),
        ((0, 4), r"offset = \(0, 4\).*it is in \[0, 4\)"),
        ((1,), "1 offsets for 2 documents: give one offset, or one per document"),
    ],
)
def test_offsets(offset: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        call(initial_state=state(offset))


@pytest.mark.parametrize(
    "bounds, message",
    [
        ([0, 5, 5, 10], r"cu_seqlens\[2\] = 5 after 5: it must increase"),
        ([0, 7, 5, 10], r"cu_seqlens\[2\] = 5 after 7"),
        ([1, 10], r"cu_seqlens\[0\] = 1: the first document starts at token 0"),
        ([0], r"cu_seqlens has shape \(1,\)"),
        ([[0, 10]], r"cu_seqlens has shape \(1, 2\)"),
        ([0.0, 10.0], "cu_seqlens has .*dtype torch.float32: give an integer vector"),
        ([0, 9], "cu_seqlens counts 9 tokens, the operands 10: they should agree"),
    ],
)
def test_document_bounds(bounds: list[Any], message: str) -> None:
    one = {name: x if name in AFFINE else x[:1] for name, x in operands().items()}
    with pytest.raises(ValueError, match=f"^{message}"):
        call(**one, cu_seqlens=torch.tensor(bounds))
    if "agree" not in message:
        with pytest.raises(ValueError, match=f"^{message}"):
            PackedLayout.from_cu_seqlens(torch.tensor(bounds), 4)


def test_lengths_and_offsets_of_layouts() -> None:
    with pytest.raises(
        ValueError, match=r"lengths = \(3, 0\): name at least one document, none of them empty"
    ):
        PackedLayout.of((3, 0), 4)
    with pytest.raises(ValueError, match="2 offsets for 3 documents"):
        PackedLayout.of((3, 1, 2), 4, offsets=(0, 1))
    with pytest.raises(ValueError, match="batch = 0, length = 3: both must be at least 1"):
        PackedLayout.uniform(0, 3, 4)


@pytest.mark.parametrize("value, said", [(None, "None"), (-0.1, "of type float"), ([1.0], "of type list")])
@pytest.mark.parametrize("name", INPUTS)
def test_operands_that_are_no_tensors(name: str, value: Any, said: str) -> None:
    if value is None and name in (*OWN_GATES, *AFFINE):
        return  # they may be missing
    with pytest.raises(ValueError, match=f"^{name} is {said}: it should be a tensor"):
        call(**{name: value})


def test_document_bounds_that_are_no_tensor() -> None:
    one = {name: x if name in AFFINE else x[:1] for name, x in operands().items()}
    with pytest.raises(ValueError, match=r"^cu_seqlens is of type list: it should be an integer tensor"):
        call(**one, cu_seqlens=[0, 10])
    with pytest.raises(ValueError, match=r"^cu_seqlens has .*dtype torch\.complex64"):
        call(**one, cu_seqlens=torch.tensor([0, 10]).to(torch.complex64))


def decode(**changes: Any) -> Any:
    token = {name: x if name in AFFINE else x[:, 0] for name, x in operands().items()}
    return decode_step(**(token | {"state": state(), "chunk_size": 4} | changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"q": torch.zeros(2, 1, 2, 5)}, r"q has shape .*should be \[B, H, D\]"),
        ({"v": torch.zeros(2, 7)}, r"v has shape .*should be \[2, 2, V\]"),
        ({"value_step_size": torch.zeros(2, 1)}, r"value_step_size has shape .*should be \[2, 2\]"),
        ({"readout_bias": torch.zeros(6)}, r"readout_bias has shape .*should be \[H, M\] = \[2, 6\]"),
        ({"alpha": torch.zeros(2, 2, 6, dtype=torch.int32)}, "alpha has dtype torch.int32"),
        ({"k": torch.zeros(2, 2, 5, device="meta")}, "k is on meta and q on cpu"),
        ({"phi": "relu"}, "phi = 'relu'"),
        ({"update": "fresh"}, "update = 'fresh'"),
        ({"chunk_size": 0}, "chunk_size = 0: use 1 or more"),
        ({"chunk_size": 2.0}, r"chunk_size = 2\.0: use 1 or more tokens, an int"),
        ({"log_decay": -0.1}, "log_decay is of type float: it should be a tensor"),
        ({"backend": "reference"}, "backend = 'reference': use one of auto, chunkwise, triton"),
        ({"state": state(9)}, r"state\.offset = 9.*in \[0, 4\)"),
        ({"state": state((1, 2, 3))}, r"state\.offset has 3 entries for 2 sequences"),
        ({"state": state(1, key_chunk_start=None)}, r"initial_state\.key_chunk_start is None at offset 1"),
        ({"state": state(key_memory=torch.zeros(1, 2, 6, 5))}, r"initial_state\.key_memory has shape"),
    ],
)
def test_decode_refuses_what_the_parallel_form_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        decode(**changes)
