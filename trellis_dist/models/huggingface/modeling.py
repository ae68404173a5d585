"""The language model as a `transformers` model: logits, loss and `generate`.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from trellis_dist.files import atomic_write
from trellis_dist.models.huggingface.cache import TrellisCache, padding
from trellis_dist.models.huggingface.config import TrellisLMConfig
from trellis_dist.models.huggingface.folder import MODEL_TYPE, PREFIX, STUB, STUB_FILE
from trellis_dist.models.init import initialise
from trellis_dist.models.language_model import LanguageModel
from trellis_dist.models.linear import linear

__all__ = ["TrellisForCausalLM"]

REFUSED = ("inputs_embeds", "output_attentions", "output_hidden_states")


class TrellisForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """Any model of this package, for `AutoModelForCausalLM`. Without weights it draws them from seed 0."""

    config_class = TrellisLMConfig
    base_model_prefix = PREFIX.removesuffix(".")
    main_input_name = "input_ids"
    # A state cannot go back to an earlier token: transformers then refuses what would need that.
    _is_stateful = True
    _no_split_modules = ["Block"]  # noqa: RUF012 (as transformers declares it)

    def __init__(self, config: TrellisLMConfig) -> None:
        """Raises ValueError: the model section is missing or wrong."""
        super().__init__(config)
        self.model = LanguageModel(config.language_model())
        if self.model.embedding_weight.device.type != "meta":  # there, weights are about to be loaded
            initialise(self.model, seed=0)
            for parameter in self.model.parameters():
                parameter._is_hf_initialized = True
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        """Called for what a folder lacks: half a model would talk nonsense without a word of warning."""
        own = module.named_parameters(recurse=False)
        missing = [name for name, parameter in own if not getattr(parameter, "_is_hf_initialized", False)]
        if missing:
            raise ValueError(
                f"the folder has no weights for {missing[0]} of a {type(module).__name__}: they do not "
                "belong to its config.json; export the model again"
            )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: TrellisCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits of the token after each of `input_ids` [B, T].

        Args:
            attention_mask: [B, T] (with a cache also what it has read): 0 for padding at the ends of a row,
                which the row's tokens do not see.
            past_key_values: the cache of earlier tokens; it is moved on in place.
            labels: int64 [B, T], shifted here; -100 is ignored.
            use_cache: return a cache; logits then have no gradient. Unless given, with `past_key_values`.
            logits_to_keep: only the last so many positions, or these; 0: all.
            kwargs: what the loss of transformers takes; position_ids are not needed.

        Raises:
            ValueError: what this model has not (`REFUSED`), a cache together with labels, a wrong mask.
        """
        for name in REFUSED:
            value = kwargs.pop(name, None)
            if value is not None and value is not False:
                raise ValueError(f"{name}: a Trellis model has none to take or to give; leave it out")
        cache = past_key_values
        if use_cache and cache is None:
            cache = TrellisCache()
        if cache is None:
            logits = self._logits(input_ids, attention_mask, logits_to_keep)
        elif labels is not None:
            raise ValueError(
                "labels together with a cache: a cached pass has no gradient; pass use_cache=False"
            )
        else:
            last_only = isinstance(logits_to_keep, int) and logits_to_keep == 1
            logits = cache.advance(self.model, input_ids, attention_mask, last_only=last_only)
            logits = logits if last_only else _kept(logits, logits_to_keep)
        loss = None
        if labels is not None:
            kwargs.pop("position_ids", None)
            loss = self.loss_function(logits, labels, vocab_size=logits.shape[-1], **kwargs)
        # transformers asks a cache for what TrellisCache has, whatever its class.
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)  # type: ignore[arg-type]
        return output.to_tuple() if return_dict is False else output

    def _logits(self, tokens: Tensor, mask: Tensor | None, keep: int | Tensor) -> Tensor:
        """Logits with gradients. Padding is made a document of its own, which others do not see."""
        hidden = self.model.hidden(tokens, cu_seqlens=None if mask is None else _documents(mask, tokens))
        return linear(_kept(hidden, keep), self.model.output_weight)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """`generate` then leaves it to `forward` to make a cache."""
        return False

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Refused: the vocabulary is the tokenizer's. Raises ValueError."""
        raise ValueError(
            "the vocabulary of a Trellis model is its tokenizer's and cannot be resized here: set "
            "model.vocab_size in a recipe and train"
        )

    def get_input_embeddings(self) -> nn.Module:
        """Refused: there is no such module. Raises NotImplementedError, which transformers expects."""
        raise NotImplementedError(
            "a Trellis model has no embedding module: read model.model.embedding_weight, [vocabulary, width]"
        )

    def get_output_embeddings(self) -> nn.Module:
        """Refused: there is no such module. Raises NotImplementedError, which transformers expects."""
        raise NotImplementedError(
            "a Trellis model has no output module: read model.model.output_weight, [vocabulary, width]"
        )

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As in transformers, and the module that config.json names for trust_remote_code=True."""
        super().save_pretrained(save_directory, *args, **kwargs)
        atomic_write(Path(save_directory) / STUB_FILE, STUB)


def _kept(values: Tensor, keep: int | Tensor) -> Tensor:
    """Of [B, T, .] the last `keep` positions, or the positions `keep`; 0 keeps all."""
    if isinstance(keep, int):
        return values[:, -keep:] if keep else values
    return values[:, keep]


def _documents(mask: Tensor, tokens: Tensor) -> Tensor | None:
    """Boundaries that part tokens from padding, for `LanguageModel.forward`; None: there is no padding."""
    if mask.shape != tokens.shape:
        raise ValueError(f"attention_mask is {list(mask.shape)}: give {list(tokens.shape)}, as input_ids")
    if bool(mask.all()):
        return None
    length = tokens.shape[1]
    bounds = {0, tokens.numel()}
    for row, span in enumerate(padding(mask)):
        bounds.update(row * length + end for end in span)
    return torch.tensor(sorted(bounds), device=tokens.device)


AutoConfig.register(MODEL_TYPE, TrellisLMConfig, exist_ok=True)
AutoModelForCausalLM.register(TrellisLMConfig, TrellisForCausalLM, exist_ok=True)
