"""What every case is compared with: one process, the whole model, the whole batch, plain torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipeline.loader import Batch
from trellis_dist.models.carry import Carry
from trellis_dist.models.language_model import LanguageModel, build_language_model
from trellis_dist.parallel import env
from trellis_dist.training.config import OptimizerConfig
from trellis_dist.training.optimizer import build_optimizer, parameter_groups
from trellis_dist.training.parity.cases import Case

__all__ = ["SEED", "Reference", "References", "Step"]

SEED = 5


@dataclass(frozen=True)
class Step:
    """One step of one process.

    Attributes:
        loss: mean over the tokens.
        norm: of the gradient before clipping.
        gradients, weights: of every parameter, the weights after the step; in host memory.
    """

    loss: float
    norm: float
    gradients: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]


Reference = tuple[Step, ...]


class References:
    """By rank 0 when a case first asks; cases of one model, optimizer, packing and length share one."""

    def __init__(self, *, rows: int, steps: int, device: torch.device) -> None:
        self._rows, self._steps, self._device = rows, steps, device
        self._known: dict[tuple[str, str, str, int], Reference] = {}

    def of(self, case: Case) -> Reference:
        """The reference of ``case``; called by all ranks in the same order."""
        key = (case.model, case.optimizer, case.documents, case.row_tokens)
        if key not in self._known:
            made = self._compute(case) if env.is_main() else None
            received = env.broadcast_object(made)
            assert received is not None, "rank 0 computes the reference"
            self._known[key] = received
        return self._known[key]

    def _compute(self, case: Case) -> Reference:
        model = build_language_model(case.model_config, seed=SEED, device=self._device)
        config = case.optimizer_config
        optimizer = build_optimizer(parameter_groups(model.named_parameters(), config.weight_decay), config)
        steps, states = [], None
        for index in range(self._steps):
            batch = case.global_batch(index, rows=self._rows)
            carry = None if batch.carried is None else Carry(batch.carried.tolist(), states)
            steps.append(self._step(model, optimizer, case, batch, carry))
            states = None if carry is None else carry.states()
        return tuple(steps)

    def _step(
        self,
        model: LanguageModel,
        optimizer: torch.optim.Optimizer,
        case: Case,
        batch: Batch,
        carry: Carry | None,
    ) -> Step:
        tokens, labels, bounds = (x.to(self._device) for x in (batch.tokens, batch.labels, batch.cu_seqlens))
        optimizer.zero_grad()
        loss = model.loss_sum(tokens, labels, cu_seqlens=bounds, carry=carry) / batch.valid_tokens
        loss.backward()
        named = dict(model.named_parameters())
        gradients = {name: _kept(p.grad) for name, p in named.items() if p.grad is not None}
        assert len(gradients) == len(named), "every parameter of the reference takes part"
        norm = _clip(list(named.values()), case.optimizer_config)
        optimizer.step()
        return Step(float(loss.detach()), norm, gradients, {name: _kept(p) for name, p in named.items()})


def _clip(parameters: list[torch.nn.Parameter], config: OptimizerConfig) -> float:
    """Torch's own clipping, where the case clips; the norm before it."""
    limit = config.clip_norm or float("inf")
    return float(torch.nn.utils.clip_grad_norm_(parameters, limit))


def _kept(x: Tensor) -> Tensor:
    return x.detach().cpu().clone()
