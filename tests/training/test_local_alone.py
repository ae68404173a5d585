"""The local engine on one rank under torchrun needs torch and nothing else that is heavy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.training.small_run import exact_rows, write_dataset

PROGRAM = """
import sys
from pathlib import Path
for name in ("deepspeed", "megatron", "ray", "triton"):
    sys.modules[name] = None  # an import of it raises ModuleNotFoundError
from tests.training.small_run import make_job
from trellis_dist.training.loop import run
result = run(make_job(sys.argv[1], training={"steps": 2}), Path(sys.argv[2]))
assert (result.outcome, result.step) == ("finished", 2)
"""


def test_one_rank_under_torchrun_trains_without_the_heavy_packages(tmp_path: Path):
    torchrun = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(write_dataset(tmp_path / "set")), str(tmp_path / "run")],
        env={**os.environ, **torchrun, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in exact_rows(tmp_path / "run")] == [1, 2]
