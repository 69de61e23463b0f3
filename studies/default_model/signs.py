"""Photographs with small coloured signs: what the default model is trained and tested on.

A sign shows a number of one to three digits, a word of two to five capital letters, or a shape. The backgrounds are
real photographs, from any folders of JPEG files. The published figures use those of the Debian packages
lomiri-wallpapers-16.04 and mate-backgrounds (LICENSES); every fourth one, by name, is held out.
"""

from __future__ import annotations

import io
import math
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont

from studies.small import painter, scenes
from studies.small.objects import COLORS, SHAPES, Box, Glyph, Sign, shape_outline
from studies.small.painter import FONT_PIXELS, REFERENCE_SIDE, SIDE, Drawing, is_clear

KINDS = {"number": 0.45, "word": 0.4, "shape": 0.15}
"""What a sign shows, and how often in training."""
LETTERS = string.ascii_uppercase
MOST_GLYPHS = 5
MOST_SIGNS = 5
_LIGHT, _BORDER = (250, 250, 250), (245, 245, 245)
_OVERSAMPLED_PIXELS = 56  # height of a font before a plate is scaled down; larger ones are drawn as they are
_TRIES = 60


@dataclass(frozen=True)
class Look:
    """How signs look; every sign draws its own.

    Attributes:
        fonts: Files of the fonts; Pillow's own for None.
        scale: Range of the height of a glyph relative to FONT_PIXELS.
        angle: Range of the angle to the horizontal in degrees, counterclockwise.
        kinds: What signs show, by weight: keys of KINDS.
        lengths: Number of glyphs of a number, by weight, and of a word.
        words: What words to show; random letters if there are none.
    """

    fonts: Sequence[Path | None]
    scale: tuple[float, float] = (0.7, 1.5)
    angle: tuple[float, float] = (-12.0, 12.0)
    kinds: tuple[tuple[str, float], ...] = tuple(KINDS.items())
    lengths: tuple[tuple[int, float], ...] = ((1, 0.2), (2, 0.4), (3, 0.4))
    words: Sequence[str] = ()


def text_of(sign: Sign) -> str:
    """Return the number, word or name of the shape on a sign."""
    return "".join(glyph.name for glyph in sign.glyphs)


def kind_of(sign: Sign) -> str:
    """Return what a sign shows, a key of KINDS."""
    first = sign.glyphs[0].name
    return "number" if first.isdigit() else "word" if first in LETTERS else "shape"


class SignPainter(painter.Painter):
    """Draws photographs with signs.

    Args:
        photographs: RGB, the backgrounds.
        look: Of the signs.
        rng: Source of all randomness.
    """

    def __init__(self, photographs: list[Image.Image], look: Look, rng: random.Random):
        super().__init__(photographs, None, rng)
        self.look = look

    def image(self, side: int, shape: tuple[float, float] | None = None, count: int | None = None) -> Drawing:
        """Draw signs of different colours on a photograph.

        Args:
            side: Pixels of the longer side.
            shape: Width and height over the longer side; random if None.
            count: Number of signs, fewer if there is no room; 1 to 5 if None.
        """
        width, height = (round(side * part) for part in shape or self.rng.choice(scenes.ASPECTS))
        drawing = Drawing(self.background(width, height, (0.45, 1.0)), side / REFERENCE_SIDE)
        for color in self.rng.sample(list(COLORS), count or self.rng.randint(1, MOST_SIGNS)):
            self.draw_sign(drawing, color)
        return drawing

    def crowd(self, side: int, scale: float) -> Drawing:
        """Draw as many signs of any colours as find room on a square crop of a photograph; see Drawing for `scale`."""
        drawing = Drawing(self.background(side, side, (0.15, 0.5)), scale)
        for color in self.rng.choices(list(COLORS), k=self.rng.randint(2, 9)):
            self.draw_sign(drawing, color)
        return drawing

    def content(self) -> tuple[str, ...]:
        """Return the glyphs of a sign."""
        rng, look = self.rng, self.look
        kind = _weighted(rng, look.kinds)
        if kind == "shape":
            return (rng.choice(SHAPES),)
        if kind == "number":
            return tuple(rng.choices(string.digits, k=_weighted(rng, look.lengths)))
        return tuple(rng.choice(look.words) if look.words else rng.choices(LETTERS, k=rng.randint(2, MOST_GLYPHS)))

    def draw_sign(self, drawing: Drawing, color: str) -> None:
        """Draw a sign at a random position clear of other signs, or nothing if there is no room."""
        rng, unit = self.rng, drawing.scale
        pixels = rng.uniform(*FONT_PIXELS) * rng.uniform(*self.look.scale) * unit
        plate, glyphs = self._plate(color, self.content(), pixels)
        plate, glyphs = _turned(plate, glyphs, math.radians(rng.uniform(*self.look.angle)))
        room = [drawing.image.width - plate.width - 1, drawing.image.height - plate.height - 1]
        if min(room) < 1:
            return
        for _ in range(_TRIES):
            left, top = (rng.randint(1, free) for free in room)
            box = Box(left, top, left + plate.width, top + plate.height)
            if is_clear(box, drawing.signs, 3 * unit):
                drawing.image.paste(plate, (left, top), plate)
                drawing.signs.append(Sign(color, tuple(glyph.moved(-left, -top) for glyph in glyphs), box))
                return

    def _plate(self, color: str, content: Sequence[str], pixels: float) -> tuple[Image.Image, list[Glyph]]:
        """Return a sign's plate, RGBA, with glyphs of a font of `pixels`, and the glyphs."""
        factor = max(1, round(_OVERSAMPLED_PIXELS / pixels))
        size, padding = pixels * factor, self.rng.uniform(0.3, 0.6) * pixels * factor
        if content[0] in SHAPES:
            advances, font = [1.1 * size], None
        else:
            font = _font(self.rng.choice(self.look.fonts), round(size))
            advances = [font.getlength(name) for name in content]
        width, height = sum(advances) + padding, 1.25 * size + padding / 2
        fill = tuple(int(min(255, max(0, part + self.rng.uniform(-14, 14)))) for part in COLORS[color])
        plate = Image.new("RGBA", (math.ceil(width), math.ceil(height)), fill)
        draw = ImageDraw.Draw(plate)
        draw.rectangle((0, 0, plate.width - 1, plate.height - 1), outline=_BORDER, width=max(1, round(0.11 * size)))
        glyphs, x = [], padding / 2
        for name, advance in zip(content, advances):
            box = _draw_glyph(draw, name, font, x, advance, plate.height / 2, 0.38 * size)
            glyphs.append(Glyph(name, Box(*(edge / factor for edge in box))))
            x += advance
        small = (max(1, round(plate.width / factor)), max(1, round(plate.height / factor)))
        return plate.resize(small, Image.Resampling.BOX), glyphs


def signs_in_square(drawing: Drawing, side: float = SIDE) -> tuple[Sign, ...]:
    """Return a drawing's signs with boxes in pixels of the square of `side` that preprocessing makes of its image."""
    corner, ratio = scenes.square_corner(drawing.image), side / max(drawing.image.size)
    return tuple(sign.moved(*corner, ratio) for sign in drawing.signs)


def photographed(image: Image.Image, rng: random.Random) -> Image.Image:
    """Return an image as a camera might save it: lighter or darker, a little blurred, a JPEG of quality 40 to 95."""
    image = ImageEnhance.Brightness(image).enhance(rng.uniform(0.65, 1.3))
    image = ImageEnhance.Contrast(image).enhance(rng.uniform(0.75, 1.2))
    if rng.random() < 0.4:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.7) * max(image.size) / 384))
    return as_jpeg(image, rng.randint(40, 95))


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    """Return an image after it was saved as a JPEG."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def _weighted(rng: random.Random, choices):
    return rng.choices([one for one, _ in choices], [weight for _, weight in choices])[0]


@cache
def _font(file: Path | None, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size) if file is None else ImageFont.truetype(str(file), size)


def _draw_glyph(draw, name: str, font, x: float, advance: float, middle: float, half: float) -> Box:
    """Draw a character, or a shape of height 2 `half`, from `x` on, and return its box."""
    if font is None:
        center = x + advance / 2
        draw.polygon([(center + half * u, middle + half * v) for u, v in shape_outline(name)], fill=_LIGHT)
        return Box(center - half, middle - half, center + half, middle + half)
    _, top, _, bottom = draw.textbbox((0, 0), "H", font=font)
    y = middle - (top + bottom) / 2
    draw.text((x, y), name, font=font, fill=_LIGHT)
    return Box(x, y + top, x + advance, y + bottom)


def _turned(plate: Image.Image, glyphs: Sequence[Glyph], angle: float) -> tuple[Image.Image, list[Glyph]]:
    """Turn a plate and its glyphs counterclockwise; a glyph's box keeps its size."""
    turned = plate.rotate(math.degrees(angle), Image.Resampling.BICUBIC, expand=True)
    cos, sin = math.cos(angle), math.sin(angle)
    turned_glyphs = []
    for glyph in glyphs:
        x, y = glyph.box.middle
        from_middle, down = x - plate.width / 2, y - plate.height / 2
        to_x = turned.width / 2 + from_middle * cos + down * sin
        to_y = turned.height / 2 - from_middle * sin + down * cos
        turned_glyphs.append(glyph.moved(x - to_x, y - to_y))
    return turned, turned_glyphs
