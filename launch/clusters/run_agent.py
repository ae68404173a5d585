"""The agent of one node: torchrun's own, with exit statuses and last words that others can act on.

``python -m launch.clusters.run_agent [--follow-stdin] [preflight ARGUMENTS --then] OPTIONS OF TORCHRUN
-m MODULE ARGUMENTS``
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from launch.ending import end_process, end_rank_at_once, on_termination
from launch.failures import silent_end
from launch.messages import show_warnings_plainly
from launch.nodes.errors import endpoint_of, refuse_taken_port
from launch.ranks import AGENT, ASKED, PASSED_ON, memory_of_killed, share_machine, silence_the_agent
from trellis_dist.training.job import EXIT_TERMINATED
from trellis_dist.training.termination import SIGNALS

__all__ = ["FOLLOW_STDIN", "PREFLIGHT", "THEN", "follow", "main", "status_of"]

FOLLOW_STDIN = "--follow-stdin"
PREFLIGHT, THEN = "preflight", "--then"
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the agent and return its exit status.

    0: all ranks are done. 75: asked to end (SIGTERM, SIGUSR1), here or on another node, and what was trained
    is saved as far as the grace allowed: start again to go on. 130: interrupted. 1: anything else, said in
    one line by a rank or here.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    show_warnings_plainly()
    end_rank_at_once()  # before there are ranks there is nothing to save; torch replaces these handlers
    if FOLLOW_STDIN in given[:1]:
        given = given[1:]
        # Unbuffered: a buffer that a thread waits in cannot be let go at the end of the process.
        stream = io.FileIO(os.dup(sys.stdin.fileno()))
        threading.Thread(target=follow, args=(stream,), daemon=True).start()
    if given[:1] == [PREFLIGHT]:
        end = given.index(THEN)
        if status := _compare_nodes(given[1:end]):
            return status
        given = given[end + 1 :]
    return _run_ranks(given)


def _compare_nodes(arguments: Sequence[str]) -> int:
    """Run `trellis preflight` with these arguments and return its status; a signal ends it too."""
    command = [sys.executable, "-m", "launch.cli", "preflight", *arguments]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as child:

        def end(*_: object) -> None:
            child.kill()  # it holds the port where the nodes meet
            end_process(EXIT_TERMINATED)

        on_termination(end)
        try:
            status = child.wait()
        except KeyboardInterrupt:
            child.kill()
            return INTERRUPTED
    end_rank_at_once()
    # A scheduler may have sent the signal to every process of the node.
    return EXIT_TERMINATED if status in ASKED else status


def _run_ranks(given: Sequence[str]) -> int:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    from launch.nodes.facts import use_local_address

    silence_the_agent()
    share_machine(_ranks(given))
    _heed_requests()
    os.environ[AGENT] = str(os.getpid())
    try:
        if address := _value(given, "--local-addr"):
            use_local_address(address)
        if place := endpoint_of(given):
            refuse_taken_port(*place)
        torchrun(given)
    except ChildFailedError as error:
        return _say_and_judge(error.failures, given)
    except SignalException as error:
        return EXIT_TERMINATED if error.sigval in SIGNALS else INTERRUPTED
    except Exception as error:
        from launch.worker import error_line

        _say(error_line(error))
        return 1
    return 0


def _heed_requests() -> None:
    """Have torch's agent take a request to end for what it is."""
    from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing import api

    api._terminate_process_handler = _OnSignal()
    monitor = LocalElasticAgent._monitor_workers

    def watch(self: LocalElasticAgent, group: WorkerGroup) -> RunResult:
        result: RunResult = monitor(self, group)
        # Ranks here agree to end with those of a node that got a signal. Torch, which calls that a failure,
        # would start them again and wait for the node that has left.
        if result.is_failed() and {failure.exitcode for failure in result.failures.values()} <= set(ASKED):
            self._remaining_restarts = 0
        return result

    LocalElasticAgent._monitor_workers = watch  # type: ignore[method-assign]


class _OnSignal:
    """Torch's handler of signals for the first one; each later one goes to the ranks and interrupts nothing.

    Torch's own raises again, out of the wait for the ranks: the third would end the agent and leave them.
    """

    def __init__(self) -> None:
        self._asked = False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        from torch.distributed.elastic.multiprocessing.api import SignalException

        if not self._asked:
            self._asked = True
            name = signal.Signals(signum)
            raise SignalException(f"process {os.getpid()} got signal: {name}", sigval=name)
        for rank in _children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, signum)


def _children() -> list[int]:
    """The processes that this one's main thread started: the ranks."""
    try:
        text = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    except OSError:  # no Linux, or one without this file: torch has sent them the first signal
        return []
    return [int(word) for word in text.split()]


def _ranks(given: Sequence[str]) -> int:
    return int(_value(given, "--nproc-per-node") or 1)


def _value(given: Sequence[str], option: str) -> str | None:
    prefix = f"{option}="
    return next((item[len(prefix) :] for item in given if item.startswith(prefix)), None)


def _run_folder(given: Sequence[str]) -> Path | None:
    """What the ranks were told of their run folder, if anything."""
    words = [*given, ""]
    for place, word in enumerate(given):
        if word == "--run-dir":
            return Path(words[place + 1])
        if word.startswith("--run-dir="):
            return Path(word.partition("=")[2])
    return None


def follow(stream: Iterable[bytes]) -> None:
    """Raise in this process each signal that a line of ``stream`` names, and SIGTERM when the stream ends.

    The launcher, on another machine, holds the other end: ssh and Ray pass on no signals, and close it when
    they are gone.
    """
    known = {number.name: number for number in PASSED_ON}
    for line in stream:
        if number := known.get(line.decode(errors="replace").strip()):
            os.kill(os.getpid(), number)
    os.kill(os.getpid(), signal.SIGTERM)


def _say_and_judge(failures: Mapping[int, Any], given: Sequence[str]) -> int:
    for rank, failure in sorted(failures.items()):
        # A rank that ends by itself has said why; a killed one could not, and SIGTERM came from the agent.
        if failure.exitcode < 0 and failure.exitcode not in ASKED:
            folder = _run_folder(given)
            memory = memory_of_killed(folder, failure.exitcode, here=_ranks(given)) if folder else ""
            _say(f"rank {rank} on {socket.gethostname()}: {silent_end(failure.exitcode)}{memory}")
    return status_of([failure.exitcode for failure in failures.values()])


def status_of(ends: Sequence[int]) -> int:
    """The status of agents, or of an agent, whose ranks ended with ``ends`` (negative: a signal)."""
    failed = [end for end in ends if end]
    if not failed:
        return 0
    return EXIT_TERMINATED if set(failed) <= set(ASKED) else 1


def _say(text: str) -> None:
    for line in text.splitlines():
        print(f"trellis: error: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
