"""What the ranks of the parallel tests share: meshes made once, one process as the reference, comparison."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from tests.distributed import GlooPool, gloo_pool
from trellis_dist.parallel import transfers as transfers_module
from trellis_dist.parallel.config import MeshConfig
from trellis_dist.parallel.mesh import Mesh, build_mesh
from trellis_dist.parallel.transfers import Transfers

_ready: set[GlooPool] = set()


def ranks() -> GlooPool:
    """Four ranks that have made their meshes, which takes longer than a case may on a busy machine."""
    pool = gloo_pool(4)
    if pool not in _ready:
        pool.run(_make_meshes)
        _ready.add(pool)
    return pool


def _make_meshes() -> None:
    for sp in (1, 2, 4):
        mesh_of(sp)


@functools.cache
def mesh_of(sp: int) -> Mesh:
    """The mesh with ``sp`` segments over all ranks of the pool."""
    return build_mesh(MeshConfig(sp=sp))


def segment(x: Tensor, mesh: Mesh) -> Tensor:
    """This rank's tokens of x [B, T, ...]."""
    return x.chunk(mesh.sp, dim=1)[mesh.sp_rank]


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def relative(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected| in the L2 norm."""
    scale = expected.double().norm().clamp_min(1e-30)
    return float((actual.double() - expected.double()).norm() / scale)


class RecordingTransfers(Transfers):
    """Keeps a copy of what was sent left."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__(mesh)
        self.sent_left: list[tuple[Tensor, ...]] = []

    def send_left(self, *tensors: Tensor) -> None:
        self.sent_left.append(tuple(tensor.clone() for tensor in tensors))
        super().send_left(*tensors)


@contextlib.contextmanager
def counted_sends() -> Iterator[list[int]]:
    """Bytes of every point-to-point send this rank makes, one entry for each."""
    sizes: list[int] = []
    real = dist.isend

    def isend(tensor: Tensor, *args: object, **kwargs: object) -> dist.Work | None:
        sizes.append(tensor.numel() * tensor.element_size())
        return real(tensor, *args, **kwargs)

    transfers_module.dist.isend = isend
    try:
        yield sizes
    finally:
        transfers_module.dist.isend = real


def gradients_of(loss: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(inputs)))
