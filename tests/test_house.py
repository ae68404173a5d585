"""Promises of the whole repository: quick import, our rooms under their names, the paper's sizes, skips."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from launch.recipe import load_recipe
from trellis_dist.models.counts import parameter_counts

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"125m": 125e6, "170m": 170e6, "350m": 350e6, "780m": 780e6, "1b": 1e9}


def python(code: str, *, path: list[Path] = [ROOT], cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:  # noqa: B006
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=cwd, capture_output=True, text=True, timeout=120
    )


def test_importing_the_package_is_quick_and_leaves_torch_alone() -> None:
    ran = python("import sys, trellis_dist; sys.exit('torch' in sys.modules or len(sys.modules) > 300)")
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("room", ["kernels", "evals"])
def test_another_package_of_a_rooms_name_is_refused_in_one_line(room: str, tmp_path: Path) -> None:
    (tmp_path / room).mkdir()
    (tmp_path / room / "__init__.py").write_text("raise SystemExit('the wrong package was imported')\n")
    ran = python(f"import sys; sys.path[:0] = [{str(tmp_path)!r}]; import trellis_dist", cwd=tmp_path)
    assert ran.returncode == 1
    last = ran.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: trellis_dist: the name ")
    assert str(tmp_path / room) in last
    assert f"pip uninstall {room}" in last


def test_rooms_of_the_tree_are_the_rooms_imported() -> None:
    for room in ("kernels", "trellis_dist", "data_pipeline", "checkpoints", "evals", "launch"):
        spec = importlib.util.find_spec(room)
        assert spec is not None
        assert spec.origin == str(ROOT / room / "__init__.py")


def test_libraries_that_know_another_kernels_still_import_with_ours_on_the_path() -> None:
    libraries = [name for name in ("transformers", "lm_eval") if importlib.util.find_spec(name)]
    assert "lm_eval" in libraries
    ran = python("\n".join(["import trellis_dist, kernels", *(f"import {name}" for name in libraries)]))
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("size", SIZES)
def test_the_papers_sizes_count_within_a_tenth_of_their_names(size: str) -> None:
    counts = parameter_counts(load_recipe(f"{size}-c4").model)
    assert counts.total == pytest.approx(SIZES[size], rel=0.10)


def test_170m_is_the_125m_body_with_untied_embeddings() -> None:
    model = load_recipe("170m-pile").model
    assert (model.num_layers, model.dim, model.num_heads) == (12, 768, 16)
    assert not model.tie_embeddings
    assert parameter_counts(model).total == pytest.approx(179e6, rel=0.02)


def test_constraints_pin_every_direct_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    # The name ends where a version, a marker or extras (`ray[default]`) begin.
    names = {re.split(r"[\[;=<>]", line)[0].strip() for line in wanted}
    pins = (ROOT / "constraints.txt").read_text().lower().replace("_", "-")
    missing = {name for name in names if f"\n{name.lower().replace('_', '-')}==" not in pins}
    assert not missing


def test_a_skip_outside_the_allow_list_is_refused() -> None:
    path = ROOT / "tests" / "conftest.py"
    spec = importlib.util.spec_from_file_location("skip_policy", path)
    assert spec is not None
    assert spec.loader is not None
    policy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(policy)
    skipped = {
        "tests/kernels/test_gpu.py::test_a": "needs a CUDA device",
        "tests/evals/test_b.py::test_c": "lazy",
    }
    allowed = (ROOT / "tests" / "skips_allowed.txt").read_text()
    assert policy.unexpected_skips(skipped, allowed) == {"tests/evals/test_b.py::test_c": "lazy"}


def test_ci_turns_such_a_skip_into_a_failure(tmp_path: Path) -> None:
    tests = tmp_path / "tests"
    tests.mkdir()
    for name in ("conftest.py", "skips_allowed.txt"):
        (tests / name).write_bytes((ROOT / "tests" / name).read_bytes())
    (tests / "test_lazy.py").write_text("import pytest\n\n\ndef test_it():\n    pytest.skip('not today')\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    for ci, status in (("true", 1), ("", 0)):
        ran = subprocess.run(
            command, cwd=tmp_path, env={**os.environ, "CI": ci}, capture_output=True, text=True, timeout=120
        )
        assert ran.returncode == status, ran.stdout
        refusal = "skip not allowed under CI: tests/test_lazy.py::test_it: Skipped: not today"
        assert (refusal in ran.stdout) == (status == 1)
