"""What the default model is asked about an image with signs, and the answers.

read        what a sign shows                       42, STOP, star
absent      the same of a colour that no sign has   there is none
presence    is there a sign of a colour             yes, no
count       how many signs there are                3
where       a sign's part of the image              at the top left, …, in the middle
colourless  a question that names no sign           what the only sign shows, or: which one of them?
describe    what the picture shows                  3 signs
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from studies.default_model import phrases
from studies.default_model.signs import KINDS, LETTERS, MOST_SIGNS, kind_of
from studies.small.encoded_scenes import EncodedScenes, Pick
from studies.small.objects import COLORS, SHAPES, Box, Sign
from studies.small.painter import SIDE
from studies.small.questions import Question

TASKS = {
    "read": 0.61,
    "absent": 0.1,
    "presence": 0.07,
    "count": 0.07,
    "where": 0.07,
    "colourless": 0.05,
    "describe": 0.03,
}
"""Shares of the tasks in training."""
NONE, WHICH = "there is none", "which one of them?"
SIGNS = ("1 sign", *(f"{count} signs" for count in range(2, MOST_SIGNS + 1)))
PARTS = ("at the top left", "at the top right", "at the bottom left", "at the bottom right", "in the middle")
ANSWERS = (*LETTERS, NONE, WHICH, *SIGNS, *PARTS)
"""Tokens of answers that are no words of questions."""
WORDS = (*SHAPES, "yes", "no")
"""Answers that are words of questions too."""
_MIDDLE, _CLEAR = 0.1, 0.06  # of the image's side: half the middle's width, and the gap between two corners

Answer = tuple[tuple[str, ...], tuple[tuple[Box, ...], ...]]
"""The tokens of an answer, and for each the boxes to look at."""


def sign_question(task: str, signs: Sequence[Sign], rng: random.Random) -> Question | None:
    """Return a question of a task about an image's signs, or None if the task does not suit them.

    Args:
        task: One of TASKS.
        signs: Of different colours, with boxes in pixels of the square of SIDE that the image is padded to.
        rng: Source of all randomness.
    """
    made = _MAKERS[task](signs, rng)
    if made is None:
        return None
    text, (answer, looks) = made
    return Question(task, text, answer, looks)


def _read(signs: Sequence[Sign], rng: random.Random) -> tuple[str, Answer]:
    sign = rng.choice(signs)
    return phrases.read_phrase(kind_of(sign), sign.color, rng), _content(sign)


def _absent(signs: Sequence[Sign], rng: random.Random) -> tuple[str, Answer] | None:
    color = _missing_color(signs, rng)
    if color is None:
        return None
    if rng.random() < 1 / 3:
        return phrases.where_phrase(color, rng), ((NONE,), ((),))
    return phrases.read_phrase(rng.choice(list(KINDS)), color, rng), ((NONE,), ((),))


def _presence(signs: Sequence[Sign], rng: random.Random) -> tuple[str, Answer] | None:
    if rng.random() < 0.5:
        sign = rng.choice(signs)
        return phrases.presence_phrase(sign.color, rng), (("yes",), ((sign.box,),))
    color = _missing_color(signs, rng)
    return None if color is None else (phrases.presence_phrase(color, rng), (("no",), ((),)))


def _count(signs: Sequence[Sign], rng: random.Random) -> tuple[str, Answer]:
    return phrases.count_phrase(rng), ((str(len(signs)),), (tuple(sign.box for sign in signs),))


def _where(signs: Sequence[Sign], rng: random.Random) -> tuple[str, Answer] | None:
    sign = rng.choice(signs)
    part = part_of(*(position / SIDE for position in sign.box.middle))
    return None if part is None else (phrases.where_phrase(sign.color, rng), ((part,), ((sign.box,),)))


def _colourless(signs: Sequence[Sign], rng: random.Random) -> tuple[str, Answer]:
    answer = _content(signs[0]) if len(signs) == 1 else ((WHICH,), ((),))
    return phrases.colourless_phrase(rng), answer


def _describe(signs: Sequence[Sign], rng: random.Random) -> tuple[str, Answer]:
    boxes = tuple(sign.box for sign in signs)
    return phrases.describe_phrase(rng), ((SIGNS[len(signs) - 1],), (boxes,))


_MAKERS: dict[str, Callable[[Sequence[Sign], random.Random], tuple[str, Answer] | None]] = {
    "read": _read,
    "absent": _absent,
    "presence": _presence,
    "count": _count,
    "where": _where,
    "colourless": _colourless,
    "describe": _describe,
}


def part_of(x: float, y: float) -> str | None:
    """Return which of PARTS a point is in, from 0 to 1 to the right and down, or None between two of them."""
    x, y = x - 0.5, y - 0.5
    if max(abs(x), abs(y)) < _MIDDLE:
        return PARTS[-1]
    if min(abs(x), abs(y)) < _CLEAR:
        return None
    return PARTS[(x > 0) + 2 * (y > 0)]


def _content(sign: Sign) -> Answer:
    return tuple(glyph.name for glyph in sign.glyphs), tuple((glyph.box,) for glyph in sign.glyphs)


def _missing_color(signs: Sequence[Sign], rng: random.Random) -> str | None:
    missing = [color for color in COLORS if color not in {sign.color for sign in signs}]
    return rng.choice(missing) if missing else None


class SignScenes(EncodedScenes):
    """Encoded images with signs, about which questions are made as they are drawn."""

    @classmethod
    def of(cls, scenes: EncodedScenes) -> SignScenes:
        """Return encoded scenes as these."""
        return cls(scenes.low, scenes.high, scenes.valid_rect, scenes.scenes)

    def sample(self, rng: random.Random, count: int) -> list[Pick]:
        """Return questions for training: a task by its share, then a scene that suits it."""
        return [self._pick(task, rng) for task in rng.choices(list(TASKS), list(TASKS.values()), k=count)]

    def _pick(self, task: str, rng: random.Random) -> Pick:
        while True:
            number = rng.randrange(len(self.scenes))
            signs = self.scenes[number].signs
            if task == "colourless" and len(signs) > 1 and rng.random() < 0.7:
                continue  # one sign and several are asked about as often
            question = sign_question(task, signs, rng) if signs else None
            if question is not None:
                return Pick(number, question)
