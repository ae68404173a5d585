"""A text and the settings of a model so small that a run of it takes seconds."""

from __future__ import annotations

from pathlib import Path

from launch.experiments.spec import RunSpec, assignments

TINY = assignments(
    {
        "model": {"num_layers": 1, "dim": 32, "num_heads": 2, "vocab_size": 300},
        "model.trellis": {"slots": 16, "chunk_size": 16},
        "data": {"sequence_length": 128, "validation_fraction": 0.2, "tokenizer": {"vocab_size": 300}},
        "mesh": {"dp": 1},
        "training": {"engine": "local", "steps": 12, "global_batch_tokens": 512, "micro_batch": 4},
        "checkpoint": {"interval": 2, "keep": 1},
        "schedule": {"warmup_steps": 2},
        "evals": {"tasks": ["perplexity"]},
        "logging": {"tensorboard": False, "interval": 2, "probe_interval": 6},
    }
)


def write_text(folder: Path) -> Path:
    """A folder of documents of which a tokenizer of 300 pieces can be made."""
    folder.mkdir(parents=True)
    for i in range(12):
        lines = (f"The number {j * 7 % 13} of line {j} in file {i} is small. " for j in range(300))
        (folder / f"{i}.txt").write_text("".join(lines))
    return folder


def tiny_spec(folder: Path, name: str = "tiny", *changes: str) -> RunSpec:
    """A spec on the text in FOLDER/text (which need not be there to read the recipe)."""
    source = ("data.source.kind=path", f"data.source.path={folder / 'text'}")
    return RunSpec(
        name=name,
        recipe="quickstart",
        overrides=(*TINY, *source, *changes),
        dataset_dir=str(folder / "shards"),
        about={"row": name},
    )
