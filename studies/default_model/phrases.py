"""Plain questions about signs: the phrases that the default model is trained on, and those that it is tested on.

A question names a sign by its colour, "{c}". What it is asked in is put together from parts, so that the model learns
which words matter and that others may stand between them.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

from studies.small.objects import COLORS

HELD_OUT = Path(__file__).parent / "held_out_phrases.json"

_SIGNS = (
    "the {c} sign",
    "the {c} sign",
    "the {c} sign",
    "the sign that is {c}",
    "the sign which is {c}",
    "the sign in {c}",
    "sign in {c}",
    "the {c} one",
    "the {c} plate",
    "the {c} board",
    "the {c} panel",
    "the {c} coloured sign",
    "the sign coloured {c}",
    "the sign with the {c} background",
    "the sign painted {c}",
    "the small {c} sign",
    "the one that is {c}",
    "this {c} sign",
    "my {c} sign",
    "{c} sign",
    "{c}",
)
_READ = {
    "any": (
        "what does {s} say",
        "what does {s} show",
        "what is on {s}",
        "what is written on {s}",
        "what can you read on {s}",
        "what do you see on {s}",
        "what can be seen on {s}",
        "what is there on {s}",
        "what stands on {s}",
        "read {s}",
        "read {s} to me",
        "tell me about {s}",
        "{s} says what",
        "{s} please",
        "can you read {s}",
    ),
    "number": (
        "what number is on {s}",
        "which number is on {s}",
        "what is the number on {s}",
        "what number does {s} show",
        "which number does {s} have",
        "which digits are on {s}",
        "what digits does {s} show",
        "what number is written on {s}",
        "what number do you see on {s}",
        "read the number on {s}",
        "read the digits on {s}",
        "tell me the number on {s}",
        "give me the number on {s}",
        "show me the number on {s}",
        "i need the number on {s}",
        "the number on {s}",
        "number on {s}",
        "{s} has which number",
        "on {s} which number is written",
    ),
    "word": (
        "what word is on {s}",
        "which word is on {s}",
        "what is the word on {s}",
        "what word does {s} show",
        "which word does {s} have",
        "which letters are on {s}",
        "what letters does {s} show",
        "what text is on {s}",
        "what is the text on {s}",
        "what word do you see on {s}",
        "read the word on {s}",
        "read the text on {s}",
        "read the letters on {s}",
        "tell me the word on {s}",
        "give me the word on {s}",
        "i need the word on {s}",
        "the word on {s}",
        "word on {s}",
        "text on {s}",
        "{s} has which word",
    ),
    "shape": (
        "what shape is on {s}",
        "which shape is on {s}",
        "what is the shape on {s}",
        "what shape does {s} show",
        "which symbol is on {s}",
        "what symbol does {s} have",
        "tell me the shape on {s}",
        "what shape do you see on {s}",
        "the shape on {s}",
        "shape on {s}",
        "name the symbol on {s}",
    ),
}
_PRESENCE = (
    "is there a {c} sign",
    "is there any {c} sign",
    "is there a sign that is {c}",
    "is there a sign in {c}",
    "is a {c} sign there",
    "do you see a {c} sign",
    "do you see any {c} sign",
    "can you see a {c} sign",
    "can you find a {c} sign",
    "does it have a {c} sign",
    "are there {c} signs",
    "any {c} sign",
)
_COUNT = (
    "how many signs are there",
    "how many signs do you see",
    "how many signs can you see",
    "how many signs does it have",
    "how many signs",
    "count the signs",
    "count all signs",
    "can you count the signs",
    "what is the number of signs",
    "tell me how many signs there are",
    "number of signs",
)
_WHERE = (
    "where is {s}",
    "where do you see {s}",
    "where can you see {s}",
    "where can i find {s}",
    "where is {s} placed",
    "find {s}",
    "in which corner is {s}",
    "in which part is {s}",
    "locate {s}",
)
_COLOURLESS = (
    "what does the sign say",
    "what does it say",
    "what is on the sign",
    "what is written on the sign",
    "read the sign",
    "read it",
    "what number is on the sign",
    "which word is on the sign",
    "what is written there",
    "which sign is it",
)
_DESCRIBE = (
    "what is in this picture",
    "what is in the image",
    "what is this",
    "what do you see",
    "what can you see",
    "describe the picture",
    "describe this image",
    "describe it",
    "tell me about the picture",
    "what is there",
)
_BEFORE = ("please", "can you tell me", "could you tell me", "tell me", "i want to know", "hello", "look", "so", "and")
_AFTER = ("please", "in this picture", "in the picture", "in the image", "in this photo", "here", "thank you", "now")
_SHORT_KEYWORDS = ("the", "sign", "word", "text", "what", "read")
_OTHER_WORDS = (Path(__file__).parent / "other_words.txt").read_text().split()


def read_phrase(kind: str, color: str, rng: random.Random) -> str:
    """Return a question about what a sign shows; every second one does not say that it is a number, word or shape."""
    return _loosened(_named(rng.choice(_READ[rng.choice(("any", kind))]), color, rng), rng)


def presence_phrase(color: str, rng: random.Random) -> str:
    """Return a question that is answered with yes or no."""
    return _framed(rng.choice(_PRESENCE).replace("{c}", color), rng)


def count_phrase(rng: random.Random) -> str:
    """Return a question about the number of signs."""
    return _framed(rng.choice(_COUNT), rng)


def where_phrase(color: str, rng: random.Random) -> str:
    """Return a question about where a sign is."""
    return _framed(_named(rng.choice(_WHERE), color, rng), rng)


def colourless_phrase(rng: random.Random) -> str:
    """Return a question about a sign that it does not name."""
    return _framed(rng.choice(_COLOURLESS), rng)


def describe_phrase(rng: random.Random) -> str:
    """Return a question about all of the picture."""
    return _framed(rng.choice(_DESCRIBE), rng)


def templates() -> Iterator[str]:
    """Yield every phrase, with "{c}" for a colour, before other words are put between its own."""
    for phrase, sign in itertools.product(itertools.chain(*_READ.values(), _WHERE), _SIGNS):
        yield phrase.replace("{s}", sign)
    yield from itertools.chain(_PRESENCE, _COUNT, _COLOURLESS, _DESCRIBE)


def framed_templates() -> Iterator[str]:
    """Yield every template alone, and with what may stand before and after it."""
    for template in templates():
        yield template
        yield from (f"{before} {template}" for before in _BEFORE)
        yield from (f"{template} {after}" for after in _AFTER)


def keywords() -> list[str]:
    """Return the words that a word with a typing error is taken for.

    Of short words, only those that the answer depends on: too many others differ in one letter from something else.
    """
    words = {word for text in templates() for word in text.split() if len(word) > 4}
    return sorted(words.union(COLORS, _SHORT_KEYWORDS))


def vocabulary() -> list[str]:
    """Return texts that contain every word that the model knows."""
    return [*(text.replace("{c}", "") for text in framed_templates()), *_OTHER_WORDS, *COLORS]


def held_out_phrases() -> list[str]:
    """Return the phrases of the test, each about what a sign shows; none shares four words in a row with a template."""
    return json.loads(HELD_OUT.read_text())


def _named(phrase: str, color: str, rng: random.Random) -> str:
    return phrase.replace("{s}", rng.choice(_SIGNS).replace("{c}", color))


def _framed(phrase: str, rng: random.Random) -> str:
    before = rng.choice(_BEFORE) if rng.random() < 0.25 else ""
    after = rng.choice(_AFTER) if rng.random() < 0.25 else ""
    return f"{before} {phrase} {after}".strip()


def _loosened(phrase: str, rng: random.Random) -> str:
    """Return a phrase in a frame or, every second time, with words left out and others put between them."""
    if rng.random() < 0.5:
        return _framed(phrase, rng)
    kept = [word for word in phrase.split() if word in COLORS or rng.random() < 0.85]
    for _ in range(rng.randint(1, 5)):
        kept.insert(rng.randint(0, len(kept)), rng.choice(_OTHER_WORDS))
    return " ".join(kept)
