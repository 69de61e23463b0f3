"""Questions about an image whose answers follow from what was drawn.

task        question                                                answer          in the spirit of
attribute   What shape is on the red sign?                          star            V* Bench, attribute
spatial     Is the circle left or right of the star on the red sign? left            V* Bench, spatial relation
text        What number is on the red sign?                         4 7             TextVQA, MagnifierBench
presence    Is there a boat?                                        yes             RSVQA-HRBEN, presence
comparison  Are there more boats than cars?                         no              RSVQA-HRBEN, comparison
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from studies.small.objects import COLORS, SHAPES, VEHICLES, Box, Glyph, Sign

SIGN_TASKS = ("attribute", "spatial", "text")
VEHICLE_TASKS = ("presence", "comparison")
TASKS = SIGN_TASKS + VEHICLE_TASKS
CHANCE = {"attribute": 1 / 5, "spatial": 1 / 2, "text": 1 / 100, "presence": 1 / 2, "comparison": 1 / 2}
"""Accuracy of a guess that knows a task's possible answers but has not seen the image."""


@dataclass(frozen=True)
class Question:
    """A question with its answer.

    Attributes:
        task: One of TASKS.
        text: What is asked.
        answer: Words of the answer, one token each.
        looks: For each word, the boxes that show it, in pixels of the padded square.
    """

    task: str
    text: str
    answer: tuple[str, ...]
    looks: tuple[tuple[Box, ...], ...]

    @property
    def boxes(self) -> tuple[Box, ...]:
        """All boxes of the answer, each once."""
        return tuple(dict.fromkeys(box for boxes in self.looks for box in boxes))


def sign_questions(signs: Sequence[Sign]) -> Iterator[Question]:
    """Yield the question of each sign. Its boxes are those of the glyphs: most of the plate is plain."""
    for sign in signs:
        names = tuple(glyph.name for glyph in sign.glyphs)
        looks = tuple((glyph.box,) for glyph in sign.glyphs)
        if names[0].isdigit():
            yield Question("text", f"What number is on the {sign.color} sign?", names, looks)
        elif len(names) == 1:
            yield Question("attribute", f"What shape is on the {sign.color} sign?", names, looks)
        else:
            circle = names.index("circle")
            text = f"Is the circle left or right of the {names[1 - circle]} on the {sign.color} sign?"
            yield Question("spatial", text, (("left", "right")[circle],), (looks[circle],))


def vehicle_questions(vehicles: Sequence[Glyph]) -> Iterator[Question]:
    """Yield the questions about an image with vehicles; none if it has none."""
    if not vehicles:
        return
    boxes = tuple(vehicle.box for vehicle in vehicles)
    counts = {kind: sum(vehicle.name == kind for vehicle in vehicles) for kind in VEHICLES}
    for kind, count in counts.items():
        yield Question("presence", f"Is there a {kind}?", ("yes" if count else "no",), (boxes,))
    for one, other in itertools.product(VEHICLES, repeat=2):
        if counts[one] and counts[other] and counts[one] != counts[other]:
            answer = "yes" if counts[one] > counts[other] else "no"
            yield Question("comparison", f"Are there more {one}s than {other}s?", (answer,), (boxes,))


def vocabulary() -> list[str]:
    """Return texts that contain every word of the questions and answers."""
    anywhere = Box(0, 0, 1, 1)
    contents = [("0", "0"), *((shape,) for shape in SHAPES), ("circle", "star"), ("star", "circle")]
    signs = [
        Sign(color, tuple(Glyph(name, anywhere) for name in names), anywhere) for color in COLORS for names in contents
    ]
    fleets = [
        [Glyph(kind, anywhere) for kind in (one, one, other)] for one, other in itertools.permutations(VEHICLES, 2)
    ]
    questions = [*sign_questions(signs), *itertools.chain.from_iterable(map(vehicle_questions, fleets))]
    return [text for question in questions for text in (question.text, *question.answer)]
