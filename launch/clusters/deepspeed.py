"""DeepSpeed's hostfile: one agent per host, started over ssh from here.

Not by DeepSpeed's own launcher, whose hostfile this reads: it needs pdsh, has no restarts, ends ranks on a
signal without waiting for their save, and ends remote ones by the text of their command line (``pkill -f``).
"""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from launch.clusters.agent import Agents, shell_words
from launch.clusters.patience import Patience
from launch.clusters.run_agent import status_of
from launch.clusters.work import Work, node_line
from launch.ending import handlers_kept
from launch.ranks import PASSED_ON
from trellis_dist.training.job import EXIT_TERMINATED

__all__ = ["Host", "dry_run", "host_commands", "read_hostfile", "run_hosts"]

_LINE = re.compile(r"(?P<name>[^\s#@:]+)\s+slots=(?P<slots>[1-9][0-9]*)")
_SSH_FAILED = 255  # of ssh itself
# A host that does not answer is given up after half a minute, one that is lost on the way after a minute.
_SSH_OPTIONS = ("BatchMode=yes", "ConnectTimeout=30", "ServerAliveInterval=15", "ServerAliveCountMax=4")
# After one host has failed: for the others to lose its ranks, and to say so.
_PATIENCE_S = 60.0
_POLL_S = 0.1


@dataclass(frozen=True)
class Host:
    """A line of a hostfile: a machine that ssh reaches, and how many ranks it takes."""

    name: str
    slots: int


def read_hostfile(path: Path) -> list[Host]:
    """The hosts of a file with lines ``HOST slots=N``; empty lines and ``#`` comments are passed over.

    Raises:
        ValueError: a line that is none, a host twice, hosts with different numbers of slots, or no host.
        FileNotFoundError: no such file.
    """
    hosts: list[Host] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        found = _LINE.fullmatch(text)
        if found is None or text.startswith("-"):
            raise ValueError(f"{path}, line {number}: {text!r}: write it as `HOST slots=N`, N at least 1")
        hosts.append(Host(found["name"], int(found["slots"])))
        if [host.name for host in hosts].count(found["name"]) > 1:
            raise ValueError(f"{path}, line {number}: {found['name']} stands there twice: give it one line")
        if hosts[-1].slots != hosts[0].slots:
            raise ValueError(
                f"{path}, line {number}: {found['name']} has {hosts[-1].slots} slots and {hosts[0].name} "
                f"{hosts[0].slots}: every host takes the same number of ranks"
            )
    if not hosts:
        raise ValueError(f"{path} names no host: write lines `HOST slots=N`")
    return hosts


def host_commands(
    agents: Agents, work: Work, hosts: Sequence[Host], *, ssh_port: int | None = None
) -> list[list[str]]:
    """The ssh command of each host, in the order of their places."""
    ssh = [
        "ssh",
        *(word for option in _SSH_OPTIONS for word in ("-o", option)),
        *(["-p", str(ssh_port)] if ssh_port else []),
    ]
    lines = [_line(agents, work, place) for place in range(len(hosts))]
    # The login shell of a host may be any; what it is to run is one word of bash.
    return [[*ssh, host.name, shell_words(["bash", "-c", line])] for host, line in zip(hosts, lines)]


def _line(agents: Agents, work: Work, place: int) -> str:
    # The first host keeps the store where all meet, whatever it calls itself.
    return node_line(agents, work, place=place, hosts_store=str(int(place == 0)), follow_stdin=True)


def dry_run(commands: Sequence[Sequence[str]], hosts: Sequence[Host]) -> str:
    """The exact command of each host."""
    lines = []
    for place, (command, host) in enumerate(zip(commands, hosts)):
        lines += [f"# node {place}: {host.name}", shell_words(command)]
    return "\n".join(lines)


def run_hosts(commands: Sequence[Sequence[str]], hosts: Sequence[Host], *, grace_s: float) -> int:
    """Run the command of each host until all have ended, and return the status of the run.

    A signal goes to the agents of all hosts as a line on their standard input, which they follow. After the
    first failure the other hosts have a minute to end by themselves; then they are asked to. Hosts that were
    asked to end have ``grace_s`` for their save before they are asked again.

    Raises:
        FileNotFoundError: there is no ssh here.
    """
    # In sessions of their own: an interrupt at the terminal goes to every process there, and would end ssh.
    processes = [
        subprocess.Popen(list(command), stdin=subprocess.PIPE, start_new_session=True) for command in commands
    ]
    patience = Patience(settle_s=_PATIENCE_S, grace_s=grace_s)
    with _signals_to(processes, patience):
        _wait(processes, hosts, patience)
    for process in processes:
        if process.stdin:
            with contextlib.suppress(OSError):
                process.stdin.close()
    ends = [process.returncode for process in processes]
    return status_of(ends)


@contextlib.contextmanager
def _signals_to(processes: Sequence[subprocess.Popen[bytes]], patience: Patience) -> Iterator[None]:
    def pass_on(number: int, _: FrameType | None) -> None:
        patience.asked()
        # A terminal that is closed asks the run to end; ranks save for SIGTERM alone.
        _tell(processes, signal.SIGTERM if number == signal.SIGHUP else signal.Signals(number))

    with handlers_kept(PASSED_ON):
        for number in PASSED_ON:
            signal.signal(number, pass_on)
        yield


def _tell(processes: Sequence[subprocess.Popen[bytes]], number: signal.Signals) -> None:
    for process in processes:
        if process.stdin and process.poll() is None:
            with contextlib.suppress(OSError):
                process.stdin.write(f"{number.name}\n".encode())
                process.stdin.flush()


def _wait(processes: Sequence[subprocess.Popen[bytes]], hosts: Sequence[Host], patience: Patience) -> None:
    said: set[str] = set()
    while True:
        ends = [process.poll() for process in processes]
        for host, end in zip(hosts, ends):
            if end and host.name not in said:
                said.add(host.name)
                _say(host, end)
        if None not in ends:
            return
        if patience.is_over(ends):
            _tell(processes, signal.SIGTERM)
        time.sleep(_POLL_S)


def _say(host: Host, status: int) -> None:
    if status == EXIT_TERMINATED:
        return
    found = "ssh cannot reach it, or lost it" if status == _SSH_FAILED else f"its agent ended with {status}"
    print(f"trellis: error: {host.name}: {found}", file=sys.stderr, flush=True)
