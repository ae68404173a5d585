"""The mesh: data ``dp`` x sequence ``sp`` x tensor ``tp`` ranks, checked first, then built.

Rank order is outer to inner dp, sp, tp (megatron-core's "tp-cp-dp"): rank = (dp_rank * sp + sp_rank) * tp +
tp_rank. ``sp`` is megatron-core's context-parallel group.
"""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from trellis_dist.models.config import ATTENTION_KINDS
from trellis_dist.parallel import cuda_absent, env
from trellis_dist.parallel.config import MeshConfig, SequenceConfig, SequenceMode, TensorConfig
from trellis_dist.validation import require

__all__ = ["Mesh", "build_mesh", "check_mesh"]

_TENSOR, _SEQUENCE = TensorConfig(), SequenceConfig()


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """This rank's place, and the process groups it takes part in (None along an axis of one rank).

    Attributes:
        dp, sp, tp: sizes of the axes.
        rank, dp_rank, sp_rank, tp_rank: this rank, globally and along each axis.
        sequence_parallel: norms and residuals hold 1/tp of the tokens (Megatron's sequence parallelism).
        sequence_mode: how layers see the other segments.
        dp_group: the ranks that hold other rows of the same segment and the same tensor shard.
        sp_group: the ranks that hold the other segments of the same rows; in state passing, collectives over
            it happen once per step.
        tp_group: the ranks that hold the other shards of the same layers.
        replica_group: dp x sp, the ranks that hold the same tensor shard and so the same weights.
        rightward, leftward: the sp ranks once more, one communicator for each direction of the transfers
            inside a step, so that a state travelling right never queues behind an adjoint travelling left.
    """

    dp: int = 1
    sp: int = 1
    tp: int = 1
    rank: int = 0
    dp_rank: int = 0
    sp_rank: int = 0
    tp_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    sequence_parallel: bool = False
    sequence_mode: SequenceMode = "state_passing"
    dp_group: dist.ProcessGroup | None = None
    sp_group: dist.ProcessGroup | None = None
    tp_group: dist.ProcessGroup | None = None
    replica_group: dist.ProcessGroup | None = None
    rightward: dist.ProcessGroup | None = None
    leftward: dist.ProcessGroup | None = None

    @property
    def world_size(self) -> int:
        """dp * sp * tp."""
        return self.dp * self.sp * self.tp

    @property
    def left(self) -> int | None:
        """Global rank that holds the segment before this one; None on the first."""
        return self.rank - self.tp if self.sp_rank > 0 else None

    @property
    def right(self) -> int | None:
        """Global rank that holds the segment after this one; None on the last."""
        return self.rank + self.tp if self.sp_rank < self.sp - 1 else None


def check_mesh(
    mesh: MeshConfig,
    *,
    world_size: int,
    sequence_length: int,
    chunk_size: int,
    num_heads: int,
    vocab_size: int,
    global_rows: int,
    micro_batch: int,
    conv_kernel: int = 0,
    pattern: Sequence[str] = ("trellis",),
    mlp_hidden: int = 0,
    tensor: TensorConfig = _TENSOR,
    sequence: SequenceConfig = _SEQUENCE,
) -> MeshConfig:
    """Refuse a mesh that cannot work, before any process group is made; return it with ``dp`` filled in.

    Args:
        world_size: ranks that were (or will be) started.
        sequence_length: T, tokens per row.
        chunk_size: C; a segment T / sp must be a multiple of it.
        num_heads, vocab_size: what ``tp`` would shard.
        global_rows: rows per optimizer step over the whole mesh.
        micro_batch: rows per forward pass and data-parallel rank.
        conv_kernel: taps of the short convolution; its halo must fit in one segment.
        pattern: layer kinds of the model.
        mlp_hidden: SwiGLU columns that ``tp`` would shard.

    Raises:
        ValueError: one line with the arithmetic and the remedy.
    """
    _check_tensor(mesh.tp, num_heads, mlp_hidden, vocab_size)
    filled = _fill_dp(mesh, world_size)
    _check_segment(filled.sp, sequence_length, chunk_size, conv_kernel)
    _check_all_to_all(mesh, num_heads, pattern, sequence)
    _check_tokens(mesh, sequence_length // mesh.sp, tensor)
    _check_batch(filled, global_rows, micro_batch)
    return filled


def _check_tensor(tp: int, num_heads: int, mlp_hidden: int, vocab_size: int) -> None:
    require(
        num_heads % tp == 0,
        f"model.num_heads = {num_heads} / mesh.tp = {tp} = {num_heads / tp:g} heads per rank: use a tp that "
        "divides the heads",
    )
    require(
        mlp_hidden % tp == 0,
        f"SwiGLU width {mlp_hidden} / mesh.tp = {tp} = {mlp_hidden / tp:g} columns per rank: set "
        f"model.mlp_hidden = {-(-mlp_hidden // tp) * tp} or another mesh.tp",
    )
    padded = -(-vocab_size // tp) * tp
    require(
        vocab_size == padded,
        f"model.vocab_size = {vocab_size} / mesh.tp = {tp} = {vocab_size / tp:g} rows per rank: pad it to "
        f"model.vocab_size = {padded} (the tokenizer may be smaller) or use another mesh.tp",
    )


def _check_all_to_all(
    mesh: MeshConfig, num_heads: int, pattern: Sequence[str], sequence: SequenceConfig
) -> None:
    """All-to-all trades segments for heads, so each rank of sp needs whole ones."""
    needed = sequence.mode == "all_to_all" or bool(set(pattern) & set(ATTENTION_KINDS))
    heads = num_heads // mesh.tp
    reason = 'sequence.mode = "all_to_all"' if sequence.mode == "all_to_all" else "softmax attention"
    require(
        mesh.sp == 1 or not needed or heads % mesh.sp == 0,
        f"{reason} with mesh.sp = {mesh.sp} shares out the {num_heads} / tp {mesh.tp} = {heads} heads of a "
        f"rank over sp: {heads} / {mesh.sp} = {heads / mesh.sp:g} is no whole number; use an sp that divides "
        'it, or recurrent layers with sequence.mode = "state_passing"',
    )


def _check_tokens(mesh: MeshConfig, tokens: int, tensor: TensorConfig) -> None:
    require(
        not tensor.sequence_parallel or mesh.tp > 1,
        "tensor.sequence_parallel = true splits tokens over tp, and mesh.tp = 1: set it to false or use more "
        "tp ranks",
    )
    require(
        not tensor.sequence_parallel or tokens % mesh.tp == 0,
        f"tensor.sequence_parallel splits the {tokens} tokens of a row or segment over mesh.tp = {mesh.tp}: "
        f"{tokens} / {mesh.tp} = {tokens / mesh.tp:g} is no whole number; use another sequence length or tp",
    )


def _fill_dp(mesh: MeshConfig, world_size: int) -> MeshConfig:
    inner = mesh.sp * mesh.tp
    if mesh.dp is None:
        require(
            world_size >= inner and world_size % inner == 0,
            f"world size {world_size} does not divide by mesh.sp * mesh.tp = {mesh.sp} * {mesh.tp} = {inner}"
            f": start a multiple of {inner} ranks or change the mesh",
        )
        return dataclasses.replace(mesh, dp=world_size // inner)
    require(
        mesh.dp * inner == world_size,
        f"mesh.dp * mesh.sp * mesh.tp = {mesh.dp} * {mesh.sp} * {mesh.tp} = {mesh.dp * inner}, but the world "
        f"size is {world_size}: start {mesh.dp * inner} ranks, or leave mesh.dp out to take what it gives",
    )
    return mesh


def _check_segment(sp: int, sequence_length: int, chunk_size: int, conv_kernel: int) -> None:
    if sp == 1:
        return
    whole = sp * chunk_size
    require(
        sequence_length % whole == 0,
        f"sequence length {sequence_length} / mesh.sp {sp} = {sequence_length / sp:g} tokens per segment, "
        f"which is no multiple of the chunk size {chunk_size}: use a sequence length that is a multiple of "
        f"sp * C = {whole} (for example {-(-sequence_length // whole) * whole})",
    )
    segment = sequence_length // sp
    require(
        segment >= conv_kernel - 1,
        f"sequence length {sequence_length} / mesh.sp {sp} = {segment} tokens per segment, fewer than the "
        f"{conv_kernel - 1} that a convolution of {conv_kernel} taps looks back: use longer rows or less sp",
    )


def _check_batch(mesh: MeshConfig, global_rows: int, micro_batch: int) -> None:
    assert mesh.dp is not None, "dp is filled before the batch equation is checked"
    rows = micro_batch * mesh.dp
    require(
        global_rows >= rows and global_rows % rows == 0,
        f"global batch of {global_rows} rows = micro_batch {micro_batch} x accumulation "
        f"{global_rows / rows:g} x dp {mesh.dp}: the accumulation must be a whole number, so use a "
        f"multiple of {rows} rows (training.global_batch_tokens = rows x T) or another training.micro_batch",
    )


def build_mesh(
    config: MeshConfig,
    *,
    tensor: TensorConfig = _TENSOR,
    sequence: SequenceConfig = _SEQUENCE,
    device: torch.device | str = "cpu",
) -> Mesh:
    """The mesh that ``check_mesh`` accepted, with its process groups (after ``env.init_distributed``).

    Every rank must call it, with the same arguments; a shape that comes again uses the groups it has. A
    single rank, under torchrun or not, needs neither groups nor megatron.

    Raises:
        ValueError: the mesh does not fit the world size.
    """
    filled = _fill_dp(config, env.world_size())
    dp, sp, tp = filled.dp, filled.sp, filled.tp
    assert dp is not None, "dp is filled from the world size"
    device = torch.device(device)
    if env.world_size() == 1:
        return Mesh(device=device)
    return dataclasses.replace(
        env.once(("mesh", dp, sp, tp), lambda: _new_mesh(dp, sp, tp)),
        device=device,
        sequence_parallel=tensor.sequence_parallel,
        sequence_mode=sequence.mode,
    )


def _new_mesh(dp: int, sp: int, tp: int) -> Mesh:
    """The place of this rank and new groups (collective: all ranks make all)."""
    state = _parallel_state(sp, tp)
    rightward, leftward = _direction_groups(dp, sp, tp)
    return Mesh(
        dp=dp,
        sp=sp,
        tp=tp,
        rank=dist.get_rank(),
        dp_rank=state.get_data_parallel_rank(),
        sp_rank=state.get_context_parallel_rank(),
        tp_rank=state.get_tensor_model_parallel_rank(),
        dp_group=state.get_data_parallel_group() if dp > 1 else None,
        sp_group=state.get_context_parallel_group() if sp > 1 else None,
        tp_group=state.get_tensor_model_parallel_group() if tp > 1 else None,
        replica_group=state.get_data_parallel_group(with_context_parallel=True) if dp * sp > 1 else None,
        rightward=rightward,
        leftward=leftward,
    )


def _parallel_state(sp: int, tp: int) -> Any:
    cuda_absent.install()
    with warnings.catch_warnings():
        # It says four times that it falls back to torch for optimizers that nothing here uses.
        warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
        from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        context_parallel_size=sp,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=env.timeout_s() / 60,
    )
    _end_unused_groups(parallel_state)
    return parallel_state


def _end_unused_groups(state: Any) -> None:
    """Of gloo's two dozen groups keep what a mesh and its layers use (this is no collective).

    Each has three threads, one of which looks around a hundred times a second; NCCL's cost nothing before
    their first use.
    """
    if dist.get_backend() != "gloo":
        return
    used = [
        state.get_data_parallel_group(),
        state.get_data_parallel_group(with_context_parallel=True),
        state.get_context_parallel_group(),
        state.get_tensor_model_parallel_group(),
        state.get_model_parallel_group(),
    ]
    made = state._global_process_group_list
    for group in [group for group in made if group is not None and group not in used]:
        dist.destroy_process_group(group)
        made.remove(group)


def _check_no_bound_device() -> None:
    """Refuse a world bound to a device: all messages of a group would then share one NCCL communicator."""
    world = dist.group.WORLD
    if world is not None and world.bound_device_id is not None:
        raise ValueError(
            "the process group was made with device_id, so messages to the right and from the left would "
            "wait for one another: with mesh.sp > 1 call init_process_group without device_id"
        )


def _direction_groups(dp: int, sp: int, tp: int) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """One group per direction over this rank's sp ranks (new_group is collective: all ranks make all)."""
    mine: list[dist.ProcessGroup | None] = [None, None]
    if sp == 1:
        return None, None
    _check_no_bound_device()
    for replica, shard in itertools.product(range(dp), range(tp)):
        ranks = [(replica * sp + segment) * tp + shard for segment in range(sp)]
        for direction in range(2):
            group = dist.new_group(ranks, timeout=timedelta(seconds=env.timeout_s()))
            if dist.get_rank() in ranks:
                mine[direction] = group
    return mine[0], mine[1]
