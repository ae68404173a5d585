"""A copy in a store is whole or refused; what is sent is pinned; nothing secret reaches a log."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import known_implementations

from checkpoints.pins import list_pins, pin, pinned_steps
from checkpoints.retention import Retention, retain
from checkpoints.state import verify_checkpoint
from checkpoints.upload import ATTEMPTS, Uploader, check_store, download, redact, upload
from tests.checkpoints.helpers import DyingFileSystem, Killed, assert_holds, contents, saved

PUT = MemoryFileSystem.put_file


def _no_wait(seconds: float) -> None:
    assert seconds > 0


@pytest.fixture
def url() -> str:
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    return "memory://bucket/run"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return saved(tmp_path / "run", 3, world=2)


def _send(checkpoint: Path, url: str) -> None:
    upload(checkpoint, url, sleep=_no_wait)


def _fetch(url: str, root: Path) -> Path:
    return download(f"{url}/step-00000003", root, sleep=_no_wait)


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_there_and_back(tmp_path: Path, checkpoint: Path, url: str, kind: str) -> None:
    url = url if kind == "memory" else f"file://{tmp_path}/store/"
    _send(checkpoint, url)
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    root = tmp_path / "fetched" / "checkpoints"
    final = _fetch(url.rstrip("/"), root)
    assert final == root / "step-00000003"
    assert {path.name: path.read_bytes() for path in final.iterdir()} == before
    assert verify_checkpoint(final) == []
    assert_holds(final, contents(3))
    assert _fetch(url.rstrip("/"), root) == final, "what is there already is kept"
    assert [item.name for item in root.iterdir()] == ["step-00000003"]


def _log_puts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    sent: list[str] = []

    def put(self: Any, source: str, target: str, **options: Any) -> None:
        sent.append(Path(source).name)
        PUT(self, source, target, **options)

    monkeypatch.setattr(MemoryFileSystem, "put_file", put)
    return sent


def test_manifest_and_digest_come_last_and_a_whole_copy_is_left(
    checkpoint: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = _log_puts(monkeypatch)
    _send(checkpoint, url)
    assert sent[-2:] == ["manifest.json", "manifest.sha256"]
    assert sorted(sent) == sorted(path.name for path in checkpoint.iterdir())
    count = len(sent)
    _send(checkpoint, url)
    assert len(sent) == count


def test_another_checkpoint_is_not_overwritten(tmp_path: Path, checkpoint: Path, url: str) -> None:
    _send(checkpoint, url)
    other = saved(tmp_path / "other", 3, tensors=contents(9))
    with pytest.raises(
        OSError, match=r"holds another checkpoint of this step .*remove it, or set checkpoint"
    ):
        _send(other, url)
    with pytest.raises(FileExistsError, match="is another checkpoint than"):
        _fetch(url, tmp_path / "other")
    assert verify_checkpoint(other) == []


def test_killed_at_every_file_a_copy_is_refused_and_completed(
    tmp_path: Path, checkpoint: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = len(list(checkpoint.iterdir()))
    for stop_at in range(files):
        MemoryFileSystem.store.clear()
        count = 0

        def put(self: Any, source: str, target: str, stop_at: int = stop_at, **options: Any) -> None:
            nonlocal count
            if count == stop_at:
                self.pipe_file(target, Path(source).read_bytes()[:7])
                raise Killed
            count += 1
            PUT(self, source, target, **options)

        monkeypatch.setattr(MemoryFileSystem, "put_file", put)
        with pytest.raises(Killed):
            _send(checkpoint, url)
        monkeypatch.setattr(MemoryFileSystem, "put_file", PUT)
        root = tmp_path / f"at-{stop_at}"
        with pytest.raises(FileNotFoundError, match="holds no finished checkpoint"):
            _fetch(url, root)
        assert not root.exists()
        _send(checkpoint, url)
        assert_holds(_fetch(url, root), contents(3))


@pytest.mark.parametrize(
    "name, change, said",
    [
        ("rank-00001.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1]), "SHA-256"),
        ("rank-00000.safetensors", lambda data: data + b"0", r"bytes where \d+ were saved"),
        ("manifest.json", lambda data: data.replace(b"step", b"stop"), "disagree"),
        ("state.json", None, "asking for state.json failed: FileNotFoundError"),
    ],
)
def test_a_damaged_copy_is_never_committed(
    tmp_path: Path, checkpoint: Path, url: str, name: str, change: Callable[[bytes], bytes] | None, said: str
) -> None:
    _send(checkpoint, url)
    store, path = MemoryFileSystem(), f"/bucket/run/step-00000003/{name}"
    if change is None:
        store.rm_file(path)
    else:
        store.pipe_file(path, change(store.cat_file(path)))
    with pytest.raises((OSError, ValueError), match=said):
        _fetch(url, tmp_path / "back")
    assert list((tmp_path / "back").iterdir()) == []


def test_a_copy_under_another_name_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    _send(checkpoint, f"file://{tmp_path}/store")
    shutil.move(tmp_path / "store" / "step-00000003", tmp_path / "store" / "step-00000004")
    with pytest.raises(ValueError, match="holds step 3: it was moved"):
        download(f"file://{tmp_path}/store/step-00000004", tmp_path / "back")
    with pytest.raises(ValueError, match=r"names no checkpoint: give .../step-00000012"):
        download(f"file://{tmp_path}/store", tmp_path / "back")


def test_a_download_killed_at_every_boundary_recovers(tmp_path: Path, checkpoint: Path, url: str) -> None:
    _send(checkpoint, url)
    counter = DyingFileSystem()
    download(f"{url}/step-00000003", tmp_path / "count", file_system=counter)
    assert len(counter.log) > 20
    for stop_at in range(len(counter.log)):
        root = tmp_path / f"at-{stop_at}"
        with pytest.raises(Killed):
            download(f"{url}/step-00000003", root, file_system=DyingFileSystem(stop_at))
        final = root / "step-00000003"
        assert not final.exists() or verify_checkpoint(final) == []
        assert verify_checkpoint(_fetch(url, root)) == []
        assert [item.name for item in root.iterdir()] == ["step-00000003"]


def test_a_store_that_fails_is_asked_again_and_then_named(
    tmp_path: Path, checkpoint: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    failures = ATTEMPTS - 1

    def put(self: Any, source: str, target: str, **options: Any) -> None:
        nonlocal failures
        if failures:
            failures -= 1
            raise RuntimeError("503 at https://key:hunter2@store/x?X-Signature=hunter2\nplease slow down")
        PUT(self, source, target, **options)

    monkeypatch.setattr(MemoryFileSystem, "put_file", put)
    upload(checkpoint, url, sleep=waits.append)
    assert waits == [2.0, 4.0, 8.0]
    assert_holds(_fetch(url, tmp_path / "back"), contents(3))
    MemoryFileSystem.store.clear()
    failures = 10**6
    with pytest.raises(OSError, match=r"sending rank-00000.json failed: RuntimeError: 503") as caught:
        _send(checkpoint, url)
    text = str(caught.value)
    assert "please slow down (4 attempts)" in text
    assert "hunter2" not in text
    assert "\n" not in text


def test_what_will_not_change_is_not_asked_again(
    checkpoint: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def put(*_: Any, **__: Any) -> None:
        raise PermissionError("no right to write")

    monkeypatch.setattr(MemoryFileSystem, "put_file", put)
    with pytest.raises(OSError, match=r"no right to write \(1 attempts\)"):
        upload(checkpoint, url, sleep=lambda _: pytest.fail("it waited"))


def test_a_store_that_loses_bytes_is_found_before_the_manifest(
    checkpoint: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def put(self: Any, source: str, target: str, **_: Any) -> None:
        self.pipe_file(target, Path(source).read_bytes()[:-1])

    monkeypatch.setattr(MemoryFileSystem, "put_file", put)
    with pytest.raises(OSError, match=r"has \d+ bytes where \d+ were saved"):
        _send(checkpoint, url)
    assert not any("manifest" in name for name in MemoryFileSystem.store)


def test_protocols_and_secrets() -> None:
    check_store("file:///data")
    with pytest.raises(ValueError, match=r"checkpoint.upload = nosuch://x: .*use s3://"):
        check_store("nosuch://x")
    with pytest.raises(ValueError, match="credentials"):
        check_store("s3://user:hunter2@bucket/run")
    assert redact("GET s3://me:hunter2@b/k?sig=hunter2&x=1 failed?\n no") == "GET s3://***@b/k?*** failed? no"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"class": "no_such_package.Store", "err": "Install no_such_package to use this"}
    monkeypatch.setitem(known_implementations, "oddstore", entry)
    with pytest.raises(OSError, match=r"checkpoint.upload = oddstore://b: Install no_such_package"):
        check_store("oddstore://b")


class Gate:
    """A send that waits until it is let through, and remembers what it sent and what was pinned then."""

    def __init__(self) -> None:
        self.entered, self.open = threading.Semaphore(0), threading.Semaphore(0)
        self.sent: list[str] = []
        self.error: Exception | None = None

    def __call__(self, checkpoint: Path, url: str, *, sleep: Callable[[float], object]) -> None:
        self.entered.release()
        assert self.open.acquire(timeout=30)
        if self.error:
            raise self.error
        self.sent.append(checkpoint.name)


def test_the_newest_waiting_one_is_sent_and_all_are_pinned_meanwhile(tmp_path: Path, url: str) -> None:
    steps = [saved(tmp_path, step) for step in (1, 2, 3, 4)]
    gate = Gate()
    uploader = Uploader(tmp_path, url, send=gate)
    uploader.submit(steps[0])
    assert gate.entered.acquire(timeout=30)
    uploader.submit(steps[1])
    uploader.submit(steps[2])
    uploader.submit(steps[2])
    assert pinned_steps(tmp_path) == {1, 3}
    assert retain(tmp_path, Retention(1)) == [steps[1]]
    gate.open.release(2)
    assert uploader.close(timeout=30)
    assert gate.sent == ["step-00000001", "step-00000003"]
    assert pinned_steps(tmp_path) == set()
    assert uploader.failures() == []
    messages = uploader.pop_messages()
    assert messages[0].startswith("step-00000002 is not uploaded: step-00000003 came before")
    assert [line[:25] for line in messages[1:]] == ["step-00000001 is uploaded", "step-00000003 is uploaded"]
    assert uploader.pop_messages() == []


def test_one_that_is_sent_again_stays_pinned_until_the_last_time(tmp_path: Path, url: str) -> None:
    one, two = saved(tmp_path, 1), saved(tmp_path, 2)
    gate = Gate()
    uploader = Uploader(tmp_path, url, send=gate)
    uploader.submit(one)
    assert gate.entered.acquire(timeout=30)
    uploader.submit(one)
    uploader.submit(two)
    assert pinned_steps(tmp_path) == {1, 2}, "it is still being sent"
    uploader.submit(one)
    gate.open.release()
    assert gate.entered.acquire(timeout=30)
    assert pinned_steps(tmp_path) == {1}
    gate.open.release()
    assert uploader.close(timeout=30)
    assert gate.sent == [one.name, one.name]
    assert pinned_steps(tmp_path) == set()


def test_a_failure_is_a_line_and_the_next_one_is_sent(tmp_path: Path, url: str) -> None:
    one, two = saved(tmp_path, 1), saved(tmp_path, 2)
    gate = Gate()
    gate.error = OSError("s3://a:hunter2@b: full")
    uploader = Uploader(tmp_path, url, send=gate)
    uploader.submit(one)
    gate.open.release()
    assert gate.entered.acquire(timeout=30)
    assert uploader.close(timeout=30)
    assert uploader.failures() == ["step-00000001 is not uploaded: s3://***@b: full"]
    assert pinned_steps(tmp_path) == set()
    again = Uploader(tmp_path, url)
    again.submit(tmp_path / "step-00000009")
    again.submit(two)
    assert again.close(timeout=30)
    assert ["step-00000009 is gone" in line for line in again.failures()] == [True]
    assert_holds(download(f"{url}/step-00000002", tmp_path / "back"), contents(2))


def test_closing_does_not_wait_for_ever(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def put(*_: Any, **__: Any) -> None:
        raise TimeoutError("the store is away")

    monkeypatch.setattr(MemoryFileSystem, "put_file", put)
    monkeypatch.setattr("checkpoints.upload.BACKOFF", 3600.0)
    uploader = Uploader(tmp_path, url)
    uploader.submit(saved(tmp_path, 1))
    assert not uploader.close(timeout=0.3)
    assert uploader.close(timeout=30), "the wait between attempts was not given up"
    assert "given up: the run ends" in uploader.failures()[0]


def test_pins_of_a_killed_uploader_are_taken_away(tmp_path: Path, url: str) -> None:
    one = saved(tmp_path, 1)
    pin(one, "upload")
    pin(one, "evaluation")
    assert Uploader(tmp_path, url).close(timeout=30)
    assert [item.owner for item in list_pins(tmp_path)] == ["evaluation"]


def test_an_uploader_with_nothing_to_send_gives_nothing_up(tmp_path: Path) -> None:
    assert Uploader(tmp_path, f"file://{tmp_path}/store").close(timeout=0)
