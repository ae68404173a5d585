"""FOLDER/report.html: one self-contained page about a model that is no run of ours."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evals.report import add_sections
from trellis_dist.files import atomic_write
from trellis_dist.report import Report

__all__ = ["write_model_report"]


def write_model_report(folder: Path, records: Mapping[str, Mapping[str, Any]]) -> Path:
    """Write the report of one model's records, by task (`evals.evaluate.evaluate_subject`); returns its path.

    Raises:
        OSError: it cannot be written.
    """
    first = next(iter(records.values()))
    report = Report(first["model"], "What it scores")
    report.facts({"Weights": first["digest"][:12], "Python": platform.python_version()})
    add_sections(report, records)
    report.section("Where the time went")
    rows = [[name, f"{record['seconds']:,.1f}"] for name, record in sorted(records.items())]
    report.table(["task", "seconds"], rows)
    path = Path(folder) / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, report.render())
    return path
