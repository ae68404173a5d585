"""From any folder to a model that can be scored: a run, a checkpoint, an export, or one of Hugging Face."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from checkpoints.commit import step_of
from checkpoints.export import EXPORT, TOKENIZER
from evals.config import Device, PeerBos
from evals.peers import Dtype, is_peer, load_peer, peer_digests
from evals.runs import load_export, load_run
from evals.subject import Subject
from trellis_dist.files import sha256_file

Kind = Literal["run", "export", "peer"]

__all__ = ["Kind", "identify", "kind_of", "load_subject", "run_and_step"]


def kind_of(path: Path) -> Kind:
    """What kind of model a folder holds. Raises ValueError: none that can be scored."""
    if any((folder / "recipe.json").is_file() for folder in (path, run_and_step(path, None)[0])):
        return "run"
    if (path / EXPORT).is_file():
        return "export"
    if is_peer(path):
        return "peer"
    raise ValueError(
        f"{path} is no run folder (recipe.json), no export ({EXPORT}) and no Hugging Face model (config.json)"
    )


def run_and_step(path: Path, step: int | None) -> tuple[Path, int | None]:
    """The run that ``path`` is, or is a checkpoint of, and the step asked for.

    Raises:
        ValueError: a checkpoint together with another step, or one outside a run.
    """
    named = step_of(path)
    if named is None or (path / "recipe.json").is_file():
        return path, step
    if step is not None and step != named:
        raise ValueError(f"{path} is step {named} and --step is {step}: leave --step out")
    if path.absolute().parent.name != "checkpoints":
        raise ValueError(f"{path} is not RUN/checkpoints/{path.name}: give the run folder and --step {named}")
    return path.absolute().parent.parent, named


def load_subject(
    path: Path,
    *,
    step: int | None = None,
    device: Device = "auto",
    dataset_dir: Path | None = None,
    trust_remote_code: bool = False,
    dtype: Dtype = "float32",
    peer_bos: PeerBos = "tokenizer",
) -> Subject:
    """Open whatever model a folder holds.

    Args:
        path: a run, RUN/checkpoints/step-N, what `trellis export` wrote (fp32, as our own code has it), or a
            Hugging Face folder.
        step, dataset_dir: of a run, as `evals.runs.load_run`.
        trust_remote_code, dtype, peer_bos: of a Hugging Face folder, as `evals.peers.load_peer`.

    Raises:
        ValueError, OSError: it is none of these, or cannot be opened; one line says why.
    """
    path = Path(path)
    kind = kind_of(path)
    if dtype != "float32" and kind != "peer":
        raise ValueError(f"--dtype {dtype}: {path} is no Hugging Face model, and ours are scored in float32")
    if step is not None and kind != "run":
        raise ValueError(f"--step {step}: {path} is no run folder, and only a run has steps")
    if kind == "run":
        run_dir, step = run_and_step(path, step)
        return load_run(run_dir, step=step, device=device, dataset_dir=dataset_dir)
    if kind == "export":
        return load_export(path, device=device)
    return load_peer(path, trust_remote_code=trust_remote_code, device=device, dtype=dtype, bos=peer_bos)


def identify(
    path: Path, *, trust_remote_code: bool = False, peer_bos: PeerBos = "tokenizer"
) -> tuple[str, str]:
    """Digests of the weights and of the tokenizer that `load_subject` gives an export or a peer; not loaded.

    Raises:
        ValueError, OSError: it is neither, or would be refused.
    """
    kind = kind_of(path)
    if kind == "run":
        raise ValueError(f"{path} is a run: it is scored checkpoint by checkpoint")
    if kind == "export":
        return sha256_file(path / EXPORT), sha256_file(path / TOKENIZER)
    return peer_digests(path, trust_remote_code=trust_remote_code, bos=peer_bos)
