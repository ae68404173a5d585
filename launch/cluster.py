"""`trellis doctor --cluster`: the parity matrix and a transfer stress on the ranks a job would use.

On one machine it starts the ranks itself; started as a rank (by torchrun, or a scheduler that sets its
variables) it is one of them, over that job's nodes and backend.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import os
import shutil
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from launch.messages import show_warnings_plainly
from launch.ranks import (
    RankError,
    TerminatedError,
    log_folder,
    record_failure,
    run_ranks,
    under_torchrun,
)
from launch.worker import ECHO_SECONDS, end_with_launcher, error_line, redirect_output
from trellis_dist.files import read_json, write_json
from trellis_dist.training.errors import EchoError

if TYPE_CHECKING:
    from trellis_dist.training.parity.compare import CaseResult, Failure
    from trellis_dist.training.parity.connect import Place
    from trellis_dist.training.parity.run import Matrix
    from trellis_dist.training.parity.stress import Neighbour

__all__ = ["check_cluster", "main", "render_case", "render_neighbours", "render_verdict"]

# The smallest world in which every axis of the mesh meets another; beyond it ranks only share cores.
_CPU_RANKS = 4
_SHOWN_FAILURES = 4

Say = Callable[[str], None]
# What becomes of a rank's failure: its line, its stacks, and whether another rank knows the cause.
Tell = Callable[[str, str, bool], None]


def check_cluster(
    *, ranks: int | None = None, steps: int = 20, cases: Sequence[str] = (), quiet: bool = False
) -> dict[str, Any]:
    """Run every case that fits the ranks, then the transfer stress, and report what each gave.

    Args:
        ranks: to start on this machine; one per CUDA device, or on a CPU 2 to 4, unless given. As a rank that
            somebody else started: must be left out.
        steps: optimizer steps of each case; some do fewer.
        cases: names; only these, and no stress.
        quiet: print no line for each case.

    Returns:
        ``{"passed", "world_size", "device", "device_names", "hosts", "versions", "steps", "cases": [...],
        "not_run": {name: reason}, "neighbours": [...]}``, the same on every rank. As a rank that somebody
        else started it does not return after a failure: the process ends with one line and status 1.

    Raises:
        ValueError: ranks or steps that cannot be.
        launch.ranks.RankError: a rank died or a case hung; the message names it, and stacks are printed.
    """
    if steps < 1:
        raise ValueError(f"--steps {steps}: use 1 or more optimizer steps")
    if under_torchrun():
        if ranks is not None:
            raise ValueError(f"--ranks {ranks}: the ranks are started already; leave it out under torchrun")
        _check_names(cases, int(os.environ["WORLD_SIZE"]))
        say = _silent if quiet or os.environ["RANK"] != "0" else _print
        report = _try_as_rank(_tell_terminal, steps=steps, cases=cases, say=say)
        return report if report is not None else _end_failed()
    flags = [f"--steps={steps}", *(f"--case={name}" for name in cases), *(["--quiet"] if quiet else [])]
    chosen = _choose_ranks(ranks)
    _check_names(cases, chosen)
    return _start(chosen, flags=flags)


def _check_names(given: Sequence[str], world_size: int) -> None:
    from trellis_dist.training.parity.rows import cases_at

    names = [case.name for case in cases_at(world_size)]
    for name in given:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=3, cutoff=0.3)
            raise ValueError(f"--case {name!r}: no such case; did you mean {', '.join(close) or names[0]}?")


def _choose_ranks(given: int | None) -> int:
    import torch

    devices = torch.cuda.device_count()
    ranks = (devices or min(_CPU_RANKS, max(2, os.cpu_count() or 1))) if given is None else given
    if devices and ranks > devices:
        raise ValueError(f"--ranks {ranks}: this machine has {devices} CUDA devices; use at most {devices}")
    if ranks < 2:
        raise ValueError(
            f"--cluster compares ranks with one process, and here is {ranks}: use --ranks 2 or more, start "
            'it with torchrun on all nodes, or hide the GPU (CUDA_VISIBLE_DEVICES="") for ranks on the CPU'
        )
    return ranks


def _start(ranks: int, *, flags: Sequence[str]) -> dict[str, Any]:
    """Run the ranks on this machine and read what they report; a failed start leaves their logs."""
    folder = Path(tempfile.mkdtemp(prefix="trellis-doctor-"))
    arguments = [f"--folder={folder}", *flags]
    try:
        run_ranks(ranks, run_dir=folder, arguments=arguments, module="launch.cluster")
    except RankError as error:
        print(error.detail, file=sys.stderr)
        raise RankError(f"{error} (logs of the ranks: {log_folder(folder)})", error.detail) from None
    except TerminatedError:
        raise RankError("ended by SIGTERM before every case was run", "") from None
    report: dict[str, Any] = read_json(folder / "report.json")
    shutil.rmtree(folder)
    return report


def _try_as_rank(tell: Tell, **given: Any) -> dict[str, Any] | None:
    """What ``_as_rank`` reports; None after an error, which is told."""
    try:
        return _as_rank(**given)
    except Exception as error:
        detail, echo = traceback.format_exc(), isinstance(error, EchoError)
        if echo:
            # torchrun ends all ranks as soon as one exits: let the one that knows the cause say it first.
            time.sleep(ECHO_SECONDS)
        tell(error_line(error), detail, echo)
        return None


def _tell_terminal(line: str, detail: str, _: bool) -> None:
    if "--debug" in sys.argv:  # which the command line takes for itself, and this process ends before it
        print(detail, file=sys.stderr)
    where = f"rank {os.environ['RANK']} on {socket.gethostname()}"
    print(f"trellis: error: {where}: {line}", file=sys.stderr)


def _end_failed() -> NoReturn:
    """End without a library's clean-up, in which a rank that failed would wait for its peers."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a terminal that is gone
            stream.flush()
    os._exit(1)


def _as_rank(
    *, steps: int, cases: Sequence[str], say: Say, on_expiry: Callable[[str, str], None] | None = None
) -> dict[str, Any]:
    """Run the cases as one of the ranks."""
    import torch

    from trellis_dist.parallel import env
    from trellis_dist.training.parity.connect import CONNECT_SECONDS, connect, remedy
    from trellis_dist.training.parity.deadline import Deadline
    from trellis_dist.training.parity.run import CASE_SECONDS, Matrix

    device, deadline = env.device(), Deadline(CASE_SECONDS, on_expiry)
    torch.set_num_threads(1)  # the model is too small to share
    _compute_in_fp32()
    with deadline.within("connecting", seconds=CONNECT_SECONDS, remedy=remedy()):
        # A case that hangs is named by its deadline; the collectives' own timeout comes after it.
        places = connect(device, timeout_s=CASE_SECONDS + 60.0)
        matrix = Matrix(steps=steps, device=device, deadline=deadline)
    report = _report(matrix, places, only=cases, device=device.type, steps=steps, say=say)
    with deadline.within("leaving the process groups"):
        env.shutdown()
    return report


def _compute_in_fp32() -> None:
    """Without TF32, which is off by 1e-3: gradients within 1e-4 would then fail on a healthy cluster.

    torch multiplies in it where TORCH_ALLOW_TF32_CUBLAS_OVERRIDE is set, as NVIDIA's containers do, and
    convolves in it unless told otherwise.
    """
    import torch

    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def _report(
    matrix: Matrix, places: Sequence[Place], *, only: Sequence[str], device: str, steps: int, say: Say
) -> dict[str, Any]:
    hosts = sorted({place.host for place in places})
    names = sorted({place.device for place in places})
    on = device if names == [device] else f"{device} ({', '.join(names)})"
    where = f"{matrix.world_size} ranks on {len(hosts)} machine(s): {', '.join(hosts)}; {on}"
    say(f"{where}; {steps} steps a case")
    results, not_run = _run_cases(matrix, only=only, say=say)
    compared = bool(results)  # with one process, which the order of messages is not
    neighbours: list[Neighbour] = []
    if matrix.world_size > 1 and not only:
        results.append(matrix.check_order())
        say(render_case(results[-1]))
        neighbours = matrix.measure_neighbours()
        say(render_neighbours(neighbours))
    report = {
        "passed": compared and all(result.passed for result in results),
        "world_size": matrix.world_size,
        "device": device,
        "device_names": names,
        "hosts": hosts,
        "versions": dict(places[0].versions),
        "steps": steps,
        "cases": [_as_json(result) for result in results],
        "not_run": not_run,
        "neighbours": [dataclasses.asdict(neighbour) for neighbour in neighbours],
    }
    say(render_verdict(report))
    return report


def _run_cases(matrix: Matrix, *, only: Sequence[str], say: Say) -> tuple[list[CaseResult], dict[str, str]]:
    """What the cases gave that fit the ranks, and why the others do not."""
    from trellis_dist.training.parity.rows import cases_at, has_compiler

    compilers = all(matrix.gather(has_compiler()))
    results, not_run = [], {}
    for case in cases_at(matrix.world_size):
        reason = case.needs(matrix.world_size)
        if getattr(case, "compile", "none") == "inductor" and not compilers:
            reason = "needs a C++ compiler on every machine"
        if only and case.name not in only:
            continue
        if reason is None:
            results.append(matrix.run(case))
            say(render_case(results[-1]))
        else:
            not_run[case.name] = reason
    return results, not_run


def _as_json(result: CaseResult) -> dict[str, Any]:
    return {**dataclasses.asdict(result), "passed": result.passed}


def render_case(result: CaseResult) -> str:
    """One line for a case, and one for each of its first failures (one for an error that ranks share)."""
    worst = ", ".join(f"{kind} {error:.1e}" for kind, error in result.worst.items())
    verdict = "pass" if result.passed else "FAIL"
    lines = [f"{result.name:48} {verdict} {result.seconds:6.1f} s  largest error: {worst or 'none'}"]
    different: dict[tuple[int, str, str], Failure] = {}
    for failure in result.failures:
        different.setdefault((failure.step, failure.quantity, failure.found), failure)
    shown = list(different.values())[:_SHOWN_FAILURES]
    lines += [f"    {failure.line()}" for failure in shown]
    more = len(result.failures) - len(shown)
    return "\n".join([*lines, *([f"    and {more} more"] if more > 0 else [])])


def render_neighbours(neighbours: Sequence[Neighbour]) -> str:
    """A table of what each pair of neighbours reached."""
    lines = ["point-to-point, one way:      latency     bandwidth"]
    for pair in neighbours:
        hosts = (
            pair.left_host if pair.left_host == pair.right_host else f"{pair.left_host}, {pair.right_host}"
        )
        ranks = f"rank {pair.left} - rank {pair.right}"
        lines.append(f"{ranks:24} {pair.latency_us:9.1f} us {pair.gigabytes_per_s:8.2f} GB/s  {hosts}")
    return "\n".join(lines)


def render_verdict(report: dict[str, Any]) -> str:
    """What did not run, and whether all that did passed."""
    cases, not_run = report["cases"], report["not_run"]
    failed = [case["name"] for case in cases if not case["passed"]]
    lines = []
    for reason in sorted(set(not_run.values())):
        names = [name for name, why in not_run.items() if why == reason]
        lines.append(f"not run, {reason}: {', '.join(names)}")
    if failed:
        lines.append(f"FAIL: {len(failed)} of {len(cases)} cases: {', '.join(failed)}")
    elif not report["passed"]:
        lines.append("FAIL: no case fits these ranks")
    else:
        others = f" ({len(not_run)} need other numbers of ranks)" if not_run else ""
        lines.append(f"pass: {len(cases)} of {len(cases) + len(not_run)} cases{others}")
    return "\n".join(lines)


def _silent(line: str) -> None:
    """Say nothing."""


def main(arguments: list[str] | None = None) -> int:
    """Be one rank of ``check_cluster``; rank 0 leaves the report, any rank its failure."""
    parser = argparse.ArgumentParser(prog="python -m launch.cluster", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--case", action="append", default=[])
    parser.add_argument("--quiet", action="store_true")
    options = parser.parse_args(arguments)
    show_warnings_plainly()
    rank = int(os.environ["RANK"])
    if rank > 0:
        redirect_output(log_folder(options.folder) / f"rank-{rank:05d}.log")

    def record(message: str, detail: str, echo: bool) -> None:
        record_failure(options.folder, rank=rank, message=message, detail=detail, echo=echo)

    def record_expiry(message: str, stacks: str) -> None:
        # Of ranks that all wait, one may know why: what only "did not finish" is the effect.
        record(message, stacks, "did not finish" in message)

    say = _silent if options.quiet or rank > 0 else _print
    given = {"steps": options.steps, "cases": options.case, "say": say, "on_expiry": record_expiry}
    report = _try_as_rank(record, **given)
    if report is None:
        return 1
    if rank == 0:
        write_json(options.folder / "report.json", report)
    return 0


def _print(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    end_with_launcher()
    status = main()
    if status:
        _end_failed()
    sys.exit(0)
