"""Running the matrix on the ranks of this job: one result per case, the same on every rank."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from trellis_dist.models.language_model import build_language_model
from trellis_dist.parallel import env
from trellis_dist.parallel.apply import apply_parallelism
from trellis_dist.parallel.config import MeshConfig, SequenceConfig, TensorConfig
from trellis_dist.parallel.mesh import Mesh, build_mesh
from trellis_dist.parallel.transfers import Transfers
from trellis_dist.training.carry import RowStates
from trellis_dist.training.engines.factory import build_engine
from trellis_dist.training.parity.batches import micro_batches
from trellis_dist.training.parity.cases import STEPS, Case, OperationCase, global_rows
from trellis_dist.training.parity.compare import CaseResult, Comparison, Failure, Findings, Trace, merge
from trellis_dist.training.parity.connect import LostContactError, LostRanksError, check_sums, lost
from trellis_dist.training.parity.deadline import AFTER_ERROR_S, Deadline
from trellis_dist.training.parity.operation import compare_operation
from trellis_dist.training.parity.reference import SEED, References
from trellis_dist.training.parity.rows import find_case
from trellis_dist.training.parity.stress import Neighbour, check_order, measure_neighbour

__all__ = ["CASE_SECONDS", "Matrix"]

T = TypeVar("T")

# Of the slowest case, with the start of its libraries, on a machine that is busy with something else.
CASE_SECONDS = 300.0
ORDER = "point-to-point order"


class Matrix:
    """Runs cases on all ranks together; references are made once and kept.

    Args:
        steps: optimizer steps of a case, at most: some do fewer.
        device: of this rank.
        deadline: ends the process when a case hangs; None waits.
    """

    def __init__(self, *, steps: int = STEPS, device: torch.device, deadline: Deadline | None = None) -> None:
        self.world_size = env.world_size()
        self._steps, self._device = steps, device
        self._deadline = deadline or Deadline(CASE_SECONDS)
        # Host memory, and apart from the groups under test.
        self._talk = dist.new_group(backend="gloo", timeout=_timeout()) if dist.is_initialized() else None
        self._rows = global_rows(self.world_size)
        self._references = References(rows=self._rows, steps=steps, device=device)
        self._traces: dict[str, Trace] = {}

    def run(self, case: Case | OperationCase) -> CaseResult:
        """Run ``case`` on every rank; the world must be one it fits."""
        if isinstance(case, OperationCase):
            return self._result(case.name, lambda: compare_operation(case.name, self._line(case.sp)))
        return self._result(case.name, lambda: self._train(case))

    def check_order(self) -> CaseResult:
        """Stress the order of point-to-point messages along the line of all ranks."""
        return self._result(ORDER, lambda: check_order(ORDER, self._transfers()))

    def _result(self, name: str, work: Callable[[], Findings]) -> CaseResult:
        """What all ranks found together; an error is a finding too."""
        with self._deadline.within(f"case {name}"):
            started = time.monotonic()
            try:
                findings = work()
            except Exception as error:
                self._deadline.note(error)
                findings = _raised(name, error)
            findings.seconds = time.monotonic() - started
            result = merge(name, self.gather(findings))
        errors = [failure for failure in result.failures if failure.quantity == "error"]
        if errors:
            self._start_afresh(f"case {name}: {errors[0].line()}; the ranks have lost each other")
        return result

    def _start_afresh(self, otherwise: str) -> None:
        """After an error on any rank: groups may be out of step, so that further cases need new ones.

        Raises:
            LostRanksError: the group of all ranks, which stays, is out of step too; says ``otherwise``.
        """
        with self._deadline.within(otherwise, seconds=AFTER_ERROR_S):
            try:
                check_sums(self._device)
                connected = True
            except RuntimeError:
                connected = False
            if not all(self.gather(connected)):
                raise lost(otherwise)
        env.forget()

    def measure_neighbours(self) -> list[Neighbour]:
        """Latency and bandwidth between neighbours on that line; half of the pairs at a time.

        Raises:
            LostRanksError: a transfer failed.
        """
        with self._deadline.within("measuring neighbours"):
            try:
                mine = self._measure_mine()
            except RuntimeError as error:
                raise LostRanksError(f"measuring neighbours: {str(error).splitlines()[0]}") from error
            found = self.gather((socket.gethostname(), mine))
        return [
            Neighbour(
                left=rank,
                right=rank + 1,
                left_host=host,
                right_host=found[rank + 1][0],
                latency_us=1e6 * speed[0],
                gigabytes_per_s=speed[1] / 1e9,
            )
            for rank, (host, speed) in enumerate(found)
            if speed is not None
        ]

    def _measure_mine(self) -> tuple[float, float] | None:
        transfers, mine = self._transfers(), None
        for turn in range(2):
            mine = measure_neighbour(transfers, right=env.rank() % 2 == turn) or mine
            self.gather(None)  # the other half's turn begins
        return mine

    def gather(self, mine: T) -> list[T]:
        """What every rank brings, by rank; for small things.

        Raises:
            LostContactError: a rank is gone.
        """
        if self._talk is None:
            return [mine]
        found = [mine] * self.world_size
        try:
            dist.all_gather_object(found, mine, group=self._talk)
        except RuntimeError as error:
            what = f"{self._deadline.what}: lost contact with a rank; the rank that failed says why"
            raise LostContactError(what) from error
        return found

    def _transfers(self) -> Transfers:
        return Transfers(self._line(self.world_size))

    def _line(self, sp: int) -> Mesh:
        """A mesh of lines of ``sp`` ranks."""
        return build_mesh(MeshConfig(sp=sp), device=self._device)

    def _train(self, case: Case) -> Findings:
        other = None if case.same_bits_as is None else self._trace_of(case.same_bits_as)
        comparison = self._compare(case)
        if other is not None:
            comparison.same_bits(other)
        self._traces[case.name] = comparison.trace
        return comparison.findings

    def _trace_of(self, name: str) -> Trace:
        if name not in self._traces:
            case = find_case(name)
            assert isinstance(case, Case), f"{name} trains no model"
            self._traces[name] = self._compare(case).trace
        return self._traces[name]

    def _compare(self, case: Case) -> Comparison:
        mesh = build_mesh(
            MeshConfig(sp=case.sp, tp=case.tp),
            tensor=TensorConfig(sequence_parallel=case.sequence_parallel),
            sequence=SequenceConfig(mode=case.mode),
            device=self._device,
        )
        comparison = Comparison(case.name, self._references.of(case), case.tolerance)
        if case.compile != "none":
            torch.compiler.reset()
        model = build_language_model(case.model_config, seed=SEED, device=self._device)
        training = case.training_config(self.world_size)
        segments = apply_parallelism(
            model, mesh, recompute=training.activation_checkpointing, compile_backend=training.compile
        )
        optimizer = case.optimizer_config
        bf16 = case.precision == "bf16"
        states = None
        if case.carried:
            states = RowStates(global_rows=self._rows, micro_batch=training.micro_batch, mesh=mesh)
        engine = build_engine(
            model, training, optimizer=optimizer, mesh=mesh, segments=segments, bf16=bf16, states=states
        )
        engine.inspector = comparison.gradients
        for step in range(min(self._steps, case.steps)):
            batch = case.global_batch(step, rows=self._rows)
            mine = micro_batches(
                batch,
                dp=mesh.dp,
                dp_rank=mesh.dp_rank,
                accumulation=case.accumulation,
                documents=case.documents,
            )
            comparison.result(engine.train_step(mine, lr=optimizer.lr, valid_tokens=batch.valid_tokens))
        comparison.weights(engine.logical_tensors())
        return comparison


def _timeout() -> timedelta:
    return timedelta(seconds=env.timeout_s())


def _raised(case: str, error: Exception) -> Findings:
    text = str(error).strip() or repr(error)
    failure = Failure(
        case=case, quantity="error", expected="none", found=f"{type(error).__name__}: {text.splitlines()[0]}"
    )
    return Findings(failures=[failure])
