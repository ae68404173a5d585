"""How quick the evaluation page is with many results, and what it looks like.

    python -m benchmarks.eval_page              writes benchmarks/results/eval_page.json, a minute
    python -m benchmarks.eval_page --pictures   writes docs/eval-*.png, from synthetic results

Chromium opens the page of a real service whose queue was filled with synthetic results: 200 runs with 40
scalars each, and a task of 10,000 samples. Times are of the browser's own clock, from the action to the frame
that shows what was asked for.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.machine import machine, versions
from evals.queue import Queue
from evals.samples import Sample, share
from tests.evals.page_data import Clock, write_database
from tests.evals.page_service import Service, open_browser
from trellis_dist.files import digest, write_json

RESULT = Path(__file__).parent / "results" / "eval_page.json"
DOCS = Path(__file__).resolve().parents[1] / "docs"
RUNS, TASKS, LENGTHS, SAMPLES = 200, 10, 4, 10_000
REPEATS = 5
PICTURES = {
    "leaderboard": ("leaderboard", "light"),
    "curves": ("curves?scalar=niah_single_2/*&x=tokens&bars=1&runs=/^(trellis|gated|mamba)/", "light"),
    "heatmap": ("heatmap?task=niah_single_2&first=trellis-125m-c4@5000&second=mamba2-125m-c4@5000", "light"),
    "samples": ("samples?task=niah_single_2&checkpoint=trellis-125m-c4@5000&group=8192&at=7", "dark"),
    "compare": (
        "compare?task=niah_single_2&first=gated-deltanet-125m-c4@5000&second=trellis-125m-c4@5000&group=4096",
        "light",
    ),
    "queue": ("queue", "dark"),
}
# From the call of `act` until a frame in which `done` holds: milliseconds.
TIMED = """async ([act, done]) => {
  const frame = () => new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve)));
  const holds = () => {
    const [selector, count] = done;
    return document.querySelectorAll(selector).length === count;
  };
  await frame();
  const start = performance.now();
  if (act.hash) location.hash = act.hash;
  if (act.click) document.querySelector(act.click).click();
  if (act.type) {
    const input = document.querySelector(act.type[0]);
    input.value = act.type[1];
    input.dispatchEvent(new Event('input'));
  }
  while (!holds()) {
    if (performance.now() - start > 30000) throw new Error(`${done[1]} of ${done[0]} did not come`);
    await frame();
  }
  await frame();
  return performance.now() - start;
}"""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", action="store_true", help="write docs/eval-*.png instead of measuring")
    chosen = parser.parse_args()
    if chosen.pictures:
        take_pictures(DOCS)
    else:
        write_json(RESULT, {"machine": machine(), "versions": versions(), **measure()})


@contextmanager
def _served(fill: Any) -> Iterator[Service]:
    """A service on what ``fill(path of the queue)`` has written."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "runs").mkdir()
        fill(folder / "queue.sqlite")
        service = Service(folder)
        try:
            yield service
        finally:
            service.stop()


def take_pictures(folder: Path) -> None:
    """Every view, 1280 pixels wide, as eval-NAME.png in ``folder``."""
    with (
        _served(lambda path: write_database(path, now=time.time(), samples=100)) as service,
        open_browser() as browser,
    ):
        for name, (route, scheme) in PICTURES.items():
            page = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme=scheme)
            page.goto(service.url(route))
            page.wait_for_selector("#status[data-state=live]")
            page.wait_for_load_state("networkidle")
            page.screenshot(path=folder / f"eval-{name}.png")
            page.close()


def fill_large(path: Path, *, runs: int = RUNS, samples: int = SAMPLES) -> None:
    """Many runs with `TASKS` * `LENGTHS` scalars at one step, and one result with many samples."""
    queue = Queue(path, clock=Clock(time.time() - 10.0 * runs * TASKS))
    for run in range(runs):
        for task in range(TASKS):
            groups = {
                str(1024 * 2**i): share([1.0] * (1 + (run * (7 + 2 * task)) % 53) + [0.0] * (20 + i))
                for i in range(LENGTHS)
            }
            scalars = {f"task_{task}/{name}": part["score"] for name, part in groups.items()}
            _store(queue, f"run-{run:03d}", f"task_{task}", {"groups": groups}, scalars)
    rows = [_sample(i).to_json() for i in range(samples)]
    whole = {"all": share([row["score"] for row in rows])}
    _store(queue, "run-000", "piqa", {"groups": whole, "samples": rows}, {"piqa/acc": whole["all"]["score"]})


def _sample(i: int) -> Sample:
    prompt, answer = f"{i} " + "word " * 300, f"answer {i}"
    return Sample(
        id=str(i), group="all", score=float(i % 3 == 0), prompt=prompt, answer=answer, output=f"output {i}"
    )


def _store(queue: Queue, run: str, task: str, result: dict[str, Any], scalars: dict[str, float]) -> None:
    key = digest([run, task])
    queue.submit(key, run=run, step=1000, task=task)
    queue.finish(key, {"seconds": 1.0, "result": result, "scalars": scalars})


def measure(*, runs: int = RUNS, samples: int = SAMPLES, repeats: int = REPEATS) -> dict[str, Any]:
    """Median and extremes of every action's milliseconds."""
    times: dict[str, list[float]] = {}
    with (
        _served(lambda path: fill_large(path, runs=runs, samples=samples)) as service,
        open_browser() as browser,
    ):
        for _ in range(repeats):
            page = browser.new_page(viewport={"width": 1440, "height": 900})
            for name, took in _session(page, service, runs=runs, samples=samples):
                times.setdefault(name, []).append(took)
            page.close()
        version = browser.version
    rows = {
        name: {"median_ms": statistics.median(took), "low_ms": min(took), "high_ms": max(took)}
        for name, took in times.items()
    }
    shape = {"runs": runs, "scalars": TASKS * LENGTHS + 1, "samples": samples, "repeats": repeats}
    return {"browser": version, **shape, "actions": rows}


def _session(page: Any, service: Service, *, runs: int, samples: int) -> Iterator[tuple[str, float]]:
    start = time.perf_counter()
    page.goto(service.url("leaderboard"))
    page.wait_for_selector(".board tbody tr")
    yield "opening the page, with all results", 1000 * (time.perf_counter() - start)
    board = ".board tbody tr"
    shown = min(runs, 60)  # the others are drawn as one scrolls towards them
    few = sum(str(run).zfill(3).endswith("7") for run in range(runs))
    sample = ".samples li"
    last = samples - 1
    for name, act, done in (
        (
            "sorting the leaderboard",
            {"click": ".board thead tr:last-child th:nth-child(9) button"},
            [board, shown],
        ),
        (
            "filtering it, 150 ms of them waiting for more letters",
            {"type": ["input[type=search]", "/7$/"]},
            [board, few],
        ),
        ("all rows again", {"type": ["input[type=search]", ""]}, [board, shown]),
        ("curves of four scalars", {"hash": "#/curves?scalar=task_3/*"}, [".chart svg", LENGTHS]),
        ("a page of the samples", {"hash": "#/samples?task=piqa"}, [sample, 50]),
        (
            "the last page of them",
            {"hash": f"#/samples?task=piqa&at={last}"},
            [f"{sample}[data-key='{last}']", 1],
        ),
    ):
        yield name, page.evaluate(TIMED, [act, done])


if __name__ == "__main__":
    main()
