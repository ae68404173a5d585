"""The long processes of this room begin with its first test."""

from __future__ import annotations

import sys

import pytest

from tests.kernels import beside


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Begin what the tests of this session will wait for: most other tests here leave a core free."""
    if sys.platform != "linux":
        return
    asked = {other.name for other in item.session.items}
    for test in beside.IN_THE_INTERPRETER:
        if test in asked:
            beside.start(test)
