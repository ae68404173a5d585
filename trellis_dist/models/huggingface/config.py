"""The configuration that `transformers` saves as config.json: the model section and token ids."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter, ValidationError
from transformers import PreTrainedConfig

from trellis_dist.models.config import ModelConfig
from trellis_dist.models.huggingface.folder import MODEL_TYPE, SECTION

__all__ = ["TrellisLMConfig"]


class TrellisLMConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """Wraps a model section; everything else is read from it.

    Attributes:
        model_section: the `[model]` table of a recipe.
        bos_token_id, eos_token_id, pad_token_id: as the tokenizer has them.
    """

    model_type = MODEL_TYPE

    model_section: dict[str, Any] | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def language_model(self) -> ModelConfig:
        """The checked model section. Raises ValueError: there is none, or a value of it is wrong."""
        if self.model_section is None:
            raise ValueError(f"this configuration has no {SECTION}: give the [model] table of a recipe")
        try:
            return TypeAdapter(ModelConfig).validate_python(dict(self.model_section))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, (SECTION, *first["loc"])))
            raise ValueError(f"config.json: {key}: {first['msg']}") from error

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.language_model().vocab_size

    @property
    def hidden_size(self) -> int:
        """Model width."""
        return self.language_model().dim

    @property
    def num_hidden_layers(self) -> int:
        """Blocks."""
        return self.language_model().num_layers

    @property
    def num_attention_heads(self) -> int:
        """Heads of each layer."""
        return self.language_model().num_heads
