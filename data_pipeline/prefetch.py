"""The next batches are made while the device computes: a loader behind a thread."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import deque

import torch

from data_pipeline.loader import Batch, BatchLoader, TokenDataset

__all__ = ["Prefetcher"]

Made = list[Batch] | BaseException


class Prefetcher:
    """Gives what its loader gives; a thread makes the global batches that follow the one asked for last.

    Asking for another counter than the next one is as correct and as slow as the loader itself. To be called
    from one thread.

    Attributes:
        waited: seconds that the caller has waited for batches so far, the first of all included.
    """

    def __init__(self, loader: BatchLoader, *, ahead: int = 2, pin: bool = False) -> None:
        """Start nothing yet.

        Args:
            loader: what makes the batches.
            ahead: global batches kept ready, at least 1.
            pin: put them into page-locked memory, from which copies to a CUDA device run beside the
                computation (`tensor.to(device, non_blocking=True)`).
        """
        if ahead < 1:
            raise ValueError(f"ahead = {ahead}: use 1 or more batches")
        self._loader, self._ahead, self._pin = loader, ahead, pin
        # A new thread's current device is the first one, and page-locking would open a context on it.
        self._device = torch.cuda.current_device() if pin else None
        self._changed = threading.Condition()
        self._ready: deque[Made] = deque()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._next = 0
        self.waited = 0.0

    @property
    def dataset(self) -> TokenDataset:
        """What the batches are made of."""
        return self._loader.dataset

    def micro_batches(self, counter: int) -> list[Batch]:
        """What the loader's `micro_batches(counter)` returns; raises what it raises."""
        if self._thread is None or counter != self._next:
            self.close()
            self._start(counter)
        began = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: self._ready)
            self.waited += time.perf_counter() - began
            made = self._ready.popleft()
            self._changed.notify_all()
        if isinstance(made, BaseException):
            self.close()
            raise made
        self._next = counter + self._loader.global_batch
        return made

    def close(self) -> None:
        """Stop the thread and wait for it; batches that were made are dropped. Harmless when repeated."""
        if self._thread is None:
            return
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()
        self._thread = None
        self._ready.clear()

    def _start(self, counter: int) -> None:
        self._stopping, self._next = False, counter
        # A daemon, so that a program that forgets to close still ends.
        self._thread = threading.Thread(target=self._work, args=(counter,), name="prefetch", daemon=True)
        self._thread.start()

    def _work(self, counter: int) -> None:
        made: Made = []
        while not isinstance(made, BaseException):
            made = self._make(counter)
            counter += self._loader.global_batch
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or len(self._ready) < self._ahead)
                if self._stopping:
                    return
                self._ready.append(made)
                self._changed.notify_all()

    def _make(self, counter: int) -> Made:
        try:
            batches = self._loader.micro_batches(counter)
            if self._device is None:
                return batches
            with torch.cuda.device(self._device):
                return [_pinned(batch) for batch in batches]
        except BaseException as error:  # whatever it is, somebody waits for an answer
            return error


def _pinned(batch: Batch) -> Batch:
    names = ("tokens", "labels", "cu_seqlens")
    return dataclasses.replace(batch, **{name: getattr(batch, name).pin_memory() for name in names})
