"""One run from its spec to its result: shards, training, scoring; what is done is re-used."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.experiments.children import Slice, run_command
from launch.experiments.result import collect, known_result, refuse_another
from launch.experiments.spec import RunSpec
from trellis_dist.files import make_directories, read_json, write_json

__all__ = ["Workshop", "perform", "prepare_shards", "trained"]

_PREPARING = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class Workshop:
    """Where and how runs are performed.

    Attributes:
        root: holds runs/NAME (checkpoints, metrics), logs/NAME.log and, unless named, results/NAME.json.
        results: folder of the result files; None for ROOT/results.
        slice_: how long runs may go on.
        threads: torch threads of a run on a CPU.
        say: takes a line for the terminal.
    """

    root: Path
    results: Path | None = None
    slice_: Slice
    threads: int = 1
    say: Callable[[str], None] = print

    def run_dir(self, spec: RunSpec) -> Path:
        """Folder of a run."""
        return self.root / "runs" / spec.name

    def result(self, spec: RunSpec) -> Path:
        """File of a run's result."""
        return (self.results or self.root / "results") / f"{spec.name}.json"

    def log(self, name: str) -> Path:
        """What the commands of a run print."""
        return self.root / "logs" / f"{name}.log"


def perform(
    spec: RunSpec,
    root: Path,
    *,
    results: Path | None = None,
    minutes: float | None = None,
    threads: int = 1,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train, score and return the result of ``spec``, which is also written to ``results`` (one JSON).

    A finished run is not trained again, a begun one goes on from its newest checkpoint.

    Args:
        root: holds runs/NAME, logs/NAME.log and results/NAME.json.
        results: another folder for the result files.
        minutes: after so many the run saves and `CutError` is raised; the same call goes on.

    Raises:
        ValueError, OSError: what a user can change, such as a folder that holds another run of that name.
        FailedError: training or scoring failed; its error line.
        CutError: the time was over.
    """
    shop = Workshop(root=root, results=results, slice_=Slice(minutes), threads=threads, say=say)
    return perform_in(shop, spec)


def perform_in(shop: Workshop, spec: RunSpec) -> dict[str, Any]:
    """`perform` in a workshop that several runs share."""
    path = shop.result(spec)
    if (known := known_result(path, spec)) is not None:
        return known
    run_dir = shop.run_dir(spec)
    if (run_dir / "recipe.json").is_file():
        refuse_another(read_json(run_dir / "recipe.json"), spec, holder=run_dir)
    for folder in (path.parent, run_dir.parent, shop.log(spec.name).parent):
        make_directories(folder)
    prepare_shards(shop, spec)
    if not trained(run_dir, spec):
        shop.say(f"{spec.name}: trains{_from(run_dir)}")
        _command(shop, spec, ["train", *spec.arguments, "--run-dir", str(run_dir), *_machine(shop, spec)])
    shop.say(f"{spec.name}: is scored")
    scoring = [f"--set=evals.{line}" for line in _scoring(spec)]
    _command(shop, spec, ["eval", str(run_dir), "--step", str(spec.resolved.training.steps), *scoring])
    found = collect(spec, run_dir)
    write_json(path, found)
    shop.say(f"{spec.name}: done, {_headline(found)}")
    return found


def prepare_shards(shop: Workshop, spec: RunSpec) -> None:
    """Make the token shards of a spec where there are none; one call at a time makes some."""
    with _PREPARING:
        folder = Path(spec.resolved.data.directory)
        if (folder / "manifest.json").is_file():
            return
        shop.say(f"prepares {folder}")
        make_directories(shop.log("prepare").parent)
        run_command(
            ["prepare", *spec.arguments], log=shop.log("prepare"), slice_=shop.slice_, threads=shop.threads
        )


def _command(shop: Workshop, spec: RunSpec, arguments: list[str]) -> None:
    run_command(arguments, log=shop.log(spec.name), slice_=shop.slice_, threads=shop.threads)


def _machine(shop: Workshop, spec: RunSpec) -> list[str]:
    """No bar in a log, and the share of the cores that the run has, unless the recipe says it."""
    threads = [] if spec.resolved.training.threads else [f"--set=training.threads={shop.threads}"]
    return ["--set=logging.progress=false", *threads]


def _scoring(spec: RunSpec) -> list[str]:
    """Every key of the evals section: a run begun with others is scored on what the spec says."""
    from launch.experiments.spec import assignments

    return list(assignments(spec.scoring))


def trained(run_dir: Path, spec: RunSpec) -> bool:
    """Whether the run's last checkpoint is there, whole."""
    from checkpoints.commit import step_of
    from checkpoints.state import latest_verified

    folder = run_dir / "checkpoints"
    newest = latest_verified(folder) if folder.is_dir() else None
    return newest is not None and (step_of(newest) or 0) >= spec.resolved.training.steps


def _from(run_dir: Path) -> str:
    from launch.ending import newest_step

    step = newest_step(run_dir)
    return f" on from step {step}" if step else ""


def _headline(found: dict[str, Any]) -> str:
    seconds = f"{found['training']['seconds']:,.0f} s of training"
    validation = found.get("validation")
    return seconds if validation is None else f"validation loss {validation['loss']:.4f}, {seconds}"
