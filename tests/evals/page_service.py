"""The service behind a port of its own, and the browser that looks at it."""

from __future__ import annotations

import os
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from evals.queue import Queue
from evals.service import create_app
from evals.watch import Runs

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Service:
    """The application on a port that stays its own when it is stopped and started again.

    Args:
        folder: holds queue.sqlite and a folder runs.
        token: clients need it when set.
    """

    def __init__(self, folder: Path, *, token: str | None = None) -> None:
        self.queue, self._runs = Queue(folder / "queue.sqlite"), Runs(folder / "runs")
        self._token, self._port = token, 0
        self.start()

    def start(self) -> None:
        """Answer from now on."""
        import uvicorn

        self._socket = socket.create_server(("127.0.0.1", self._port))
        self._port = self._socket.getsockname()[1]
        app = create_app(self.queue, self._runs, token=self._token)
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Close every connection."""
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()

    def url(self, route: str) -> str:
        """The page at a route."""
        return f"http://127.0.0.1:{self._port}/#/{route}"


@contextmanager
def open_browser() -> Iterator[Any]:
    """The Chromium of this machine, driven by Playwright."""
    from playwright.sync_api import sync_playwright

    options = ["--no-sandbox"] if os.geteuid() == 0 else []  # as root Chromium runs in no other way
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=options)
        yield browser
        browser.close()
