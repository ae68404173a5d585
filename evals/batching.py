"""Which prompts and which continuations are read together: few calls, and little that is read for nothing.

A batch is read up to its shortest prompt; what is left of the others is read again with each continuation.
So the sorted lengths l_1 <= ... <= l_n are cut into batches such that the tokens read are least:

    sum over batches of   overhead + sum over its prompts of (l_min - 1) + copies (l - l_min + 1)

The continuations of a batch, as rows of l_1 <= ... <= l_n tokens, are padded to the longest of a call, and so
are prompts for a model that takes pads:

    sum over calls of   overhead + rows l_max

Both by dynamic programming over the place of the last cut. ``overhead`` is in tokens: what would have been
read in the time that starting the calls takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

__all__ = ["cut", "cut_rows"]


def cut(
    lengths: Sequence[int],
    *,
    most: Callable[[int], int],
    spread: int,
    overhead: int,
    copies: int,
) -> list[int]:
    """Places before which a new batch begins, the end included: batch k is lengths[places[k]:places[k + 1]].

    Args:
        lengths: of the prompts in tokens, ascending.
        most: prompts that a batch may have, by the length of its longest.
        spread: by how many tokens the lengths of a batch may differ.
        overhead: tokens that a batch costs whatever is in it.
        copies: continuations of a prompt, about.
    """
    before = [0, *accumulate(lengths)]

    def cost(start: int, end: int) -> float:
        rows, shared = end - start, lengths[start] - 1
        again = before[end] - before[start] - rows * shared
        return overhead + rows * shared + copies * again

    def fits(start: int, end: int) -> bool:
        longest = lengths[end - 1]
        return end - start <= most(longest) and longest - lengths[start] <= spread

    return _cheapest(len(lengths), cost, fits)


def cut_rows(
    lengths: Sequence[int],
    *,
    most: Callable[[int], int],
    overhead: int,
    budget: float = math.inf,
    spread: float = math.inf,
) -> list[int]:
    """Places before which a new call begins, the end included, as ``cut`` gives them.

    Args:
        lengths: of the rows in tokens, ascending.
        most: rows that a call may have, by the length of its longest.
        overhead: tokens that a call costs whatever is in it.
        budget: tokens of a call, pads included; a row that is longer has a call of its own.
        spread: by how many tokens the lengths of a call may differ.
    """

    def fits(start: int, end: int) -> bool:
        rows, longest = end - start, lengths[end - 1]
        return rows <= most(longest) and rows * longest <= budget and longest - lengths[start] <= spread

    return _cheapest(len(lengths), lambda start, end: overhead + (end - start) * lengths[end - 1], fits)


def _cheapest(count: int, cost: Callable[[int, int], float], fits: Callable[[int, int], bool]) -> list[int]:
    """The places that cut ``count`` things at the least cost.

    ``fits`` is asked of more than one thing, and what does not fit does not with another one before it.
    """
    least, last = [0.0], [0]
    for end in range(1, count + 1):
        best, place = least[end - 1] + cost(end - 1, end), end - 1
        for start in range(end - 2, -1, -1):
            if not fits(start, end):
                break
            whole = least[start] + cost(start, end)
            if whole < best:
                best, place = whole, start
        least.append(best)
        last.append(place)
    places = [count]
    while places[-1]:
        places.append(last[places[-1]])
    return places[::-1]
