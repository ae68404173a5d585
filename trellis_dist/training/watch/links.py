"""Has this host itself lost its network? Then what it cannot hear of is not to blame."""

from __future__ import annotations

import contextlib
import socket
import struct
import sys

__all__ = ["lost_links", "working_links"]

# Of netdevice(7): the request, and the bits that say up, loopback, and up with a link.
SIOCGIFFLAGS = 0x8913
UP, LOOPBACK, RUNNING = 0x1, 0x8, 0x40


def working_links() -> frozenset[str]:
    """Names of this host's network interfaces that have a link now; none where the system does not tell."""
    if sys.platform != "linux":
        return frozenset()
    return frozenset(name for _, name in socket.if_nameindex() if _works(name))


def lost_links(before: frozenset[str]) -> list[str]:
    """Those of the interfaces ``before``, earlier ``working_links``, that have none any more."""
    return sorted(before - working_links())


def _works(name: str) -> bool:
    import fcntl

    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        answer = fcntl.ioctl(asked, SIOCGIFFLAGS, struct.pack("16sH14x", name.encode(), 0))
        flags = struct.unpack("16sH14x", answer)[1]
        return bool(flags & UP and flags & RUNNING and not flags & LOOPBACK)
    return False
