"""What every request to the service passes through: host, origin, token and size; headers on every answer."""

import hmac
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit

__all__ = ["HEADERS", "Guard", "is_loopback"]

MAX_BODY = 16 * 1024
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
LOOPBACK = ("127.0.0.1", "localhost", "::1")

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


def is_loopback(host: str) -> bool:
    """Whether a host name is this machine's own."""
    return host in LOOPBACK


@dataclass(frozen=True)
class Refusal:
    """Status and reason of a request that goes no further."""

    status: int
    reason: str


class Guard:
    """ASGI middleware.

    Args:
        app: what is guarded.
        hosts: names under which a service without a token may be addressed; another Host is refused (DNS
            rebinding). With a token any Host passes: the page of another site does not know the token.
        token: needed as ``Authorization: Bearer <token>`` when set; compared in constant time.
    """

    def __init__(self, app: Any, *, hosts: tuple[str, ...], token: str | None) -> None:
        self._app, self._hosts, self._token = app, hosts, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse or pass on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                extra = [(k.lower().encode(), v.encode()) for k, v in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *extra]}
            await send(message)

        headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}
        refusal = self._refusal(scope["method"], headers)
        if refusal is None:
            await self._app(scope, receive, send_with_headers)
        else:
            await _refuse(refusal, send_with_headers)

    def _refusal(self, method: str, headers: Mapping[str, str]) -> Refusal | None:
        host = headers.get("host", "")
        if self._token is None and _parts(f"//{host}").hostname not in self._hosts:
            return Refusal(421, "this service does not answer to that Host")
        origin = headers.get("origin")
        if method not in ("GET", "HEAD") and origin and _parts(origin).netloc != host.lower():
            return Refusal(403, "requests of other sites are refused")
        if self._token is not None and not _has_token(headers.get("authorization", ""), self._token):
            return Refusal(401, "send the token as Authorization: Bearer ...")
        return _body_refusal(headers)


def _body_refusal(headers: Mapping[str, str]) -> Refusal | None:
    if "transfer-encoding" in headers:
        return Refusal(411, "send a Content-Length")
    length = headers.get("content-length", "0")
    # The server in front reads no more than the length that was announced.
    if not length.isdigit() or len(length) > 9 or int(length) > MAX_BODY:
        return Refusal(413, f"a body has at most {MAX_BODY} bytes")
    return None


def _parts(url: str) -> SplitResult:
    try:
        return urlsplit(url.lower())
    except ValueError:
        return urlsplit("")


def _has_token(header: str, token: str) -> bool:
    return hmac.compare_digest(header.encode(), f"Bearer {token}".encode())


async def _refuse(refusal: Refusal, send: Send) -> None:
    body = refusal.reason.encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
