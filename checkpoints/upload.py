"""Copies of committed checkpoints in an object store, through fsspec, and the way back.

    upload:    every file of the manifest -> sizes compared -> manifest.json -> manifest.sha256
    download:  manifest against its digest -> files into an attempt -> verified byte for byte -> committed

A copy without its manifest and digest is unfinished and refused; the next upload of that step completes it.
The protocols: docs of fsspec; their credentials come from its configuration and the environment, never from
a URL, and texts that stores answer with are cleared of what could be one.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from checkpoints.commit import begin_attempt, step_name, step_of
from checkpoints.config import check_url
from checkpoints.manifest import DIGEST_FILE, DIGEST_LINE, MANIFEST_FILE, MAX_MANIFEST, load_manifest
from checkpoints.pins import list_pins, pin, unpin
from checkpoints.verify import verify_checkpoint
from trellis_dist.files import REAL, FileSystem, commit_directory

__all__ = ["Uploader", "check_store", "download", "redact", "upload"]

ATTEMPTS = 4
BACKOFF = 2.0  # seconds before the second attempt; doubled before each further one
PIECE = 16 << 20
OWNER = "upload"  # of pins
Result = TypeVar("Result")


def redact(text: str) -> str:
    """`text` on one line without passwords in URLs and without queries, which hold signatures and tokens."""
    text = re.sub(r"(://)[^/\s@]*:[^\s@]*@", r"\1***@", " ".join(text.split()))
    return re.sub(r"\?[^\s'\"<>]*=[^\s'\"<>]*", "?***", text)


def check_store(url: str) -> None:
    """Check before a run that its URL's protocol can be spoken here; nothing is sent.

    Raises:
        ValueError: a URL that `check_url` refuses, or a protocol that nobody speaks.
        OSError: its package is not installed; the line says which.
    """
    import fsspec

    check_url(url)
    protocol = url.partition("://")[0]
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:  # the error's text names the package
        raise OSError(f"checkpoint.upload = {url}: {error}") from error
    except ValueError as error:
        raise ValueError(f"checkpoint.upload = {url}: {error}; use s3://, gs:// or file:///") from error


def upload(checkpoint: Path, url: str, *, sleep: Callable[[float], object] = time.sleep) -> None:
    """Copy the committed `checkpoint` to `url`/step-XXXXXXXX, manifest and digest last.

    A copy that is there with the same digest is left as it is; an unfinished one is completed. Each file is
    tried up to `ATTEMPTS` times.

    Args:
        checkpoint: a step's directory; pin it, so that retention does not take it away meanwhile.
        url: folder in the store.
        sleep: waits between attempts; seconds.

    Raises:
        OSError: the copy was not finished, or another checkpoint of this step is there; one line, no secrets.
        ValueError: a bad URL, or a damaged manifest.
    """
    manifest, digest = load_manifest(checkpoint), (checkpoint / DIGEST_FILE).read_bytes()
    store = _Store(f"{url.rstrip('/')}/{checkpoint.name}", sleep)
    if (there := store.finished()) is not None:
        if there == digest:
            return
        raise OSError(
            f"{store.url} holds another checkpoint of this step and is not overwritten: remove it, or set "
            "checkpoint.upload to another folder"
        )
    store.make()
    for names in (sorted(manifest.files), [MANIFEST_FILE], [DIGEST_FILE]):
        if (checkpoint / DIGEST_FILE).read_bytes() != digest:  # a rollback removed it, and it was saved again
            raise OSError(f"{checkpoint} is not the checkpoint any more whose upload began")
        for name in names:
            store.put(checkpoint / name)
        for name in names:
            store.check_size(name, (checkpoint / name).stat().st_size)


def download(
    url: str, root: Path, *, file_system: FileSystem = REAL, sleep: Callable[[float], object] = time.sleep
) -> Path:
    """Fetch the copy `url` (.../step-XXXXXXXX) into `root`, verify every byte and commit it under its step.

    Returns:
        The committed directory. One that is there already and has the same digest is kept, unread.

    Raises:
        OSError: no finished copy, another checkpoint of that step in `root`, or a transfer that failed.
        ValueError: a bad URL, or a copy that is damaged; nothing was committed.
    """
    store = _Store(url.rstrip("/"), sleep)
    final = root / store.url.rpartition("/")[2]
    step = step_of(final)
    if step is None:
        raise ValueError(f"{store.url} names no checkpoint: give .../{step_name(12)}, for example")
    digest = store.finished()
    if digest is None:
        raise FileNotFoundError(
            f"{store.url} holds no finished checkpoint: its manifest or digest is missing or cut short"
        )
    if final.exists():
        if (final / DIGEST_FILE).is_file() and (final / DIGEST_FILE).read_bytes() == digest:
            return final
        raise FileExistsError(f"{final} is another checkpoint than {store.url}: fetch into another folder")
    attempt = begin_attempt(root, step, file_system=file_system)
    try:
        _fetch(store, attempt, digest, file_system)
        if problems := verify_checkpoint(attempt):
            raise ValueError(f"{store.url} is damaged: {'; '.join(problems)}")
        commit_directory(attempt, final, file_system=file_system)
    except Exception:
        file_system.remove_tree(attempt)
        raise
    return final


def _fetch(store: _Store, attempt: Path, digest: bytes, file_system: FileSystem) -> None:
    """Bring all files; no file is asked for before the manifest that names it agrees with its digest."""
    file_system.write(attempt / DIGEST_FILE, [digest])
    file_system.write(attempt / MANIFEST_FILE, [store.read_small(MANIFEST_FILE)])
    manifest = load_manifest(attempt)
    step = step_of(Path(store.url.rpartition("/")[2]))
    if manifest.step != step:
        raise ValueError(f"{store.url} holds step {manifest.step}: it was moved, give it its own name again")
    for name, record in manifest.files.items():
        store.check_size(name, record.size)
        store.get(attempt / name, record.size, file_system)


class _Store:
    """One checkpoint's folder in a store; every call is tried again, and errors are one line of OSError."""

    def __init__(self, url: str, sleep: Callable[[float], object]) -> None:
        import fsspec

        check_store(url)
        self.url, self._sleep = url, sleep
        self._files, self._folder = self._often("opening", lambda: fsspec.core.url_to_fs(url))

    def finished(self) -> bytes | None:
        """The digest file of the copy that is there, or None when there is none or half of one."""
        there = self._often("looking", lambda: self._exists(MANIFEST_FILE) and self._exists(DIGEST_FILE))
        digest = self.read_small(DIGEST_FILE) if there else b""
        return digest if DIGEST_LINE.fullmatch(digest.decode("latin-1")) else None

    def make(self) -> None:
        """Make the folder, where stores have such a thing."""
        self._often("making the folder", lambda: self._files.makedirs(self._folder, exist_ok=True))

    def put(self, path: Path) -> None:
        """Copy a local file."""
        self._often(f"sending {path.name}", lambda: self._files.put_file(str(path), self._path(path.name)))

    def get(self, path: Path, size: int, file_system: FileSystem) -> None:
        """Bring a file of `size` bytes to the new local `path`, durably."""

        def bring() -> None:
            file_system.unlink(path)  # of an attempt before
            with self._files.open(self._path(path.name), "rb") as source:
                file_system.write(path, _pieces(source, size))
            file_system.fsync_file(path)

        self._often(f"fetching {path.name}", bring)

    def read_small(self, name: str) -> bytes:
        """A file's bytes. Raises ValueError when it is too large for a manifest."""
        size = self._often(f"asking for {name}", lambda: self._size(name))
        if size > MAX_MANIFEST:
            raise ValueError(f"{self.url}/{name} has {size} bytes; {MAX_MANIFEST} is the most it may have")
        return self._often(f"reading {name}", lambda: bytes(self._files.cat_file(self._path(name))))

    def check_size(self, name: str, size: int) -> None:
        """Raise OSError unless the file is there with `size` bytes."""
        found = self._often(f"asking for {name}", lambda: self._size(name))
        if found != size:
            raise OSError(f"{self.url}/{name} has {found} bytes where {size} were saved: upload it again")

    def _exists(self, name: str) -> bool:
        self._files.invalidate_cache()
        return bool(self._files.exists(self._path(name)))

    def _size(self, name: str) -> int:
        self._files.invalidate_cache()
        return int(self._files.info(self._path(name))["size"])

    def _path(self, name: str) -> str:
        return f"{self._folder.rstrip('/')}/{name}"

    def _often(self, what: str, work: Callable[[], Result]) -> Result:
        """`work()`, tried again with longer and longer waits. Stores raise whatever they like."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return work()
            except Exception as error:
                final = isinstance(error, (FileNotFoundError, PermissionError)) or attempt == ATTEMPTS
                if final:
                    text = redact(f"{what} failed: {type(error).__name__}: {error}")
                    # Not chained: a traceback would print the store's own words.
                    raise OSError(f"{self.url}: {text} ({attempt} attempts)") from None
            self._sleep(BACKOFF * 2 ** (attempt - 1))
        raise AssertionError("the last attempt returns or raises")


def _pieces(source: Any, size: int) -> Iterator[bytes]:
    """What `source` holds, one byte beyond `size` at most: a file that grew is refused, not stored."""
    left = size + 1
    while left > 0 and (piece := source.read(min(PIECE, left))):
        left -= len(piece)
        yield piece


class Uploader:
    """Sends a run's checkpoints from one thread, while training goes on; rank 0 has one.

    At most one is being sent and one waits: a newer one takes the place of the one that waits, which is then
    never sent. Both are pinned. What went wrong stops nothing: it is a line for the run's log.
    """

    def __init__(self, root: Path, url: str, *, send: Callable[..., None] = upload) -> None:
        """Start the thread.

        Args:
            root: folder of the run's checkpoints. Pins that a killed run's uploader left there are taken
                away; submit its newest checkpoint again, which costs a look when it was sent.
            url: folder in the store.
            send: `upload`, or what a test puts in its place.

        Raises:
            ValueError, OSError: as `check_store`.
        """
        check_store(url)
        self._url, self._send = url, send
        self._lock = threading.Condition()
        # Held from a pin to the queue and from a look at the queue to an unpin, never while sending.
        self._pinning = threading.Lock()
        self._waiting: Path | None = None
        self._sending: Path | None = None
        self._closed = False
        self._stop = threading.Event()
        self._messages: list[str] = []
        self._failures: list[str] = []
        for left in list_pins(root):
            if left.owner == OWNER:
                unpin(root / step_name(left.step), OWNER)
        self._thread = threading.Thread(target=self._run, name="checkpoint-upload", daemon=True)
        self._thread.start()

    def submit(self, checkpoint: Path) -> None:
        """Have the committed `checkpoint` sent; returns at once."""
        try:
            with self._pinning:
                pin(checkpoint, OWNER)
                replaced = self._queue(checkpoint)
        except OSError as error:
            self._fail(checkpoint, error)
            return
        if replaced is not None and replaced != checkpoint:
            self._release(replaced)
            self._say(f"{replaced.name} is not uploaded: {checkpoint.name} came before the store was ready")

    def _queue(self, checkpoint: Path) -> Path | None:
        """Let `checkpoint` wait; what it takes the place of."""
        with self._lock:
            assert not self._closed, f"{checkpoint} was submitted to an uploader that is closed"
            replaced, self._waiting = self._waiting, checkpoint
            self._lock.notify_all()
            return replaced

    def failures(self) -> list[str]:
        """One line per checkpoint that could not be sent, since the start."""
        with self._lock:
            return list(self._failures)

    def pop_messages(self) -> list[str]:
        """Lines for the log since the last call: what was sent, replaced, or failed."""
        with self._lock:
            messages, self._messages = self._messages, []
            return messages

    def close(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for what is being sent and what waits; True when all is through.

        Otherwise the sending is given up at its next wait, or at the end of the process: the copy has no
        manifest then, and the next run completes it.
        """
        with self._lock:
            self._closed, idle = True, self._waiting is None and self._sending is None
            self._lock.notify_all()
        self._thread.join(timeout)
        self._stop.set()
        return idle or not self._thread.is_alive()

    def _run(self) -> None:
        while (checkpoint := self._next()) is not None:
            start = time.monotonic()
            try:
                self._send(checkpoint, self._url, sleep=self._pause)
                self._say(f"{checkpoint.name} is uploaded ({time.monotonic() - start:.1f} s)")
            except Exception as error:
                self._fail(checkpoint, error)
            with self._lock:
                self._sending = None
            self._release(checkpoint)

    def _next(self) -> Path | None:
        with self._lock:
            self._lock.wait_for(lambda: self._closed or self._waiting is not None)
            self._sending, self._waiting = self._waiting, None
            return None if self._stop.is_set() else self._sending

    def _pause(self, seconds: float) -> None:
        if self._stop.wait(seconds):
            raise OSError("given up: the run ends")

    def _release(self, checkpoint: Path) -> None:
        """Unpin, unless the same checkpoint waits again or is being sent."""
        try:
            with self._pinning:
                if checkpoint not in (self._waiting, self._sending):
                    unpin(checkpoint, OWNER)
        except OSError as error:
            self._say(f"{checkpoint.name} stays pinned: {error}")

    def _fail(self, checkpoint: Path, error: Exception) -> None:
        line = redact(f"{checkpoint.name} is not uploaded: {error}")
        with self._lock:
            self._failures.append(line)
            self._messages.append(line)

    def _say(self, line: str) -> None:
        with self._lock:
            self._messages.append(line)
