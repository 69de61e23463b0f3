"""Photographs with small coloured signs, each with two digits: what the default model is trained and tested on.

The backgrounds are real photographs, from any folders of JPEG files. The published figures use those of the Debian
packages lomiri-wallpapers-16.04 and mate-backgrounds (LICENSES); every fourth one, by name, is held out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image

from studies.small import painter, scenes
from studies.small.objects import COLORS, Sign
from studies.small.painter import Drawing
from studies.small.questions import Question
from studies.small.scenes import Scene

QUESTIONS = (
    "What number is on the sign that is {}?",
    "Which digits are on the sign that is {}?",
    "What does the sign say that is {}?",
    "Read the number on the sign that is {}",
)
SIDE = painter.REFERENCE_SIDE  # pixels of an image's longer side


def digits_of(sign: Sign) -> str:
    """Return the two digits on a sign."""
    return "".join(glyph.name for glyph in sign.glyphs)


@dataclass(frozen=True)
class SignQuestion:
    """A question about one sign of an image."""

    image: Image.Image
    sign: Sign
    text: str


class SignPainter(painter.Painter):
    """Draws images with signs, and asks about them."""

    def image(self, side: int = SIDE, scale: float = 1.0, shape: tuple[float, float] | None = None) -> Drawing:
        """Draw 3 or 4 signs of different colours on a photograph.

        Args:
            side: Pixels of the longer side.
            scale: Size of the signs relative to the usual one.
            shape: Width and height over the longer side; random if None.
        """
        width, height = (round(side * part) for part in shape or self.rng.choice(scenes.ASPECTS))
        drawing = Drawing(self.background(width, height, (0.45, 1.0)), scale)
        count = self.rng.choice((3, 4))
        return self._with_signs(drawing, self.rng.sample(list(COLORS), count))

    def crowd(self, side: int, count: int) -> Drawing:
        """Draw up to `count` signs of any colours on a square crop of a photograph."""
        drawing = Drawing(self.background(side, side, (0.15, 0.5)), 1.0)
        return self._with_signs(drawing, self.rng.choices(list(COLORS), k=count))

    def _with_signs(self, drawing: Drawing, colors: Sequence[str]) -> Drawing:
        for color in colors:
            self.add_sign(drawing, color, lambda: f"{self.rng.randrange(100):02d}")
        return drawing

    def question(self, color: str) -> str:
        """Return a question about the sign of a colour."""
        return self.rng.choice(QUESTIONS).format(color)

    def ask_about_any_sign(self) -> SignQuestion:
        """Draw an image and ask about one of its signs."""
        drawing = self.image()
        sign = self.rng.choice(drawing.signs)
        return SignQuestion(drawing.image, sign, self.question(sign.color))

    def scenes(self, count: int) -> Iterator[Scene]:
        """Yield images with every question about every sign, as scenes of the study."""
        for _ in range(count):
            drawing = self.image()
            corner = scenes.square_corner(drawing.image)
            signs = tuple(sign.moved(*corner, painter.SIDE / SIDE) for sign in drawing.signs)
            questions = tuple(
                Question("text", form.format(sign.color), tuple(digits_of(sign)), 2 * ((sign.box,),))
                for sign in signs
                for form in QUESTIONS
            )
            yield Scene(drawing.image, "small", self.rng.choice(questions), questions, signs)
