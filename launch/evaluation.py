"""What `trellis eval` does, alone or as one of several ranks (``python -m launch.evaluation``)."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.messages import show_warnings_plainly

if TYPE_CHECKING:
    from evals.baselines import Baselines
    from evals.config import EvalConfig
    from launch.recipe import Recipe

__all__ = [
    "EvalRequest",
    "baselines_of",
    "main",
    "score",
    "score_as_rank",
    "score_on_ranks",
    "settings_of",
]

# A batch of long prompts takes minutes; the connection to a rank that is lost ends at once.
WAIT_SECONDS = 6 * 3600.0


@dataclass(frozen=True, kw_only=True)
class EvalRequest:
    """What `trellis eval` was asked for, as JSON types: each rank reads the same.

    Attributes:
        model: the folder.
        assignments: ``evals.key=value``, over the run's recipe.
        step, dataset_dir: of a run.
        output: folder of records and report; None is the run's own.
        trust_remote_code, dtype: of a Hugging Face folder.
        as_json: print the records.
    """

    model: str
    assignments: list[str]
    step: int | None
    dataset_dir: str | None
    output: str | None
    trust_remote_code: bool
    dtype: str
    as_json: bool


def settings_of(request: EvalRequest) -> tuple[EvalConfig, Recipe | None]:
    """The settings, and the recipe where the model is a run. Raises ValueError for what does not fit."""
    from evals.evaluate import check_tasks
    from evals.subjects import kind_of, run_and_step
    from launch.layers import override
    from launch.recipe import parse_evals, parse_recipe, resolve
    from launch.run_folder import recipe_of_run

    strangers = [item for item in request.assignments if not item.startswith("evals.")]
    if strangers:
        raise ValueError(f"--set {strangers[0]}: a model keeps its recipe; only evals.* can be set here")
    path = Path(request.model)
    if kind_of(path) == "run":
        run_dir, _ = run_and_step(path, request.step)
        table = resolve(recipe_of_run(run_dir))
        override(table, request.assignments)
        recipe = parse_recipe(table, source=str(run_dir))
        return recipe.evals, recipe
    if request.output is None:
        raise ValueError(f"{path} is no run folder: name a folder for the results with --output DIR")
    table = {"evals": {}}
    override(table, request.assignments)
    config = parse_evals(table, source=str(path))
    check_tasks(config, run=False, name=str(path))
    return config, None


def baselines_of(folder: Path | None, recipe: Path | None, *, trust_remote_code: bool) -> Baselines | None:
    """The models of ``--baselines``, on the evals section of ``--baselines-recipe`` or on its defaults.

    Raises:
        ValueError, OSError: what was given does not fit, or is not there.
    """
    from evals.baselines import open_baselines
    from launch.layers import read_layers
    from launch.recipe import parse_evals
    from trellis_dist.files import read_json

    if folder is None:
        for option, given in (("--baselines-recipe", recipe), ("--trust-remote-code", trust_remote_code)):
            if given:
                raise ValueError(f"{option} is of the models of --baselines FOLDER: give that too")
        return None
    table: Mapping[str, Any] = {}
    if recipe is not None:
        table = read_layers(str(recipe)) if recipe.suffix == ".toml" else read_json(recipe)
    if not isinstance(table, Mapping):
        raise ValueError(f"--baselines-recipe {recipe} holds no sections: it is no recipe")
    config = parse_evals({"evals": table.get("evals", {})}, source=str(recipe))
    return open_baselines(folder, config, trust_remote_code=trust_remote_code)


def score(request: EvalRequest) -> None:
    """Score as one of the ranks of this process's group, or alone; rank 0 writes and prints."""
    from evals.ranks import current_ranks

    ranks = current_ranks()
    config, recipe = settings_of(request)
    progress = recipe.logging.progress if recipe is not None else sys.stderr.isatty()
    if recipe is not None and request.output is None:
        records = _score_run(request, config, progress=progress)
    else:
        records = _score_model(request, config, progress=progress)
    line = ranks.from_main(lambda: _write_reports(request, records))
    if ranks.is_main:
        print(json.dumps(records, indent=1) if request.as_json else line, flush=True)


def _score_run(request: EvalRequest, config: EvalConfig, *, progress: bool) -> dict[str, Any]:
    from evals.evaluate import evaluate_run
    from evals.subjects import run_and_step

    run_dir, step = run_and_step(Path(request.model), request.step)
    dataset_dir = Path(request.dataset_dir) if request.dataset_dir else None
    return evaluate_run(run_dir, config, progress=progress, step=step, dataset_dir=dataset_dir)


def _score_model(request: EvalRequest, config: EvalConfig, *, progress: bool) -> dict[str, Any]:
    from evals.evaluate import evaluate_subject
    from evals.subjects import load_subject

    assert request.output is not None, "asked for before"
    subject = load_subject(
        Path(request.model),
        step=request.step,
        device=config.device,
        dataset_dir=Path(request.dataset_dir) if request.dataset_dir else None,
        trust_remote_code=request.trust_remote_code,
        dtype=request.dtype,  # type: ignore[arg-type] # one of Dtype
        peer_bos=config.peer_bos,
    )
    return evaluate_subject(subject, config, Path(request.output), progress=progress)


def _write_reports(request: EvalRequest, records: Mapping[str, Any]) -> str:
    """The report, and of a run the summary; returns the line that says where everything is."""
    if request.output is not None:
        from evals.model_report import write_model_report

        report = write_model_report(Path(request.output), records)
        return f"results in {request.output}, report {report}"
    from evals.report import write_run_report
    from evals.subjects import run_and_step
    from evals.summary import write_summary
    from launch.run_folder import StageSeconds

    run_dir, _ = run_and_step(Path(request.model), request.step)
    write_summary(run_dir, StageSeconds(run_dir).all())
    return f"results in {run_dir / 'evals'}, report {write_run_report(run_dir)}"


def _as_rank(request: EvalRequest) -> None:
    """Join the group, score, and leave it. Raises EchoError where another rank knows the cause."""
    from evals.ranks import current_ranks
    from trellis_dist.parallel import env

    env.init_distributed("cuda" if _uses_gpus(request) else "cpu", timeout_s=WAIT_SECONDS)
    current_ranks().together(lambda: score(request))
    env.shutdown()


def _uses_gpus(request: EvalRequest) -> bool:
    """Whether to compute on GPUs; a request that is refused is refused by all together, on the CPU."""
    import torch

    try:
        device = settings_of(request)[0].device
    except (ValueError, OSError):
        return False
    return device != "cpu" and torch.cuda.is_available()


def score_as_rank(request: EvalRequest) -> None:
    """As a rank that torchrun started: a failure is one line of one rank, and ends the process at once."""
    from evals.ranks import current_ranks
    from launch.ending import end_process
    from launch.failures import lost_contact
    from launch.worker import error_line

    try:
        _as_rank(request)
    except Exception as error:
        if current_ranks().says(error) and not lost_contact(error):
            if "--debug" in sys.argv:
                traceback.print_exc()
            print(f"trellis: error: {error_line(error)}", file=sys.stderr, flush=True)
        end_process(1)


def score_on_ranks(request: EvalRequest, ranks: int) -> None:
    """Run the ranks on this machine; rank 0 has the terminal."""
    import torch

    from launch.ranks import RankError, TerminatedError, run_ranks

    devices = torch.cuda.device_count()
    if devices < ranks and _uses_gpus(request):
        raise ValueError(f"--ranks {ranks}: this machine has {devices} CUDA devices; use at most {devices}")
    folder = Path(tempfile.mkdtemp(prefix="trellis-eval-"))
    (folder / "request.json").write_text(json.dumps(dataclasses.asdict(request)))
    try:
        run_ranks(ranks, run_dir=folder, arguments=[str(folder)], module="launch.evaluation")
    except TerminatedError:
        raise RankError("ended by a signal before every task was scored", "") from None
    shutil.rmtree(folder, ignore_errors=True)


def main(arguments: list[str] | None = None) -> int:
    """Be one rank that `score_on_ranks` started; leaves its failure where the launcher finds it."""
    parser = argparse.ArgumentParser(prog="python -m launch.evaluation", description=__doc__)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args(arguments).folder
    from launch.failures import log_folder
    from launch.worker import leave_failure, redirect_output

    show_warnings_plainly()
    rank = int(os.environ["RANK"])
    if rank > 0:
        redirect_output(log_folder(folder) / f"rank-{rank:05d}.log")
    try:
        _as_rank(EvalRequest(**json.loads((folder / "request.json").read_text())))
    except Exception as error:
        leave_failure(error, run_dir=folder, rank=rank)
        return 1
    return 0


if __name__ == "__main__":
    from launch.ending import end_process
    from launch.worker import end_with_launcher

    end_with_launcher()
    status = main()
    if status:
        end_process(status)
    sys.exit(0)
