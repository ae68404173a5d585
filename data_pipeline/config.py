"""The data section of a recipe: which text, how it becomes tokens, how tokens become rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from trellis_dist.validation import STRICT, require

__all__ = [
    "CORPUS",
    "DataConfig",
    "DecontaminateConfig",
    "DedupConfig",
    "FilterConfig",
    "NormalizeConfig",
    "SourceConfig",
    "TokenizerConfig",
]

# The name of the only source where the recipe has no mixture.
CORPUS = "corpus"


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
        weight: share of this source's rows in the mixture, relative to the others'; None counts its rows.
        max_documents: stop after this many documents are kept; None takes all.
        max_tokens: stop with the document that brings the training split to this many tokens; None takes all.
        max_document_bytes: a longer record is quarantined.
        text_document_bytes: cut a .txt file, at blank lines where it has them, into documents of at most this
            many bytes; None keeps a file whole. For a corpus that is one long file.
        strip_gutenberg: leave out the header and the licence that Project Gutenberg puts around a .txt book.
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
    weight: float | None = None
    max_documents: int | None = None
    max_tokens: int | None = None
    max_document_bytes: int = 64 * 2**20
    text_document_bytes: int | None = None
    strip_gutenberg: bool = False

    def __post_init__(self) -> None:
        require(self.kind != "path" or bool(self.path), 'data.source.kind = "path" needs data.source.path')
        require(
            self.kind != "huggingface" or bool(self.name),
            'data.source.kind = "huggingface" needs data.source.name',
        )
        for name in ("max_documents", "max_tokens", "max_document_bytes", "text_document_bytes"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"data.source.{name} = {value}: use 1 or more")
        require(
            self.weight is None or 0 < self.weight < float("inf"),
            f"data.source.weight = {self.weight}: use a number above 0, or leave the source out",
        )


@dataclass(frozen=True, kw_only=True)
class NormalizeConfig:
    r"""What is changed in every document before anything looks at it.

    Line endings become "\n", and control characters but tab, newline and form feed are removed, always.

    Attributes:
        form: Unicode normal form: "NFC" joins letters and accents, "NFKC" also replaces ligatures, widths and
            the like (it changes text: not for code), "none" keeps the code points.
        mojibake: undo text that was decoded with the wrong encoding ("caf\u00c3\u00a9"), with ftfy.
    """

    __pydantic_config__ = STRICT

    form: Literal["NFC", "NFKC", "none"] = "NFC"
    mojibake: bool = False


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """Rules that drop whole documents; a rule without a threshold is off. The first that applies is counted.

    Words are what lies between white space. The repetition and word rules are those of Gopher (Rae et al.
    2021, "Scaling Language Models", table A1), whose thresholds are shipped as the recipe part
    ``filters/gopher``.

    Attributes:
        languages: ISO 639-1 codes to keep, e.g. ["en"]; empty keeps all. py3langid, its own model of 97.
        language_confidence: least probability of the language found, where languages are given.
        min_words, max_words: words per document.
        min_mean_word_length, max_mean_word_length: characters per word.
        max_symbol_ratio: "#" or ellipses, per word.
        min_alphabetic_words: share of words with a letter in them.
        max_bullet_lines, max_ellipsis_lines: share of lines that begin with a bullet, or end in an ellipsis.
        min_stop_words: how many of the, be, to, of, and, that, have, with must occur (English only).
        max_duplicate_lines, max_duplicate_paragraphs: share of lines, and of paragraphs, that stood before.
        max_duplicate_line_characters, max_duplicate_paragraph_characters: their share of the characters.
        max_top_ngrams: share of the characters in the commonest word n-gram of 2, 3 and 4 words.
        max_duplicate_ngrams: share of the characters in repeated n-grams of 5, 6, 7, 8, 9 and 10 words.
    """

    __pydantic_config__ = STRICT

    languages: tuple[str, ...] = ()
    language_confidence: float = 0.5
    min_words: int | None = None
    max_words: int | None = None
    min_mean_word_length: float | None = None
    max_mean_word_length: float | None = None
    max_symbol_ratio: float | None = None
    min_alphabetic_words: float | None = None
    max_bullet_lines: float | None = None
    max_ellipsis_lines: float | None = None
    min_stop_words: int | None = None
    max_duplicate_lines: float | None = None
    max_duplicate_paragraphs: float | None = None
    max_duplicate_line_characters: float | None = None
    max_duplicate_paragraph_characters: float | None = None
    max_top_ngrams: tuple[float, ...] = ()
    max_duplicate_ngrams: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        require(
            0.0 <= self.language_confidence <= 1.0,
            f"data.filters.language_confidence = {self.language_confidence}: use a probability",
        )
        for name, sizes in (("max_top_ngrams", "2, 3 and 4"), ("max_duplicate_ngrams", "5 to 10")):
            given, count = getattr(self, name), 3 if name == "max_top_ngrams" else 6
            require(
                len(given) in (0, count),
                f"data.filters.{name} = {list(given)}: give {count} shares, for {sizes} words, or none",
            )


@dataclass(frozen=True, kw_only=True)
class DedupConfig:
    """Which documents are copies: of equal and of similar ones the first in corpus order is kept.

    Attributes:
        exact: drop a document whose normalised text came before.
        similarity: drop a document whose estimated Jaccard similarity (shingles of words, MinHash) with an
            earlier one is at least this; None is off.
        shingle_words: words per shingle, lower case.
        permutations: MinHash values per document; the estimate's standard error is below
            0.5 / sqrt(permutations).
        bands: groups of MinHash values; documents that agree in one group are compared. 128 values in 16
            bands find a pair of similarity 0.8 with probability 0.95, of 0.9 with 0.9999.
    """

    __pydantic_config__ = STRICT

    exact: bool = True
    similarity: float | None = None
    shingle_words: int = 5
    permutations: int = 128
    bands: int = 16

    def __post_init__(self) -> None:
        require(
            self.similarity is None or 0 < self.similarity <= 1,
            f"data.dedup.similarity = {self.similarity}: use a share above 0 and up to 1, or leave it out",
        )
        require(self.shingle_words >= 1, f"data.dedup.shingle_words = {self.shingle_words}: use 1 or more")
        require(
            self.bands >= 1 and self.permutations >= 1 and self.permutations % self.bands == 0,
            f"data.dedup.permutations = {self.permutations} is no multiple of bands = {self.bands}",
        )


@dataclass(frozen=True, kw_only=True)
class DecontaminateConfig:
    """Documents that hold text of the evaluation sets are dropped.

    Attributes:
        paths: files or folders of evaluation sets (.jsonl, .json, .txt, .parquet); every text in them counts.
        ngram_words: a document that shares this many consecutive words with them (lower case, punctuation
            left out) is dropped; the n-gram and where it comes from are logged.
    """

    __pydantic_config__ = STRICT

    paths: tuple[str, ...] = ()
    ngram_words: int = 13

    def __post_init__(self) -> None:
        require(
            self.ngram_words >= 5,
            f"data.decontaminate.ngram_words = {self.ngram_words}: use 5 or more (13 is usual)",
        )


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """A SentencePiece tokenizer, trained on the corpus or given, or a given Hugging Face tokenizer.

    Attributes:
        path: an existing SentencePiece .model or Hugging Face tokenizer.json; None trains one.
        bos_token, eos_token: the pieces put around a document, for a tokenizer.json; None finds the usual
            names among its special tokens, and takes the one there is for both.
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
    bos_token: str | None = None
    eos_token: str | None = None
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
        packing: "concat" fills rows end to end and cuts documents where a row ends; "best_fit" cuts only
            documents longer than a row and fills rows with whole ones; "per_document" starts a row with
            every document.
        chunk_aligned: documents start at multiples of the model's chunk size, which mesh.sp > 1 needs.
        carry_rows: consecutive rows read by one place of consecutive batches, each layer's state carried from
            one to the next (without gradients between them), so that a document inside such a run is seen
            whole; 1 starts every row anew.
        validation_fraction: share of whole documents held out, chosen by document hash (never less than one).
        test_fraction: share of whole documents held out besides, never looked at in training; may be 0.
        unit_bytes: input bytes per Ray task (a work unit).
        shard_tokens: a shard is closed before it would hold more tokens than this.
        seed: order of the samples.
        mixture: several sources instead of ``source``, each a section ``data.mixture.NAME`` with the keys of
            ``data.source``; duplicates are dropped over all of them, in alphabetical order of the names.
    """

    __pydantic_config__ = STRICT

    directory: str
    sequence_length: int = 2048
    packing: Literal["concat", "best_fit", "per_document"] = "concat"
    chunk_aligned: bool = False
    carry_rows: int = 1
    validation_fraction: float = 0.02
    test_fraction: float = 0.0
    unit_bytes: int = 2 * 2**20
    shard_tokens: int = 2**28
    seed: int = 0
    source: SourceConfig = field(default_factory=SourceConfig)
    mixture: dict[str, SourceConfig] = field(default_factory=dict)
    normalize: NormalizeConfig = field(default_factory=NormalizeConfig)
    filters: FilterConfig = field(default_factory=FilterConfig)
    dedup: DedupConfig = field(default_factory=DedupConfig)
    decontaminate: DecontaminateConfig = field(default_factory=DecontaminateConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)

    def __post_init__(self) -> None:
        require(
            self.sequence_length >= 2, f"data.sequence_length = {self.sequence_length}: use 2 or more tokens"
        )
        require(
            0.0 < self.validation_fraction < 0.5,
            f"data.validation_fraction = {self.validation_fraction}: use a share between 0 and 0.5",
        )
        require(
            0.0 <= self.test_fraction < 0.5,
            f"data.test_fraction = {self.test_fraction}: use a share from 0 to 0.5",
        )
        require(self.carry_rows >= 1, f"data.carry_rows = {self.carry_rows}: use 1 (off) or more rows")
        require(self.unit_bytes >= 1, f"data.unit_bytes = {self.unit_bytes}: use 1 or more bytes")
        require(self.shard_tokens >= 1, f"data.shard_tokens = {self.shard_tokens}: use 1 or more tokens")
        require(
            not self.mixture or self.source == SourceConfig(),
            "data.source and data.mixture are both given: name every source in data.mixture.NAME",
        )
        weighted = [name for name, source in self.mixture.items() if source.weight is not None]
        require(
            len(weighted) in (0, len(self.mixture)),
            f"data.mixture: {', '.join(weighted)} of {', '.join(sorted(self.mixture))} have a weight: give "
            "every source one, or none",
        )
        for name in self.mixture:
            require(
                name.isidentifier() and name.isascii(),
                f"data.mixture.{name}: use letters, digits and _ in the name of a source",
            )

    @property
    def sources(self) -> dict[str, SourceConfig]:
        """Name -> source, in corpus order; the only source of a recipe without a mixture is "corpus"."""
        return dict(sorted(self.mixture.items())) or {CORPUS: self.source}
