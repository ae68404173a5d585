"""The mesh under the names by which DeepSpeed asks for it (its "model parallel unit")."""

from __future__ import annotations

import torch.distributed as dist

from trellis_dist.parallel import env
from trellis_dist.parallel.mesh import Mesh

__all__ = ["ModelParallelUnit"]


class ModelParallelUnit:
    """Sequence parallel is our sp, sequence x data parallel is dp x sp, model parallel is tp.

    It has no ``initialize_sequence_parallel``, by which DeepSpeed would take it for its own Ulysses state and
    ignore the model-parallel ranks.
    """

    def __init__(self, mesh: Mesh, *, shard_over_replicas: bool = False) -> None:
        """Name the groups of ``mesh``; every rank must, because an axis of one rank needs a group made.

        With ``shard_over_replicas`` the data group is dp x sp too: ZeRO 3 divides parameters over the data
        group and averages gradients over dp x sp, which must be the same ranks.
        """
        self._mesh = mesh
        alone = env.alone()
        self._replicas = mesh.replica_group or alone
        self._data = self._replicas if shard_over_replicas else mesh.dp_group or alone
        self._sequence = mesh.sp_group or alone
        self._tensor = mesh.tp_group or alone

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """The ranks with other rows."""
        return self._data

    def get_data_parallel_world_size(self) -> int:
        """How many ranks ``get_data_parallel_group`` has."""
        return dist.get_world_size(self._data)

    def get_data_parallel_rank(self) -> int:
        """This rank among them."""
        return dist.get_rank(self._data)

    def get_sequence_parallel_group(self) -> dist.ProcessGroup:
        """The ranks with the other segments of the same rows."""
        return self._sequence

    def get_sequence_parallel_world_size(self) -> int:
        """The sp axis."""
        return self._mesh.sp

    def get_sequence_parallel_rank(self) -> int:
        """This rank along sp."""
        return self._mesh.sp_rank

    def get_sequence_data_parallel_group(self) -> dist.ProcessGroup:
        """The ranks with the same tensor shard."""
        return self._replicas

    def get_sequence_data_parallel_world_size(self) -> int:
        """dp * sp."""
        return self._mesh.dp * self._mesh.sp

    def get_sequence_data_parallel_rank(self) -> int:
        """This rank among them."""
        return dist.get_rank(self._replicas)

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """The ranks with the other tensor shards of the same layers."""
        return self._tensor

    def get_model_parallel_world_size(self) -> int:
        """The tp axis."""
        return self._mesh.tp

    def get_model_parallel_rank(self) -> int:
        """This rank along tp."""
        return self._mesh.tp_rank
