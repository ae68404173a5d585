"""Run folders below the served folders, and models beside them, by the ids that clients send."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints.commit import list_steps
from checkpoints.manifest import MANIFEST_FILE
from checkpoints.state import load_run_state
from evals.baselines import ID, Baselines, PublicError
from evals.config import EvalConfig
from evals.runs import read_recipe
from trellis_dist.files import digest

if TYPE_CHECKING:
    from pydantic import TypeAdapter

__all__ = ["PublicError", "Runs", "state_at"]

# Of a checkpoint's run state (trellis_dist.training.state), by section.
_LASTING = {
    "data": ("fingerprint", "sequence_length", "seed"),
    "model": ("vocab_size", "num_layers", "dim", "num_heads"),
    "init_from": ("manifest_sha256",),
}


class Runs:
    """The run folders directly below each of ``roots``; a client names one by its folder name alone.

    A run whose id an earlier root has too is not served.

    Args:
        roots: folders of run folders.
        baselines: models that are shown beside the runs; one with the id of a run is not served.

    Raises:
        ValueError: a root is no folder, or two of them hold runs of one id.
    """

    def __init__(self, *roots: Path, baselines: Baselines | None = None) -> None:
        assert roots, "no folder to serve"
        self._baselines = baselines
        for root in roots:
            if not root.is_dir():
                raise ValueError(f"{root} is no folder: name the one that holds the run folders")
        self.roots = tuple(dict.fromkeys(root.resolve() for root in roots))
        if shadowed := self._shadowed_runs():  # a baseline may take a name at any time: the watcher warns
            raise ValueError(f"{shadowed[0]} has the id of a run in another folder: rename one of the two")

    def ids(self) -> list[str]:
        """Ids of all runs, sorted."""
        return sorted({path.name for path in self._all()})

    def shadowed(self) -> list[Path]:
        """Folders that are not served because a run has their id: runs of later roots, and baselines."""
        runs, models = self._shadowed_runs(), self._baselines
        return runs + [models.folder / name for name in models.ids() if self.is_run(name)] if models else runs

    def _shadowed_runs(self) -> list[Path]:
        return [path for path in self._all() if self.folder(path.name) != path]

    def baseline_ids(self) -> list[str]:
        """Ids of the models that are no runs, sorted."""
        return [name for name in self._baselines.ids() if not self.is_run(name)] if self._baselines else []

    def baseline(self, name: str) -> Baselines | None:
        """The baselines, when one of them has that id."""
        found = self._baselines is not None and self._baselines.path(name) is not None
        return self._baselines if found and not self.is_run(name) else None

    def is_run(self, name: str) -> bool:
        """Whether a run has that id."""
        return bool(ID.fullmatch(name)) and any(self._is_run(root / name) for root in self.roots)

    def folder(self, run: str) -> Path:
        """The folder of a run id. Raises PublicError for anything that is none, paths included."""
        if ID.fullmatch(run):
            for root in self.roots:
                if self._is_run(root / run):
                    return root / run
        raise PublicError(f"there is no run {run[:128]!r}: GET /runs lists them")

    def _all(self) -> list[Path]:
        return [path for root in self.roots for path in root.iterdir() if self._is_run(path)]

    def _is_run(self, path: Path) -> bool:
        """A real folder of its root (no link out of it) with a recipe."""
        return bool(ID.fullmatch(path.name)) and has_recipe(path, link=False)

    def refused(self) -> list[Path]:
        """What would be served but for its name, which no client could send, or because it is a link."""
        found = [path for root in self.roots for path in root.iterdir()]
        bad_names = [path for path in found if not ID.fullmatch(path.name) and has_recipe(path, link=False)]
        links = [path for path in found if has_recipe(path, link=True)]
        return bad_names + links + (self._baselines.refused() if self._baselines else [])

    def config(self, run: str) -> EvalConfig:
        """The evals section of the run's own recipe, or the baselines' one; clients cannot send settings."""
        if (baselines := self.baseline(run)) is not None:
            return baselines.config
        return _parser().validate_python(read_recipe(self.folder(run)).get("evals", {}))

    def steps(self, run: str) -> dict[int, Path]:
        """Committed checkpoints by step; one that is being removed has lost its manifest and is not there."""
        found = list_steps(self.checkpoints(run))
        return {step: path for step, path in found.items() if (path / MANIFEST_FILE).is_file()}

    def tokens(self, run: str) -> dict[int, int]:
        """Training tokens by step, where the checkpoint says so."""
        known = {step: state_at(path)[0] for step, path in self.steps(run).items()}
        return {step: tokens for step, tokens in known.items() if tokens is not None}

    def checkpoints(self, run: str) -> Path:
        """The folder of a run's checkpoints."""
        return self.folder(run) / "checkpoints"


def has_recipe(path: Path, *, link: bool) -> bool:
    """Whether a folder, or a link to one, has a recipe; one that cannot be read has none."""
    try:
        return path.is_symlink() == link and (path / "recipe.json").is_file()
    except OSError:  # no permission, or a file system that went: it must not take the other runs along
        return False


@lru_cache(maxsize=1)
def _parser() -> TypeAdapter[EvalConfig]:
    from pydantic import TypeAdapter

    return TypeAdapter(EvalConfig)


def state_at(checkpoint: Path) -> tuple[int | None, str | None]:
    """Tokens and identity of a checkpoint."""
    try:
        return _state(checkpoint, (checkpoint / MANIFEST_FILE).stat().st_mtime_ns)
    except (OSError, ValueError):
        return None, None  # gone or damaged: whoever scores it says so


@lru_cache(maxsize=8192)
def _state(checkpoint: Path, modified: int) -> tuple[int | None, str | None]:
    """What its run state says; ``modified`` tells a later checkpoint of the same name apart."""
    state = load_run_state(checkpoint)
    tokens = state.get("tokens")
    return (tokens if isinstance(tokens, int) else None), _identity(state)


def _identity(state: Mapping[str, Any]) -> str | None:
    """What training refuses to change between two starts of a run, of states of every version.

    A difference is a run trained anew under the same name; the same may be one too, with the same seed.
    """
    if not isinstance(state.get("data"), dict):
        return None
    parts: dict[str, Any] = {}
    for section, names in _LASTING.items():
        found = state.get(section)
        parts[section] = {name: found.get(name) for name in names} if isinstance(found, dict) else None
    return digest(parts)
