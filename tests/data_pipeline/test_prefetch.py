"""A loader behind a thread: the same batches in the same order, errors and the end included."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.loader import Batch, BatchLoader, TokenDataset
from data_pipeline.prefetch import Prefetcher
from tests.data_pipeline.written import documents, write_dataset


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory) -> BatchLoader:
    folder = write_dataset(tmp_path_factory.mktemp("data"), {"train": {"corpus": [documents(0, 60)]}})
    data = TokenDataset(folder, "train", sequence_length=32, seed=0, packing="best_fit")
    return BatchLoader(data, global_batch=4, micro_batch=2)


def threads() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


def same(ours: list[Batch], theirs: list[Batch]) -> bool:
    names = ("tokens", "labels", "cu_seqlens")
    return len(ours) == len(theirs) and all(
        all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)
        and a.valid_tokens == b.valid_tokens
        for a, b in zip(ours, theirs)
    )


class Counted:
    """Stands in for a loader: remembers what was asked, and fails at some counters."""

    global_batch = 4

    def __init__(self, *, fails_at: int | None = None) -> None:
        self.asked: list[int] = []
        self.fails_at = fails_at

    def micro_batches(self, counter: int) -> list[Batch]:
        self.asked.append(counter)
        if counter == self.fails_at:
            raise OSError(5, "Input/output error")
        return [Batch(*(torch.tensor([counter]) for _ in range(3)), valid_tokens=counter)]


@settings(max_examples=20, deadline=None)
@given(
    starts=st.lists(st.integers(0, 50), min_size=1, max_size=4),
    steps=st.integers(1, 5),
    ahead=st.integers(1, 3),
)
def test_it_gives_what_the_loader_gives_also_after_jumps(
    loader: BatchLoader, starts: list[int], steps: int, ahead: int
) -> None:
    prefetcher = Prefetcher(loader, ahead=ahead)
    for start in starts:
        for counter in range(start, start + 4 * steps, 4):
            assert same(prefetcher.micro_batches(counter), loader.micro_batches(counter))
    prefetcher.close()
    assert threads() == 0


def test_it_works_ahead_and_no_further() -> None:
    counted = Counted()
    prefetcher = Prefetcher(counted, ahead=2)
    assert counted.asked == []
    assert prefetcher.micro_batches(8)[0].valid_tokens == 8
    # Two are ready, and the third waits in the thread's hands.
    wait_for(lambda: counted.asked == [8, 12, 16, 20])
    time.sleep(0.05)
    assert counted.asked == [8, 12, 16, 20]
    assert prefetcher.micro_batches(12)[0].valid_tokens == 12
    wait_for(lambda: counted.asked[-1] == 24)
    prefetcher.close()
    prefetcher.close()
    assert threads() == 0
    assert prefetcher.micro_batches(4)[0].valid_tokens == 4
    prefetcher.close()


def wait_for(condition: object) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_an_error_comes_with_its_own_batch_and_ends_the_thread() -> None:
    counted = Counted(fails_at=12)
    prefetcher = Prefetcher(counted)
    assert [prefetcher.micro_batches(c)[0].valid_tokens for c in (4, 8)] == [4, 8]
    with pytest.raises(OSError, match="Input/output error") as failed:
        prefetcher.micro_batches(12)
    assert "in micro_batches" in "".join(map(str, failed.traceback))
    assert threads() == 0
    counted.fails_at = None
    assert prefetcher.micro_batches(12)[0].valid_tokens == 12
    prefetcher.close()


def test_nothing_ahead_is_refused(loader: BatchLoader) -> None:
    with pytest.raises(ValueError, match="ahead = 0: use 1 or more"):
        Prefetcher(loader, ahead=0)


def test_pinned_batches_are_the_same(loader: BatchLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the device of the thread that asked: a new thread's would be the first."""
    devices: list[int] = []
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
        monkeypatch.setattr(torch.cuda, "device", lambda d: contextlib.nullcontext(devices.append(d)))
        monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
        monkeypatch.setattr(torch.Tensor, "is_pinned", lambda x: bool(devices))
    prefetcher = Prefetcher(loader, pin=True)
    for counter in (0, 4, 8):
        found = prefetcher.micro_batches(counter)
        assert all(x.is_pinned() for b in found for x in (b.tokens, b.labels, b.cu_seqlens))
        assert same(found, loader.micro_batches(counter))
    prefetcher.close()
    assert set(devices) <= {3}
