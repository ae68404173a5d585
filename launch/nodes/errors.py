"""What torch says when ranks or nodes do not come together, as one line with the remedy."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
from collections.abc import Sequence
from pathlib import Path

from launch.nodes.ports import holder_of, port_in_use, unreachable, why_unreachable

__all__ = ["endpoint_of", "network_line", "refuse_taken_port"]

# The words of torch.distributed 2.11 to 2.13.
IN_USE = re.compile(r"failed to listen.*port: (?P<port>\d+).*EADDRINUSE", re.DOTALL)
NOT_REACHED = re.compile(
    r"client socket has (?:timed out after (?P<ms>\d+)\s*ms|failed)[^()]*"
    r"\((?P<host>[^,()\s]+), (?P<port>\d+)\)"
)
JOINED = re.compile(r"(?P<came>\d+)/(?P<all>\d+) clients joined")
# Of torch's agents, by the names of their errors.
AGENT_TIMEOUT, AGENT_CLOSED = "RendezvousTimeoutError", "RendezvousClosedError"
AGENT_CONNECTION = "RendezvousConnectionError"
PROBE_S = 3.0
OURS = ("launch.clusters.run_agent", "torch.distributed.run", "torchrun")


def network_line(error: BaseException | None) -> str | None:
    """The line for an error of meeting: port in use, master not reached, ranks or nodes missing; else None.

    ``error`` is what torch raised; what it was raised from counts too.
    """
    first = error
    while error is not None:
        if found := _line(error):
            return found
        error = error.__cause__ or error.__context__
    if type(first).__name__ == AGENT_CONNECTION:
        return (
            "the first node, where the nodes meet, has left: its terminal says why, or names the node that "
            "is gone"
        )
    return None


def _line(error: BaseException) -> str | None:
    text, kind = str(error), type(error).__name__
    host = os.environ.get("MASTER_ADDR") or socket.gethostname()
    if found := IN_USE.search(text):
        return port_in_use(host, int(found["port"]))
    if found := NOT_REACHED.search(text):
        there, port = found["host"], int(found["port"])
        return unreachable(there, port, _why(there, port), seconds=float(found["ms"] or 0) / 1e3)
    if found := JOINED.search(text):
        place = f"{host}:{os.environ.get('MASTER_PORT', '')}"
        return (
            f"{found['came']} of {found['all']} ranks came to {place}: look whether the others were started, "
            "with this address and the same number of ranks"
        )
    if kind == AGENT_TIMEOUT:
        return (
            "not all nodes came in time: start the same command on every node, with the same --nodes, "
            "--master, --port and --job, and see there whether they reach the first one (trellis preflight)"
        )
    if kind == AGENT_CLOSED:
        return "the other nodes have ended this job: see their terminals, and start every node again"
    return None


def _why(host: str, port: int) -> str:
    """Torch says no more than that time was up: one attempt of our own tells the reason."""
    try:
        socket.create_connection((host, port), timeout=PROBE_S).close()
    except OSError as error:
        return why_unreachable(error)
    return "what listens there did not answer"


def refuse_taken_port(host: str, port: int) -> None:
    """Raise OSError if HOST is this node and a program that is no agent has PORT: torch would wait for it.

    A node whose address it is keeps the store there; where it cannot listen torch's agent takes the program
    that can for another agent of the job, and waits for its answer for ever.
    """
    with contextlib.suppress(socket.gaierror), socket.socket() as trial:
        address = socket.getaddrinfo(host, port, family=socket.AF_INET, type=socket.SOCK_STREAM)[0][4]
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(address)
        except OSError as error:
            holder = holder_of(port)
            if error.errno == errno.EADDRINUSE and holder and not _is_agent(holder.split()[1]):
                raise OSError(port_in_use(host, port)) from None


def _is_agent(process: str) -> bool:
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace")
        return any(name in words for name in OURS)
    return True


def endpoint_of(arguments: Sequence[str]) -> tuple[str, int] | None:
    """(host, port) where agents with these options of torchrun meet; None if they do not say."""
    given = dict(item.split("=", 1) for item in arguments if item.startswith("--") and "=" in item)
    if place := given.get("--rdzv-endpoint"):
        host, _, port = place.rpartition(":")
        return host, int(port)
    if "--master-addr" in given and "--master-port" in given:
        return given["--master-addr"], int(given["--master-port"])
    return None
