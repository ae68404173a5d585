"""The most bytes that tensors made inside a block hold at once: counted, so the same every time."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakBytes(TorchDispatchMode):
    """Follows the storages of all results of operators until they are freed."""

    def __init__(self):
        super().__init__()
        self.peak = self._now = 0
        self._alive = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {self._key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and self._key(tensor) not in given:
                self._follow(tensor.untyped_storage())
        return result

    @staticmethod
    def _key(tensor):
        return tensor.untyped_storage()._cdata

    def _follow(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._now += size
        self.peak = max(self.peak, self._now)

        def forget(_):
            self._now -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, forget)
