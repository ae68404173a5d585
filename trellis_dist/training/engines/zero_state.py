"""What DeepSpeed's optimizers hold of each parameter on this rank, as fragments.

    stages 1, 2    flat partitions of each parameter group; ``parameter._hp_mapping`` tells where one lies
    stage 3        an equal, padded part of every parameter, kept in flat sub-groups

Stage 0 holds everything whole (``fragments.whole_fragments``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trellis_dist.training.engines.fragments import Fragment, Held

__all__ = ["drop_gradients", "flat_state", "poison_gradients", "refresh_gathered", "zero_fragments"]


def zero_fragments(
    optimizer: Any, base: torch.optim.Optimizer, held: Sequence[Held], *, gradients: bool
) -> Iterator[Fragment]:
    """Yield this rank's fragments; ``gradients`` between the last backward pass and the update.

    Args:
        optimizer: DeepSpeed's optimizer of stage 1, 2 or 3.
        base: the torch optimizer it wraps.
    """
    one = _from_partition if hasattr(optimizer, "fp32_partitioned_groups_flat") else _from_mapping
    for item in held:
        fragment = one(optimizer, base, item, gradients)
        if fragment is not None:
            yield fragment


def flat_state(optimizer: Any, base: torch.optim.Optimizer) -> list[Tensor]:
    """The flat tensors that the torch optimizer's state belongs to."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # stage 3 lends them to ``base`` one at a time
        return list(optimizer.fp32_partitioned_groups_flat)
    return [parameter for group in base.param_groups for parameter in group["params"]]


def _moments(base: torch.optim.Optimizer, flat: Tensor, start: int, count: int) -> dict[str, Tensor]:
    """Views of a fragment's moments in the state of its flat tensor."""
    state = base.state.get(flat, {})
    held = (key for key in ("exp_avg", "exp_avg_sq") if key in state)
    return {key: state[key].narrow(0, start, count) for key in held}


def _from_mapping(
    optimizer: Any, base: torch.optim.Optimizer, item: Held, gradients: bool
) -> Fragment | None:
    """Stages 1 and 2.

    Not ``mapping.optim_fragment``: DeepSpeed 0.19 links it after the first parameter group's first step, when
    later groups have no state yet, and never again.
    """
    mapping = item.parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None
    (flat,) = base.param_groups[mapping.param_group_index]["params"]
    start, address = mapping.lp_fragment_address.start, mapping.hp_fragment_address
    moments = _moments(base, flat, address.start, address.numel)
    gradient = None
    if gradients and getattr(optimizer, "cpu_offload", False):
        gradient = flat.grad.narrow(0, address.start, address.numel)
    elif gradients:
        gradient = mapping.get_lp_grad_fragment(item.parameter._index_in_param_group).flatten()  # type: ignore[attr-defined]
        if gradient.numel() != address.numel:  # with bf16 at stage 1 it is the whole local gradient
            gradient = gradient.narrow(0, start, address.numel)
    return Fragment(item, start, mapping.hp_fragment, moments, gradient)


def _from_partition(
    optimizer: Any, base: torch.optim.Optimizer, item: Held, gradients: bool
) -> Fragment | None:
    """Stage 3; what pads the last rank's part belongs to no parameter."""
    parameter: Any = item.parameter
    group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = dist.get_rank(parameter.ds_process_group) * size
    count = min(size, parameter.ds_numel - start)
    if count <= 0:
        return None
    flat = optimizer.fp32_partitioned_groups_flat[group]
    gradient = optimizer.get_local_fp32_grad_for_param(parameter)[:count] if gradients else None
    return Fragment(
        item,
        start,
        flat.detach().narrow(0, offset, count),
        _moments(base, flat, offset, count),
        gradient,
        parameter.ds_tensor.detach().view(-1)[:count],
    )


def refresh_gathered(optimizer: Any) -> None:
    """Give the parameters that stage 3 keeps whole on every rank the values of their parts.

    After the parts were loaded, and after a skipped step, which leaves them divided.
    """
    kept = getattr(optimizer, "persistent_parameters", [])
    if kept:
        kept[0].partition(kept)
        kept[0].all_gather(kept)


def poison_gradients(optimizer: Any, fragments: Iterable[Fragment]) -> None:
    """Make ZeRO skip an update whose loss is not finite though its gradient is (an infinite logit).

    Only what belongs to a parameter is touched: nothing would clear the padding again.
    """
    nan = float("nan")
    for part in fragments:
        assert part.gradient is not None, "gradients are poisoned inside a step"
        part.gradient.fill_(nan)
    if hasattr(optimizer, "fp32_groups_gradients_flat"):  # bf16 at stage 1 measures what it holds whole
        optimizer.fp32_groups_gradients_flat[0].fill_(nan)
    # With offload the norms were taken while the gradients went to the host.
    norms = getattr(optimizer, "norm_for_param_grads", {})
    norms.update(dict.fromkeys(norms, torch.tensor(nan)))


def drop_gradients(optimizer: Any) -> None:
    """Forget the gradient of a skipped step.

    DeepSpeed 0.19 does so itself, but not at stages 1 and 2 with bf16 and offload, where it would add the
    next step's gradient to the spoiled one.
    """
    if getattr(optimizer, "cpu_offload", False):
        optimizer.averaged_gradients.update(dict.fromkeys(optimizer.averaged_gradients))
