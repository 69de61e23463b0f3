"""What a small model knows of a language: its words, typing errors in those that matter, and what it reports."""

from __future__ import annotations

import re
from collections.abc import Collection

from flexattn_cuda.errors import InputError

_WORD = re.compile(r"<[^<>\s]*>|[^\W\d_]+")
_SHORTEST = 4  # letters: most shorter words have neighbours that mean something else


class Vocabulary:
    """The words of a model, outside of which it guesses.

    Args:
        words: Lower-case words that the model knows.
        keywords: Those of them that a word is taken for that differs in one letter: left out, put in, changed, or
            swapped with the next. A keyword of less than four letters needs the same first letter and length.
        about: What the model can be asked, for the message about words that it does not know.
    """

    def __init__(self, words: Collection[str], keywords: Collection[str], about: str):
        self._words, self._about = frozenset(words), about
        self._keywords = sorted(keywords)

    def spelled(self, text: str) -> str:
        """Return a text in lower case whose words are all known. Special tokens such as "<image>" stay.

        Raises:
            InputError: If a word is neither known nor a keyword with one typing error.
        """
        unknown: list[str] = []

        def known(match: re.Match[str]) -> str:
            word = match.group()
            lower = word.lower()
            if word.startswith("<"):
                return word
            if lower in self._words:
                return lower
            meant = next((keyword for keyword in self._keywords if _is_meant(keyword, lower)), None)
            if meant is None:
                unknown.append(word)
            return meant or word

        spelled = _WORD.sub(known, text)
        if unknown:
            raise InputError(f"the model does not know: {', '.join(dict.fromkeys(unknown))}; {self._about}")
        return spelled


def _is_meant(keyword: str, word: str) -> bool:
    if len(keyword) < _SHORTEST and (len(word) != len(keyword) or word[0] != keyword[0]):
        return False
    return len(word) >= min(len(keyword), _SHORTEST) - 1 and _differ_in_one_letter(keyword, word)


def _differ_in_one_letter(one: str, other: str) -> bool:
    """Return whether two words become equal when a letter is put in, left out, changed, or swapped with the next."""
    if len(one) > len(other):
        one, other = other, one
    start = next((place for place, (a, b) in enumerate(zip(one, other)) if a != b), len(one))
    rest, other_rest = one[start:], other[start:]
    if len(one) != len(other):
        return rest == other_rest[1:]
    return rest[1:] == other_rest[1:] or (rest[:2] == other_rest[1::-1] and rest[2:] == other_rest[2:])
