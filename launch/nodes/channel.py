"""What two nodes of a preflight say to each other: JSON objects, one a line, bounded in size and in time.

The port has no password, so whoever reaches it may say anything: nothing is unpickled, a line that is too
long or no JSON object ends the connection, and nobody is waited for beyond a deadline.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping
from typing import Any, NoReturn

__all__ = ["Channel"]

LONGEST_LINE = 1 << 20  # bytes; a node's facts are some 10 KB
_PIECE = 1 << 16


class Channel:
    """One end of a connection; every call has a ``deadline``, in seconds of ``time.monotonic``."""

    def __init__(self, connection: socket.socket) -> None:
        """Take over ``connection``."""
        self._connection, self._buffer = connection, b""
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # the clocks are read by round trips

    @property
    def here(self) -> str:
        """The address of this end."""
        return str(self._connection.getsockname()[0])

    @property
    def there(self) -> str:
        """The address of the other end."""
        return str(self._connection.getpeername()[0])

    def send(self, message: Mapping[str, Any], *, deadline: float) -> None:
        """Send one object. Raises OSError (TimeoutError after ``deadline``)."""
        self._connection.settimeout(_left(deadline))
        self._connection.sendall(json.dumps(message, allow_nan=False).encode() + b"\n")

    def receive(self, *, deadline: float) -> dict[str, Any]:
        """The next object.

        Raises:
            OSError: the connection ended; TimeoutError after ``deadline``, however little came at a time.
            ValueError: what came is no object, or too long.
        """
        while b"\n" not in self._buffer:
            if len(self._buffer) > LONGEST_LINE:
                raise ValueError(f"a line of more than {LONGEST_LINE} bytes")
            self._connection.settimeout(_left(deadline))
            piece = self._connection.recv(_PIECE)
            if not piece:
                raise ConnectionResetError("the connection was closed")
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        return _parse(line)

    def close(self) -> None:
        """End the connection; may be called twice."""
        self._connection.close()


def _left(deadline: float) -> float:
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("timed out")
    return seconds


def _parse(line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("JSON that is nested too deep") from None
    if not isinstance(message, dict):
        raise ValueError("no JSON object")
    return message


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")
