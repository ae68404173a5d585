from __future__ import annotations

import errno
import mmap
import os
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from trellis_dist.training.watch.status_page import SLOT, Status, StatusPage, read_status, status_path

ROOT = Path(__file__).resolve().parents[3]


def line(status: Status | None) -> tuple[int, str, float]:
    assert status is not None
    return status.step, status.operation, status.since


def test_the_last_line_is_read_back_and_stays_after_close(tmp_path: Path) -> None:
    path = status_path(tmp_path, 7)
    assert path.name == "rank-00007.status"
    times = iter([10.5, 11.0, 12.0])
    page = StatusPage(path, rank=7, clock=lambda: next(times))
    assert read_status(path) is None  # nothing said yet
    for step, operation in ((1, "forward pass"), (1, "backward pass"), (2, "forward pass")):
        page.write(step=step, operation=operation)
    page.close()
    page.close()
    page.write(step=3, operation="after close")
    status = read_status(path)
    assert line(status) == (2, "forward pass", 12.0)
    assert status is not None
    assert (status.rank, status.pid) == (7, os.getpid())
    assert status.host


def test_long_and_foreign_text_is_cut_and_read(tmp_path: Path) -> None:
    path = tmp_path / "a.status"
    page = StatusPage(path, rank=0)
    for operation, kept in (
        ("x" * 5000, "x" * 100),
        ("\u0416\U0001f600\n" * 50, "?" * 100),
        ('"' * 900, '"' * 100),
    ):
        page.write(step=10**18, operation=operation)
        assert line(read_status(path))[1] == kept


def test_a_damaged_slot_falls_back_to_the_line_before(tmp_path: Path) -> None:
    path = tmp_path / "a.status"
    page = StatusPage(path, rank=0)
    page.write(step=1, operation="first")
    page.write(step=2, operation="second")
    whole = path.read_bytes()
    for where in range(3, 2 * SLOT, 37):
        damaged = bytearray(whole)
        damaged[where] ^= 1
        path.write_bytes(damaged)
        # Turn 1 lies in slot 1, turn 2 in slot 0.
        assert line(read_status(path))[0] == (1 if where < SLOT else 2), where


def test_garbage_is_no_status_and_no_error(tmp_path: Path) -> None:
    path = tmp_path / "a.status"
    assert read_status(path) is None
    assert read_status(tmp_path) is None
    for text in (b"[]", b"1", b'{"turn": 1}', b'{"turn": null}', b"[" * 400, b'{"turn": 1, "x": 2}'):
        body = text.ljust(SLOT - 8)
        path.write_bytes(b"%08x" % zlib.crc32(body) + body)
        assert read_status(path) is None, text
    fields = b'"host": "h", "pid": 1, "step": 1, "operation": "o", "since": 1.0, "turn": 1}'
    for rank, good in ((b"1", True), (b'"1"', False)):
        body = (b'{"rank": ' + rank + b", " + fields).ljust(SLOT - 8)
        path.write_bytes(b"%08x" % zlib.crc32(body) + body)
        assert (read_status(path) is not None) == good
    for content in (b"", b"\0" * 1024, b"\xff" * 3000):
        path.write_bytes(content)
        assert read_status(path) is None


def test_a_new_process_starts_with_an_empty_page(tmp_path: Path) -> None:
    path = tmp_path / "a.status"
    StatusPage(path, rank=0).write(step=5, operation="of the process before")
    StatusPage(path, rank=0)
    assert read_status(path) is None


def test_what_a_killed_process_wrote_is_there(tmp_path: Path) -> None:
    path = tmp_path / "a.status"
    code = (
        "import sys, itertools, pathlib\n"
        "from trellis_dist.training.watch.status_page import StatusPage\n"
        "page = StatusPage(pathlib.Path(sys.argv[1]), rank=3)\n"
        "for step in itertools.count(1):\n"
        "    page.write(step=step, operation='a' * (step % 100))\n"
        "    if step == 1000: print('ready', flush=True)\n"
    )
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for _ in range(2000):  # while it is being written, too
            read_status(path)
        process.send_signal(signal.SIGKILL)
    status = read_status(path)
    assert status is not None
    assert status.step >= 1000
    assert status.operation == "a" * (status.step % 100)
    assert status.pid == process.pid


def test_a_file_system_that_refuses_costs_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENODEV, "No such device")

    missing = StatusPage(tmp_path / "no" / "folder.status", rank=0)
    monkeypatch.setattr(mmap, "mmap", refuse)
    refused = StatusPage(tmp_path / "a.status", rank=0)
    for page in (missing, refused):
        page.write(step=1, operation="x")
        page.write(step=2, operation="x")
        page.close()
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2
    assert "No such device" in warnings[1]
    assert read_status(tmp_path / "a.status") is None
