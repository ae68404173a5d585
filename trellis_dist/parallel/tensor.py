"""Tensor parallelism: heads, MLP columns and vocabulary over ``tp``, by megatron-core's parallel layers.

Shapes: B rows, T tokens, n = B T, tp ranks, F_in and F_out features of a whole linear layer.

    column   [B, T, F_in]      -> [B, T, F_out / tp]   backward sums the gradient of its input over tp
    row      [B, T, F_in / tp] -> [B, T, F_out]        forward sums its output over tp

With Megatron's sequence parallelism the norms and residuals between a row and the next column hold tokens
[tp_rank n/tp, +n/tp) of the flattened stream as [B, T/tp, F]: row reduce-scatters, column all-gathers, and
their backward passes do the opposite. The first dimension only says there how many rows the batch has.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trellis_dist.models.language_model import LanguageModel
from trellis_dist.models.linear import SplitLayer
from trellis_dist.models.loss import IGNORED_LABEL, Scores, linear_cross_entropy_sum
from trellis_dist.models.parallel_kind import ParallelKind, keep_shard, kind_of
from trellis_dist.parallel import cuda_absent
from trellis_dist.parallel.mesh import Mesh

__all__ = ["TensorParallel", "split_tensors"]


def split_tensors(model: nn.Module, mesh: Mesh) -> None:
    """Keep this rank's shard of every parameter of ``model`` and make its layers compute with shards.

    Raises:
        ValueError: a parameter does not divide by ``mesh.tp``; the message names it.
    """
    for name, parameter in model.named_parameters():
        if kind_of(parameter) is ParallelKind.SHARDED:
            try:
                keep_shard(parameter, index=mesh.tp_rank, count=mesh.tp)
            except ValueError as error:
                raise ValueError(f"parameter {name}: {error}: use a mesh.tp that divides it") from None
    tensor = TensorParallel(mesh)
    for module in model.modules():
        if isinstance(module, SplitLayer):
            module.column, module.row = tensor.column, tensor.row
        if isinstance(module, LanguageModel):
            module.embed, module.project, module.token_loss = tensor.embed, tensor.project, tensor.token_loss
            module.split_over["tp"] = mesh.tp


class TensorParallel:
    """What replaces the linear layers, the embedding and the loss of a model on one tp rank.

    The weights stay the model's own: each call hands them to a megatron-core layer of that shape.
    """

    def __init__(self, mesh: Mesh) -> None:
        assert mesh.tp_group is not None, "tensor parallelism needs a mesh with tp > 1"
        cuda_absent.install()
        _quieten()
        self._mesh, self._group = mesh, mesh.tp_group
        self._scattered = mesh.sequence_parallel
        # Made once for each shape: their construction looks up groups, which a forward pass need not do.
        self._column_layer = functools.cache(self._make_column)
        self._row_layer = functools.cache(self._make_row)
        self._embedding_layer = functools.cache(self._make_embedding)

    def column(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """Products of x with this rank's rows of each weight [F_out / tp, F_in], side by side.

        x is [B, T, F_in], with sequence parallelism this rank's [B, T/tp, F_in]; the result has all T tokens.
        """
        weight = weights[0] if len(weights) == 1 else torch.cat(list(weights))
        y, _ = self._column_layer(weight.shape[1], len(weight), gather=False)(self._flat(x), weight=weight)
        return self._rows(y, len(x)) if self._scattered else y

    def row(self, x: Tensor, weight: Tensor) -> Tensor:
        """Sum over tp of x [B, T, F_in / tp] times weight [F_out, F_in / tp] transposed.

        With sequence parallelism this rank's [B, T/tp, F_out] of it.
        """
        layer = self._row_layer(weight.shape[1], len(weight))
        layer.weight = weight
        y, _ = layer(self._flat(x))
        return self._rows(y, len(x)) if self._scattered else y

    def embed(self, tokens: Tensor, weight: Tensor) -> Tensor:
        """Rows of the whole embedding, of which ``weight`` [V / tp, dim] is a part; tokens [B, T]."""
        layer = self._embedding_layer(*weight.shape)
        layer.weight = weight
        if not self._scattered:
            return layer(tokens)  # type: ignore[no-any-return]
        return self._rows(layer(tokens.reshape(1, -1)), len(tokens))

    def project(self, x: Tensor, weight: Tensor) -> Tensor:
        """Logits [B, T, V] on every rank, of which this rank's weight [V / tp, dim] gives a part."""
        y, _ = self._column_layer(weight.shape[1], len(weight), gather=True)(self._flat(x), weight=weight)
        return self._rows(y, len(x)) if self._scattered else y

    def token_loss(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        *,
        z_loss: float = 0.0,
        each: Tensor | None = None,
    ) -> Tensor:
        """``loss.linear_cross_entropy_sum`` of the whole vocabulary, the same on every tp rank.

        Unlike megatron-core's cross-entropy it keeps fp64 and never holds the logits of all rows.

        Args:
            hidden: [n, dim]; with sequence parallelism this rank's [n / tp, dim].
            weight: [V / tp, dim].
            labels: int64 [n].
            each: [n], takes the losses of the rows.
        """
        from megatron.core.tensor_parallel import mappings

        if self._scattered:
            hidden = mappings.gather_from_sequence_parallel_region(hidden, group=self._group)
        else:
            hidden = mappings.copy_to_tensor_model_parallel_region(hidden, group=self._group)
        return linear_cross_entropy_sum(hidden, weight, labels, z_loss=z_loss, score=self._score, each=each)

    def _score(self, logits: Tensor, labels: Tensor) -> Scores:
        """Scores of this rank's columns [n, V / tp]; two small reductions over tp."""
        columns = logits.shape[1]
        valid = (labels != IGNORED_LABEL).unsqueeze(-1)
        local = labels.unsqueeze(-1) - self._mesh.tp_rank * columns
        owned = valid & (local >= 0) & (local < columns)
        index = local.where(owned, 0)
        highest = logits.amax(dim=-1, keepdim=True)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=self._group)
        shifted = logits - highest
        sums = torch.cat([shifted.exp().sum(-1, keepdim=True), shifted.gather(-1, index) * owned], dim=-1)
        dist.all_reduce(sums, group=self._group)
        log_sum = sums[:, :1].log()
        nll = log_sum - sums[:, 1:]
        return Scores(shifted - log_sum, nll, log_sum + highest, index, owned, valid)

    def _flat(self, x: Tensor) -> Tensor:
        """Megatron's order for sequence parallelism, tokens first: [B, t, F] -> [B t, 1, F]."""
        return x.reshape(-1, 1, x.shape[-1]) if self._scattered else x

    @staticmethod
    def _rows(y: Tensor, rows: int) -> Tensor:
        """Back to [B, t, F]."""
        return y.reshape(rows, -1, y.shape[-1])

    def _make_column(self, inputs: int, outputs: int, *, gather: bool) -> Any:
        from megatron.core.tensor_parallel import ColumnParallelLinear

        return ColumnParallelLinear(
            inputs,
            outputs * self._mesh.tp,
            config=self._config(),
            init_method=_unused,
            bias=False,
            gather_output=gather,
            skip_weight_param_allocation=True,
            tp_group=self._group,
        )

    def _make_row(self, inputs: int, outputs: int) -> Any:
        from megatron.core.tensor_parallel import RowParallelLinear

        with torch.device("meta"):  # its own weight, which each call replaces by the model's
            return RowParallelLinear(
                inputs * self._mesh.tp,
                outputs,
                config=self._config(),
                init_method=_unused,
                bias=False,
                input_is_parallel=True,
                skip_bias_add=False,
                tp_group=self._group,
            )

    def _make_embedding(self, rows: int, dim: int) -> Any:
        from megatron.core.tensor_parallel import VocabParallelEmbedding

        with torch.device("meta"):
            return VocabParallelEmbedding(
                rows * self._mesh.tp,
                dim,
                init_method=_unused,
                reduce_scatter_embeddings=self._scattered,
                config=self._config(),
                tp_group=self._group,
            )

    def _config(self) -> Any:
        from megatron.core import ModelParallelConfig

        return ModelParallelConfig(
            tensor_model_parallel_size=self._mesh.tp,
            sequence_parallel=self._scattered,
            use_cpu_initialization=True,
            perform_initialization=False,
        )


def _quieten() -> None:
    """Leave out what no user can act on: megatron-core's names for collectives, and its advice for a GPU."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    if not torch.cuda.is_available():
        warnings.filterwarnings("ignore", message=".*CUDA_DEVICE_MAX_CONNECTIONS")


def _unused(weight: Tensor) -> None:
    raise AssertionError("the weights are the model's own: megatron-core initialises none")
