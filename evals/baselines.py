"""Models beside the runs: exports of ours and Hugging Face folders, scored once and shown without a step."""

from __future__ import annotations

import dataclasses
import logging
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from evals.config import EvalConfig, PeerBos
from evals.evaluate import subject_key
from evals.places import NO_STEP, Place
from evals.subject import Subject
from evals.subjects import identify, kind_of, load_subject
from evals.tasks.registry import get_task

__all__ = ["ID", "Baselines", "PublicError", "open_baselines"]

# Names that clients can send: of runs, and of these.
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_log = logging.getLogger(__name__)


class PublicError(ValueError):
    """A refusal whose text names ids and nothing of this machine, so that a client may read it."""


@dataclass(frozen=True, kw_only=True)
class Baselines:
    """The model folders directly below one folder; a client names one by its folder's name alone.

    Attributes:
        folder: holds them.
        config: what they are scored on.
        trust_remote_code: run the Python files of Hugging Face folders.
    """

    folder: Path
    config: EvalConfig
    trust_remote_code: bool = False
    _said: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    def ids(self) -> list[str]:
        """Names of all model folders, sorted; no links. None while the folder cannot be read."""
        return sorted(path.name for path in self._found() if self.path(path.name) is not None)

    def refused(self) -> list[Path]:
        """What would be a model but for its name, which no client could send, or because it is a link."""
        found = self._found()
        bad_names = [path for path in found if not ID.fullmatch(path.name) and _is_model(path, link=False)]
        return bad_names + [path for path in found if _is_model(path, link=True)]

    def _found(self) -> list[Path]:
        """What the folder holds; one that went, or a disk that did, must not take the runs along."""
        try:
            found = list(self.folder.iterdir())
        except OSError as error:
            if not self._said:
                _log.warning("no baseline is served: %s", error)
                self._said.add("gone")
            return []
        self._said.clear()
        return found

    def path(self, name: str) -> Path | None:
        """The folder of that name, None for anything that is no model, paths included."""
        path = self.folder / name
        return path if ID.fullmatch(name) and _is_model(path, link=False) else None

    def mark(self, name: str) -> tuple[tuple[str, int, int], ...]:
        """Names, sizes and times of a model's files: while it stays the same, nothing is read again."""
        path = self.path(name)
        files = sorted(item for item in path.iterdir() if item.is_file()) if path else []
        found = [(item.name, item.stat()) for item in files]
        return tuple((name, status.st_size, status.st_mtime_ns) for name, status in found)

    def place(self, name: str, task: str) -> Place:
        """Where and under which key a task of a model is kept. Raises ValueError or OSError: it cannot be."""
        path, wanted = self.path(name), get_task(task)
        if path is None:  # it went since it was listed
            raise PublicError(f"there is no baseline {name}: GET /runs lists them")
        weights, tokenizer = _digests(path, self.trust_remote_code, self.config.peer_bos, self.mark(name))
        key = subject_key(wanted, self.config, weights=weights, tokenizer=tokenizer)
        return Place(run=name, step=NO_STEP, task=task, key=key, digest=weights)

    def key(self, subject: Subject, task: str) -> str:
        """The key of a task on a model that was loaded."""
        weights, tokenizer = subject.digest, subject.tokenizer_digest
        return subject_key(get_task(task), self.config, weights=weights, tokenizer=tokenizer)

    def load(self, name: str) -> Subject:
        """The model of that name. Raises ValueError or OSError: it is none, or cannot be opened."""
        return load_subject(
            self.folder / name,
            device=self.config.device,
            trust_remote_code=self.trust_remote_code,
            peer_bos=self.config.peer_bos,
        )


def _is_model(path: Path, *, link: bool) -> bool:
    """Whether a folder, or a link to one, holds a model that is no run; one that cannot be read is none."""
    try:
        return path.is_symlink() == link and path.is_dir() and kind_of(path) != "run"
    except (ValueError, OSError):
        return False


@lru_cache(maxsize=1024)
def _digests(path: Path, trust_remote_code: bool, bos: PeerBos, mark: object) -> tuple[str, str]:
    """Of a model's weights and tokenizer; a folder that stays as it is, is read once."""
    return identify(path, trust_remote_code=trust_remote_code, peer_bos=bos)


def open_baselines(folder: Path, config: EvalConfig, *, trust_remote_code: bool = False) -> Baselines:
    """The models below ``folder``, scored on those of ``config``'s tasks that suit any model.

    Raises:
        ValueError: no such folder, or no such task.
    """
    if not folder.is_dir():
        raise ValueError(f"--baselines {folder} is no folder: name the one that holds the model folders")
    tasks = tuple(name for name in config.tasks if get_task(name).suits(config, run=False))
    if not tasks:
        raise ValueError(
            f"evals.tasks = {list(config.tasks)}: all of them need a run; name others in --baselines-recipe"
        )
    config = dataclasses.replace(config, tasks=tasks)
    return Baselines(folder=folder.resolve(), config=config, trust_remote_code=trust_remote_code)
