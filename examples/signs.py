"""Photographs with small coloured signs, each carrying two digits: what the default model is trained and tested on.

The backgrounds are real photographs, from any folders of JPEG files. The published figures use those of the Debian
packages lomiri-wallpapers-16.04 and mate-backgrounds (LICENSES); every fourth one, by name, is held out.
"""

from __future__ import annotations

from PIL import Image

from studies.small import scenes
from studies.small.scenes import COLORS, Sign

QUESTIONS = (
    "What number is on the sign that is {}?",
    "Which digits are on the sign that is {}?",
    "What does the sign say that is {}?",
    "Read the number on the sign that is {}",
)
SIDE = scenes.REFERENCE_SIDE  # pixels of the longer side, for which the sizes of signs are given


def digits_of(sign: Sign) -> str:
    return "".join(glyph.name for glyph in sign.glyphs)


class Painter(scenes.Painter):
    """Draws images; everything random comes from `rng`."""

    def image(
        self,
        side: int = SIDE,
        scale: float = 1.0,
        signs: int | None = None,
        shape=None,
        crowd=False,
    ) -> tuple[Image.Image, list[Sign]]:
        """An image whose longer side has `side` pixels, with 3 or 4 signs `scale` times their usual size.

        Each sign has a colour of its own, unless it is a `crowd`.
        """
        width, height = (round(side * part) for part in shape or self.rng.choice(scenes.ASPECTS))
        image = self.background(width, height, (0.15, 0.5) if crowd else (0.45, 1.0))
        drawn: list[Sign] = []
        count = signs or self.rng.choice((3, 4))
        for color in self.rng.choices(list(COLORS), k=count) if crowd else self.rng.sample(list(COLORS), count):
            self.add_sign(image, color, lambda: f"{self.rng.randrange(100):02d}", drawn, scale)
        return image, drawn

    def question(self, color: str) -> str:
        return self.rng.choice(QUESTIONS).format(color)
