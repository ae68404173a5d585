"""Prose for RULER's prompts, and odd tokenizers: one token per character, per word, per mark."""

from __future__ import annotations

import random
import re

from evals.ruler.words import ADJECTIVES, NOUNS, VERBS

ENDS = (".", ".", "!", "?", '."')


def prose(sentences=400, seed=5):
    """Sentences of six to fourteen words over several lines, none of them like another."""
    rng = random.Random(seed)
    lines = []
    for _ in range(sentences):
        words = [rng.choice((*ADJECTIVES, *NOUNS, *VERBS)) for _ in range(rng.randint(5, 13))]
        lines.append(f"The {' '.join(words)}{rng.choice(ENDS)}")
    return "\n".join(" ".join(lines[i : i + 5]) for i in range(0, sentences, 5))


class Characters:
    """One token per character."""

    bos_id, eos_id, vocab_size = 0, 1, 2**17

    def encode(self, text):
        return [2 + ord(character) for character in text]

    def decode(self, ids):
        return "".join(chr(i - 2) for i in ids if i > 1)


class Words:
    """One token per run of characters without white space."""

    bos_id, eos_id, vocab_size = 0, 1, 3

    def encode(self, text):
        return [2] * len(text.split())


class Marks:
    """One token per word, punctuation mark or line break."""

    bos_id, eos_id, vocab_size = 0, 1, 3

    def encode(self, text):
        return [2] * len(re.findall(r"\w+|[^\w\s]|\n", text))


def encoder(tokenizer):
    """Ids of a prompt as the task makes them."""
    return lambda text: [tokenizer.bos_id, *tokenizer.encode(text)]
