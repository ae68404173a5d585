"""The pictures of docs/monitoring.md: ``python -m benchmarks.observe_pictures [--run RUN]``.

Without --run a small model is first trained on the running Python's own library, byte by byte, in
runs/monitoring: about a minute on two quiet cores. Then TensorBoard shows the run to a headless Chromium,
and its pages become docs/monitoring-*.png. Nothing is measured here.
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.hand_made import BOS, EOS, write_documents
from checkpoints.config import CheckpointConfig
from data_pipeline.config import DataConfig
from tests.evals.page_service import open_browser
from trellis_dist.models.config import ModelConfig, TrellisConfig
from trellis_dist.parallel.config import MeshConfig
from trellis_dist.training.config import LoggingConfig, OptimizerConfig, ScheduleConfig, TrainingConfig
from trellis_dist.training.job import Job
from trellis_dist.training.loop import run

ROOT = Path(__file__).resolve().parents[1]
DOCS, RUN = ROOT / "docs", ROOT / "runs" / "monitoring"
FILES, LONGEST = 300, 40_000  # of the library; bytes of one file
# What each picture shows: TensorBoard's page, and the tags it is filtered by.
PICTURES = {
    "scalars": ("timeseries", "^(loss/|optim/)"),
    "trellis": ("timeseries", "^trellis/layer_01/[a-z_]+$"),
    "histograms": ("histograms", ""),
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="a run folder to show")
    parser.add_argument("--steps", type=int, default=300, help="of the run that is trained without --run")
    chosen = parser.parse_args()
    if chosen.run is None:
        train(RUN, steps=chosen.steps)
    with tensorboard(chosen.run or RUN) as address, open_browser() as browser:
        for name, (page, tags) in PICTURES.items():
            query = urllib.parse.urlencode({"tagFilter": tags, "smoothing": 0})
            photograph(browser, f"{address}/?{query}#{page}", DOCS / f"monitoring-{name}.png")


def train(run_dir: Path, *, steps: int) -> None:
    """A byte-level model of two layers on Python's library."""
    data = write_bytes(run_dir.with_name(f"{run_dir.name}-data"))
    job = Job(
        model=ModelConfig(
            vocab_size=259,
            num_layers=2,
            dim=96,
            num_heads=4,
            trellis=TrellisConfig(slots=32, chunk_size=32),
        ),
        mesh=MeshConfig(),
        data=DataConfig(directory=str(data), sequence_length=256),
        optimizer=OptimizerConfig(lr=6e-3),
        schedule=ScheduleConfig(warmup_steps=40),
        training=TrainingConfig(
            steps=steps,
            global_batch_tokens=512,
            micro_batch=2,
            engine="local",
            precision="fp32",
            validation_interval=50,
            validation_rows=16,
            threads=1,
        ),
        checkpoint=CheckpointConfig(interval=150),
        logging=LoggingConfig(progress=False, probe_interval=20),
        recipe={"name": "monitoring"},
    )
    run(job, run_dir)


def write_bytes(folder: Path) -> Path:
    """Files of the library as documents of bytes, of which every twentieth validates."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:FILES]
    documents = [
        np.array([BOS, *(np.frombuffer(file.read_bytes()[:LONGEST], np.uint8).astype(int) + 3), EOS])
        for file in files
    ]
    splits = {
        "train": {"stdlib": [[d for i, d in enumerate(documents) if i % 20]]},
        "validation": {"stdlib": [documents[::20]]},
    }
    return write_documents(folder, splits, vocab_size=259)


@contextmanager
def tensorboard(run_dir: Path) -> Iterator[str]:
    """TensorBoard on a port of its own; its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", "tensorboard"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--load_fast", "false"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=run_dir, **quiet)
    try:
        address = f"http://127.0.0.1:{port}"
        _await_tags(f"{address}/data/plugin/scalars/tags")
        yield address
    finally:
        process.terminate()
        process.wait()


def _await_tags(address: str, *, seconds: float = 180.0) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(address, timeout=10) as answer:
                if b"trellis/" in answer.read():
                    return
        except OSError:
            pass
        time.sleep(0.5)
    raise TimeoutError(f"{address} showed no tags within {seconds:.0f} s")


def photograph(browser: Any, address: str, path: Path) -> None:
    """What the page shows once its charts are drawn."""
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.goto(address, wait_until="networkidle", timeout=120_000)
    settings = page.get_by_role("button", name="Settings", exact=True)
    if settings.count():  # a panel that would take a third of the page
        settings.first.click()
    page.wait_for_timeout(8000)
    page.screenshot(path=str(path))
    page.close()


if __name__ == "__main__":
    main()
