"""Has this host itself lost the network of the job? Then what it cannot hear of is not to blame.

Only the one interface that carries the ranks' traffic counts: containers, bridges and tunnels come and go.
"""

from __future__ import annotations

import array
import contextlib
import ipaddress
import os
import socket
import struct
import sys
from pathlib import Path

__all__ = ["has_link", "interface_of", "is_own_address", "job_link"]

# Of netdevice(7): the requests, and the bits that say up, loopback, and up with a link.
SIOCGIFCONF, SIOCGIFFLAGS = 0x8912, 0x8913
UP, LOOPBACK, RUNNING = 0x1, 0x8, 0x40
_REQUEST, _MOST = 40, 1024  # bytes of a struct ifreq, and how many addresses of a host are read


def job_link() -> str | None:
    """The interface by which this rank reaches those of other hosts, if it has a link now.

    In the order in which gloo chooses: GLOO_SOCKET_IFNAME, the interface that has the address of this host's
    name, and, where that leads nowhere, that of the route to MASTER_ADDR. None for ranks of one host.
    """
    if os.environ.get("WORLD_SIZE", "1") == os.environ.get("LOCAL_WORLD_SIZE", "1"):
        return None
    name: str | None = os.environ.get("GLOO_SOCKET_IFNAME", "").partition(",")[0]
    name = name or _of_own_name() or _of_route(os.environ.get("MASTER_ADDR", ""))
    return name if name and has_link(name) else None


def has_link(name: str) -> bool:
    """Whether the network interface ``name`` is up with a link; False for a loopback, and off Linux."""
    if sys.platform != "linux":
        return False
    import fcntl

    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        answer = fcntl.ioctl(asked, SIOCGIFFLAGS, struct.pack("16sH14x", name.encode(), 0))
        flags = struct.unpack("16sH14x", answer)[1]
        return bool(flags & UP and flags & RUNNING and not flags & LOOPBACK)
    return False


def interface_of(address: str) -> str | None:
    """The interface of this host that has ``address`` (IPv4 or IPv6); None where none has, and off Linux."""
    if sys.platform != "linux":
        return None
    with contextlib.suppress(OSError, ValueError):
        wanted = ipaddress.ip_address(address.partition("%")[0])
        found = _addresses_4() if wanted.version == 4 else _addresses_6()
        return next((name for name, own in found if own == wanted.packed), None)
    return None


def is_own_address(host: str) -> bool:
    """Whether ``host``, a name or an address, is this machine."""
    with contextlib.suppress(OSError):
        family, _, _, _, address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as trial:
            trial.bind((address[0], 0))
        return True
    return False


def _of_own_name() -> str | None:
    with contextlib.suppress(OSError):
        found = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
        name = interface_of(str(found[0][4][0]))
        return name if name and has_link(name) else None
    return None


def _of_route(host: str) -> str | None:
    """Connecting a datagram socket sends nothing, and tells by which address it would."""
    with contextlib.suppress(OSError):
        family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as trial:
            trial.connect(address)
            return interface_of(str(trial.getsockname()[0]))
    return None


def _addresses_4() -> list[tuple[str, bytes]]:
    """(interface, address), second addresses of an interface included."""
    import fcntl

    room = array.array("B", bytes(_REQUEST * _MOST))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        answer = fcntl.ioctl(asked, SIOCGIFCONF, struct.pack("iL", len(room), room.buffer_info()[0]))
    used, data = struct.unpack("iL", answer)[0], room.tobytes()
    requests = [data[begin : begin + _REQUEST] for begin in range(0, used, _REQUEST)]
    return [
        (request[:16].partition(b"\0")[0].decode().partition(":")[0], request[20:24]) for request in requests
    ]


def _addresses_6() -> list[tuple[str, bytes]]:
    rows = [line.split() for line in Path("/proc/net/if_inet6").read_text(encoding="ascii").splitlines()]
    return [(row[5], bytes.fromhex(row[0])) for row in rows]
