"""Every one-letter typo of a word: all deletions and swaps, and insertions and changes with a few letters at every place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

LETTERS = "aesz_1"


def typos(word: str, legal: Iterable[str] = (), letters: str = LETTERS) -> list[str]:
    """Each once, without those that are words themselves, and without nothing at all."""
    known = {word, *legal, ""}
    return [typo for typo in dict.fromkeys(_typos(word, letters)) if typo not in known]


def _typos(word: str, letters: str) -> Iterator[str]:
    for i in range(len(word)):
        yield word[:i] + word[i + 1 :]
        yield word[:i] + word[i : i + 2][::-1] + word[i + 2 :]
        for letter in letters:
            yield word[:i] + letter + word[i + 1 :]
    for i in range(len(word) + 1):
        for letter in letters:
            yield word[:i] + letter + word[i:]
