"""Which prompts are read together: few batches, and little that is read more than once.

A batch is read up to its shortest prompt; what is left of the others is read again with each continuation.
So the sorted lengths l_1 <= ... <= l_n are cut into batches such that the tokens read are least:

    sum over batches of   overhead + sum over its prompts of (l_min - 1) + copies (l - l_min + 1)

by dynamic programming over the place of the last cut. A batch costs ``overhead`` tokens on top: what its
calls would have read in the time that starting them takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

__all__ = ["cut"]


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
    least, last = [0.0], [0]
    for end in range(1, len(lengths) + 1):
        longest, best, place = lengths[end - 1], math.inf, end - 1
        for start in range(end - 1, max(end - most(longest), 0) - 1, -1):
            if longest - lengths[start] > spread:
                break
            rows, shared = end - start, lengths[start] - 1
            again = before[end] - before[start] - rows * shared
            cost = least[start] + overhead + rows * shared + copies * again
            if cost < best:
                best, place = cost, start
        least.append(best)
        last.append(place)
    places = [len(lengths)]
    while places[-1]:
        places.append(last[places[-1]])
    return places[::-1]
