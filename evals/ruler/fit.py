"""How much haystack fits: the search that fills a prompt up to its length, and ends."""

from __future__ import annotations

from collections.abc import Callable

from evals.ruler.question import Encode, Ids

__all__ = ["WORDS_PER_TOKEN", "fill", "fit"]

# Haystack words that are tried at most, per token: more than any tokenizer puts into a token.
WORDS_PER_TOKEN = 8

# A prompt may fall short of its room by this share and by this many tokens: prompts of one length then differ
# by little enough to be read as one batch (`evals.scorer.MAX_SPREAD`).
SLACK, SLACK_TOKENS = 0.01, 24
# Haystack of the first trial that is not empty: tells tokens per unit.
PROBE = 64
# Every second trial after these halves the range, whatever the tokenizer does.
SECANTS = 6


def fit(encode: Callable[[int], Ids], room: int, *, most: int) -> tuple[int, Ids] | None:
    """About the largest haystack whose prompt has at most ``room`` tokens.

    Tokens grow almost linearly with the haystack, so a secant lands within the slack in two or three trials;
    a tokenizer for which they do not costs at most 6 + 2 log2(most) trials.

    Args:
        encode: units of haystack -> token ids of the whole prompt.
        room: tokens the prompt may have.
        most: units there are.

    Returns:
        Units and the ids of their prompt, or None when the prompt without a haystack is too long.
    """
    low, ids = 0, encode(0)
    if len(ids) > room:
        return None
    slack = min(int(SLACK * room), SLACK_TOKENS)
    high, guess, trials = most + 1, PROBE, 0
    while high - low > 1 and room - len(ids) > slack:
        guess = min(max(guess, low + 1), high - 1)
        tried = encode(guess)
        per_unit = max(len(tried) - len(ids), 1) / (guess - low)
        if len(tried) <= room:
            low, ids = guess, tried
        else:
            high = guess
        trials += 1
        guess = low + int((room - slack / 2 - len(ids)) / per_unit)
        if trials > SECANTS and trials % 2:
            guess = (low + high) // 2
    return low, ids


def fill(
    task: str,
    build: Callable[[int], str],
    encode: Encode,
    *,
    length: int,
    answer_tokens: int,
    most: int,
) -> tuple[int, str, Ids]:
    """Units of haystack, the prompt and its ids, for ``length`` tokens with the answer.

    Args:
        build: units of haystack -> prompt.

    Raises:
        ValueError: the prompt without a haystack is longer than ``length`` allows.
    """
    fitted = fit(lambda units: encode(build(units)), length - answer_tokens, most=most)
    if fitted is None:
        least = len(encode(build(0))) + answer_tokens
        raise ValueError(
            f"{task}: {length} tokens are too few: the shortest prompt and its answer take {least} with this "
            "tokenizer; use longer ones (evals.ruler_lengths)"
        )
    units, ids = fitted
    return units, build(units), ids
