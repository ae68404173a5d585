"""The tokenizer of a data set for `transformers`, which needs transformers.

Importing this module also registers the model with the Auto classes: one import opens an exported folder.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizer

from data_pipeline.tokenizer import Tokenizer
from trellis_dist.files import atomic_write
from trellis_dist.models.huggingface.config import TrellisLMConfig
from trellis_dist.models.huggingface.modeling import TrellisForCausalLM

__all__ = ["TrellisForCausalLM", "TrellisLMConfig", "TrellisTokenizer"]

FILE = "tokenizer.model"


class TrellisTokenizer(PreTrainedTokenizer):
    """`data_pipeline.tokenizer.Tokenizer` itself, whatever its kind: the ids are those of the training data.

    Special tokens written out in a text are encoded as the plain text they are, as in the data. With
    `add_special_tokens` (the default) a text begins with BOS, as documents do; EOS pads, on the left.
    """

    vocab_files_names = {"vocab_file": FILE}  # noqa: RUF012 (as transformers declares it)
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocab_file: str, **kwargs: Any) -> None:
        """`vocab_file`: the tokenizer.model of a data set or an export. Raises as `Tokenizer.load`."""
        self._ours = Tokenizer.load(vocab_file)
        self._pieces = _pieces(self._ours)
        self._ids = {piece: id_ for id_, piece in self._pieces.items()}
        bos, eos = self._pieces[self._ours.bos_id], self._pieces[self._ours.eos_id]
        defaults = {"bos_token": bos, "eos_token": eos, "pad_token": eos, "padding_side": "left"}
        options = {**defaults, "clean_up_tokenization_spaces": False, **kwargs}
        super().__init__(**options)  # type: ignore[no-untyped-call]

    @property
    def vocab_size(self) -> int:
        """Ids lie below it."""
        return self._ours.vocab_size

    def get_vocab(self) -> dict[str, int]:
        """Piece -> id."""
        return dict(self._ids)

    def tokenize(self, text: str, *args: Any, **kwargs: Any) -> list[str]:
        """Pieces of `text`; nothing in it is taken for a special token. Raises ValueError: a surrogate."""
        return self._tokenize(text)

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [self._pieces[id_] for id_ in self._ours.encode(text)]

    def _convert_token_to_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def _convert_id_to_token(self, index: int) -> str:
        # A model may have more rows than there are pieces, and then draws such an id now and then.
        return self._pieces.get(index, f"<unused {index}>")

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of pieces; special tokens, and ids that no piece has, give nothing."""
        return self._ours.decode([self._ids[token] for token in tokens if token in self._ids])

    def _decode(
        self, token_ids: int | list[int], skip_special_tokens: bool = False, *args: Any, **kwargs: Any
    ) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else [int(id_) for id_ in token_ids]
        special = {self._ours.bos_id, self._ours.eos_id}
        parts: list[str] = []
        run: list[int] = []
        for id_ in [*(id_ for id_ in ids if id_ in self._pieces), None]:
            if id_ is not None and id_ not in special:
                run.append(id_)
                continue
            parts.append(self._ours.decode(run))  # together: a character may be spread over several ids
            run = []
            if id_ is not None and not skip_special_tokens:
                parts.append(self._pieces[id_])
        return "".join(parts)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """BOS, then the text: a prompt goes on, so no EOS."""
        return [self._ours.bos_id, *token_ids_0, *(token_ids_1 or [])]

    def get_special_tokens_mask(
        self,
        token_ids_0: list[int],
        token_ids_1: list[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """1 for BOS and EOS, 0 for what text is made of."""
        if not already_has_special_tokens:
            token_ids_0 = self.build_inputs_with_special_tokens(token_ids_0, token_ids_1)
        return [int(id_ in (self._ours.bos_id, self._ours.eos_id)) for id_ in token_ids_0]

    def add_special_tokens(self, special_tokens_dict: dict[str, Any], *args: Any, **kwargs: Any) -> int:
        """As in transformers; refused before anything is set. Raises ValueError: not in the vocabulary."""
        for value in special_tokens_dict.values():
            self._check_known(value if isinstance(value, (list, tuple)) else [value])
        added: int = super().add_special_tokens(special_tokens_dict, *args, **kwargs)
        return added

    def _check_known(self, tokens: Iterable[Any]) -> None:
        """Those that are in the vocabulary may be named special; the model has no rows for others."""
        for token in map(str, tokens):
            if token not in self._ids:
                raise ValueError(
                    f"{token!r} is not in the vocabulary this model was trained with, which is fixed: leave "
                    "it out"
                )

    def _add_tokens(self, new_tokens: list[Any], special_tokens: bool = False) -> int:
        self._check_known(new_tokens)
        added: int = super()._add_tokens(new_tokens, special_tokens=special_tokens)
        return added

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """The file this tokenizer was read from, as it was."""
        path = Path(save_directory) / (f"{filename_prefix}-{FILE}" if filename_prefix else FILE)
        atomic_write(path, self._ours.model)
        return (str(path),)


def _pieces(tokenizer: Tokenizer) -> dict[int, str]:
    """Id -> piece, each piece once."""
    if tokenizer.library == "sentencepiece":
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
        return {id_: processor.id_to_piece(id_) for id_ in range(tokenizer.vocab_size)}
    import json

    import tokenizers

    inner = tokenizers.Tokenizer.from_str(json.loads(tokenizer.model)["tokenizer"])
    return {id_: piece for piece, id_ in inner.get_vocab(with_added_tokens=True).items()}


AutoTokenizer.register(  # type: ignore[no-untyped-call]
    TrellisLMConfig, tokenizer_class=TrellisTokenizer, exist_ok=True
)
