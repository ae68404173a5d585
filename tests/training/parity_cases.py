"""What the parity tests run on the ranks of a pool: the matrix's cases, whole and with faults put in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from trellis_dist.parallel.segments import Segments
from trellis_dist.parallel.transfers import Transfers
from trellis_dist.training.engines import deepspeed, fsdp2, local
from trellis_dist.training.parity import cases, run, stress
from trellis_dist.training.parity.compare import CaseResult
from trellis_dist.training.parity.rows import cases_at, find_case
from trellis_dist.training.parity.run import Matrix
from trellis_dist.training.parity.stress import Neighbour

FAULT_STEPS = 2


@functools.cache
def matrix(steps: int) -> Matrix:
    """This rank's matrix; the pool's first case of a number of steps makes it."""
    return Matrix(steps=steps, device=torch.device("cpu"))


def run_case(name: str, steps: int) -> CaseResult:
    return matrix(steps).run(find_case(name))


def run_eight(name: str, steps: int) -> list[CaseResult]:
    """The case, and what eight ranks have that four have not."""
    more = [case for case in cases_at(8) if case.name not in {row.name for row in cases_at(4)}]
    return [matrix(steps).run(case) for case in (find_case(name), *more)]


def run_variant(change: dict[str, Any], row: str) -> CaseResult:
    """A row with another Trellis layer, and embeddings of its own for the output."""
    usual = cases.MODELS["trellis"]
    model = replace(usual, tie_embeddings=False, trellis=replace(usual.trellis, **change))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cases.MODELS, "trellis", model)
        return Matrix(steps=FAULT_STEPS, device=torch.device("cpu")).run(find_case(row))


def run_order() -> tuple[CaseResult, list[Neighbour]]:
    return matrix(FAULT_STEPS).check_order(), matrix(FAULT_STEPS).measure_neighbours()


def run_with_fault(name: str, fault: str) -> list[CaseResult]:
    """The case with ``fault``, and once more without: what failed must leave nothing behind."""
    with pytest.MonkeyPatch.context() as patch:
        FAULTS[fault](patch)
        broken = run_case(name, FAULT_STEPS)
    return [broken, run_case(name, FAULT_STEPS)]


def run_order_with_fault() -> CaseResult:
    """Rank 1 sends two neighbouring messages of one size in the wrong order."""
    real, held = Transfers.send_right, list[tuple[Tensor, ...]]()

    def send_right(self: Transfers, *tensors: Tensor) -> None:
        if self.mesh.rank != 1:
            real(self, *tensors)
            return
        held.append(tensors)
        if len(held) == 2:
            alike = held[0][1].shape == held[1][1].shape
            for message in reversed(held) if alike else held:
                real(self, *message)
            held.clear()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Transfers, "send_right", send_right)
        patch.setattr(stress, "_SIZES", (512,))
        return matrix(FAULT_STEPS).check_order()


# Faults that were silent errors when parallel training was first tried without parity: each must show.


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Leave something out."""


def _no_tensor_sum(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(local, "sum_tensor_gradients", _nothing)


def _no_tensor_hooks(patch: pytest.MonkeyPatch) -> None:
    class NoHooks:
        def __init__(self, *args: object) -> None:
            pass

        check = _nothing

    patch.setattr(deepspeed, "TensorSums", NoHooks)


def _no_replica_sum(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(local, "sum_replica_gradients", _nothing)


def _no_sequence_sum(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(fsdp2, "sum_sequence_gradients", _nothing)


def _around_engine(patch: pytest.MonkeyPatch, change: Callable[[Any, Any], None]) -> None:
    """Let ``change(engine, mesh)`` do something to the engine of the case."""
    real = run.build_engine

    def build(*args: Any, **kwargs: Any) -> Any:
        engine = real(*args, **kwargs)
        change(engine, kwargs["mesh"])
        return engine

    patch.setattr(run, "build_engine", build)


def _replica_mean(patch: pytest.MonkeyPatch) -> None:
    def change(engine: Any, mesh: Any) -> None:
        step = engine.train_step

        def train_step(batches: Any, *, lr: float, valid_tokens: int) -> Any:
            return step(batches, lr=lr, valid_tokens=mesh.dp * sum(b.valid_tokens for b in batches))

        engine.train_step = train_step

    _around_engine(patch, change)


def _labels_per_segment(patch: pytest.MonkeyPatch) -> None:
    real = Segments.cut

    def cut(self: Segments, tokens: Tensor, labels: Tensor, cu_seqlens: Tensor | None = None) -> Any:
        here, there, bounds = real(self, tokens, labels, cu_seqlens)
        shifted = torch.cat([here[:, 1:], torch.full_like(here[:, :1], -100)], dim=1)
        return here, torch.where(there < 0, there, shifted), bounds

    patch.setattr(Segments, "cut", cut)


def _untagged(patch: pytest.MonkeyPatch) -> None:
    real = run.apply_parallelism

    def apply(model: Any, *args: Any, **kwargs: Any) -> Any:
        segments = real(model, *args, **kwargs)
        del model.blocks[0].mixer.out_weight.tensor_model_parallel
        return segments

    patch.setattr(run, "apply_parallelism", apply)


def _sum_where_the_library_averages(patch: pytest.MonkeyPatch) -> None:
    for engine in (deepspeed.DeepSpeedEngine, fsdp2.Fsdp2Engine):
        patch.setattr(engine, "_averaged_over", lambda self: 1)


def _sequence_ranks_averaged(patch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's own setting: its stage 3 averages over dp x sp where it has to sum over sp."""
    real = deepspeed._deepspeed_config

    def config(*args: Any) -> dict[str, Any]:
        made = real(*args)
        made["zero_optimization"]["reduce_scatter"] = True
        return made

    patch.setattr(deepspeed, "_deepspeed_config", config)


def _norms_differ_in_a_bit(patch: pytest.MonkeyPatch) -> None:
    real = local.clip_gradients

    def clip(pairs: Any, *, mesh: Any, **kwargs: Any) -> float:
        return real(pairs, mesh=mesh, **kwargs) * (1 + mesh.rank * 2**-52)

    patch.setattr(local, "clip_gradients", clip)


def _one_gradient_is_not_shown(patch: pytest.MonkeyPatch) -> None:
    def change(engine: Any, mesh: Any) -> None:
        real = engine._gradients
        engine._gradients = lambda: (part for part in real() if "norm" not in part.name)

    _around_engine(patch, change)


def _no_update(patch: pytest.MonkeyPatch) -> None:
    def change(engine: Any, mesh: Any) -> None:
        engine._optimizer.step = _nothing

    _around_engine(patch, change)


def _refused(patch: pytest.MonkeyPatch) -> None:
    def build(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("no such engine")

    patch.setattr(run, "build_engine", build)


def _recomputed_in_other_bits(patch: pytest.MonkeyPatch) -> None:
    """A hair of difference, far inside every tolerance, whenever activations are checkpointed."""
    real = run.apply_parallelism

    def apply(model: Any, *args: Any, recompute: str, **kwargs: Any) -> Any:
        if recompute != "none":
            with torch.no_grad():
                model.norm.weight.mul_(1 + 2**-22)
        return real(model, *args, recompute=recompute, **kwargs)

    patch.setattr(run, "apply_parallelism", apply)


def _states_of_other_rows(patch: pytest.MonkeyPatch) -> None:
    """Every row goes on from its neighbour's state."""
    real = run.RowStates.leave

    def leave(self: Any, batch: Any, carry: Any) -> None:
        for layer, state in carry.leaving.items():
            parts = {name: x.roll(1, dims=0) for name, x in vars(state).items()}
            carry.leaving[layer] = replace(state, **parts)
        real(self, batch, carry)

    patch.setattr(run.RowStates, "leave", leave)


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "no sum over tp": _no_tensor_sum,
    "no hooks over tp": _no_tensor_hooks,
    "no sum over dp x sp": _no_replica_sum,
    "no sum over sp": _no_sequence_sum,
    "a mean per replica": _replica_mean,
    "labels shifted per segment": _labels_per_segment,
    "an untagged parameter": _untagged,
    "a sum where the library averages": _sum_where_the_library_averages,
    "an average over sp": _sequence_ranks_averaged,
    "norms that differ in a bit": _norms_differ_in_a_bit,
    "a gradient that is not shown": _one_gradient_is_not_shown,
    "no update": _no_update,
    "a refusal": _refused,
    "recomputation in other bits": _recomputed_in_other_bits,
    "states of other rows": _states_of_other_rows,
}
