"""One server process: its socket, its lock on the queue, its workers."""

from __future__ import annotations

import fcntl
import os
import secrets
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.baselines import Baselines
from evals.folders import Runs
from evals.guard import is_loopback
from evals.pool import Pool, WorkerPool
from evals.queue import Queue
from evals.service.app import create_app
from evals.service.background import WATCH_SECONDS, Background
from evals.watch import Watcher
from evals.worker import JOB_SECONDS, LEASE_SECONDS

if TYPE_CHECKING:
    import uvicorn

__all__ = ["serve", "server_config"]

# Connections at a time; beyond them uvicorn answers 503 itself. The guard allows fewer requests.
MAX_CONNECTIONS = 256
# Bytes of a request's line and headers.
MAX_HEAD = 16 * 1024
# After so long without a request in progress a connection is closed.
IDLE_SECONDS = 10.0
DATABASE = "evaluations.sqlite"


def serve(
    roots: Path | Sequence[Path],
    *,
    host: str = "127.0.0.1",
    port: int = 8321,
    workers: int = 1,
    token: str | None = None,
    ray_address: str | None = None,
    database: Path | None = None,
    baselines: Baselines | None = None,
    job_seconds: float = JOB_SECONDS,
    lease_seconds: float = LEASE_SECONDS,
    watch_seconds: float = WATCH_SECONDS,
) -> None:
    """Serve the runs below ``roots`` until interrupted.

    Args:
        roots: folders that hold run folders; ids of runs are unique over all of them.
        host: address to listen on; one that is not loopback needs a token.
        port: 0 takes a free one, which is printed.
        workers: worker processes, or actors with ``ray_address``.
        token: clients send it as ``Authorization: Bearer <token>``.
        ray_address: "local", "auto" or host:port of a Ray cluster, whose nodes then work instead.
        database: the queue, on a disk of this machine; the first root's evaluations.sqlite unless given.
        baselines: models that are scored beside the runs.
        job_seconds: a job that takes longer is given back.
        lease_seconds: after which the job of a dead worker goes to another one.
        watch_seconds: between two looks for new checkpoints.

    Raises:
        ValueError: no such folder, a run id that comes twice, another address than loopback without a token,
            a port or a queue that is in use, Ray that cannot be used.
    """
    if not is_loopback(host) and not token:
        raise ValueError(f"host = {host}: an address others can reach needs a token (or use 127.0.0.1)")
    if workers < 1:
        raise ValueError(f"workers = {workers}: use 1 or more")
    if job_seconds <= 0:
        raise ValueError(f"job_seconds = {job_seconds:g}: use more than 0")
    runs = Runs(*([roots] if isinstance(roots, Path) else roots), baselines=baselines)
    path = database or runs.roots[0] / DATABASE
    with _only_server(path), _listening(host, port) as listener:
        queue, secret = Queue(path), secrets.token_urlsafe(32) if ray_address else None
        # Workers end with their server, so whoever holds a job now is dead.
        queue.release_all("the service was ended while it ran")
        given: dict[str, Any] = {"lease_seconds": lease_seconds, "job_seconds": job_seconds}
        given["baselines"] = baselines
        pool: Pool
        if ray_address is not None and secret is not None:
            from evals.actors import RayPool, public_url

            url = public_url(host, listener.getsockname()[1])
            pool = RayPool(
                queue, runs.roots, count=workers, address=ray_address, url=url, secret=secret, **given
            )
        else:
            pool = WorkerPool(queue, runs.roots, count=workers, **given)
        background = Background(Watcher(queue, runs), pool, seconds=watch_seconds)
        # An empty variable is no token.
        _run(create_app(queue, runs, token=token or None, secret=secret, background=background), listener)


def _run(app: Any, listener: socket.socket) -> None:
    import uvicorn

    host, port = listener.getsockname()[:2]
    print(f"http://{f'[{host}]' if ':' in host else host}:{port}/ (interrupt to stop)", flush=True)
    uvicorn.Server(server_config(app)).run(sockets=[listener])


def server_config(app: Any) -> uvicorn.Config:
    """uvicorn with the service's limits."""
    import uvicorn

    return uvicorn.Config(
        app,
        http=_patient_protocol(),
        h11_max_incomplete_event_size=MAX_HEAD,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=5,
        log_level="warning",
        access_log=False,
        server_header=False,
    )


@contextmanager
def _only_server(path: Path) -> Iterator[None]:
    """Hold the lock of a queue. Raises ValueError when another server does."""
    with open(path.with_name(f"{path.name}.lock"), "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"another service has the queue {path}: stop it, or name another with --database"
            ) from None
        yield


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """The service's socket. Raises ValueError when the address cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=MAX_CONNECTIONS)
    except OSError as error:
        # The error's own text names the address a second time.
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise ValueError(f"cannot listen on {host}:{port}: {reason}; choose another --port") from None
    with listener:
        yield listener


def _patient_protocol() -> Any:
    """uvicorn's HTTP/1.1, which would wait for ever for a request's headers, with an end to that."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class PatientProtocol(H11Protocol):
        """Closes a connection that stays without a request in progress for `IDLE_SECONDS`."""

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._last: object = None
            self._watch = self.loop.call_later(IDLE_SECONDS, self._close_idle)

        def connection_lost(self, exc: Exception | None) -> None:
            self._watch.cancel()
            super().connection_lost(exc)

        def _close_idle(self) -> None:
            idle = self.cycle is None or self.cycle.response_complete
            if idle and self._last is self.cycle:
                self.transport.close()
                return
            self._last = self.cycle
            self._watch = self.loop.call_later(IDLE_SECONDS, self._close_idle)

    return PatientProtocol
