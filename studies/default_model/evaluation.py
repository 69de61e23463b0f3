"""What the default model is tested on: held-out photographs, each condition by itself and all of them together."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from rich.progress import Progress

from flexattn_cuda.analysis.intervals import wilson
from studies.default_model.fonts import FONTS, HELD_OUT_FONTS, find_fonts
from studies.default_model.phrases import held_out_phrases
from studies.default_model.questions import NONE, sign_question
from studies.default_model.signs import Look, SignPainter, as_jpeg, photographed, signs_in_square
from studies.small.painter import Drawing
from studies.small.stage import console

TEST_WORDS = (Path(__file__).parent / "test_words.txt").read_text().split()
WITHOUT_HR = ("none", "HR off")
"""Systems that see the low resolution alone: trained so, and "attention" without its HR tokens."""
_BATCH = 10
_MOST_TOKENS = 8


@dataclass(frozen=True)
class Asked:
    """A picture, a question about it, and the answer."""

    image: Image.Image
    question: str
    answer: str


@dataclass(frozen=True)
class Condition:
    """Pictures and questions of one kind.

    Attributes:
        name: Of the condition.
        draw: Returns a picture with the signs on it.
        look: Of the signs.
        task: A key of questions.TASKS.
        saved: Returns a picture as it is asked about.
        phrases: Questions in place of the task's own, with "{c}" for the sign's colour.
    """

    name: str
    draw: Callable[[SignPainter], Drawing]
    look: Look
    task: str = "read"
    saved: Callable[[Image.Image, random.Random], Image.Image] = lambda image, rng: image
    phrases: Sequence[str] = ()

    def asked(self, photographs: list[Image.Image], count: int) -> Iterator[Asked]:
        """Yield `count` pictures, the same in every run."""
        painter = SignPainter(photographs, self.look, random.Random(f"test {self.name}"))
        while count:
            drawing = self.draw(painter)
            signs = signs_in_square(drawing)
            question = sign_question(self.task, signs, painter.rng) if signs else None
            if question is None:
                continue
            text = question.text
            if self.phrases:
                (color,) = (sign.color for sign in signs if sign.glyphs[0].box in question.boxes)
                text = painter.rng.choice(self.phrases).format(c=color)
            yield Asked(self.saved(drawing.image, painter.rng), text, "".join(question.answer))
            count -= 1


def conditions(fonts: Sequence[Path]) -> list[Condition]:
    """Return all conditions; fonts are looked for in these folders."""
    known, held_out = find_fonts(fonts, FONTS), find_fonts(fonts, HELD_OUT_FONTS)
    digits = Look(known, scale=(1, 1), angle=(0, 0), kinds=(("number", 1),), lengths=((1, 1), (2, 1)))
    three, words = replace(digits, lengths=((3, 1),)), replace(digits, kinds=(("word", 1),), words=TEST_WORDS)
    every = Look(held_out, kinds=(("number", 1), ("word", 1)), words=TEST_WORDS)
    return [
        Condition("one and two digits", _few, digits),
        Condition("three digits", _few, three),
        Condition("words of 2 to 5 letters", _few, words),
        *(
            Condition(f"size x {scale}", _few, replace(digits, scale=(scale, scale)))
            for scale in (0.7, 0.85, 1.15, 1.3)
        ),
        Condition("unseen fonts", _few, replace(digits, fonts=held_out)),
        Condition("turned left by 12 degrees", _few, replace(digits, angle=(12, 12))),
        Condition("turned right by 12 degrees", _few, replace(digits, angle=(-12, -12))),
        Condition("JPEG 50", _few, digits, saved=lambda image, rng: as_jpeg(image, 50)),
        Condition("4000 x 3000 pixels", lambda painter: painter.image(4000, (1, 0.75), 3), digits),
        Condition("portrait", lambda painter: painter.image(600, (0.6, 1), 3), digits),
        Condition("unseen phrasings", _few, digits, phrases=held_out_phrases()),
        Condition("all of it", _few, every, saved=photographed, phrases=held_out_phrases()),
        Condition("no such sign", _few, digits, "absent"),
        Condition("shape", _few, replace(digits, kinds=(("shape", 1),))),
        Condition("where", _few, replace(digits, kinds=Look.kinds), "where"),
        Condition("is there a", _few, replace(digits, kinds=Look.kinds), "presence"),
        Condition("how many", _any_number, replace(digits, kinds=Look.kinds), "count"),
    ]


def _few(painter: SignPainter) -> Drawing:
    return _any_number(painter, painter.rng.randint(2, 4))


def _any_number(painter: SignPainter, count: int | None = None) -> Drawing:
    return painter.image(painter.rng.choice((288, 384, 500, 800)), count=count)


@dataclass(frozen=True)
class Result:
    """A system's answers under a condition, with Wilson's 95 % interval: a row of default_model.csv.

    Attributes:
        system: The system.
        condition: Name of the condition.
        pictures: Number of pictures.
        right: Share of exact answers.
        low: Lower end of its interval.
        high: Upper end.
        none: Share of the answers that there is no such sign.
    """

    system: str
    condition: str
    pictures: int
    right: float
    low: float
    high: float
    none: float

    def columns(self) -> dict[str, str]:
        """Return the columns of the CSV file."""
        return {name: f"{v:.4f}" if isinstance(v, float) else v for name, v in asdict(self).items()}


@torch.inference_mode()
def evaluate(model, processor, system: str, condition: Condition, photographs: list[Image.Image], count: int) -> Result:
    """Ask about all pictures of a condition, and compare the greedy answers with the right ones."""
    right = none = 0
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(f"{system}, {condition.name}", total=count)
        pictures = condition.asked(photographs, count)
        while batch := list(islice(pictures, _BATCH)):
            answers = answered(model, processor, batch, system not in WITHOUT_HR)
            right += sum(answer == one.answer for answer, one in zip(answers, batch))
            none += answers.count(NONE)
            progress.update(task, advance=len(batch))
    return Result(system, condition.name, count, right / count, *wilson(right, count), none / count)


def answered(model, processor, batch: Sequence[Asked], high_resolution: bool = True) -> list[str]:
    """Return the greedy answers to questions about a picture each."""
    texts = [processor.prompt(one.question) for one in batch]
    inputs = dict(processor(images=[one.image for one in batch], text=texts))
    if not high_resolution:
        inputs.pop("pixel_values_hr")
    output = model.generate(**inputs, max_new_tokens=_MOST_TOKENS, do_sample=False)
    return processor.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
