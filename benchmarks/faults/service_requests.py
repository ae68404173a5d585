"""Row 20, requests: what must not get in, sent to a service over real sockets.

A case gets a `Target` and says what was wrong with the answer; nothing where it was the expected refusal.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import psutil

from benchmarks.faults.row import Outcome
from benchmarks.faults.service_kills import STEPS, make_run, undisturbed, what_is_wrong
from benchmarks.faults.service_run import Address, Service, request

__all__ = ["FAMILIES", "GIGABYTE", "HEAD", "TOKEN", "Case", "Target", "attack", "raw", "receive"]

TOKEN = "t0k3n"
GIGABYTE = 2**30
# Of a gigabyte that is sent: what may leave its sender, and what the service may grow by, buffers included.
MOST_SENT, MOST_KEPT = GIGABYTE // 8, 64 * 2**20
HEAD = (
    f"POST /jobs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: application/json\r\n"
)


@dataclass(frozen=True)
class Target:
    """A service.

    Attributes:
        address: where it listens.
        pid: the process that answers.
        folder: on this machine, served or around what is served; no answer may name it.
    """

    address: Address
    pid: int
    folder: Path


Case = Callable[[Target], str]


def receive(connection: socket.socket) -> str:
    """What comes back, until there is a JSON object, or the connection is closed."""
    received = b""
    connection.settimeout(10)
    while b"\r\n\r\n" not in received or b"}" not in received:
        part = connection.recv(65536)
        if not part:
            break
        received += part
    return received.decode()


def raw(address: Address, data: bytes) -> str:
    """The answer to bytes as they are."""
    with socket.create_connection(address, timeout=10) as connection:
        connection.sendall(data)
        return receive(connection)


def _expect(status: int, *wanted: int, text: str = "", hidden: tuple[str, ...] = ()) -> str:
    if status not in wanted:
        return f"the answer is {status}"
    told = [word for word in hidden if word in text]
    return f"the answer tells {told[0]!r}" if told else ""


def _status(answer: str) -> int:
    parts = answer.split(maxsplit=2)
    return int(parts[1]) if len(parts) > 1 else 0


def _without_token(headers: dict[str, str], method: str, path: str, target: Target) -> str:
    status, _, text = request(target.address, method, path, headers=headers)
    return _expect(status, 401, text=text, hidden=(TOKEN,))


def _of_another_site(origin: str, method: str, path: str, target: Target) -> str:
    headers = {"Origin": origin, "Authorization": f"Bearer {TOKEN}"}
    return _expect(request(target.address, method, path, headers=headers)[0], 403)


def _out(path: str, target: Target) -> str:
    """A path that leads out of what is served names nothing."""
    head = f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nConnection: close\r\n\r\n"
    answer = raw(target.address, head.encode())
    return _expect(_status(answer), 404, 405, 422, text=answer, hidden=("root:", "import"))


def _run_named(run: str, target: Target) -> str:
    """A run's id that is a path, or something like one, names nothing; the folders are not told."""
    run = run.format(folder=target.folder)
    headers = {"Authorization": f"Bearer {TOKEN}"}
    status, _, text = request(target.address, "POST", "/jobs", {"run": run, "task": "sample"}, headers)
    return _expect(status, 404, text=text.replace(json.dumps(run)[1:-1], ""), hidden=(str(target.folder),))


def _announced(length: int, target: Target) -> str:
    """Refused unread, and the connection closed."""
    with socket.create_connection(target.address) as connection:
        connection.sendall(f"{HEAD}Content-Length: {length}\r\n\r\n".encode())
        wrong = _expect(_status(receive(connection)), 413)
        if wrong:
            return wrong
        connection.settimeout(10)
        return "" if connection.recv(1) == b"" else "the connection stays open"


def _sent(head: str, status: int, target: Target) -> str:
    """In chunks: nothing announces how much it will be. The sender never gets rid of it all."""
    chunk, process = b"10000\r\n" + b"x" * 65536 + b"\r\n", psutil.Process(target.pid)
    memory, sent = process.memory_info().rss, 0
    begin = f"{head}Transfer-Encoding: chunked\r\n\r\n".encode()
    with socket.create_connection(target.address) as connection:
        connection.settimeout(10)
        try:
            connection.sendall(begin)
            while sent < GIGABYTE:
                connection.sendall(chunk)
                sent += len(chunk)
        except OSError:
            pass
    if sent >= MOST_SENT:
        return f"{sent / 2**20:.0f} MiB were taken"
    if (kept := process.memory_info().rss - memory) >= MOST_KEPT:
        return f"{kept / 2**20:.0f} MiB were kept"
    return _expect(_status(raw(target.address, begin + chunk)), status)


def _cases(case: Callable[..., str], *given: tuple[object, ...]) -> list[Case]:
    return [partial(case, *arguments) for arguments in given]


_WRONG_TOKENS: list[dict[str, str]] = [
    {},
    {"Authorization": f"Bearer {TOKEN[:-1]}"},
    {"Authorization": TOKEN},
    {"Cookie": TOKEN},
]
_ASKED = [("GET", "/results"), ("POST", "/jobs"), ("GET", f"/jobs?token={TOKEN}"), ("GET", "/metrics")]
_ORIGINS = ["http://evil.example", "null", "http://127.0.0.1:1"]
_OUT = [
    "/assets/../../queue.py",
    "/assets/..%2f..%2fqueue.py",
    "/assets/%2e%2e/%2e%2e/queue.py",
    "/assets//etc/passwd",
    "/assets/%2fetc%2fpasswd",
    "/assets/....//queue.py",
    "/assets/index.html%00.js",
    "/../etc/passwd",
    "//etc/passwd",
    "/jobs/..%2f..%2fetc%2fpasswd",
    "/results/%2e%2e%2f%2e%2e",
    "/heatmap/../../etc/passwd",
    "/runs/tiny/recipe.json",
]
_RUNS = ["../runs/tiny", "..", ".", "/etc", "tiny/../tiny", "tiny\x00", "{folder}"]
_NO_TOKEN = HEAD.replace(TOKEN, "other")

# By what is asked for, all of a service with the token `TOKEN`.
FAMILIES: dict[str, list[Case]] = {
    "no token, a wrong one: 401": _cases(
        _without_token, *((headers, *asked) for headers, asked in product(_WRONG_TOKENS, _ASKED))
    ),
    "of another site: 403": _cases(
        _of_another_site,
        *((o, *asked) for o, asked in product(_ORIGINS, [("POST", "/jobs"), ("DELETE", "/jobs/k")])),
    ),
    "paths out of the folders: nothing is there": [
        *_cases(_out, *((path,) for path in _OUT)),
        *_cases(_run_named, *((run,) for run in _RUNS)),
    ],
    "a body of 1 GB: 413": [
        *_cases(_announced, (GIGABYTE,), (10**13,)),
        *_cases(_sent, (HEAD, 413), (_NO_TOKEN, 401)),
    ],
}


def attack(folder: Path, index: int) -> Outcome:
    """All requests of a family while the service evaluates; then each checkpoint has its one result."""
    name, cases = list(FAMILIES.items())[index]
    expected, run = undisturbed(folder.parent), make_run(folder.parent, folder / "runs")
    with Service(run.parent, token=TOKEN, said=folder / "said.txt") as service:
        service.wait_for(lambda jobs: any(job["state"] == "running" for job in jobs))
        target = Target(service.address, service.process.pid, folder)
        wrong = [f"{place}: {said}" for place, case in enumerate(cases) if (said := case(target))]
        service.wait_for(lambda jobs: [job["state"] for job in jobs] == ["done"] * len(STEPS))
    disturbed = what_is_wrong(run, expected)
    note = "; ".join([name, *wrong, *([disturbed] if disturbed else [])])
    return Outcome(
        not wrong and not disturbed,
        note[:300],
        of=len(cases),
        passed=0 if disturbed else len(cases) - len(wrong),
    )
