"""What every test runs under: one thread, no network, and, under CI, no skip that nobody agreed to.

Under `pytest -n 3` a room is one unit of work, so that its pools and sessions exist once.
The two rooms of multi-rank tests share a unit, and the longest units begin first, so that the workers end
together.
"""

from __future__ import annotations

import fnmatch
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Before any test module imports torch, DeepSpeed, Ray or a Hugging Face library: they read these once.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
for _name, _value in _ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

MANY_RANKS = ("parallel", "training")
# By how long they take; the others after them.
LONGEST_FIRST = ("ranks", "launch", "evals", "kernels", "benchmarks", "data_pipeline", "models")
SKIPS_ALLOWED = Path(__file__).with_name("skips_allowed.txt")
_skipped: dict[str, str] = {}


@pytest.fixture(scope="module", autouse=True)
def rested_ranks() -> Iterator[None]:
    """After a module, ranks that it has left with many idle threads are stopped."""
    yield
    pools = sys.modules.get("tests.distributed")
    if pools is not None:
        pools.close_tired_pools()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest units first; skip tests marked ``gpu`` where there is no CUDA device."""
    items.sort(key=lambda item: _place(unit_of(item.nodeid)))
    _skip_without_gpu(items)


def _place(unit: str) -> int:
    return LONGEST_FIRST.index(unit) if unit in LONGEST_FIRST else len(LONGEST_FIRST)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give whole units to the workers. (Marks of its own, xdist_group, are lost with pytest 9.2.)"""
    from xdist.scheduler import LoadScopeScheduling

    class ByRoom(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return unit_of(nodeid)

    return ByRoom(config, log)


def unit_of(nodeid: str) -> str:
    """What runs in one process: a room, or both rooms whose tests start many ranks."""
    _, room, *below = nodeid.partition("::")[0].split("/")
    return "ranks" if room in MANY_RANKS else room if below else "house"


def _skip_without_gpu(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Remember every skip; an expected failure is none."""
    if report.skipped and not hasattr(report, "wasxfail"):
        _skipped[report.nodeid] = _reason(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Remember modules that skip themselves while they are imported."""
    if report.skipped:
        _skipped[report.nodeid] = _reason(report)


def unexpected_skips(skipped: dict[str, str], allowed: str) -> dict[str, str]:
    """Skips whose node id matches no line of the allow list (fnmatch patterns, # for comments)."""
    lines = (line.partition("#")[0].strip() for line in allowed.splitlines())
    patterns = [line for line in lines if line]
    return {
        node: reason
        for node, reason in skipped.items()
        if not any(fnmatch.fnmatchcase(node, pattern) for pattern in patterns)
    }


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Under CI=true, fail the session for each skip that tests/skips_allowed.txt does not name."""
    if os.environ.get("CI", "").lower() not in ("1", "true"):
        return
    refused = unexpected_skips(_skipped, SKIPS_ALLOWED.read_text(encoding="utf-8"))
    for node, reason in sorted(refused.items()):
        print(
            f"\nskip not allowed under CI: {node}: {reason}; make it run, or list it in {SKIPS_ALLOWED.name}"
        )
    if refused:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    return report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
