"""`trellis export`, `import` and `download`: weights on their way to other programs and places, and back."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from checkpoints.import_model import Imported

__all__ = ["download", "export", "import_weights"]


# Times that the folder of checkpoints is listed: steps may go before they are pinned, and newer ones come.
CHOICES = 3


class Format(StrEnum):
    """What an export is for."""

    TRELLIS = "trellis"
    HF = "hf"


def export(
    source: Annotated[
        Path,
        typer.Argument(metavar="SOURCE", help="a run folder, or its RUN/checkpoints/step-N"),
    ],
    folder: Annotated[Path | None, typer.Argument(metavar="OUTPUT", help="the same as --output")] = None,
    output: Annotated[Path | None, typer.Option(help="new folder for weights and tokenizer")] = None,
    format_: Annotated[
        Format,
        typer.Option("--format", help="hf: for the Auto classes of transformers"),
    ] = Format.TRELLIS,
    step: Annotated[
        int | None, typer.Option(help="a saved step; the newest verified one unless given")
    ] = None,
    dataset_dir: Annotated[
        Path | None, typer.Option(help="where the run's token shards are now, if they were moved")
    ] = None,
) -> None:
    """Write a run's weights (safetensors), model section and tokenizer as a folder of their own."""
    if (folder is None) == (output is None):
        raise ValueError("export needs one new folder: give OUTPUT, or --output OUTPUT")
    target = output or folder
    assert target is not None, "checked above"
    from checkpoints.export import export_model
    from checkpoints.hf_export import export_for_transformers
    from data_pipeline.tokenizer import Tokenizer
    from evals.runs import find_dataset
    from evals.subjects import run_and_step
    from launch.recipe import resolve
    from launch.run_folder import recipe_of_run

    run_dir, step = run_and_step(source, step)
    recipe = recipe_of_run(run_dir)
    with _held(run_dir, step) as checkpoint:
        dataset, _ = find_dataset(run_dir, checkpoint, dataset_dir=dataset_dir)
        given: dict[str, Any] = {
            "tokenizer": dataset / "tokenizer.model",
            "model_config": resolve(recipe)["model"],
        }
        if format_ is Format.HF:
            ids = Tokenizer.load(given["tokenizer"])
            export_for_transformers(checkpoint, target, **given, bos_id=ids.bos_id, eos_id=ids.eos_id)
        else:
            export_model(checkpoint, target, **given)
    print(f"exported {checkpoint} to {target}")


@contextmanager
def _held(run_dir: Path, step: int | None) -> Iterator[Path]:
    """A verified checkpoint of the run, pinned while the block runs: a run at work removes old ones.

    Raises:
        ValueError: as `evals.runs.find_checkpoint`.
    """
    from checkpoints.pins import unpin

    owner = f"export-{socket.gethostname()}-{os.getpid()}"
    checkpoint = _pin_sound(run_dir, step, owner)
    try:
        yield checkpoint
    finally:
        with suppress(OSError):
            unpin(checkpoint, owner)


def _pin_sound(run_dir: Path, step: int | None, owner: str) -> Path:
    """Pin the newest checkpoint (or that of `step`), then verify it; one that went first is passed over."""
    from checkpoints.commit import CheckpointWarning, list_steps
    from checkpoints.pins import pin, unpin
    from checkpoints.verify import verify_checkpoint
    from evals.runs import find_checkpoint

    root, damaged = run_dir / "checkpoints", set[Path]()
    for _ in range(CHOICES):
        for number, path in list_steps(root).items():
            if step not in (None, number) or path in damaged:
                continue
            try:
                pin(path, owner)
            except FileNotFoundError:
                continue
            except OSError:  # a folder that is not ours to write to: go on without
                pass
            if not (problems := verify_checkpoint(path)):
                return path
            damaged.add(path)
            with suppress(OSError):
                unpin(path, owner)
            if step is None:
                text = f"{path} is damaged and was passed over: {'; '.join(problems)}"
                warnings.warn(text, CheckpointWarning, stacklevel=2)
    return find_checkpoint(run_dir, step=step)  # none: it says why


def import_weights(
    directory: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="a folder that `trellis export` wrote")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="new folder for the checkpoint and model.toml")] = None,
    from_transformer: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="a Llama in a Hugging Face folder, to start a Trellis from"),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="MODEL.B=C", help="of --from-transformer: a key of the model section; repeatable"
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="of --from-transformer: of what the source does not have (0 unless given)"),
    ] = None,
) -> None:
    """Turn an exported folder, or a Llama, into a checkpoint that `trellis train --init-from` starts from."""
    if output is None or (directory is None) == (from_transformer is None):
        raise ValueError("import needs --output FOLDER, and DIR or --from-transformer DIR: one of the two")
    from checkpoints.import_model import import_folder, write_import

    if from_transformer is not None:
        imported = _converted(from_transformer, set_ or [], seed or 0)
    else:
        assert directory is not None, "checked above"
        if set_:
            raise ValueError(f"--set {set_[0]}: an exported model keeps its section")
        if seed is not None:
            raise ValueError(f"--seed {seed}: of an exported model nothing is drawn; leave it out")
        imported = import_folder(directory)
    source = from_transformer or directory
    assert source is not None, "checked above"
    write_import(imported, output, source=source)
    for line in _account(imported, output):
        print(line)


def download(
    url: Annotated[
        str,
        typer.Argument(metavar="URL", help="an uploaded checkpoint, such as s3://bucket/run/step-00004000"),
    ],
    output: Annotated[Path, typer.Option(help="folder of checkpoints, such as runs/NAME/checkpoints")],
) -> None:
    """Bring an uploaded checkpoint back: verified byte for byte, then put beside those that are there."""
    from checkpoints.upload import download as fetch
    from checkpoints.upload import redact

    print(f"{redact(url)} is in {fetch(url, output)}, verified")


def _converted(directory: Path, assignments: list[str], seed: int) -> Imported:
    from checkpoints.from_llama import convert_llama, llama_section
    from launch.layers import override

    strangers = [item for item in assignments if not item.startswith("model.")]
    if strangers:
        raise ValueError(f"--set {strangers[0]}: only model.* can be set here")
    table: dict[str, Any] = {"model": llama_section(directory)}
    override(table, assignments)
    return convert_llama(directory, table["model"], seed=seed)


def _account(imported: Imported, output: Path) -> list[str]:
    """What became of every tensor, and how to go on."""
    lines = [f"imported {len(imported.mapped)} tensors into {output / 'step-00000000'}"]
    lines += _listed("not taken over from the source", imported.unmapped)
    lines += _listed("initialised anew", imported.fresh)
    lines += [f"note: {note}" for note in imported.notes]
    lines.append(
        f"to go on: trellis train RECIPE+{output / 'model.toml'} --init-from {output}, with the source's own "
        "tokenizer as data.tokenizer.path"
    )
    return lines


def _listed(title: str, found: Mapping[str, str]) -> list[str]:
    return [f"{title} ({len(found)}):", *(f"  {name}: {why}" for name, why in found.items())] if found else []
