"""The queue over HTTP, for workers on other machines: SQLite stays with its one server process."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from evals.database import as_json
from evals.queue import QueuedJob

__all__ = ["RefusedError", "RemoteJobs"]

TIMEOUT = 30.0
TRIES = 5


class RefusedError(RuntimeError):
    """The server does not take this worker's secret: it is another server by now."""


class RemoteJobs:
    """A `evals.worker.JobSource` that asks a server.

    Every call may be made twice: a second lease runs out, a second result is dropped.

    Args:
        url: of the server, such as http://10.0.0.1:8321.
        secret: of this one server process; opens nothing but what workers need.
    """

    def __init__(self, url: str, secret: str) -> None:
        self._url, self._secret = url.rstrip("/"), secret
        # The environment's proxy knows nothing of a cluster's own machines.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def lease(self, owner: str, *, seconds: float) -> QueuedJob | None:
        """As `Queue.lease`. Raises as `_post`."""
        found = self._post("lease", {"owner": owner, "seconds": seconds})["job"]
        return QueuedJob(**found) if found else None

    def renew(self, key: str, owner: str, *, seconds: float) -> bool:
        """As `Queue.renew`. Raises as `_post`."""
        return bool(self._post("renew", {"key": key, "owner": owner, "seconds": seconds})["held"])

    def finish(self, key: str, record: Mapping[str, Any]) -> bool:
        """As `JobSource.finish`, tried again while the server does not answer. Raises as `_post`."""
        body = {"key": key, "record": json.loads(as_json(record))}
        for attempt in range(TRIES - 1):
            try:
                return bool(self._post("finish", body)["stored"])
            except OSError:
                time.sleep(2.0**attempt)
        return bool(self._post("finish", body)["stored"])

    def fail(self, key: str, owner: str, error: str) -> None:
        """As `JobSource.fail`. Raises as `_post`."""
        self._post("fail", {"key": key, "owner": owner, "error": error})

    def _post(self, name: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Raises RefusedError when the secret is not the server's, OSError when it does not answer."""
        headers = {"Authorization": f"Bearer {self._secret}", "Content-Type": "application/json"}
        data = json.dumps(body).encode()
        request = urllib.request.Request(f"{self._url}/internal/{name}", data=data, headers=headers)
        try:
            with self._opener.open(request, timeout=TIMEOUT) as answer:
                found: dict[str, Any] = json.load(answer)
                return found
        except urllib.error.HTTPError as error:
            if error.code in (401, 403, 404):
                raise RefusedError(f"{self._url} refuses this worker ({error.code})") from None
            raise ConnectionError(f"{self._url}/internal/{name} answers {error.code}") from None
