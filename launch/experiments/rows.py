"""Whether the rows that runs will be scored on can be had: asked before anything is trained."""

from __future__ import annotations

from collections.abc import Iterable

from launch.experiments.spec import RunSpec

__all__ = ["check_suites"]


def check_suites(specs: Iterable[RunSpec]) -> None:
    """Read one row of every commonsense suite that the runs are scored on, from their folder or the Hub.

    Raises:
        ValueError: one cannot be read; a line with the remedy.
    """
    from evals.suites.catalogue import SUITES
    from evals.suites.rows import read_questions

    sections = [spec.resolved.evals for spec in specs]
    asked = {(each.suites_folder, task): None for each in sections for task in each.tasks if task in SUITES}
    for folder, task in asked:
        try:
            read_questions(folder, SUITES[task], limit=1)
        except (ValueError, OSError, ImportError) as error:
            files = ", ".join(f"{suite.files[0]}.jsonl" for suite in SUITES.values())
            raise ValueError(
                f"nothing was started: {' '.join(str(error).split())}; as --suites DIR, with all of {files}"
            ) from error
