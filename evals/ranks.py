"""One evaluation on several ranks: the work is divided, and every rank gets every result.

All exchange between ranks goes through `Ranks.together`, so that a rank which fails anywhere is heard by the
others at their next exchange, wherever that is: it raises its own error, they raise an `EchoError`. What runs
on ranks is therefore called by `together` as a whole.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

from trellis_dist.training.errors import EchoError

T = TypeVar("T")

__all__ = ["Ranks", "current_ranks"]

# Set on an error that all ranks know of, to the first rank that failed: no outer exchange tells it again.
_TOLD = "_told_to_all_ranks"


def current_ranks() -> Ranks:
    """The ranks of this process's group; one rank where there is no group."""
    import torch.distributed as dist

    from trellis_dist.parallel import env

    return Ranks(env.rank(), env.world_size()) if dist.is_initialized() else Ranks()


@dataclass(frozen=True)
class Ranks:
    """This process's place among the ranks that score together.

    Attributes:
        rank: from 0; rank 0 writes files and prints.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """True on the rank that writes and prints."""
        return self.rank == 0

    def together(self, work: Callable[[], T]) -> list[T]:
        """``work()`` of every rank, in rank order, on every rank; every rank must call it at the same place.

        Raises:
            EchoError: other ranks failed, and this one did not; those raise what their ``work`` raised.
        """
        if self.size == 1:
            return [work()]
        own: Exception | None = None
        try:
            message: tuple[str, bytes] = ("", pickle.dumps(work()))
        except Exception as error:
            if hasattr(error, _TOLD):
                raise
            own, message = error, (f"{type(error).__name__}: {error}", b"")
        heard = self._exchange(message)
        failed = [(rank, text) for rank, (text, _) in enumerate(heard) if text]
        if failed:
            first, text = failed[0]
            raised = own or EchoError(f"another rank failed: rank {first}: {text}")
            setattr(raised, _TOLD, first)
            raise raised
        return [pickle.loads(content) for _, content in heard]

    def says(self, error: Exception) -> bool:
        """Whether this rank is the one to say an error that `together` raised, so that it is said once."""
        return getattr(error, _TOLD, self.rank) == self.rank

    def _exchange(self, message: tuple[str, bytes]) -> list[tuple[str, bytes]]:
        import torch.distributed as dist

        heard: list[Any] = [None] * self.size
        dist.all_gather_object(heard, message)
        return heard

    def from_main(self, work: Callable[[], T]) -> T:
        """``work()`` of rank 0, on every rank: for what must not differ, such as which step is newest."""
        found: list[Any] = self.together(lambda: work() if self.is_main else None)
        return found[0]  # type: ignore[no-any-return]

    def divide(
        self, count: int, work: Callable[[int], T], *, costs: Sequence[float] | None = None
    ) -> list[T]:
        """``[work(0), ..., work(count - 1)]`` on every rank, each computed by one of them.

        Args:
            count: pieces of work; what they are must not depend on the number of ranks.
            work: of one piece; its result is pickled.
            costs: relative cost of each; the dearest are done first, each by the rank with the least to do.

        Raises:
            EchoError: as `together`.
        """
        mine = self._shares(costs if costs is not None else [1.0] * count)[self.rank]
        parts = self.together(lambda: [(piece, work(piece)) for piece in mine])
        found = dict(chain.from_iterable(parts))
        assert sorted(found) == list(range(count)), "the ranks disagree about what there is to do"
        return [found[piece] for piece in range(count)]

    def _shares(self, costs: Sequence[float]) -> list[list[int]]:
        """Which pieces each rank does."""
        shares: list[list[int]] = [[] for _ in range(self.size)]
        load = [0.0] * self.size
        for piece in sorted(range(len(costs)), key=lambda place: -costs[place]):
            least = load.index(min(load))
            shares[least].append(piece)
            load[least] += costs[piece]
        return shares
