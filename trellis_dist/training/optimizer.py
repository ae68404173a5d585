"""Parameter groups and the torch optimizer that every engine wraps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trellis_dist.models.init import Constant
from trellis_dist.training.config import OptimizerConfig

__all__ = ["build_optimizer", "keep_tags", "parameter_groups", "set_learning_rate", "set_step_count"]


def keep_tags(new: nn.Parameter, old: nn.Parameter) -> nn.Parameter:
    """Declare about ``new``, which stands for ``old`` (as its master or shard), the same; returns it."""
    new.__dict__.update({key: value for key, value in vars(old).items() if key not in vars(new)})
    return new


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Split trainable parameters into decayed and undecayed groups.

    Vectors are not decayed, nor is what starts as a constant: norm weights and biases, whatever their shape.
    A group without members is left out. The order inside a group is the order of ``named``, the same on every
    rank.
    """
    trainable = [parameter for _, parameter in named if parameter.requires_grad]
    decayed = [p for p in trainable if _decays(p)]
    rest = [p for p in trainable if not _decays(p)]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _decays(parameter: nn.Parameter) -> bool:
    return parameter.ndim >= 2 and not isinstance(getattr(parameter, "initial", None), Constant)


def build_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Make AdamW (decoupled decay, Loshchilov & Hutter 2019) or plain SGD over ``groups``."""
    if config.kind == "sgd":
        return torch.optim.SGD(groups, lr=config.lr)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set every group's learning rate; called before each step, the schedule keeps no state."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def set_step_count(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], steps: int) -> None:
    """Give the state of all ``parameters`` zero moments and ``steps`` applied updates (for bias correction).

    Creates AdamW's lazily made state, so that moments can be copied in before the first step.
    """
    if not isinstance(optimizer, torch.optim.AdamW) or steps == 0:
        return
    for parameter in parameters:
        state = optimizer.state[parameter]
        state["step"] = torch.tensor(float(steps), dtype=torch.float32)
        state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
