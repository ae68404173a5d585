"""The result of `python -m benchmarks.checkpoint` as a Markdown table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

__all__ = ["table"]

SAVE_TARGET, BLOCKED_TARGET = 0.80, 0.10


def table(found: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = ["| what | seconds (min to max) | of what it is compared with | target |", "|---|---|---|---|"]
    lines += ["| " + " | ".join(row) + " |" for row in _rows(found["cases"])]
    return "\n".join(lines)


def _rows(cases: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    save, back, loop = cases["save"], cases["background"], cases["loop"]
    size = f"{save['bytes'] / 1e9:.2f} GB"
    yield f"plain fsynced write of {size}", _seconds(save["plain"]), "", ""
    yield "the same past the page cache", _seconds(save["direct"]), "", ""
    ratio, other = save["bandwidth_of_plain"], save["bandwidth_of_direct"]
    verdict = _verdict(ratio >= SAVE_TARGET, f"at least {SAVE_TARGET:.2f}")
    share = f"{ratio:.2f} of the plain write's bandwidth, {other:.2f} of the direct one's"
    yield "save, waited for", _seconds(save["save"]), share, verdict
    ratio = save["unhashed_of_plain"]
    yield "the same without hashes", _seconds(save["unhashed"]), f"{ratio:.2f} of its bandwidth", ""
    rate = cases["hash"]["bytes_per_second"] / 1e9
    yield "SHA-256 of the bytes, one thread", _seconds(cases["hash"]), f"{rate:.2f} GB/s", ""
    ratio = loop["blocked"]["median"] / back["foreground"]["median"]
    verdict = _verdict(ratio <= BLOCKED_TARGET, f"at most {BLOCKED_TARGET:.2f}")
    share = f"{ratio:.3f} of a save that is waited for"
    yield "save in the background: the training loop is blocked", _seconds(loop["blocked"]), share, verdict
    share = f"{back['blocked_of_foreground']:.3f} of a save that is waited for"
    yield "a loop would be whose update comes at once", _seconds(back["blocked"]), share, ""
    yield "its first save, which gets the memory", f"{back['first_blocked']:.2f}", "", ""
    memory = f"snapshot {back['snapshot_bytes'] / 1e9:.2f} GB"
    yield "save in the background, to the commit", _seconds(back["whole_save"]), memory, ""
    name = f"{loop['steps']} steps of {loop['step_seconds']:.2f} s with one save, minus without"
    yield name, _seconds(loop["lost"]), "both cores compute; the writer takes its share", ""
    for name in (name for name in cases if name.startswith(("load", "verify"))):
        rate = save["bytes"] / cases[name]["median"] / 1e9
        yield name, _seconds(cases[name]), f"{rate:.2f} GB/s, hashes checked", ""


def _seconds(spread: dict[str, float]) -> str:
    return f"{spread['median']:.2f} ({spread['min']:.2f} to {spread['max']:.2f})"


def _verdict(met: bool, bound: str) -> str:
    return f"{bound}: {'met' if met else 'missed'}"
