"""Gradient hooks for a library that reduces gradients as soon as the backward pass makes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from trellis_dist.parallel.gradients import partial_over_tensor
from trellis_dist.parallel.mesh import Mesh
from trellis_dist.training.engines.fragments import Held

__all__ = ["GradientOrder", "TensorSums"]


class TensorSums:
    """Sums, over tp, the gradients that are partial there, before the library sees them.

    Make it after the library has installed its own hooks on the same parameters.
    """

    def __init__(self, held: Sequence[Held], mesh: Mesh) -> None:
        """Install a hook on every parameter of ``held`` that ``partial_over_tensor`` names."""
        self._group = mesh.tp_group
        self._expected = [item.name for item in held if partial_over_tensor(item.parameter, mesh)]
        self.fired: dict[str, int] = dict.fromkeys(self._expected, 0)
        for item in held:
            if item.name in self.fired:
                item.parameter.register_hook(self._hook(item.name))

    def _hook(self, name: str):  # type: ignore[no-untyped-def]
        def hook(gradient: Tensor) -> Tensor:
            self.fired[name] += 1
            total = gradient.contiguous().clone()
            dist.all_reduce(total, group=self._group)
            return total

        return hook

    def check(self, micro_batches: int) -> None:
        """Fail unless every hook has run once per micro-batch; called after the first step's backward."""
        wrong = {name: count for name, count in self.fired.items() if count != micro_batches}
        assert not wrong, f"partial gradients were not summed over tp {micro_batches} time(s) each: {wrong}"


class GradientOrder:
    """Notes in which order the gradients of one backward pass arrive, to compare it between sequence ranks.

    ZeRO 2 and 3 reduce over dp x sp in that order, and ranks at the ends of a row have other graphs.
    """

    def __init__(self, held: Sequence[Held], mesh: Mesh) -> None:
        """Start to note, where it matters (sp > 1)."""
        self._group = mesh.replica_group
        self._order: list[str] = []
        watched = held if mesh.sp > 1 else ()
        self._handles = [item.parameter.register_hook(self._note(item.name)) for item in watched]

    def _note(self, name: str):  # type: ignore[no-untyped-def]
        def hook(_: Tensor) -> None:
            self._order.append(name)

        return hook

    def check(self) -> None:
        """Fail unless all ranks that reduce together saw the same order; stop noting."""
        for handle in self._handles:
            handle.remove()
        if not self._handles:
            return
        orders: list[list[str] | None] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(orders, self._order, group=self._group)
        self._handles = []
        assert all(order == orders[0] for order in orders), (
            "sequence ranks made their gradients in different orders, which ZeRO 2 and 3 would add up wrongly"
        )
