"""What a look at a trellis layer takes from one forward pass: a few numbers of its operation, copied.

A tap stands in a mixer's place of the operation for one micro-batch: it calls the operation, hands its result
on, and keeps

    gates     forget gate beta and step size of the first tokens, of each pass that has its own
    final     memories S, R after the longest document (of this rank's segment, with mesh.sp > 1)
    chunk     q, k, v, alpha and the gates of the last whole chunk among that document's first ones
    start     the memories before that chunk, and the stale pair where the chunk was entered before

Nothing of it is on the autograd graph, and no random number is drawn. Shapes: H heads of this rank, c tokens
of the chunk, M slots, D and V head widths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels import CompressState, compress_kv
from kernels.types import Memories, Operands, Rule
from trellis_dist.models.mixers.trellis import TrellisMixer
from trellis_dist.parallel.all_to_all import AllToAllCompress
from trellis_dist.parallel.mesh import Mesh
from trellis_dist.parallel.sequence import StatePassing

__all__ = ["LayerSample", "Tap", "looks", "sample", "sample_bounds"]

TOKENS = 4096  # of which the gates are kept
CHUNKS = 16  # of the longest document, from its beginning: the chunk is the last of them
_GATES = {
    "log_decay": "forget_gate",
    "step_size": "step_size",
    "value_log_decay": "value_forget_gate",
    "value_step_size": "value_step_size",
}
_TOKEN_NAMES = Operands._fields[:8]


@dataclass(frozen=True)
class LayerSample:
    """What one tap kept.

    Attributes:
        layer: number of the layer.
        first_head: of the layer's heads, the first on this rank.
        gates: beta, gamma and those of the value pass [tokens, H], on the CPU.
        final: [H, M, .], as the operation left them.
        chunk: operands in fp64 [1, c, H, .], affine [H, M].
        start: memories before the chunk, fp64 [1, H, M, .].
        stale: what its inner gradients are taken at, where that is not ``start``.
        rule: the function.
    """

    layer: int
    first_head: int
    gates: Mapping[str, Tensor]
    final: Memories
    chunk: Operands
    start: Memories
    stale: Memories | None
    rule: Rule


def looks(mesh: Mesh) -> bool:
    """Whether this rank looks: of the replicas the first; of segments the last, which has seen most."""
    if mesh.dp_rank:
        return False
    return mesh.sp == 1 or mesh.sequence_mode == "all_to_all" or mesh.sp_rank == mesh.sp - 1


class Tap:
    """Replaces the operation of ``mixer`` until ``remove``; the first call is looked at.

    Attributes:
        taken: the sample; None before the first call.
        failure: what went wrong in taking it: a look never ends a run.
    """

    def __init__(self, mixer: TrellisMixer, mesh: Mesh) -> None:
        """Install it."""
        self.taken: LayerSample | None = None
        self.failure: Exception | None = None
        self._layer = mixer.layer
        self._entered: Memories | None = None
        own = mixer.config.num_heads // mesh.tp
        self._first_head = own * mesh.tp_rank
        # torch.compile's "disable" wraps what communicates.
        found: Any = getattr(mixer.operation, "_torchdynamo_orig_callable", mixer.operation)
        self._passing = found if isinstance(found, StatePassing) else None
        self._place: Any = mixer
        self._name = "operation"
        if isinstance(found, AllToAllCompress):
            self._place, self._name = found, "inner"
            self._first_head += own // mesh.sp * mesh.sp_rank
        if self._passing is not None:
            self._passing.entered = self._note_entered
        self._operation: Callable[..., Any] = getattr(self._place, self._name)
        setattr(self._place, self._name, self)

    def remove(self) -> None:
        """Put the operation back. Harmless when repeated."""
        setattr(self._place, self._name, self._operation)
        if self._passing is not None:
            self._passing.entered = None

    def _note_entered(self, key: Tensor, value: Tensor) -> None:
        self._entered = Memories(key.detach(), value.detach())

    def __call__(self, *, output_final_state: bool = False, **arguments: Any) -> Any:
        """The operation's own result."""
        y, final = self._operation(**arguments, output_final_state=True)
        if self.taken is None and self.failure is None:
            try:
                with torch.no_grad():
                    self.taken = sample(
                        arguments,
                        final,
                        layer=self._layer,
                        first_head=self._first_head,
                        entered=self._entered,
                    )
            except Exception as error:
                self.failure = error
            self._entered = None
        return y, final if output_final_state else None


def sample_bounds(length: int, offset: int, chunk_size: int) -> tuple[int, int]:
    """First token of the chunk to look at in a document of ``length`` tokens, and one past its last.

    ``offset`` tokens of the document's current chunk came before. The last whole chunk of the first CHUNKS;
    without a whole one what there is of a chunk, from its beginning if it has that.
    """
    first = -offset % chunk_size
    whole = min((length - first) // chunk_size, CHUNKS)
    if whole >= 1:
        return first + (whole - 1) * chunk_size, first + whole * chunk_size
    return (first, length) if length > first else (0, length)


def sample(
    arguments: Mapping[str, Any],
    final: CompressState,
    *,
    layer: int,
    first_head: int = 0,
    entered: Memories | None = None,
) -> LayerSample:
    """Take from one call of an operation with ``arguments`` (those of ``kernels.compress_kv``).

    Args:
        final: the state it returned.
        layer, first_head: as in ``LayerSample``.
        entered: memories before each document [N, H, M, .], where they are not the call's ``initial_state``.
    """
    layout, size = arguments.get("layout"), arguments["chunk_size"]
    batch, length = arguments["q"].shape[:2]
    lengths = (length,) * batch if layout is None else layout.lengths
    document = max(range(len(lengths)), key=lengths.__getitem__)
    before = _state_before(arguments, document, entered)
    offset = before.offset
    assert isinstance(offset, int), "a state of one document has one offset"
    begin, end = sample_bounds(lengths[document], offset, size)
    place = sum(lengths[:document])
    if begin > 0:
        before = _read_up_to(arguments, before, place, place + begin)
    operands = {name: _tokens(arguments.get(name), place + begin, place + end) for name in _TOKEN_NAMES}
    affine = {name: arguments.get(name) for name in ("readout_weight", "readout_bias")}
    wide = {name: None if x is None else x.double() for name, x in {**operands, **affine}.items()}
    stale = None
    if before.inside_chunk and before.key_chunk_start is not None and before.value_chunk_start is not None:
        stale = Memories(before.key_chunk_start.double(), before.value_chunk_start.double())
    names = ("phi", "readout", "update")
    return LayerSample(
        layer=layer,
        first_head=first_head,
        gates=_gates(arguments),
        final=Memories(final.key_memory[document].clone(), final.value_memory[document].clone()),
        chunk=Operands(**wide),  # type: ignore[arg-type]
        start=Memories(before.key_memory.double(), before.value_memory.double()),
        stale=stale,
        rule=Rule(*(arguments[name] for name in names)),
    )


def _state_before(arguments: Mapping[str, Any], document: int, entered: Memories | None) -> CompressState:
    """The state [1, H, M, .] before the first token of ``document``."""
    state = arguments.get("initial_state")
    if entered is not None:
        return CompressState(entered.key[document, None], entered.value[document, None])
    if state is not None:
        one: CompressState = state.select_rows([document])
        return one
    q, v, alpha = (arguments[name] for name in ("q", "v", "alpha"))
    wide = torch.promote_types(q.dtype, torch.float32)
    shape = (1, *alpha.shape[2:])
    key, value = (torch.zeros(*shape, x.shape[-1], dtype=wide, device=q.device) for x in (q, v))
    return CompressState(key, value)


def _tokens(x: Tensor | None, begin: int, end: int) -> Tensor | None:
    """Tokens [begin, end) of the flattened stream, [1, end - begin, H, .]."""
    return None if x is None else x.detach().flatten(0, 1)[begin:end].unsqueeze(0)


def _read_up_to(arguments: Mapping[str, Any], state: CompressState, begin: int, end: int) -> CompressState:
    """The state after the tokens [begin, end) of the stream."""
    changed: dict[str, Any] = {name: _tokens(arguments.get(name), begin, end) for name in _TOKEN_NAMES}
    changed |= {"initial_state": state, "layout": None, "check_values": False}
    _, after = compress_kv(**{**arguments, **changed, "output_final_state": True})
    assert after is not None, "asked for above"
    return after


def _gates(arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    found = {}
    for name, title in _GATES.items():
        x = arguments.get(name)
        if x is not None:
            kept = x.detach().flatten(0, 1)[:TOKENS]
            found[title] = (kept.exp() if name.endswith("log_decay") else kept).float().cpu()
    return found
