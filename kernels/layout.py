"""PackedLayout: where each token sits in the grid of chunks.

    token order  [B, T, H, .]     what callers hold; packed documents lie end to end in a row with B = 1
    chunk order  [P, H, C, .]     what the stages work on: P chunks of C slots, each of one document

Chunks are sorted by (index inside the document, rank of the document), documents ranked by descending number
of chunks. So the chunks of one scan step lie together, the documents still running are a prefix of all
documents, and an evenly filled batch is a plain transposition. A slot that holds no token (a pad) reads a
token of its own chunk, so that not even a NaN crosses documents; the gates are what silences it
(stages.arrange).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["KEPT", "PackedLayout", "Segments", "check_chunk_size", "check_rows"]


@dataclass(frozen=True, eq=False)
class Segments:
    """Runs of consecutive chunks that documents are cut into; G runs, int64 tables [G].

    Attributes:
        rank: document of the run, by rank.
        first_step: its first scan step.
        count: its number of chunks.
        chunk: its first chunk.
    """

    rank: Tensor
    first_step: Tensor
    count: Tensor
    chunk: Tensor


@dataclass(frozen=True, eq=False)
class PackedLayout:
    """The chunk grid of a batch of documents; build it once and hand it to every layer.

    Attributes:
        chunk_size: C.
        lengths: tokens of each document, N of them.
        bounds: the same as cu_seqlens, int64 [N + 1], always on the CPU.
        offsets: for each document, how many tokens of its first chunk an earlier call has already consumed.
        steps: for scan step i, the range of chunks (begin, end) it works on.
        order, rank: document at each rank, rank of each document [N]; None when documents are already ranked.
        token_of_slot: token of each slot [P * C]; None when the grid is a plain transposition.
        slot_of_token: its inverse on the tokens [B * T].
        valid: which slots hold a token, bool [P, C]; None when all do.
        last_chunk: last chunk of each document, by rank [N].
        ends_inside: whether each document, by rank, ends inside a chunk, bool [N]; None when none does.
        ending_rank, ending_chunk: the documents that end inside a chunk, and that chunk [E]; None when none.
        first_step, first_rank: of a span, its first step in the whole layout; of a band, its first document.
        rows: documents and steps of the whole layout, where the grid is a plain transposition.
    """

    chunk_size: int
    lengths: tuple[int, ...]
    bounds: Tensor
    offsets: tuple[int, ...]
    steps: tuple[tuple[int, int], ...]
    order: Tensor | None
    rank: Tensor | None
    token_of_slot: Tensor | None
    slot_of_token: Tensor | None
    valid: Tensor | None
    last_chunk: Tensor
    ends_inside: Tensor | None
    ending_rank: Tensor | None
    ending_chunk: Tensor | None
    first_step: int = 0
    first_rank: int = 0
    rows: tuple[int, int] = (0, 0)

    # What was cut out of this layout, by the arguments. No fields: a layout can be a part of itself, and FSDP
    # walks through the fields of what a block is given.

    @functools.cached_property
    def _spans(self) -> dict[tuple[int, int], tuple[PackedLayout, ...]]:
        return {}

    @functools.cached_property
    def _segments(self) -> dict[int, Segments]:
        return {}

    @functools.cached_property
    def _bands(self) -> dict[int, tuple[PackedLayout, ...]]:
        return {}

    @staticmethod
    def from_cu_seqlens(
        cu_seqlens: Tensor, chunk_size: int, *, offsets: int | Sequence[int] = 0
    ) -> PackedLayout:
        """Layout of documents that lie end to end in one row.

        Args:
            cu_seqlens: integers [N + 1], the first token of each document and, last, the number of tokens.
            chunk_size: C.
            offsets: tokens of the current chunk that the carried state has already seen (one, or one per
                document).

        Raises:
            ValueError: cu_seqlens is not a strictly increasing integer vector from 0, or an offset is not in
            [0, C).
        """
        bounds = _checked_bounds(cu_seqlens)
        lengths = tuple(end - begin for begin, end in itertools.pairwise(bounds))
        return _build(lengths, chunk_size, _per_document(offsets, len(lengths))).to(cu_seqlens.device)

    @staticmethod
    def of(lengths: tuple[int, ...], chunk_size: int, *, offsets: int | Sequence[int] = 0) -> PackedLayout:
        """Layout of documents of ``lengths`` tokens, end to end. Raises ValueError as above."""
        if len(lengths) < 1 or min(lengths) < 1:
            raise ValueError(f"lengths = {lengths}: name at least one document, none of them empty")
        return _build(lengths, chunk_size, _per_document(offsets, len(lengths)))

    @staticmethod
    def uniform(batch: int, length: int, chunk_size: int, *, offset: int | Sequence[int] = 0) -> PackedLayout:
        """Layout of ``batch`` rows of ``length`` tokens, one document each. Raises ValueError as above."""
        check_rows(batch, length, chunk_size, offset)
        return _build((length,) * batch, chunk_size, _per_document(offset, batch))

    @property
    def num_documents(self) -> int:
        """N."""
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """B * T."""
        return sum(self.lengths)

    @property
    def num_chunks(self) -> int:
        """P."""
        return self.steps[-1][1]

    @property
    def end_offsets(self) -> tuple[int, ...]:
        """Offset of each document's state after its last token."""
        return tuple((o + n) % self.chunk_size for o, n in zip(self.offsets, self.lengths, strict=True))

    @functools.cached_property
    def chunk_tokens(self) -> tuple[Tensor, Tensor]:
        """Where each chunk's tokens lie in token order: the first one, and how many, int64 [P]."""
        c, device = self.chunk_size, self.last_chunk.device
        if self.token_of_slot is None:
            rows, steps = self.rows
            first = torch.arange(rows, device=device) * steps + torch.arange(steps, device=device)[:, None]
            first = first.flatten() * c
        else:
            first = self.token_of_slot.view(-1, c)[:, 0].contiguous()
        return first, torch.full_like(first, c) if self.valid is None else self.valid.sum(1)

    @functools.cached_property
    def rank_chunks(self) -> tuple[Tensor, Tensor]:
        """First chunk of each scan step, and number of chunks of each document by rank, int64."""
        base, counts = self._rank_chunks
        device = self.last_chunk.device
        return base.to(device), counts.to(device)

    @property
    def _rank_chunks(self) -> tuple[Tensor, Tensor]:
        """``rank_chunks`` on the CPU, from which nothing has to wait for a device."""
        base, ends = torch.tensor(self.steps, device="cpu").T
        return base.contiguous(), _larger(ends - base, self.num_documents)

    def segments(self, chunks: int) -> Segments:
        """Every document cut into runs of ``chunks`` chunks, the last one shorter; cached."""
        if chunks not in self._segments:
            base, counts = self._rank_chunks
            running = torch.tensor([end - begin for begin, end in self.steps[::chunks]], device="cpu")
            step = torch.arange(0, len(base), chunks, device="cpu").repeat_interleave(running)
            first = (running.cumsum(0) - running).repeat_interleave(running)
            rank = torch.arange(len(step), device="cpu") - first
            tables = (rank, step, (counts[rank] - step).clamp(max=chunks), base[step] + rank)
            device = self.last_chunk.device
            self._segments[chunks] = Segments(*(x.contiguous().to(device) for x in tables))
        return self._segments[chunks]

    def to(self, device: torch.device | str) -> PackedLayout:
        """The same layout with its tables on ``device`` (itself when they are there)."""
        device = torch.device(device)
        if self.last_chunk.device == device:
            return self
        tables = {name: getattr(self, name) for name in _TABLES}
        moved: dict[str, Any] = {name: None if t is None else t.to(device) for name, t in tables.items()}
        return replace(self, **moved)

    def spans(self, chunks: int, *, steps: int = 1) -> tuple[PackedLayout, ...]:
        """The layout cut between scan steps into pieces of at least ``chunks`` chunks and ``steps`` steps
        (the last may have fewer).

        A span reads the operands of the whole call (``to_chunks``) and has its own ``steps``,
        ``token_of_slot`` and ``valid``; the tables of documents and tokens stay those of the whole. Cached:
        layers share their layout.
        """
        if (chunks, steps) not in self._spans:
            found, first = [], 0
            for i, (_, end) in enumerate(self.steps):
                full = end - self.steps[first][0] >= chunks and i + 1 - first >= steps
                if full or i + 1 == len(self.steps):
                    found.append(self._span(first, i + 1))
                    first = i + 1
            self._spans[chunks, steps] = tuple(found)
        return self._spans[chunks, steps]

    def _span(self, first: int, last: int) -> PackedLayout:
        if (first, last) == (0, len(self.steps)):
            return self
        base, end, c = self.steps[first][0], self.steps[last - 1][1], self.chunk_size
        ending_rank, ending_chunk = self.ending_rank, self.ending_chunk
        if ending_chunk is not None and ending_rank is not None:
            here = (ending_chunk >= base) & (ending_chunk < end)
            some = bool(here.any())
            ending_rank = ending_rank[here] if some else None
            ending_chunk = ending_chunk[here] - base if some else None
        return replace(
            self,
            first_step=first,
            ending_rank=ending_rank,
            ending_chunk=ending_chunk,
            steps=tuple((a - base, b - base) for a, b in self.steps[first:last]),
            token_of_slot=None if self.token_of_slot is None else self.token_of_slot[base * c : end * c],
            valid=None if self.valid is None or bool(self.valid[base:end].all()) else self.valid[base:end],
        )

    def bands(self, documents: int) -> tuple[PackedLayout, ...]:
        """The layout cut between documents, by rank, into bands of at most ``documents`` of them.

        Like a span, a band reads and writes the tokens of the whole call and keeps the whole's ranks in
        ``ending_rank``; bands can be cut into spans. Cached.
        """
        if documents not in self._bands:
            firsts = range(0, self.num_documents, documents)
            self._bands[documents] = tuple(self._band(i, i + documents) for i in firsts)
        return self._bands[documents]

    def _band(self, first: int, last: int) -> PackedLayout:
        if first == 0 and last >= self.num_documents:
            return self
        ranges = [(a + first, min(b, a + last)) for a, b in self.steps if b > a + first]
        ends = list(itertools.accumulate(b - a for a, b in ranges))
        steps = tuple(zip([0, *ends[:-1]], ends, strict=True))
        band = replace(self, first_rank=first, steps=steps)
        if self.token_of_slot is None:
            return band
        chunks = torch.cat([torch.arange(a, b, device=self.token_of_slot.device) for a, b in ranges])
        valid = None if self.valid is None else self.valid[chunks]
        ending_rank, ending_chunk = self.ending_rank, self.ending_chunk
        if ending_rank is not None and ending_chunk is not None:
            here = (ending_rank >= first) & (ending_rank < last)
            ending_rank, ending_chunk = ending_rank[here], torch.searchsorted(chunks, ending_chunk[here])
        none = ending_rank is not None and len(ending_rank) == 0
        return replace(
            band,
            token_of_slot=self.token_of_slot.view(-1, self.chunk_size)[chunks].flatten(),
            valid=None if valid is None or bool(valid.all()) else valid,
            ending_rank=None if none else ending_rank,
            ending_chunk=None if none else ending_chunk,
        )

    def to_chunks(self, x: Tensor) -> Tensor:
        """Token order [B, T, H, F] to contiguous chunk order [P, H, C, F].

        Pads repeat a token of their own chunk.
        """
        heads, width, c = x.shape[2], x.shape[3], self.chunk_size
        if self.token_of_slot is None:
            grid = self._of_whole(x.reshape(*self.rows, c, heads, width))
            return grid.permute(1, 0, 3, 2, 4).contiguous().view(-1, heads, c, width)
        head = torch.arange(heads, device=x.device)
        rows = self.token_of_slot.view(-1, 1, c) * heads + head[:, None]  # [P, H, C]
        return x.reshape(-1, width).index_select(0, rows.view(-1)).view(-1, heads, c, width)

    def from_chunks(self, x: Tensor, batch: int) -> Tensor:
        """Chunk order [P, H, C, F] back to token order [batch, T, H, F]; what the pads hold is dropped."""
        heads, width, c = x.shape[1], x.shape[3], self.chunk_size
        if self.slot_of_token is None:
            grid = x.view(self.rows[1], self.rows[0], heads, c, width).permute(1, 0, 3, 2, 4)
            return grid.reshape(batch, -1, heads, width)
        chunk, slot = self.slot_of_token // c, self.slot_of_token % c
        head = torch.arange(heads, device=x.device)
        rows = (chunk[:, None] * heads + head) * c + slot[:, None]  # [B * T, H]
        return x.reshape(-1, width).index_select(0, rows.view(-1)).view(batch, -1, heads, width)

    def write_tokens(self, out: Tensor, x: Tensor) -> None:
        """Write a span's x [P, H, C, F] to its tokens of ``out`` [B, T, H, F]; what pads hold is dropped."""
        heads, width, c = x.shape[1], x.shape[3], self.chunk_size
        if self.token_of_slot is None:
            part = self._of_whole(out.view(*self.rows, c, heads, width)).permute(1, 0, 3, 2, 4)
            part.copy_(x.view(part.shape))
            return
        slots, tokens = self._filled
        head = torch.arange(heads, device=x.device)
        rows = (slots // c * (heads * c) + slots % c)[:, None] + head * c
        target = tokens[:, None] * heads + head
        out.view(-1, width)[target.view(-1)] = x.reshape(-1, width)[rows.view(-1)].to(out.dtype)

    def _of_whole(self, grid: Tensor) -> Tensor:
        """This band's and span's part of the whole even grid [documents, steps, ...]."""
        step, rank = self.first_step, self.first_rank
        return grid[rank : rank + self.steps[0][1] - self.steps[0][0], step : step + len(self.steps)]

    @functools.cached_property
    def _filled(self) -> tuple[Tensor, Tensor]:
        """The slots that hold a token, and those tokens."""
        assert self.token_of_slot is not None, "an even grid needs no tables"
        if self.valid is None:
            return torch.arange(len(self.token_of_slot), device=self.token_of_slot.device), self.token_of_slot
        slots = self.valid.view(-1).nonzero().flatten()
        return slots, self.token_of_slot[slots]

    def rank_documents(self, x: Tensor) -> Tensor:
        """[N, ...] in the caller's order to rank order."""
        return x if self.order is None else x.index_select(0, self.order)

    def unrank_documents(self, x: Tensor) -> Tensor:
        """[N, ...] in rank order to the caller's order."""
        return x if self.rank is None else x.index_select(0, self.rank)


_TABLES: tuple[str, ...] = (
    "order",
    "rank",
    "token_of_slot",
    "slot_of_token",
    "valid",
    "last_chunk",
    "ends_inside",
    "ending_rank",
    "ending_chunk",
)


def check_rows(batch: int, length: int, chunk_size: int, offset: int | Sequence[int]) -> None:
    """Refuse what ``PackedLayout.uniform`` refuses, without building a table (ValueError)."""
    if batch < 1 or length < 1:
        raise ValueError(f"batch = {batch}, length = {length}: both must be at least 1")
    _check_offsets(chunk_size, _per_document(offset, batch))


def check_chunk_size(chunk_size: int) -> None:
    """Refuse what is not an int of at least 1 (ValueError)."""
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size = {chunk_size!r}: use 1 or more tokens, an int")


def _check_offsets(chunk_size: int, offsets: tuple[int, ...]) -> None:
    check_chunk_size(chunk_size)
    if any(not 0 <= o < chunk_size for o in offsets):
        raise ValueError(
            f"offset = {offsets}: an offset counts tokens of a chunk, so it is in [0, {chunk_size})"
        )


def _checked_bounds(cu_seqlens: Tensor) -> list[int]:
    whole = not cu_seqlens.is_floating_point() and not cu_seqlens.is_complex()
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or not whole:
        raise ValueError(
            f"cu_seqlens has shape {tuple(cu_seqlens.shape)} and dtype {cu_seqlens.dtype}: "
            "give an integer vector of the N document starts followed by the number of tokens"
        )
    bounds: list[int] = cu_seqlens.tolist()
    if bounds[0] != 0:
        raise ValueError(f"cu_seqlens[0] = {bounds[0]}: the first document starts at token 0")
    for i, (begin, end) in enumerate(itertools.pairwise(bounds)):
        if end <= begin:
            raise ValueError(
                f"cu_seqlens[{i + 1}] = {end} after {begin}: it must increase (no empty documents)"
            )
    return bounds


def _per_document(offsets: int | Sequence[int], documents: int) -> tuple[int, ...]:
    values = (offsets,) * documents if isinstance(offsets, int) else tuple(offsets)
    if len(values) != documents:
        raise ValueError(
            f"{len(values)} offsets for {documents} documents: give one offset, or one per document"
        )
    return values


# Layouts that are kept: micro-batches in flight. At 1M tokens one takes 32 MB, on a GPU as much again there.
KEPT = 16


@functools.lru_cache(maxsize=KEPT)
def _build(lengths: tuple[int, ...], chunk_size: int, offsets: tuple[int, ...]) -> PackedLayout:
    _check_offsets(chunk_size, offsets)
    # Whoever asks first does so for everybody: in inference mode, or with another default device.
    with torch.inference_mode(False), torch.device("cpu"):
        return _grid(lengths, chunk_size, offsets)


def _grid(lengths: tuple[int, ...], chunk_size: int, offsets: tuple[int, ...]) -> PackedLayout:
    length, offset = torch.tensor(lengths), torch.tensor(offsets)
    chunks = (offset + length + chunk_size - 1) // chunk_size  # of each document
    order = torch.argsort(chunks, descending=True, stable=True)
    rank = torch.argsort(order)
    active = _larger(chunks, int(chunks.max()))  # documents in each step
    ends = active.cumsum(0)
    base = ends - active  # first chunk of each step
    ranked_end = (offset + length)[order] % chunk_size
    plain = chunk_size * len(active) == lengths[0] and len(set(lengths)) == 1 and not any(offsets)
    tables = (None, None, None) if plain else _tables(length, offset, rank, base, int(ends[-1]), chunk_size)
    ranked = bool((order == torch.arange(len(lengths))).all())
    last_chunk = base[chunks[order] - 1] + torch.arange(len(lengths))
    inside = ranked_end > 0
    some = bool(inside.any())
    return PackedLayout(
        chunk_size=chunk_size,
        lengths=lengths,
        bounds=torch.tensor([0, *itertools.accumulate(lengths)]),
        offsets=offsets,
        steps=tuple(zip(base.tolist(), ends.tolist(), strict=True)),
        order=None if ranked else order,
        rank=None if ranked else rank,
        rows=(len(lengths), len(active)),
        token_of_slot=tables[0],
        slot_of_token=tables[1],
        valid=tables[2],
        last_chunk=last_chunk,
        ends_inside=inside if some else None,
        ending_rank=inside.nonzero().flatten() if some else None,
        ending_chunk=last_chunk[inside] if some else None,
    )


def _larger(values: Tensor, count: int) -> Tensor:
    """How many of ``values`` [n] are larger than i, for i < ``count``: int64, in time n + count."""
    return len(values) - values.bincount(minlength=count).cumsum(0)[:count]


def _tables(
    length: Tensor, offset: Tensor, rank: Tensor, base: Tensor, num_chunks: int, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    tokens = int(length.sum())
    document = torch.repeat_interleave(torch.arange(len(length)), length)
    position = offset[document] + torch.arange(tokens) - (length.cumsum(0) - length)[document]
    step = position // chunk_size
    slot = position % chunk_size - torch.where(step == 0, offset[document], 0)
    chunk = base[step] + rank[document]
    slot_of_token = chunk * chunk_size + slot
    # Pads read the first token of their own chunk.
    first = torch.full((num_chunks,), tokens).scatter_reduce(0, chunk, torch.arange(tokens), "amin")
    token_of_slot = first.repeat_interleave(chunk_size)
    token_of_slot[slot_of_token] = torch.arange(tokens)
    valid = torch.zeros(num_chunks * chunk_size, dtype=torch.bool)
    valid[slot_of_token] = True
    return token_of_slot, slot_of_token, None if bool(valid.all()) else valid.view(num_chunks, chunk_size)
