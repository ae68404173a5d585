"""The data section of a recipe: which text, how it becomes tokens, how tokens become rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from trellis_dist.validation import STRICT, require

__all__ = ["DataConfig", "SourceConfig", "TokenizerConfig"]


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where documents come from.

    Attributes:
        kind: "stdlib" (the running Python's own library), "path" (a folder or file of .txt, .jsonl(.gz/.zst),
            .parquet) or "huggingface" (a data set name, streamed through ``datasets``).
        path: folder or file, for kind "path".
        name, subset, revision, split: the Hugging Face data set; the revision is pinned in shipped recipes.
        text_column: field that holds the text in jsonl, parquet and Hugging Face rows.
        licence: licence of the corpus, copied into the manifest and the report.
        max_documents: stop after this many documents; None reads all.
        max_document_bytes: a longer record is quarantined.
        text_document_bytes: cut a .txt file, at blank lines where it has them, into documents of at most this
            many bytes; None keeps a file whole. For a corpus that is one long file.
    """

    __pydantic_config__ = STRICT

    kind: Literal["stdlib", "path", "huggingface"] = "stdlib"
    path: str | None = None
    name: str | None = None
    subset: str | None = None
    revision: str | None = None
    split: str = "train"
    text_column: str = "text"
    licence: str = "unknown"
    max_documents: int | None = None
    max_document_bytes: int = 64 * 2**20
    text_document_bytes: int | None = None

    def __post_init__(self) -> None:
        require(self.kind != "path" or bool(self.path), 'data.source.kind = "path" needs data.source.path')
        require(
            self.kind != "huggingface" or bool(self.name),
            'data.source.kind = "huggingface" needs data.source.name',
        )
        for name in ("max_documents", "max_document_bytes", "text_document_bytes"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"data.source.{name} = {value}: use 1 or more")


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """A SentencePiece tokenizer, trained on the corpus or given.

    Attributes:
        path: an existing .model file; None trains one.
        vocab_size: pieces, 256 bytes and control tokens included.
        model_type: "bpe" trains in seconds; "unigram" takes ten times as long to train and encodes five times
            faster (about 20 MB/s per core), which pays on a corpus of billions of tokens.
        split_by_script: keep letters, digits and punctuation in separate pieces. False lets a piece mix them
            ("self.", "):\\n"): 6% fewer tokens on held-out code.
        sample_bytes: text used for training, drawn evenly over the work units, held-out documents left out.
        threads: training threads; part of the recipe because the result may depend on it.
    """

    __pydantic_config__ = STRICT

    path: str | None = None
    vocab_size: int = 4096
    model_type: Literal["unigram", "bpe"] = "bpe"
    split_by_script: bool = False
    sample_bytes: int = 16 * 2**20
    threads: int = 2

    def __post_init__(self) -> None:
        require(
            self.vocab_size > 260, f"data.tokenizer.vocab_size = {self.vocab_size}: 256 byte pieces need more"
        )
        require(
            self.sample_bytes >= 1, f"data.tokenizer.sample_bytes = {self.sample_bytes}: use 1 or more bytes"
        )
        require(self.threads >= 1, f"data.tokenizer.threads = {self.threads}: use 1 or more threads")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Text to token shards to rows.

    Attributes:
        directory: where shards, tokenizer and manifest are written and read.
        sequence_length: T, tokens per row.
        packing: "concat" fills rows end to end; "aligned" starts every document at a multiple of the chunk
            size, which mesh.sp > 1 needs, and leaves gaps.
        validation_fraction: share of whole documents held out, chosen by document hash (never less than one).
        unit_bytes: input bytes per Ray task (a work unit).
        shard_tokens: a shard is closed before it would hold more tokens than this.
        seed: order of the samples.
    """

    __pydantic_config__ = STRICT

    directory: str
    sequence_length: int = 2048
    packing: Literal["concat", "aligned"] = "concat"
    validation_fraction: float = 0.02
    unit_bytes: int = 2 * 2**20
    shard_tokens: int = 2**28
    seed: int = 0
    source: SourceConfig = field(default_factory=SourceConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)

    def __post_init__(self) -> None:
        require(
            self.sequence_length >= 2, f"data.sequence_length = {self.sequence_length}: use 2 or more tokens"
        )
        require(
            0.0 < self.validation_fraction < 0.5,
            f"data.validation_fraction = {self.validation_fraction}: use a share between 0 and 0.5",
        )
        require(self.unit_bytes >= 1, f"data.unit_bytes = {self.unit_bytes}: use 1 or more bytes")
        require(self.shard_tokens >= 1, f"data.shard_tokens = {self.shard_tokens}: use 1 or more tokens")
