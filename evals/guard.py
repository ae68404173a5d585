"""What every request to the service passes through: host, origin, token, size, time; headers on every answer.

A refused request is not read: who announces or sends too much gets its answer, and after a moment in which
the answer can arrive the connection is closed.
"""

import asyncio
import hmac
import json
import logging
import sqlite3
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit

from evals.counters import Counters

__all__ = ["HEADERS", "INTERNAL", "LOOPBACK", "MAX_BODY", "Guard", "is_loopback"]

MAX_BODY = 16 * 1024
# Of a worker's result with all its samples, read only after the worker's secret was seen.
MAX_RESULT = 256 * 1024 * 1024
MAX_HEADERS = 64
MAX_ACTIVE = 32
BODY_SECONDS = 10.0
REQUEST_SECONDS = 30.0
RESULT_SECONDS = 120.0
# How long, and how far, the rest of a refused body is taken in, so that its sender reads the refusal.
LINGER_SECONDS, LINGER_BYTES = 0.5, 1024 * 1024
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
LOOPBACK = ("127.0.0.1", "localhost", "::1")
INTERNAL = "/internal/"
# Headers that decide here: one that comes twice may be read otherwise elsewhere.
SINGLE = ("host", "origin", "authorization", "content-length", "transfer-encoding")
_log = logging.getLogger(__name__)

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


def is_loopback(host: str) -> bool:
    """Whether a host name is this machine's own."""
    return host in LOOPBACK


@dataclass
class Refusal(Exception):  # noqa: N818 - an answer rather than an error
    """Status and reason of a request that goes no further; ``retry``: seconds after which it may."""

    status: int
    reason: str
    retry: int | None = None


class Guard:
    """ASGI middleware.

    Args:
        app: what is guarded.
        hosts: names under which a service without a token may be addressed; another Host is refused (DNS
            rebinding). With a token any Host passes: the page of another site does not know the token.
        token: needed as ``Authorization: Bearer <token>`` when set, but for the page's own files, which hold
            no data; compared in constant time.
        secret: what workers send instead, below `INTERNAL` and nowhere else; None: nothing is there.
        counters: get "requests" by status.
    """

    def __init__(
        self, app: Any, *, hosts: tuple[str, ...], token: str | None, secret: str | None, counters: Counters
    ) -> None:
        self._app, self._hosts, self._token, self._secret = app, hosts, token, secret
        self._counters, self._active = counters, 0
        self._answering: set[asyncio.Task[None]] = set()  # the event loop itself would let go of a task

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse or pass on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def send_with_headers(message: dict[str, Any]) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self._counters.add("requests", status=str(message["status"]))
                extra = [(k.lower().encode(), v.encode()) for k, v in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *extra]}
            await send(message)

        try:
            await self._pass_on(scope, receive, send_with_headers)
        except Refusal as refusal:
            await _refuse(refusal, receive, send_with_headers)
        except Exception as error:
            if started:
                raise
            await _refuse(_failure(scope["path"], error), receive, send_with_headers)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = _headers(scope)
        self._check(scope["method"], scope["path"], headers)
        internal = scope["path"].startswith(INTERNAL)
        if self._active >= MAX_ACTIVE and not internal:
            raise Refusal(503, "the service is busy", retry=1)
        self._active += 1
        try:
            body = await _body(headers, receive, MAX_RESULT if internal else MAX_BODY, internal=internal)
        except BaseException:
            self._active -= 1
            raise
        seconds = RESULT_SECONDS if internal else REQUEST_SECONDS
        await self._answer(scope, _replay(body, receive), send, seconds=seconds)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, *, seconds: float) -> None:
        """Run the application. Raises TimeoutError after so long.

        A handler's thread cannot be ended: its request stays one of the active ones until it returns, and
        what it answers then is dropped.
        """
        over = sending = False

        async def send_in_time(message: dict[str, Any]) -> None:
            nonlocal sending
            if not over:
                sending = True
                await send(message)
                sending = False

        def done(task: asyncio.Task[None]) -> None:
            self._active -= 1
            self._answering.discard(task)
            if over and not task.cancelled() and (error := task.exception()) is not None:
                _log.error("%r failed after its time", scope["path"], exc_info=error)

        task = asyncio.create_task(self._app(scope, receive, send_in_time))
        self._answering.add(task)
        task.add_done_callback(done)
        try:
            async with asyncio.timeout(seconds):
                await asyncio.shield(task)
        finally:
            over = True
            if sending:  # to a client that does not read; no thread works for it any more
                task.cancel()

    def _check(self, method: str, path: str, headers: Mapping[str, str]) -> None:
        """Raise the Refusal of a request by its headers."""
        host = headers.get("host", "")
        if self._token is None and _parts(f"//{host}").hostname not in self._hosts:
            raise Refusal(421, "this service does not answer to that Host")
        origin = headers.get("origin")
        if method not in ("GET", "HEAD") and origin is not None and _parts(origin).netloc != host.lower():
            raise Refusal(403, "requests of other sites are refused")
        if path.startswith(INTERNAL):
            if self._secret is None:
                raise Refusal(404, "no workers are waited for")
            needed: str | None = self._secret
        else:
            shell = method in ("GET", "HEAD") and (path == "/" or path.startswith("/assets/"))
            needed = None if shell else self._token
        if needed is not None and not _has_token(headers.get("authorization", ""), needed):
            raise Refusal(401, "send the token as Authorization: Bearer ...")


def _headers(scope: Scope) -> dict[str, str]:
    """By lower-case name. Raises Refusal for too many, or two where one decides."""
    pairs = [(key.decode("latin-1").lower(), value.decode("latin-1")) for key, value in scope["headers"]]
    if len(pairs) > MAX_HEADERS:
        raise Refusal(431, f"a request has at most {MAX_HEADERS} headers")
    times = Counter(name for name, _ in pairs)
    if doubled := [name for name in SINGLE if times[name] > 1]:
        raise Refusal(400, f"the header {doubled[0]} comes twice")
    return dict(pairs)


async def _body(headers: Mapping[str, str], receive: Receive, limit: int, *, internal: bool) -> bytes:
    """The whole body, `limit` bytes at most. Raises Refusal for more, and for one that does not come."""
    too_large = Refusal(413, f"a body has at most {limit} bytes")
    length = headers.get("content-length", "0")
    if not length.isdecimal() or len(length) > 12 or int(length) > limit:
        raise too_large
    if length == "0" and "transfer-encoding" not in headers:
        return b""
    body = bytearray()
    try:
        async with asyncio.timeout(RESULT_SECONDS if internal else BODY_SECONDS):
            while True:
                message = await receive()
                body += message.get("body", b"")
                if len(body) > limit:
                    raise too_large
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise Refusal(408, "the body did not come in time") from None


def _replay(body: bytes, receive: Receive) -> Receive:
    """What the application reads: the body at once, then whatever comes."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> dict[str, Any]:
        return messages.pop() if messages else await receive()

    return replayed


def _failure(path: str, error: Exception) -> Refusal:
    """What a client is told of an error of ours; the log gets the rest."""
    if isinstance(error, TimeoutError):
        _log.warning("%r took more than %g s", path, REQUEST_SECONDS)
        return Refusal(503, "that took too long", retry=5)
    _log.error("%r failed", path, exc_info=error)
    if isinstance(error, sqlite3.OperationalError):  # locked for too long, or the disk is full
        return Refusal(503, "the queue cannot be used now", retry=5)
    return Refusal(500, "the service failed: its log says why")


def _parts(url: str) -> SplitResult:
    try:
        return urlsplit(url.lower())
    except ValueError:
        return urlsplit("")


def _has_token(header: str, token: str) -> bool:
    return hmac.compare_digest(header.encode(), f"Bearer {token}".encode())


async def _refuse(refusal: Refusal, receive: Receive, send: Send) -> None:
    """Answer, and close the connection: what the client still sends is not wanted."""
    body = json.dumps({"detail": refusal.reason}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers.append((b"connection", b"close"))
    if refusal.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if refusal.retry is not None:
        headers.append((b"retry-after", str(refusal.retry).encode()))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    unread = refusal.status in (408, 413)
    await send({"type": "http.response.body", "body": body, "more_body": unread})
    if unread:
        await _linger(receive)
        await send({"type": "http.response.body", "body": b""})


async def _linger(receive: Receive) -> None:
    """Closing with unread bytes resets the connection, and the client may lose the answer."""
    taken, more = 0, True
    try:
        async with asyncio.timeout(LINGER_SECONDS):
            while more and taken < LINGER_BYTES:
                message = await receive()
                more = message.get("more_body", False)
                taken += len(message.get("body", b""))
    except TimeoutError:
        return
