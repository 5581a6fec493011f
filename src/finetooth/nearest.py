"""The nearest of the words that there are, for an error about one that there is not: "Did you mean 'accumulate'?"

Nearest by the number of letters to insert, delete, change, or swap with their neighbour (optimal string alignment); among equals, by
difflib's ratio. difflib alone counts letters in common: it finds nothing for a word of two letters, and takes swapped letters for two faults.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

RATIO = 0.5  # of a word that is more than one letter away


def nearest(given: str, known: Iterable[str]) -> str | None:
    """The nearest of some words, None if none is near.

    >>> nearest("l", ["lr", "eps"]), nearest("btach_size", ["batch_size", "seed"]), nearest("wd", ["lr", "eps"])
    ('lr', 'batch_size', None)
    """
    ranked = [(distance(given, word), -difflib.SequenceMatcher(None, given, word).ratio(), word) for word in known]
    if not ranked:
        return None
    far, ratio, word = min(ranked)
    return word if far <= 1 or -ratio >= RATIO else None


def hint(given: object, known: Iterable[str]) -> str:
    """The words for an error, with a space before them; nothing if no word is near."""
    near = nearest(str(given), known)
    return f" Did you mean {near!r}?" if near else ""


def distance(a: str, b: str) -> int:
    """Insertions, deletions, changes and swaps of neighbours between two words.

    >>> distance("lr", "rl"), distance("lr", "l"), distance("eps", "aps"), distance("lr", "lr")
    (1, 1, 1, 0)
    """
    before, row = list[int](), list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        now = [i]
        for j, y in enumerate(b, 1):
            cost = min(row[j] + 1, now[j - 1] + 1, row[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                cost = min(cost, before[j - 2] + 1)
            now.append(cost)
        before, row = row, now
    return row[-1]
