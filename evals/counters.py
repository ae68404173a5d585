"""Counts of what a server did, and Prometheus' text form of them."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping

__all__ = ["Counters", "Labels", "Metric", "render"]

Labels = tuple[tuple[str, str], ...]
# Name, help, type, and values by label.
Metric = tuple[str, str, str, Mapping[Labels, float]]


class Counters:
    """Counts by name and label; threads may share it."""

    def __init__(self) -> None:
        self._lock, self._values = threading.Lock(), dict[str, dict[Labels, float]]()

    def add(self, name: str, amount: float = 1, **labels: str) -> None:
        """Count."""
        key = tuple(sorted(labels.items()))
        with self._lock:
            values = self._values.setdefault(name, {})
            values[key] = values.get(key, 0) + amount

    def values(self, name: str) -> dict[Labels, float]:
        """By label."""
        with self._lock:
            return dict(self._values.get(name, {}))


def render(metrics: Iterable[Metric]) -> str:
    """Prometheus' text exposition format, version 0.0.4."""
    lines: list[str] = []
    for name, words, kind, values in metrics:
        lines += [f"# HELP {name} {words}", f"# TYPE {name} {kind}"]
        lines += [f"{name}{_labels(labels)} {value:.17g}" for labels, value in sorted(values.items())]
    return "\n".join(lines) + "\n"


def _labels(labels: Labels) -> str:
    def escape(value: str) -> str:
        return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

    return "{" + ",".join(f'{name}="{escape(value)}"' for name, value in labels) + "}" if labels else ""
