"""Shards to batches: memory maps, rows and labels; the state of a loader is one number.

b rows of T tokens. What a row holds is the packing's affair (pack.py), which row comes when the order's
(order.py). The global sequence of rows is a pure function of (fingerprint, seed, weights, counter); a rank
takes its share by arithmetic, so every mesh sees the same one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data_pipeline.manifest import Manifest, ShardInfo, load_manifest, verify_files
from data_pipeline.order import RunOrder
from data_pipeline.pack import IGNORED, Packing, StreamRows, TableRows
from data_pipeline.rows import check_alignment, needs_row_index, open_row_index
from data_pipeline.shard import Shard
from data_pipeline.workers import default_workers

__all__ = ["Batch", "BatchLoader", "TokenDataset"]


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank.

    Attributes:
        tokens: int64 [b, T].
        labels: int64 [b, T], the token that follows in the document; -100 in fill and, where rows hold whole
            documents end to end ("concat"), at their last tokens.
        cu_seqlens: int32 [n + 1] over the flattened [b * T] stream: where each row, document or piece and the
            fill at a row's end begin, and b * T.
        valid_tokens: labels that count.
        slot: place of its first row in the global batch.
        carried: where rows go on from the states of earlier rows, int64 [b]: tokens of each row's first
            document that this place of the earlier batches has read, 0 where it starts anew; otherwise None.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    cu_seqlens: torch.Tensor
    valid_tokens: int
    slot: int = 0
    carried: torch.Tensor | None = None


class TokenDataset:
    """One split of a prepared data set, as rows of T tokens.

    Attributes:
        fingerprint: identity of the data set; together with `seed` and `weights` it decides the order.
        num_samples: rows of all sources; a shuffled epoch has `order.size` samples, as many or a few more.
        source_rows: source -> its rows, in the order in which they are numbered.
        order: which row each sample of a shuffled epoch is.
        num_tokens: stored tokens of the split (BOS and EOS included).
        utilisation: share of the positions of all rows that predict a token; the rest is fill and, with
            "concat", the ends of documents.
        num_documents: documents of the split; num_tokens - num_documents tokens are predicted when every row
            is read once.
        num_bytes: UTF-8 bytes of the split's normalised text, the denominator of bits per byte.
        vocab_size, bos_id, eos_id: of the tokenizer.
    """

    def __init__(
        self,
        directory: Path | str,
        split: str,
        *,
        sequence_length: int,
        seed: int,
        packing: Packing = "concat",
        align: int = 1,
        weights: Mapping[str, float] | None = None,
        carry_rows: int = 1,
        verify: bool = True,
    ) -> None:
        """Open the shards of a split, and the row indexes of the packing, through memory maps.

        A row index that is missing, damaged or of other shards is made first.

        Args:
            directory: a prepared data set.
            split: "train", "validation" or "test".
            sequence_length: T, tokens per row.
            seed: of the order.
            packing: how documents become rows (data_pipeline/pack.py).
            align: documents start at multiples of this many tokens: 1, or the chunk size C for mesh.sp > 1.
            weights: share of a source in the shuffled order, relative to the others'; a source without one
                has the number of its rows.
            carry_rows: consecutive rows that one place of consecutive batches reads, for layers that carry
                their state from one to the next; 1 shuffles the rows one by one.
            verify: compare every shard's sha256 with the manifest (about 1.8 GB/s per core).

        Raises:
            FileNotFoundError: there is no prepared data set.
            ValueError: no such split, a weight for a source that is not there, a source of fewer rows than
                `carry_rows`, a missing or damaged file, or a row index that cannot be written; one line, with
                the remedy.
        """
        directory = Path(directory)
        if sequence_length < 2:
            raise ValueError(f"data.sequence_length = {sequence_length}: use 2 or more tokens")
        check_alignment(sequence_length, align)
        if carry_rows < 1:
            raise ValueError(f"data.carry_rows = {carry_rows}: use 1 (off) or more rows")
        manifest = load_manifest(directory)
        infos = _shards_of(manifest, split, directory)
        if verify:
            _verify(directory, infos)
        self.sequence_length, self.seed, self.split = sequence_length, seed, split
        self.packing, self.align = packing, align
        self.fingerprint = manifest.fingerprint
        self.vocab_size: int = manifest.tokenizer["vocab_size"]
        self.bos_id: int = manifest.tokenizer["bos"]
        self.eos_id: int = manifest.tokenizer["eos"]
        self._shards = [Shard(directory / info.name) for info in infos]
        self._first_document: list[int] = np.cumsum([0] + [s.documents for s in self._shards]).tolist()
        sources = self._open_sources(directory, infos)
        self.source_rows = {name: rows.num_rows for name, rows in sources.items()}
        self._readers = list(sources.values())
        self._first_row: list[int] = np.cumsum([0, *self.source_rows.values()]).tolist()
        self.num_samples: int = self._first_row[-1]
        self.num_documents = self._first_document[-1]
        self.num_tokens = sum(len(shard.tokens) for shard in self._shards)
        self.num_bytes = manifest.splits[split].bytes
        self.utilisation = (self.num_tokens - self.num_documents) / max(1, self.num_samples * sequence_length)
        self.order = RunOrder(self.fingerprint, seed, self.source_rows, weights, length=carry_rows)

    def _open_sources(
        self, directory: Path, infos: tuple[ShardInfo, ...]
    ) -> dict[str, StreamRows | TableRows]:
        """Readers of the rows of each source, in the order of the shards."""
        sources: dict[str, StreamRows | TableRows] = {}
        for name in dict.fromkeys(info.source for info in infos):
            chosen = [(s, info) for s, info in zip(self._shards, infos) if info.source == name]
            shards, width = [shard for shard, _ in chosen], self.sequence_length
            if not needs_row_index(self.packing, self.align):
                sources[name] = StreamRows(shards, sequence_length=width, fill=self.eos_id)
                continue
            options = {"sequence_length": width, "align": self.align}
            tables = [open_row_index(directory, i, packing=self.packing, **options) for _, i in chosen]
            sources[name] = TableRows(shards, tables, fill=self.eos_id, **options)
        return sources

    def tokens_of(self, document: int) -> np.ndarray:
        """Stored tokens of a document, int64, BOS and EOS included. IndexError outside [0, num_documents)."""
        if not 0 <= document < self.num_documents:
            raise IndexError(f"document {document} of {self.num_documents}")
        shard = bisect_right(self._first_document, document) - 1
        found = self._shards[shard].document(document - self._first_document[shard])
        return found.astype(np.int64)

    def read(self, row: int, tokens: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Write row `row`, counted source after source, into tokens and labels, int64 [T] each.

        Returns:
            int64 [n], rising from 0: positions where a segment (document, piece or fill) begins.
        """
        reader, row = self._found(row)
        return reader.read(row, tokens, labels)

    def carried(self, row: int, rows: int) -> int:
        """Tokens of row `row`'s first document that lie in the `rows` rows before it, of the same source."""
        reader, row = self._found(row)
        return reader.carried(row, rows)

    def sources_of(self, rows: np.ndarray) -> dict[str, int]:
        """How many of `rows`, counted source after source, belong to each source."""
        found = np.searchsorted(self._first_row, rows, side="right") - 1
        counts = np.bincount(found, minlength=len(self._readers)).tolist()
        return dict(zip(self.source_rows, counts, strict=True))

    def _found(self, row: int) -> tuple[StreamRows | TableRows, int]:
        if not 0 <= row < self.num_samples:
            raise IndexError(f"row {row} of {self.num_samples}")
        source = bisect_right(self._first_row, row) - 1
        return self._readers[source], row - self._first_row[source]


def _shards_of(manifest: Manifest, split: str, directory: Path) -> tuple[ShardInfo, ...]:
    if split not in manifest.splits:
        raise ValueError(f"no split {split!r} in {directory}: it has {', '.join(sorted(manifest.splits))}")
    return manifest.splits[split].shards


def _verify(directory: Path, infos: tuple[ShardInfo, ...]) -> None:
    hashes = {f"{info.name}.bin": info.sha256_bin for info in infos}
    hashes |= {f"{info.name}.idx": info.sha256_idx for info in infos}
    if problems := verify_files(directory, hashes, threads=default_workers()):
        raise ValueError("; ".join(problems))


class BatchLoader:
    """The micro-batches of one data-parallel rank, addressed by a counter.

    Global batch k holds the samples [k * global_batch, (k + 1) * global_batch); rank r takes the r-th of
    `dp_size` equal shares of them, cut into micro-batches. Which row sample s is, the data set's order says
    (order.py). There is no other state.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        global_batch: int,
        micro_batch: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        shuffle: bool = True,
    ) -> None:
        """Check the batch equation.

        Args:
            dataset: the split.
            global_batch: rows per step over all ranks.
            micro_batch: rows per forward pass of one rank.
            dp_rank, dp_size: this rank's place among the data-parallel ranks.
            shuffle: False gives the rows once, source after source, and empty rows (all labels -100) beyond:
                for validation, with `num_batches` batches.

        Raises:
            ValueError: the batches do not divide, or the split has no rows.
        """
        if min(global_batch, micro_batch, dp_size) < 1 or not 0 <= dp_rank < dp_size:
            raise ValueError(
                "a loader needs positive batches and 0 <= dp_rank < dp_size: got "
                f"{global_batch = }, {micro_batch = }, {dp_rank = }, {dp_size = }"
            )
        if global_batch % (micro_batch * dp_size):
            raise ValueError(
                f"global batch of {global_batch} rows is no multiple of micro_batch {micro_batch} x dp "
                f"{dp_size} = {micro_batch * dp_size}: change one of them"
            )
        if dataset.num_samples == 0:
            raise ValueError(f"the {dataset.split} split has no rows: use a larger corpus")
        self.dataset, self.global_batch, self.micro_batch = dataset, global_batch, micro_batch
        self.dp_rank, self.dp_size, self.shuffle = dp_rank, dp_size, shuffle

    @property
    def num_batches(self) -> int:
        """Global batches that hold every row of an epoch once."""
        return -(-self.dataset.num_samples // self.global_batch)

    def micro_batches(self, counter: int) -> list[Batch]:
        """This rank's micro-batches of the global batch that begins after `counter` consumed samples.

        Raises:
            ValueError: rows carry states, and `counter` is no multiple of the global batch.
        """
        order, size = self.dataset.order, self.micro_batch
        carries = self.shuffle and order.length > 1
        if carries and counter % self.global_batch:
            raise ValueError(
                f"a counter of {counter} samples is inside a batch of {self.global_batch}: rows that carry "
                "states keep their places from batch to batch, so the global batch cannot change on the way"
            )
        share = self.global_batch // self.dp_size
        begin = self.dp_rank * share
        rows = inside = np.arange(counter + begin, counter + begin + share, dtype=np.int64)
        if self.shuffle:
            rows, inside = order.rows(rows, self.global_batch)
        parts = [slice(i, i + size) for i in range(0, share, size)]
        return [
            self._batch(
                rows[part],
                slot=begin + part.start,
                carried=self._carried(rows[part], inside[part]) if carries else None,
            )
            for part in parts
        ]

    def _carried(self, rows: np.ndarray, inside: np.ndarray) -> torch.Tensor:
        pairs = zip(rows.tolist(), inside.tolist(), strict=True)
        return torch.tensor([self.dataset.carried(row, before) for row, before in pairs])

    def _batch(self, rows: np.ndarray, *, slot: int, carried: torch.Tensor | None) -> Batch:
        data, width = self.dataset, self.dataset.sequence_length
        tokens, labels = np.empty((2, len(rows), width), np.int64)
        starts = []
        for place, row in enumerate(rows.tolist()):
            if row < data.num_samples:
                starts.append(data.read(row, tokens[place], labels[place]) + place * width)
            else:
                tokens[place], labels[place] = data.eos_id, IGNORED
                starts.append(np.array([place * width]))
        bounds = np.concatenate([*starts, [len(rows) * width]]).astype(np.int32)
        return Batch(
            tokens=torch.from_numpy(tokens),
            labels=torch.from_numpy(labels),
            cu_seqlens=torch.from_numpy(bounds),
            valid_tokens=int(np.count_nonzero(labels != IGNORED)),
            slot=slot,
            carried=carried,
        )
