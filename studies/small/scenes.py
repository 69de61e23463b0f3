"""High-resolution images with questions and known answers: a benchmark that needs no download.

Small objects are too fine for the low-resolution image, which shows only where they are, as in V* Bench: a sign by its
colour, the objects of an aerial scene as blobs. Large objects can be seen at low resolution.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from PIL import Image

from studies.small.objects import COLORS, SHAPES, VEHICLES, Glyph, Sign
from studies.small.painter import REFERENCE_SIDE, SIDE, Drawing, Painter
from studies.small.questions import (
    CHANCE,
    SIGN_TASKS,
    TASKS,
    VEHICLE_TASKS,
    Question,
    sign_questions,
    vehicle_questions,
)

SIZES = {"small": 1.0, "large": 2.25}
"""Factors of the objects' size. A large object covers as many pixels at a side of 128 as a small one at 288."""
ASPECTS = ((1.0, 1.0), (1.0, 1.0), (1.0, 0.75), (0.75, 1.0), (1.0, 0.67))  # width and height over the longer side


@dataclass(frozen=True)
class Scene:
    """An image with everything that can be asked about it.

    Attributes:
        image: RGB; None where only its tokens are kept.
        size: A key of SIZES.
        asked: The question of the evaluation.
        questions: All questions, `asked` among them. Uniform over the questions of a task is uniform over its answers.
        signs: Signs drawn, with boxes in pixels of the image padded to a square of SIDE.
        vehicles: Vehicles drawn, likewise.
    """

    image: Image.Image | None
    size: str
    asked: Question
    questions: tuple[Question, ...]
    signs: tuple[Sign, ...] = ()
    vehicles: tuple[Glyph, ...] = ()

    def without_image(self) -> Scene:
        """Return the scene without its pixels."""
        return replace(self, image=None)


def make_scenes(photographs: list[Image.Image], count: int, seed: int, first: int = 0) -> Iterator[Scene]:
    """Yield scenes `first` to `first + count` of a seed, each determined by the seed and its number.

    Tasks alternate; sizes alternate after each round of tasks, and the two answers of a task that has two after each
    round of sizes.

    Args:
        photographs: RGB, the backgrounds.
        count: How many scenes to yield.
        seed: Of the whole series.
        first: Number of the first scene.
    """
    sizes = list(SIZES)
    for number in range(first, first + count):
        painter = Painter(photographs, None, random.Random(f"{seed} {number}"))
        rounds, task = divmod(number, len(TASKS))
        turn, size = divmod(rounds, len(sizes))
        yield draw_scene(painter, TASKS[task], sizes[size], turn)


def draw_scene(painter: Painter, task: str, size: str, turn: int = 0) -> Scene:
    """Draw an image for a question of a task; `turn` alternates between the answers of a task that has two."""
    aspect = painter.rng.choice(ASPECTS)
    width, height = (round(SIDE * part) for part in aspect)
    if task in VEHICLE_TASKS:
        drawing = Drawing(painter.ground(width, height), object_scale(size))
        for kind in _choose_fleet(painter.rng, task):
            painter.add_vehicle(drawing, kind)
    else:
        drawing = Drawing(painter.background(width, height, (0.45, 1.0)), object_scale(size))
        _add_signs(painter, drawing, task, turn)
    corner = square_corner(drawing.image)
    signs = tuple(sign.moved(*corner) for sign in drawing.signs)
    vehicles = tuple(vehicle.moved(*corner) for vehicle in drawing.vehicles)
    questions = (*sign_questions(signs), *vehicle_questions(vehicles))
    asked = _choose_question(painter.rng, questions, task, turn)
    return Scene(drawing.image, size, asked, questions, signs, vehicles)


def object_scale(size: str) -> float:
    """Return the scale of a drawing of SIDE pixels whose objects have a size of SIZES."""
    return SIZES[size] * SIDE / REFERENCE_SIDE


def square_corner(image: Image.Image) -> tuple[int, int]:
    """Return the left and top of the square that preprocessing pads an image to, in the image's pixels."""
    side = max(image.size)
    return -((side - image.width) // 2), -((side - image.height) // 2)


def sign_content(rng: random.Random, task: str, turn: int) -> tuple[str, ...]:
    """Return what a sign shows so that a task can ask about it.

    One of two shapes is a circle: the left one in even turns, the right one in odd turns.
    """
    if task == "text":
        return tuple(rng.choices("0123456789", k=2))
    if task == "attribute":
        return (rng.choice(SHAPES),)
    other = rng.choice([shape for shape in SHAPES if shape != "circle"])
    return ("circle", other) if turn % 2 == 0 else (other, "circle")


def _add_signs(painter: Painter, drawing: Drawing, task: str, turn: int) -> None:
    """Draw a sign for the task's question, and two or three more for any task, each of a colour of its own."""
    rng = painter.rng
    tasks = [task] + [rng.choice(SIGN_TASKS) for _ in range(rng.choice((2, 3)))]
    turns = [turn] + [rng.randrange(2) for _ in tasks[1:]]
    for color, of_sign, turn_of_sign in zip(rng.sample(list(COLORS), len(tasks)), tasks, turns):
        painter.add_sign(drawing, color, partial(sign_content, rng, of_sign, turn_of_sign))


def _choose_fleet(rng: random.Random, task: str) -> list[str]:
    """Return vehicles of one or two kinds, equally often, so that each kind is in half of the images.

    A comparison gets two kinds in unequal numbers.
    """
    kinds = rng.sample(VEHICLES, 2)
    if task == "comparison":
        counts = rng.choice(((2, 1), (3, 1), (3, 2)))
    elif rng.random() < 0.5:
        counts = rng.choice(((2, 1), (3, 1), (3, 2), (1, 1), (2, 2)))
    else:
        counts = (rng.randint(2, 5), 0)
    return [kind for kind, count in zip(kinds, counts) for _ in range(count)]


def _choose_question(rng: random.Random, questions: Sequence[Question], task: str, turn: int) -> Question:
    of_task = [question for question in questions if question.task == task]
    if CHANCE[task] == 1 / 2:
        answers = sorted({question.answer for question in of_task})
        of_task = [question for question in of_task if question.answer == answers[turn % len(answers)]]
    return rng.choice(of_task)
