"""RULER's tasks by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from evals.config import TaskName
from evals.ruler import chains, common_words, niah
from evals.ruler.haystack import Essay, Haystack, Noise
from evals.ruler.niah import NiahSpec, make_niah
from evals.ruler.question import Encode, Question

__all__ = ["RULER", "Maker", "RulerTask"]


class Maker(Protocol):
    """Writes question number ``index`` for a total of ``length`` tokens."""

    def __call__(self, *, seed: int, length: int, index: int, encode: Encode) -> Question:
        """Raises ValueError when the length is too short."""


@dataclass(frozen=True, kw_only=True)
class RulerTask:
    """One task.

    Attributes:
        name: of the task.
        title: for people.
        answer_tokens: written at most; room that every prompt leaves.
        spec: of a needle task.
        maker: of another one.
    """

    name: TaskName
    title: str
    answer_tokens: int = niah.ANSWER_TOKENS
    spec: NiahSpec | None = None
    maker: Maker | None = None

    @property
    def single(self) -> bool:
        """One needle: scored as a choice too."""
        return self.spec is not None and self.spec.single

    @property
    def essay(self) -> bool:
        """It needs prose."""
        return self.spec is not None and self.spec.essay

    def questions(self, essay: str) -> Maker:
        """What writes this task's questions; ``essay`` is the prose, where it needs some."""
        if self.spec is None:
            assert self.maker is not None, f"{self.name} has neither a needle nor a maker"
            return self.maker
        haystack: Haystack = Essay(essay) if self.essay else Noise()
        return partial(make_niah, self.spec, haystack)


def _niah(spec: NiahSpec, title: str) -> RulerTask:
    return RulerTask(name=spec.name, title=title, spec=spec)


_TASKS = (
    _niah(NiahSpec(name="niah_single_1", essay=False), "a number in repeated noise"),
    _niah(NiahSpec(name="niah_single_2"), "a number in prose"),
    _niah(NiahSpec(name="niah_single_3", kind="uuid"), "a UUID in prose"),
    _niah(NiahSpec(name="niah_single_word", kind="word"), "a word in prose"),
    _niah(NiahSpec(name="niah_multikey_1", keys=4), "one of four keys in prose"),
    _niah(NiahSpec(name="niah_multivalue", values=4), "four values of one key in prose"),
    _niah(NiahSpec(name="niah_multiquery", keys=4, asked=4), "four keys in prose"),
    RulerTask(
        name="vt",
        title="variables that share a value",
        answer_tokens=chains.ANSWER_TOKENS,
        maker=chains.make_chain,
    ),
    RulerTask(
        name="cwe",
        title="the ten most common words of a list",
        answer_tokens=common_words.ANSWER_TOKENS,
        maker=common_words.make_common_words,
    ),
)
RULER: Mapping[str, RulerTask] = {task.name: task for task in _TASKS}
