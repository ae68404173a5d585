"""What every backend takes: the operands, which function of them is computed, memories and carried states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["CompressState", "Memories", "Operands", "Rule"]


class Operands(NamedTuple):
    """Operands of one call in token order; a missing gate of the value pass is the key pass's.

    Attributes:
        q, k: queries and keys [B, T, H, D].
        v: values [B, T, H, V].
        alpha: latent targets [B, T, H, M].
        log_decay, step_size: log beta and gamma [B, T, H].
        value_log_decay, value_step_size: the value pass's own [B, T, H].
        readout_weight, readout_bias: affine of the readout activation [H, M].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    alpha: Tensor
    log_decay: Tensor
    step_size: Tensor
    value_log_decay: Tensor | None = None
    value_step_size: Tensor | None = None
    readout_weight: Tensor | None = None
    readout_bias: Tensor | None = None

    def each_token(self, change: Callable[[Tensor], Tensor]) -> Operands:
        """The operands with what has tokens, all but the affine, changed by ``change``."""
        parts = (None if x is None else change(x) for x in self[:8])
        return Operands(*parts, *self[8:])  # type: ignore[arg-type, call-arg]

    @property
    def compute_dtype(self) -> torch.dtype:
        """fp64 where q, k, v or alpha is, else fp32: what memories, gates and sums are."""
        return torch.float64 if any(x.dtype == torch.float64 for x in self[:4]) else torch.float32


@dataclass(frozen=True)
class Rule:
    """Which function is computed, apart from the chunk size (that is the layout's).

    Attributes:
        phi: inner nonlinearity.
        readout: activation between the two passes.
        update: "stale" (the paper) or "corrected" (docs/math.md).
    """

    phi: str = "silu"
    readout: str = "ln_silu"
    update: str = "stale"

    @property
    def corrected(self) -> bool:
        """Whether the inner gradient sees what its own chunk has written."""
        return self.update == "corrected"


@dataclass(frozen=True)
class Memories:
    """A pair of memories, one per document or one per chunk: key [., H, M, D], value [., H, M, V]."""

    key: Tensor
    value: Tensor


@dataclass(frozen=True, eq=False)
class CompressState:
    """What a sequence leaves behind; its size does not depend on the number of tokens.

    Attributes:
        key_memory: S after the last token [N, H, M, D].
        value_memory: R after the last token [N, H, M, V].
        key_chunk_start, value_chunk_start: the memories before the current chunk's first token, of the same
            shapes (under update "corrected" decayed to the last token); needed where ``offset`` is not 0 and
            ignored where it is.
        offset: tokens of the current chunk already consumed, in [0, C); one for all documents, or one for
            each.
    """

    key_memory: Tensor
    value_memory: Tensor
    key_chunk_start: Tensor | None = None
    value_chunk_start: Tensor | None = None
    offset: int | tuple[int, ...] = 0

    @property
    def inside_chunk(self) -> bool:
        """Whether any document's next token is not the first of its chunk."""
        return bool(self.offset) if isinstance(self.offset, int) else any(self.offset)

    def select_rows(self, rows: Sequence[int]) -> CompressState:
        """The state whose document n is document ``rows[n]`` of this one; documents may repeat."""
        index = torch.tensor(list(rows), dtype=torch.long, device=self.key_memory.device)
        pairs = (self.key_memory, self.value_memory, self.key_chunk_start, self.value_chunk_start)
        chosen = (None if x is None else x.index_select(0, index) for x in pairs)
        offset = self.offset
        if not isinstance(offset, int):
            offsets = tuple(offset[row] for row in rows)
            offset = offsets[0] if len(set(offsets)) == 1 else offsets
        return CompressState(*chosen, offset)  # type: ignore[arg-type, call-arg]

    def detach(self) -> CompressState:
        """The same numbers without a graph."""
        pairs = (self.key_memory, self.value_memory, self.key_chunk_start, self.value_chunk_start)
        return CompressState(*(None if x is None else x.detach() for x in pairs), self.offset)  # type: ignore[arg-type, call-arg]
