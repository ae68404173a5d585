"""The arrows of the house: import-linter keeps them, and an import inside a function counts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("kernels", "trellis_dist", "data_pipeline", "checkpoints", "evals", "launch")


def lint(checkout: Path) -> subprocess.CompletedProcess[str]:
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_imports_point_down() -> None:
    ran = lint(ROOT)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_an_upward_import_inside_a_function_is_found(tmp_path: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for room in ROOMS:
        shutil.copytree(
            ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("*.so", "__pycache__", "recipes")
        )
    (tmp_path / "kernels" / "upward.py").write_text(
        "def f():\n    from launch import recipe\n    return recipe\n"
    )
    ran = lint(tmp_path)
    assert ran.returncode != 0
    assert "kernels.upward -> launch.recipe" in ran.stdout
