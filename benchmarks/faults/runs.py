"""The rows of the fault table that take real runs: signals, hangs, bad numbers, other meshes."""

from __future__ import annotations

from benchmarks.faults.rank_guards import flip_bit, poison_gradient, slow_rank
from benchmarks.faults.rank_hangs import skip_collective, stop_rank
from benchmarks.faults.rank_kills import kill_all_ranks, kill_one_rank, preempt
from benchmarks.faults.rank_meshes import CHAINS, change_mesh
from benchmarks.faults.row import Row

__all__ = ["ROWS"]

ROWS: dict[int, Row] = {
    1: Row(
        title="SIGKILL one rank of `trellis train --max-restarts 3` at a random moment, mid-save included",
        expected="it finishes by itself; losses and tensors equal an undisturbed run's in every bit",
        full=50,
        quick=2,
        trial=kill_one_rank,
    ),
    2: Row(
        title="SIGKILL all ranks and the launcher with an asynchronous save in flight, start again by hand",
        expected="equal in every bit; lost steps at most the save interval (3)",
        full=20,
        quick=1,
        trial=kill_all_ranks,
    ),
    12: Row(
        title="SIGSTOP a rank of 2, 3 or 4",
        expected="the rank is named within the timeout + 5 s",
        full=9,
        quick=1,
        trial=stop_rank,
    ),
    13: Row(
        title="one rank of 3 skips a collective: the agreement, the loss, the gradients",
        expected="the rank and the operation are named",
        full=9,
        quick=1,
        trial=skip_collective,
    ),
    14: Row(
        title="one rank takes twice as long; 1,000 recorded clean steps",
        expected="flagged within 20 steps; 0 false alarms",
        full=12,
        quick=2,
        trial=slow_rank,
    ),
    15: Row(
        title="NaN or Inf in one rank's gradient",
        expected="all ranks skip or stop together; weights and optimizer state unchanged",
        full=48,
        quick=9,
        trial=poison_gradient,
    ),
    16: Row(
        title="a bit of one replica's weights flipped",
        expected="found within K = 5 steps, the rank named (of two, both); without copies the log says why",
        full=32,
        quick=8,
        trial=flip_bit,
    ),
    17: Row(
        title="SIGTERM or SIGUSR1 to `trellis train`, while it starts too",
        expected="status 75 and a checkpoint within the grace period; the next start ends equal in every bit",
        full=20,
        quick=1,
        trial=preempt,
    ),
    18: Row(
        title="stop and resume on another mesh and engine: 4 ranks, 2, 4; every engine to every engine",
        expected="the same token sequence; loss within 1e-5 relative, gradient norm within 1e-4",
        full=len(CHAINS),
        quick=3,
        trial=change_mesh,
    ),
}
