"""The random generators of a run, as tensors of its checkpoints.

Nothing that ships draws while it trains: weights come from their seed, rows from a counter. A mixer or a hook
of one's own may, and a run resumed on as many ranks then goes on with the same draws.

    rng/<rank>/cpu, rng/<rank>/cuda   the generator's state, uint8 [n]
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from trellis_dist.parallel import env

if TYPE_CHECKING:
    from checkpoints.logical import LogicalTensor
    from checkpoints.state import CheckpointReader

__all__ = ["random_states", "restore_random_states", "seed_generators"]


def seed_generators(seed: int) -> None:
    """Seed this rank's generators, each rank's differently."""
    torch.manual_seed((seed << 20) + env.rank())


def random_states() -> Iterator[LogicalTensor]:
    """Yield this rank's generator states."""
    from checkpoints.logical import LogicalTensor

    yield LogicalTensor.whole(f"rng/{env.rank():05d}/cpu", torch.get_rng_state())
    if torch.cuda.is_available():
        yield LogicalTensor.whole(f"rng/{env.rank():05d}/cuda", torch.cuda.get_rng_state())


def restore_random_states(reader: CheckpointReader) -> None:
    """Put this rank's generators where a run of as many ranks left them; another run's stay as seeded."""
    names = set(reader.names())
    if reader.manifest.world_size != env.world_size():
        return
    if f"rng/{env.rank():05d}/cpu" in names:
        torch.set_rng_state(reader.read(f"rng/{env.rank():05d}/cpu"))
    if torch.cuda.is_available() and f"rng/{env.rank():05d}/cuda" in names:
        torch.cuda.set_rng_state(reader.read(f"rng/{env.rank():05d}/cuda"))
