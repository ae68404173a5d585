"""What a run remembers beside its tensors, and the checks when it comes back."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoints.commit import step_of
from checkpoints.manifest import load_manifest
from checkpoints.pins import pin, unpin
from checkpoints.state import latest_verified, load_run_state, verify_checkpoint
from trellis_dist.files import digest, read_json, write_json
from trellis_dist.models.baseline_config import BASELINES, READERS
from trellis_dist.models.config import ATTENTION_KINDS, ModelConfig
from trellis_dist.training.job import Job, Resume

__all__ = ["Progress", "Start", "check_same_run", "find_start", "let_go", "run_state"]


INIT_RECORD = "init_from.json"  # in the run folder


@dataclasses.dataclass
class Progress:
    """How far a run is: ``samples`` is the data counter, rows consumed over the whole mesh."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    skipped: int = 0
    rollbacks: int = 0

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Progress:
        """Read what ``run_state`` wrote; a count that its version of the code did not have yet is 0."""
        return cls(**{field.name: int(state.get(field.name, 0)) for field in dataclasses.fields(cls)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """What a start of a run begins with.

    Attributes:
        progress: how far the run is.
        checkpoint: its own, to be resumed; None for a new run.
        optimizer_steps: updates applied so far.
        weights: the checkpoint that a new run takes its weights from; None without ``training.init_from``.
        origin: where the weights of the run came from at its beginning: path, step, digest of the manifest.
        guards: what the watchers of the numbers remember.
        pending_row: the row of the last step, if its validation was broken off by a request to end.
    """

    progress: Progress
    checkpoint: Path | None = None
    optimizer_steps: int = 0
    weights: Path | None = None
    origin: Mapping[str, Any] | None = None
    guards: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    pending_row: Mapping[str, float] = dataclasses.field(default_factory=dict)


def run_state(
    job: Job,
    progress: Progress,
    *,
    optimizer_steps: int,
    fingerprint: str,
    measured: Mapping[str, float] | None = None,
    origin: Mapping[str, Any] | None = None,
    guards: Mapping[str, Any] | None = None,
    pending_row: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Return the JSON state of a checkpoint.

    ``measured`` are metrics of this very step, ``origin`` says where the first weights came from, ``guards``
    is what the watchers of the numbers remember, ``pending_row`` waits for its validation.
    """
    return {
        **dataclasses.asdict(progress),
        "optimizer_steps": optimizer_steps,
        "init_from": dict(origin) if origin else None,
        "guards": dict(guards or {}),
        "pending_row": _finite(pending_row or {}),
        "metrics": _finite(measured or {}),
        "optimizer": _plain(dataclasses.asdict(job.optimizer)),
        "schedule": _plain(dataclasses.asdict(job.schedule)),
        "data": _data_identity(job, fingerprint),
        "model": _plain(dataclasses.asdict(job.model)),
        "mesh": dataclasses.asdict(job.mesh),
        "engine": f"{job.training.engine}-{job.training.zero_stage}",
        "recipe_digest": digest(_plain(job.recipe)),
    }


def _finite(values: Mapping[str, float]) -> dict[str, float]:
    """JSON has no NaN."""
    return {key: value for key, value in values.items() if math.isfinite(value)}


# What a state says nothing of when it was saved before there was a choice.
_DATA_DEFAULTS: dict[str, Any] = {
    "packing": "concat",
    "chunk_aligned": False,
    "mixture": {},
    "carry_rows": 1,
    "rows per step": None,
}


def _data_identity(job: Job, fingerprint: str) -> dict[str, Any]:
    """All that decides which rows come when, but the chunk size, which is the model's."""
    data = job.data
    return {
        "fingerprint": fingerprint,
        "sequence_length": data.sequence_length,
        "seed": data.seed,
        "packing": data.packing,
        "chunk_aligned": data.chunk_aligned,
        "mixture": {name: source.weight for name, source in data.mixture.items()},
        "carry_rows": data.carry_rows,
        # Rows that carry states keep their places from step to step.
        "rows per step": job.global_rows if data.carry_rows > 1 else None,
    }


def _plain(value: Any) -> Any:
    """Turn tuples into lists, as a file would."""
    return json.loads(json.dumps(value))


def check_same_run(state: Mapping[str, Any], job: Job, *, fingerprint: str, checkpoint: Path) -> None:
    """Raise ``ValueError`` when ``checkpoint`` belongs to other data or another model, with both values."""
    for key, value in _data_identity(job, fingerprint).items():
        saved = {**_DATA_DEFAULTS, **state["data"]}[key]
        if saved != value:
            raise ValueError(
                f"the data changed: data {key} is {value}, but {checkpoint} was trained with {saved}: "
                "restore the data set and its settings, or start a new run in another folder"
            )
    model, saved = _plain(dataclasses.asdict(job.model)), _completed(state["model"], ModelConfig)
    changed = [key for key in model if saved.get(key) != model[key]]
    if changed:
        key = changed[0]
        raise ValueError(
            f"model.{key} = {model[key]}, but {checkpoint} was saved with {saved.get(key)}: use the "
            "recipe the run began with, or start a new run in another folder"
        )


def _completed(saved: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """A saved section with the defaults of the fields that its version of the code did not have yet."""
    section = dict(saved)
    for field in dataclasses.fields(kind):
        if field.default is not dataclasses.MISSING:
            section.setdefault(field.name, _plain(field.default))
        elif isinstance(field.default_factory, type):
            section[field.name] = _completed(section.get(field.name, {}), field.default_factory)
    return section


def find_start(root: Path, resume: Resume, job: Job, *, fingerprint: str) -> Start:
    """Choose what to begin with: the newest verified checkpoint of the run, given weights, or neither.

    Raises:
        FileNotFoundError: ``resume`` is "require" and there is none; no checkpoint at ``training.init_from``.
        ValueError: all that are there are damaged, or the newest one belongs to other data or another model.
    """
    present = sorted(root.glob("step-*")) if root.is_dir() else []
    found = latest_verified(root)
    if found is not None:
        return _resumed(found, job, fingerprint=fingerprint)
    if present:
        raise ValueError(
            f"none of the {len(present)} checkpoints in {root} is intact: restore one, or use another folder"
        )
    if resume == "require":
        raise FileNotFoundError(f"no checkpoint in {root}: start without --resume")
    if job.training.init_from:
        return _initialised(job.training.init_from, root.parent, job.model)
    return Start(progress=Progress())


def _resumed(found: Path, job: Job, *, fingerprint: str) -> Start:
    state = load_run_state(found)
    check_same_run(state, job, fingerprint=fingerprint, checkpoint=found)
    return Start(
        progress=Progress.from_state(state),
        checkpoint=found,
        optimizer_steps=int(state["optimizer_steps"]),
        origin=state.get("init_from"),
        guards=state.get("guards", {}),
        pending_row=state.get("pending_row", {}),
    )


def _initialised(given: str, run_dir: Path, model: ModelConfig) -> Start:
    """The weights of a checkpoint, or of the newest verified one in a run or a folder of checkpoints.

    What was chosen is remembered in ``RUN/init_from.json``: a start that is killed before its first save
    begins again with the same weights, also if the run they come from has gone on. It is pinned until
    ``let_go``.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: a damaged one, or one of a model in which the weights mean something else.
    """
    record = run_dir / INIT_RECORD
    known = read_json(record) if record.is_file() else {}
    weights = Path(known["path"]) if known.get("given") == given else _chosen(Path(given))
    with contextlib.suppress(OSError):  # a folder that is not ours to write to
        pin(weights, _pin_owner())
    problems = verify_checkpoint(weights)
    if problems:
        raise ValueError(f"training.init_from = {given} is damaged: {problems[0]}")
    _check_same_function(load_run_state(weights).get("model"), model, weights)
    manifest = load_manifest(weights)
    origin = {"path": str(weights), "step": manifest.step, "manifest_sha256": manifest.digest}
    if known.get("given") == given and known != {"given": given, **origin}:
        raise ValueError(
            f"{weights} is not the checkpoint any more that {run_dir} began with: use another --run-dir"
        )
    write_json(record, {"given": given, **origin})
    return Start(progress=Progress(), weights=weights, origin=origin)


# Of a model section, what may differ from that of the weights a run begins with: the sizes, which shapes
# show, what only draws first weights, and the chunk, which goes with the length of the context.
_SIZES = ("vocab_size", "num_layers", "dim", "mlp_hidden", "tie_embeddings")
# The chunk size and the base of rotary positions are what a longer context may change.
_FREE = (
    *_SIZES,
    "init_std",
    "mixer_out_init",
    "trellis.step_size_bias",
    "trellis.value_step_size_bias",
    "trellis.initial_value_memory",
    "trellis.chunk_size",
    "attention.rope_theta",
    "baselines.chunk_size",
    "baselines.backend",
    "baselines.titans_keep_bias",
    "baselines.titans_momentum_bias",
)


# Inner tables of the model section and their keys, and the layer kinds that read them.
_READERS = {
    "trellis": ("trellis",),
    "attention": ATTENTION_KINDS,
    "attention.window": ("attention",),
    "attention.sliding_window": ("sliding_window",),
    "baselines": BASELINES,
    **{f"baselines.{option}": kinds for option, kinds in READERS.items()},
}


def _check_same_function(saved: Any, model: ModelConfig, weights: Path) -> None:
    """Raise ``ValueError`` when weights saved with ``saved`` would mean something else in ``model``."""
    if not isinstance(saved, Mapping):  # not every checkpoint says what its model was
        return
    theirs = _spelled_out(_completed(saved, ModelConfig), model.num_layers)
    ours = _spelled_out(_plain(dataclasses.asdict(model)), model.num_layers)
    kinds = {*ours["pattern"], *theirs["pattern"]}
    for key, value in ours.items():
        table = key.partition(".")[0]
        readers = _READERS.get(key, _READERS.get(table))
        unused = readers is not None and kinds.isdisjoint(readers)
        learned = key == "trellis.gate_bias" and "fixed" not in ours["trellis.gates"]
        if key not in _FREE and not unused and not learned and theirs.get(key) != value:
            raise ValueError(
                f"model.{key} = {value}, but {weights} was saved with {theirs.get(key)}, and its weights "
                "mean something else with another value: use that one (None: leave the key out)"
            )


def _spelled_out(section: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Key -> value, those of an inner table as "table.key"; what is cycled over the layers, once for each."""
    found: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, Mapping):
            found |= {f"{key}.{name}": each for name, each in value.items()}
        else:
            found[key] = value
    for key in ("pattern", "trellis.gates"):
        found[key] = [found[key][layer % len(found[key])] for layer in range(layers)]
    return found


def _chosen(source: Path) -> Path:
    folder = source / "checkpoints" if (source / "checkpoints").is_dir() else source
    if not folder.is_dir():
        raise FileNotFoundError(f"training.init_from = {source}: no such folder; give a run or a checkpoint")
    weights = source if step_of(folder) is not None else latest_verified(folder)
    if weights is None:
        raise FileNotFoundError(
            f"training.init_from = {source}: no sound checkpoint (step-N) in it; `trellis doctor` says more"
        )
    return weights


def let_go(start: Start) -> None:
    """Give up the pin on the weights that a run began with, once every rank has read them."""
    if start.weights is not None:
        with contextlib.suppress(OSError):
            unpin(start.weights, _pin_owner())


def _pin_owner() -> str:
    return f"init-{socket.gethostname()}-{os.getpid()}"
