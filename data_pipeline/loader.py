"""Shards to batches: memory maps, rows and labels; the state of a loader is one number.

b rows of T tokens. Row i is a slice of the split's token stream (pack.py). The global sequence of rows is a
pure function of (fingerprint, seed, counter); a rank takes its share by
arithmetic, so every mesh sees the same one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data_pipeline.manifest import load_manifest, verify_files
from data_pipeline.pack import IGNORED, EpochOrder, Stream, mask_of, num_rows
from data_pipeline.shard import Shard

__all__ = ["Batch", "BatchLoader", "TokenDataset"]


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank.

    Attributes:
        tokens: int64 [b, T].
        labels: int64 [b, T], the next token; -100 where there is none (after EOS, and beyond the last token).
        cu_seqlens: int32 [n + 1] over the flattened [b * T] stream: each row and document start, and b * T.
        valid_tokens: labels that count.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    cu_seqlens: torch.Tensor
    valid_tokens: int


class TokenDataset:
    """One split of a prepared data set, as rows of T tokens.

    Attributes:
        fingerprint: identity of the data set; together with `seed` it decides the order.
        num_samples: rows per epoch.
        num_tokens: stored tokens of the split (BOS and EOS included).
        utilisation: stored tokens over the positions of an epoch's rows; below 1 where documents are aligned.
        num_documents: documents of the split; num_tokens - num_documents tokens are predicted in an epoch.
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
        align: int = 1,
        verify: bool = True,
    ) -> None:
        """Open the shards of a split through memory maps.

        Args:
            directory: a prepared data set.
            split: "train" or "validation".
            sequence_length: T, tokens per row.
            seed: of the order.
            align: documents start at multiples of this many tokens: 1, or the chunk size C for mesh.sp > 1.
            verify: compare every shard's sha256 with the manifest (about 1.8 GB/s).

        Raises:
            FileNotFoundError: there is no prepared data set.
            ValueError: no such split, or a missing or damaged file, which the message names with the remedy.
        """
        directory = Path(directory)
        if sequence_length < 2:
            raise ValueError(f"data.sequence_length = {sequence_length}: use 2 or more tokens")
        manifest = load_manifest(directory)
        if split not in manifest.splits:
            raise ValueError(
                f"no split {split!r} in {directory}: it has {', '.join(sorted(manifest.splits))}"
            )
        info = manifest.splits[split]
        if verify:
            hashes = {f"{shard.name}.bin": shard.sha256_bin for shard in info.shards}
            hashes |= {f"{shard.name}.idx": shard.sha256_idx for shard in info.shards}
            if problems := verify_files(directory, hashes):
                raise ValueError("; ".join(problems))
        shards = [Shard(directory / shard.name) for shard in info.shards]
        self._stream = Stream(shards, align=align, fill=manifest.tokenizer["eos"])
        self.sequence_length, self.seed, self.split = sequence_length, seed, split
        self.fingerprint = manifest.fingerprint
        self.num_tokens, self.num_documents = self._stream.stored_tokens, info.documents
        self.num_bytes = info.bytes
        self.num_samples = num_rows(len(self._stream), sequence_length)
        self.utilisation = self.num_tokens / max(1, self.num_samples * sequence_length)
        self.vocab_size: int = manifest.tokenizer["vocab_size"]
        self.bos_id: int = manifest.tokenizer["bos"]
        self.eos_id: int = manifest.tokenizer["eos"]

    def tokens_of(self, document: int) -> np.ndarray:
        """Stored tokens of a document, int64, BOS and EOS included. IndexError outside [0, num_documents)."""
        if not 0 <= document < self.num_documents:
            raise IndexError(f"document {document} of {self.num_documents}")
        return self._stream.document(document)

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Row `index` in stream order.

        Returns:
            tokens: int64 [T + 1]; the last row is filled up with EOS, whose labels are masked.
            starts: int64 [n], positions in [0, T) where a document begins; 0 is always one of them.
        """
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        width = self.sequence_length
        start = index * width
        tokens = np.full(width + 1, self.eos_id, np.int64)
        found = self._stream.slice(start, start + width + 1)
        tokens[: len(found)] = found
        return tokens, self._stream.starts_in(start, start + width)


class BatchLoader:
    """The micro-batches of one data-parallel rank, addressed by a counter.

    Global batch k holds the samples [k * global_batch, (k + 1) * global_batch); rank r takes the r-th of
    `dp_size` equal runs of them, cut into micro-batches. Sample s is row
    `permutation(epoch)[s % num_samples]`, a new permutation each epoch. There is no other state.
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
            shuffle: False gives the rows once, in stream order, and empty rows (all labels -100) beyond: for
                validation, with `num_batches` batches.

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
        self._order = EpochOrder(dataset.fingerprint, dataset.seed, dataset.num_samples)

    @property
    def num_batches(self) -> int:
        """Global batches that hold every row of an epoch once."""
        return -(-self.dataset.num_samples // self.global_batch)

    def micro_batches(self, counter: int) -> list[Batch]:
        """This rank's micro-batches of the global batch that begins after `counter` consumed samples."""
        share = self.global_batch // self.dp_size
        first = counter + self.dp_rank * share
        samples = np.arange(first, first + share, dtype=np.int64)
        rows = self._order.rows(samples) if self.shuffle else samples
        return [self._batch(rows[i : i + self.micro_batch]) for i in range(0, share, self.micro_batch)]

    def _batch(self, rows: np.ndarray) -> Batch:
        width, data = self.dataset.sequence_length, self.dataset
        tokens = np.full((len(rows), width + 1), data.eos_id, np.int64)
        starts = [np.arange(len(rows), dtype=np.int64) * width]
        for place, row in enumerate(rows):
            if row < data.num_samples:
                tokens[place], found = data.sample(int(row))
                starts.append(found + place * width)
        labels = mask_of(tokens[:, :-1], tokens[:, 1:], data.eos_id)
        boundaries = np.append(np.unique(np.concatenate(starts)), len(rows) * width)
        return Batch(
            tokens=torch.from_numpy(np.ascontiguousarray(tokens[:, :-1])),
            labels=torch.from_numpy(labels),
            cu_seqlens=torch.from_numpy(boundaries.astype(np.int32)),
            valid_tokens=int((labels != IGNORED).sum()),
        )
