"""What a language model sends over sequence ranks; tests/training/test_parity.py has what it computes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from tests.parallel.cases import counted_sends, mesh_of, ranks
from trellis_dist.models.config import ModelConfig, TrellisConfig
from trellis_dist.models.language_model import build_language_model
from trellis_dist.parallel.apply import apply_parallelism
from trellis_dist.parallel.mesh import Mesh

TINY = ModelConfig(
    vocab_size=40,
    num_layers=2,
    dim=32,
    num_heads=2,
    mlp_hidden=48,
    trellis=TrellisConfig(slots=8, chunk_size=8, learned_initial_memory=True),
)
ROWS, LENGTH = 4, 64
PACKED = [0, 8, 24, 64, 112, 128, 160, 192, 200, 208]


def global_batch(step: int, *, packed: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tokens and labels of unequal masks: the last row of every batch has few labels, its tail none."""
    generator = torch.Generator().manual_seed(100 + step)
    stream = torch.randint(0, TINY.vocab_size, (ROWS, LENGTH + 1), generator=generator)
    tokens, labels = stream[:, :-1].contiguous(), stream[:, 1:].clone()
    labels[-1, 5:] = -100
    labels[0, ::7] = -100
    return tokens, labels, torch.tensor([*PACKED, ROWS * LENGTH]) if packed else None


def rows_of(mesh: Mesh, batch: tuple[Tensor, Tensor, Tensor | None]) -> tuple[Tensor, Tensor, Tensor | None]:
    """The rows of this data-parallel replica."""
    tokens, labels, bounds = batch
    share = ROWS // mesh.dp
    first, last = mesh.dp_rank * share, (mesh.dp_rank + 1) * share
    if bounds is not None:
        inside = bounds[(bounds >= first * LENGTH) & (bounds <= last * LENGTH)] - first * LENGTH
        bounds = torch.unique(torch.cat([inside, torch.tensor([0, share * LENGTH])]))
    return tokens[first:last], labels[first:last], bounds


def bytes_per_layer(length: int) -> tuple[int, int]:
    """(forward, backward) bytes that a middle rank sends in one layer."""
    mesh = mesh_of(4)
    model = build_language_model(TINY, seed=0)
    segments = apply_parallelism(model, mesh)
    tokens = torch.zeros(ROWS, length, dtype=torch.int64)
    parts = segments.cut(tokens, tokens, None)
    with counted_sends() as forward:
        total = model.loss_sum(parts[0], parts[1])
    with counted_sends() as backward:
        total.backward()
    dist.barrier()
    return sum(forward) // TINY.num_layers, sum(backward) // TINY.num_layers


def test_a_layer_sends_two_memories_and_a_halo_whatever_the_length():
    head, options = TINY.head_dim, TINY.trellis
    memories = 2 * TINY.num_heads * options.slots * head * 4 * ROWS
    halo = (options.conv_kernel - 1) * 2 * TINY.dim * 4 * ROWS
    for length in (64, 256):
        found = ranks().run(bytes_per_layer, length)
        assert found[1] == found[2] == (memories + halo, memories + halo)
        assert found[0] == (memories + halo, 0)
        assert found[3] == (0, memories + halo)
