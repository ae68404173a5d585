"""The examples of docs/kernels.md run, one after the other, as the page says."""

from __future__ import annotations

import re
from typing import Any

import torch

from tests.kernels.helpers import ROOT


def test_the_examples_run() -> None:
    text = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    examples = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(examples) >= 5, "the page has examples"
    assert all("assert" in example for example in examples if "def part" not in example)
    names: dict[str, Any] = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for example in examples:
            exec(example, names)
