"""Imported once by the server of ``ranks``: what every rank would import for seconds."""

from __future__ import annotations

import contextlib
import importlib
import os
import warnings

os.environ["DS_ACCELERATOR"] = "cpu"
# megatron-core says on import that it falls back to torch for optimizers that nothing here uses.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for name in ("torch", "benchmarks.sequence_parallel.subject", "trellis_dist.training.engines.local"):
        importlib.import_module(name)
    with contextlib.suppress(ImportError):
        importlib.import_module("megatron.core.parallel_state")
