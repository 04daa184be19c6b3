"""Removal of near-copies between the training and the held-out texts of a corpus.

Docstrings are full of templates: the same paragraph on `axis` or on the arguments of a distribution is in hundreds
of them. Splitting by content alone leaves such paragraphs on both sides, and held-out metrics would reward memory.
"""

import re
from collections.abc import Iterable

SEQUENCE_WORDS = 8
LARGEST_SHARED_PART = 0.5


def word_sequences(text: str) -> set[str]:
    """Every run of eight words of a text, case, digits and punctuation aside; all of it if it is shorter."""
    words = re.findall(r"[^\W\d_]+", text.casefold())
    last = max(len(words) - SEQUENCE_WORDS, 0)
    return {" ".join(words[start : start + SEQUENCE_WORDS]) for start in range(last + 1)}


def shared_part(sequences: set[str], others: set[str]) -> float:
    """Share of `sequences` (not empty) that are among `others`."""
    return len(sequences & others) / len(sequences)


def without_near_copies(train: Iterable[str], held_out: Iterable[str]) -> tuple[set[str], set[str]]:
    """Texts of both sides that may stay.

    First every training text goes of whose word sequences half or more are in held-out texts, then every held-out text
    of which half or more are in the training texts that are left.

    Returns:
      (training texts kept, held-out texts kept).
    """
    held_out_sequences = {text: word_sequences(text) for text in held_out}
    of_held_out = set().union(*held_out_sequences.values())
    kept, seen = set(), set()
    for text in train:
        sequences = word_sequences(text)
        if shared_part(sequences, of_held_out) < LARGEST_SHARED_PART:
            kept.add(text)
            seen |= sequences & of_held_out
    clean = {
        text for text, sequences in held_out_sequences.items() if shared_part(sequences, seen) < LARGEST_SHARED_PART
    }
    return kept, clean
