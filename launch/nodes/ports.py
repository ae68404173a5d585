"""Ports and addresses of this machine: who holds a port, what a failed connection means, in words."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
from pathlib import Path

__all__ = ["holder_of", "is_loopback", "parse_endpoint", "port_in_use", "unreachable", "why_unreachable"]

_LISTENING = "0A"


def parse_endpoint(text: str, *, option: str = "--rdzv") -> tuple[str, int]:
    """(host, port) of ``HOST:PORT``. Raises ValueError with the remedy."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"{option} {text!r}: give HOST:PORT, such as 10.0.0.1:29500")
    return host, int(port)


def is_loopback(address: str) -> bool:
    """Whether an address leads nowhere but back to its own machine."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def port_in_use(host: str, port: int) -> str:
    """One line for an address that another program has, named where /proc tells, with the remedy."""
    holder = holder_of(port)
    by = f" by {holder}" if holder else ""
    remedy = "end it" if holder else "end the program that listens there"
    return f"port {port} of {host} is in use{by}: {remedy}, or give every node another port"


def unreachable(host: str, port: int, why: str, *, seconds: float) -> str:
    """One line for a meeting place that this node did not reach, with the remedy for ``why``."""
    tried = f"{why}; tried for {seconds:.0f} s"
    return f"{socket.gethostname()} cannot reach {host}:{port} ({tried}): {_remedy(why)}"


def why_unreachable(error: BaseException | str) -> str:
    """Why no connection was made: "refused", "timed out", "name not known" or the error's words."""
    if isinstance(error, socket.gaierror):
        return "name not known"
    if isinstance(error, ConnectionRefusedError):
        return "refused"
    if isinstance(error, OSError) and error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH):
        return "no route"
    text = str(error)
    if isinstance(error, TimeoutError) or "timed out" in text.lower() or "timeout" in text.lower():
        return "timed out"
    return text.splitlines()[0] if text else type(error).__name__


def _remedy(why: str) -> str:
    if why == "name not known":
        return "give the first node by an address, or by a name that every node can look up"
    if why == "refused":
        return (
            "start the same command on that node too, with the same port, and look whether it has ended there"
        )
    if why in ("timed out", "no route"):
        return (
            "look whether that node is up, the address is of a network that the nodes share, and no firewall "
            "is between"
        )
    return "another program may be listening there; give every node another port, or end that program"


def holder_of(port: int) -> str:
    """``process 123 (python3)`` that listens on ``port`` of this machine; empty where that cannot be told."""
    sockets = {f"socket:[{inode}]" for inode in _listening(port)}
    if not sockets:
        return ""
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and process.name != str(os.getpid()) and _opened(process) & sockets:
            with contextlib.suppress(OSError):
                return f"process {process.name} ({(process / 'comm').read_text(encoding='utf-8').strip()})"
    return ""


def _listening(port: int) -> list[str]:
    """Inodes of the sockets that listen on ``port``, from the kernel's tables."""
    found = []
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/net/{table}").read_text(encoding="ascii").splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                    found.append(fields[9])
    return found


def _opened(process: Path) -> set[str]:
    found = set()
    with contextlib.suppress(OSError):  # gone, or another user's
        for entry in (process / "fd").iterdir():
            with contextlib.suppress(OSError):
                found.add(os.readlink(entry))
    return found
