"""`trellis eval`, `eval-service` and `generate`: any model scored, or made to write."""

from __future__ import annotations

import difflib
import json
import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from evals.writing import Written

__all__ = ["eval_service", "evaluate", "generate"]


class Dtype(StrEnum):
    """Of the weights of a Hugging Face model."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


ModelArgument = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL", help="a run, RUN/checkpoints/step-N, an export, or a local Hugging Face folder"
    ),
]
Step = Annotated[
    int | None, typer.Option(help="of a run: a saved step; the newest verified one unless given")
]
MovedDataset = Annotated[
    Path | None,
    typer.Option("--dataset-dir", help="of a run: where its token shards are now, if moved"),
]
Trust = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="run the Python files of a Hugging Face folder"),
]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="of a Hugging Face model's weights")]


def evaluate(
    model: ModelArgument,
    tasks: Annotated[
        str | None, typer.Option(metavar="A,B", help="what to score; the recipe's evals.tasks unless given")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="EVALS.KEY=VALUE", help="override a key of evals; repeatable"),
    ] = None,
    step: Step = None,
    dataset_dir: MovedDataset = None,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="for records and report; needed unless MODEL is a run")
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="processes on this machine that share the work, one per GPU")
    ] = None,
    trust_remote_code: Trust = False,
    dtype: DtypeOption = Dtype.FLOAT32,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Score a model: a run as its recipe says (RUN/evals/ and RUN/report.html), any other as you say.

    On several ranks: --ranks N here, or under torchrun: torchrun --nproc-per-node N -m launch.cli eval ...
    """
    from launch.evaluation import EvalRequest, score, score_as_rank, score_on_ranks, settings_of
    from launch.ranks import under_torchrun

    request = EvalRequest(
        model=str(model),
        assignments=[*(set_ or []), *_task_assignments(tasks)],
        step=step,
        dataset_dir=None if dataset_dir is None else str(dataset_dir),
        output=None if output is None else str(output),
        trust_remote_code=trust_remote_code,
        dtype=dtype.value,
        as_json=as_json,
    )
    if under_torchrun():
        if ranks is not None:
            raise ValueError(f"--ranks {ranks}: the ranks are started already; leave it out under torchrun")
        score_as_rank(request)
        return
    settings_of(request)  # refused before anything starts
    if ranks is not None and ranks > 1:
        score_on_ranks(request, ranks)
    else:
        score(request)


def _task_assignments(tasks: str | None) -> list[str]:
    """``--tasks a,b`` as an assignment; a name that is no task is refused with the closest one."""
    if tasks is None:
        return []
    from evals.tasks.registry import TASKS

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    for name in names:
        if name not in TASKS:
            close = difflib.get_close_matches(name, TASKS, n=3, cutoff=0.5) or sorted(TASKS)
            raise ValueError(f"--tasks {name}: no such task; did you mean {', '.join(close)}?")
    if not names:
        raise ValueError(f"--tasks {tasks!r} names none: choose among {', '.join(sorted(TASKS))}")
    return [f"evals.tasks={json.dumps(names)}"]


def eval_service(
    roots: Annotated[
        list[Path] | None, typer.Argument(metavar="[ROOT]...", help="folders that hold run folders; runs/")
    ] = None,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen on")] = 8321,
    workers: Annotated[int, typer.Option(help="worker processes, or Ray actors")] = 1,
    ray_address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT|auto|local", help="work on this Ray cluster; all nodes see the same ROOTs"
        ),
    ] = None,
    database: Annotated[
        Path | None, typer.Option(help="the queue, on a local disk; ROOT/evaluations.sqlite unless given")
    ] = None,
    baselines: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="exports and Hugging Face folders to score beside the runs"),
    ] = None,
    baselines_recipe: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="a recipe (.toml, .json) whose evals section they are scored on"),
    ] = None,
    trust_remote_code: Trust = False,
    job_timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="a task that takes longer is taken for stuck")
    ] = 6 * 3600.0,
) -> None:
    """Score checkpoints as they are committed, behind HTTP with a web page.

    On an address others can reach, clients need the token in the environment variable TRELLIS_TOKEN.
    """
    from evals.service import serve
    from launch.evaluation import baselines_of

    serve(
        roots or [Path("runs")],
        host=host,
        port=port,
        workers=workers,
        token=os.environ.get("TRELLIS_TOKEN"),
        ray_address=ray_address,
        database=database,
        baselines=baselines_of(baselines, baselines_recipe, trust_remote_code=trust_remote_code),
        job_seconds=job_timeout,
    )


def generate(
    model: ModelArgument,
    prompt: Annotated[list[str] | None, typer.Option(help="text to continue; repeatable")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help='one prompt per line; of a .jsonl file {"prompt": ...} per line'),
    ] = None,
    tokens: Annotated[int, typer.Option(help="tokens to write at most")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.8,
    top_p: Annotated[
        float, typer.Option(help="draw among the most probable tokens holding this mass")
    ] = 0.95,
    stop: Annotated[list[str] | None, typer.Option(help="end before this text; repeatable")] = None,
    seed: Annotated[int, typer.Option(help="of the draws")] = 0,
    step: Step = None,
    dataset_dir: MovedDataset = None,
    trust_remote_code: Trust = False,
    dtype: DtypeOption = Dtype.FLOAT32,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object per prompt")] = False,
) -> None:
    """Continue texts with any model. One is printed as it is written; several are written together."""
    from evals.generate import as_json as json_of
    from evals.generate import generate as write
    from evals.generate import read_prompts
    from evals.sampling import Sampling
    from evals.subjects import load_subject

    sampling = Sampling(
        max_tokens=tokens, temperature=temperature, top_p=top_p, seed=seed, stop=tuple(stop or ())
    )
    texts = read_prompts(prompt or [], prompts)
    subject = load_subject(
        model,
        step=step,
        dataset_dir=dataset_dir,
        trust_remote_code=trust_remote_code,
        dtype=dtype.value,
    )
    if len(texts) == 1 and not as_json:
        print(texts[0], end="", flush=True)
        write(subject, texts, sampling, on_text=lambda _, text: print(text, end="", flush=True))
        print()
        return
    for text, written in zip(texts, write(subject, texts, sampling)):
        print(json.dumps(json_of(text, written), ensure_ascii=False) if as_json else _shown(text, written))


def _shown(prompt: str, written: Written) -> str:
    """A prompt with its continuation, and a line that parts it from the next."""
    return f"{prompt}{written.text}\n{'-' * 40}"
