"""The decoder-only language model: embedding, blocks, norm, output projection.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trellis_dist.models.block import Block
from trellis_dist.models.carry import Carry
from trellis_dist.models.config import ModelConfig
from trellis_dist.models.context import SequenceContext, packed_context
from trellis_dist.models.init import Normal, initialise, new_parameter
from trellis_dist.models.linear import RowFunction, linear
from trellis_dist.models.loss import IGNORED_LABEL, TokenLoss, linear_cross_entropy_sum
from trellis_dist.models.norm import RMSNorm
from trellis_dist.models.pads import FrontPads
from trellis_dist.models.parallel_kind import ParallelKind
from trellis_dist.models.registry import LayerState

__all__ = ["LMState", "LanguageModel", "build_language_model"]


# Boundaries of packed documents, or those boundaries prepared by ``LanguageModel.documents``.
Documents = Tensor | SequenceContext | None


@dataclass(frozen=True)
class LMState:
    """Everything needed to continue B rows; immutable, so one prefix can be continued in several ways.

    Attributes:
        layers: one state per block.
        position: tokens seen so far, by the longest of rows that had pads.
        batch: B.
    """

    layers: tuple[LayerState, ...]
    position: int
    batch: int

    def bytes(self) -> int:
        """Bytes held over all layers and rows."""
        return sum(layer.bytes() for layer in self.layers)


class LanguageModel(nn.Module):
    """Built by ``build_language_model``, which also draws the weights.

    Attributes:
        token_loss: like ``loss.linear_cross_entropy_sum``; parallel/ replaces it to split the vocabulary.
        embed, project: like ``F.embedding`` and ``linear.linear`` (to logits); parallel/ replaces them too.
        split_over: the axes that parallel/ split this model over, by name with their ranks: such a model
            trains and gives logits of what it is fed, but holds too little of itself to generate.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.token_loss: TokenLoss = linear_cross_entropy_sum
        self.embed: Callable[[Tensor, Tensor], Tensor] = F.embedding
        self.project: RowFunction = linear
        self.split_over: dict[str, int] = {}
        shape, initial = (config.vocab_size, config.dim), Normal(config.init_std)
        self.embedding_weight = new_parameter(*shape, initial=initial, kind=ParallelKind.SHARDED, dim=0)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.dim, eps=config.norm_eps)
        if not config.tie_embeddings:
            self.head_weight = new_parameter(*shape, initial=initial, kind=ParallelKind.SHARDED, dim=0)

    @property
    def output_weight(self) -> nn.Parameter:
        """[V, dim] of the output projection: the embedding itself when tied."""
        return self.embedding_weight if self.config.tie_embeddings else self.head_weight

    def forward(self, tokens: Tensor, *, cu_seqlens: Documents = None) -> Tensor:
        """Logits [B, T, V] of the token after each of ``tokens`` [B, T].

        Args:
            tokens: int32 or int64 in [0, V).
            cu_seqlens: int32 or int64 [n+1], document boundaries over the flattened [B*T] stream; a document
                sees nothing of its neighbours, and a row start is always a document start. None: one per row.
                Or what ``documents`` made of them: a graph of torch.compile cannot read boundaries itself.

        Raises:
            ValueError: wrong shape, dtype or token, or ``cu_seqlens`` that do not cover the stream.
        """
        hidden = self._hidden(tokens, cu_seqlens)
        return self.project(hidden, self.output_weight).view(*tokens.shape, -1)

    def loss_sum(
        self,
        tokens: Tensor,
        labels: Tensor,
        *,
        cu_seqlens: Documents = None,
        z_loss: float = 0.0,
        carry: Carry | None = None,
        each: Tensor | None = None,
    ) -> Tensor:
        """Sum of the token losses: an fp32 scalar (fp64 for an fp64 model).

        Args:
            tokens, cu_seqlens: as in ``forward``.
            labels: int64 [B, T], the token each position should predict; -100 is ignored.
            z_loss: adds z_loss * logsumexp(logits)^2 per labelled token.
            carry: states that rows take over from earlier rows; what the layers leave is filled in. Needs
                boundaries in ``cu_seqlens``.
            each: [B*T], takes the loss of every labelled token, without the z-loss.

        Raises:
            ValueError: as ``forward``; labels of another shape or outside the vocabulary; a carry of another
                number of rows, or for layers that cannot take a state.
        """
        self._check_labels(tokens, labels)
        if carry is not None:
            cu_seqlens = self._carried_documents(tokens, cu_seqlens, carry)
        hidden = self._hidden(tokens, cu_seqlens)
        return self.token_loss(
            hidden.flatten(0, -2), self.output_weight, labels.flatten(), z_loss=z_loss, each=each
        )

    def hidden(self, tokens: Tensor, *, cu_seqlens: Documents = None) -> Tensor:
        """Final normalised activations [B, T, dim]; arguments as in ``forward``.

        Raises:
            ValueError: as ``forward``, or the model is split over ranks.
        """
        self._check_whole()
        return self._hidden(tokens, cu_seqlens).view(*tokens.shape, -1)

    def _hidden(self, tokens: Tensor, cu_seqlens: Documents) -> Tensor:
        """The same as the layers leave it: [B, T, dim], [1, B*T, dim], or what a split model holds of it."""
        self._check_tokens(tokens, dimensions=2)
        if cu_seqlens is None:
            context = SequenceContext()
        elif isinstance(cu_seqlens, SequenceContext):
            context = cu_seqlens
        else:
            context = self.documents(cu_seqlens, rows=tokens.shape[0], length=tokens.shape[1])
        if context.packed:
            tokens = tokens.reshape(1, -1)
        x = self.embed(tokens, self.embedding_weight)
        for block in self.blocks:
            x = block(x, context)
        return self.norm(x)  # type: ignore[no-any-return]

    def documents(
        self, cu_seqlens: Tensor, *, rows: int, length: int, carry: Carry | None = None
    ) -> SequenceContext:
        """``cu_seqlens`` of [rows, length] tokens, checked and prepared for this model's layers.

        Raises:
            ValueError: as ``forward``.
        """
        return packed_context(
            cu_seqlens,
            rows=rows,
            length=length,
            chunk_sizes=self.config.chunk_sizes,
            conv_kernel=self.config.conv_kernel,
            carry=carry,
        )

    def _carried_documents(self, tokens: Tensor, cu_seqlens: Documents, carry: Carry) -> SequenceContext:
        rows, length = tokens.shape
        if not isinstance(cu_seqlens, Tensor):
            raise ValueError("a carry needs the boundaries of documents in cu_seqlens: pass their tensor")
        if len(carry.before) != rows:
            raise ValueError(f"{rows} rows of tokens and a carry of {len(carry.before)}: they should agree")
        if set(self.config.pattern) != {"trellis"}:
            raise ValueError(
                f"model.pattern = {list(self.config.pattern)}: only trellis layers have a state of fixed "
                "size that rows can take over"
            )
        return self.documents(cu_seqlens, rows=rows, length=length, carry=carry)

    def init_state(self, batch: int) -> LMState:
        """The state before the first token of ``batch`` rows.

        Raises:
            ValueError: ``batch`` is below 1, or the model is split over ranks.
        """
        self._check_whole()
        if batch < 1:
            raise ValueError(f"batch = {batch}: a state needs at least one row")
        layers = tuple(block.init_state(batch) for block in self.blocks)  # type: ignore[operator]
        return LMState(layers=layers, position=0, batch=batch)

    @property
    def pads_within(self) -> int:
        """How many tokens of a row may follow pads in one ``prefill`` without costing more than they are; 0
        where a layer takes no pads: it places tokens by the position of all rows."""
        return min(getattr(block.mixer, "pads_within", 0) for block in self.blocks)

    @torch.no_grad()
    def prefill(
        self, tokens: Tensor, state: LMState, *, last_only: bool = False, pads: Sequence[int] | None = None
    ) -> tuple[Tensor, LMState]:
        """Logits [B, T, V] of ``tokens`` [B, T] after ``state``, and the state after them. No gradients.

        Args:
            last_only: logits [B, V] of the last token only, as ``decode_step`` gives them: the output
                projection of the others, most of the time at a large vocabulary, is not computed.
            pads: how many tokens at the front of each row are none, so that rows of unequal length end
                together; their logits mean nothing. Only where ``pads_within`` is not 0.

        Raises:
            ValueError: as ``forward``, the rows are not those of ``state``, or the model is split over ranks.
        """
        self._check_whole()
        self._check_tokens(tokens, dimensions=2)
        self._check_rows(tokens, state)
        if pads is not None and not self.pads_within:
            raise ValueError(
                "pads: layers of this model cannot be told which tokens are none; give rows of one length"
            )
        front = None if pads is None else FrontPads.of(pads, tokens)
        x, layers = F.embedding(tokens, self.embedding_weight), []
        for block, layer in zip(self.blocks, state.layers, strict=True):
            x, after = block.prefill(x, layer, front)  # type: ignore[operator]
            layers.append(after)
        after_all = LMState(tuple(layers), state.position + tokens.shape[1], state.batch)
        return linear(self.norm(x[:, -1] if last_only else x), self.output_weight), after_all

    @torch.no_grad()
    def logits_after(self, tokens: Tensor, state: LMState) -> Tensor:
        """Logits [B, T, V] of ``tokens`` [B, T] after ``state``, where no state after them is needed.

        Raises:
            ValueError: as ``prefill``.
        """
        self._check_whole()
        self._check_tokens(tokens, dimensions=2)
        self._check_rows(tokens, state)
        x = F.embedding(tokens, self.embedding_weight)
        for block, layer in zip(self.blocks, state.layers, strict=True):
            x = block.after(x, layer)  # type: ignore[operator]
        return linear(self.norm(x), self.output_weight)

    @torch.no_grad()
    def decode_step(self, tokens: Tensor, state: LMState) -> tuple[Tensor, LMState]:
        """Logits [B, V] after one more token per row, ``tokens`` [B], and the state after it. No gradients.

        Raises:
            ValueError: as ``prefill``.
        """
        self._check_whole()
        self._check_tokens(tokens, dimensions=1)
        self._check_rows(tokens, state)
        x, layers = F.embedding(tokens, self.embedding_weight), []
        for block, layer in zip(self.blocks, state.layers, strict=True):
            x, after = block.decode_step(x, layer)  # type: ignore[operator]
            layers.append(after)
        after_all = LMState(tuple(layers), state.position + 1, state.batch)
        return linear(self.norm(x), self.output_weight), after_all

    def _check_whole(self) -> None:
        """What follows uses weights and rows as if they were whole: of shards it would make nonsense."""
        if self.split_over:
            axes = " and ".join(f"{axis} = {ranks}" for axis, ranks in self.split_over.items())
            raise ValueError(
                f"this model is split over {axes} ranks: load its checkpoint in one process to generate or "
                "score (trellis export, trellis generate)"
            )

    def _check_tokens(self, tokens: Tensor, *, dimensions: int) -> None:
        shape = "[rows, tokens]" if dimensions == 2 else "[rows]"
        if (
            tokens.dim() != dimensions
            or tokens.dtype not in (torch.int32, torch.int64)
            or tokens.numel() == 0
        ):
            raise ValueError(
                f"tokens are {tokens.dtype} {list(tokens.shape)}: pass a non-empty int32 or int64 {shape}"
            )
        self._check_vocabulary(tokens, "tokens")

    def _check_labels(self, tokens: Tensor, labels: Tensor) -> None:
        if labels.shape != tokens.shape or labels.dtype != torch.int64:
            raise ValueError(
                f"labels are {labels.dtype} {list(labels.shape)}: pass int64 {list(tokens.shape)}"
            )
        self._check_vocabulary(torch.where(labels == IGNORED_LABEL, 0, labels), "labels")

    def _check_vocabulary(self, values: Tensor, name: str) -> None:
        """On a CPU only, and not in a compiled graph: on a GPU the check would wait at every step."""
        if values.device.type != "cpu" or torch.compiler.is_compiling():
            return
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(
                f"{name} run from {low} to {high}: model.vocab_size = {self.config.vocab_size}; "
                "use the tokenizer the model was trained with"
            )

    @staticmethod
    def _check_rows(tokens: Tensor, state: LMState) -> None:
        if len(tokens) != state.batch:
            raise ValueError(
                f"{len(tokens)} rows of tokens for a state of {state.batch}: make one with init_state"
            )


def build_language_model(
    config: ModelConfig, *, seed: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> LanguageModel:
    """A model with initial weights drawn from (seed, parameter name, global index), the same on every device.

    Args:
        seed: any integer.
        dtype: of weights and activations; gates, memories and losses are at least fp32.
    """
    with torch.device(device):
        model = LanguageModel(config).to(dtype)
    initialise(model, seed)
    return model
