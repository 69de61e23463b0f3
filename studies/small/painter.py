"""Draws signs and vehicles over photographs."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter, ImageFont

from studies.small.objects import COLORS, Box, Glyph, Sign, shape_outline, vehicle_outline

SIDE = 384  # pixels of an image's longer side: the images at zoom 2, 3 and 4 of 96 pixels are resampled from it
REFERENCE_SIDE = 288  # pixels of the longer side that the sizes below refer to
FONT_PIXELS = (12.0, 14.5)
VEHICLE_PIXELS = (11.0, 13.0)  # length
_LIGHT, _BORDER = (250, 250, 250), (245, 245, 245)
_GROUND = (50, 60, 55)
_OVERSAMPLING = 4
_SIGN_TRIES, _VEHICLE_TRIES = 50, 200


@dataclass
class Drawing:
    """An image in the making and what has been drawn on it, with boxes in its own pixels.

    Attributes:
        image: RGB.
        scale: Size of the objects relative to FONT_PIXELS and VEHICLE_PIXELS.
    """

    image: Image.Image
    scale: float
    signs: list[Sign] = field(default_factory=list)
    vehicles: list[Glyph] = field(default_factory=list)


class Painter:
    """Draws on images.

    Args:
        photographs: RGB, the backgrounds.
        font: TrueType file for the digits; Pillow's own font if None.
        rng: Source of all randomness.
    """

    def __init__(self, photographs: list[Image.Image], font: Path | None, rng: random.Random):
        self.photographs, self.rng = photographs, rng
        self._font_file = font
        self._fonts: dict[int, ImageFont.FreeTypeFont] = {}

    def background(self, width: int, height: int, shares: tuple[float, float]) -> Image.Image:
        """Return a random crop of a photograph that spans between the two shares of its width or height."""
        photograph = self.rng.choice(self.photographs)
        share = self.rng.uniform(*shares)
        w = min(photograph.width * share, photograph.height * share * width / height)
        h = w * height / width
        left, top = self.rng.uniform(0, photograph.width - w), self.rng.uniform(0, photograph.height - h)
        crop = photograph.resize((width, height), Image.Resampling.BICUBIC, box=(left, top, left + w, top + h))
        return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.rng.random() < 0.5 else crop

    def ground(self, width: int, height: int) -> Image.Image:
        """Return a photograph as ground seen from above: blurred, and dark enough for vehicles to stand out."""
        blurred = self.background(width, height, (0.45, 1.0)).filter(ImageFilter.GaussianBlur(SIDE / 48))
        return Image.blend(blurred, Image.new("RGB", blurred.size, _GROUND), 0.5)

    def add_sign(self, drawing: Drawing, color: str, content: Callable[[], Sequence[str]]) -> None:
        """Draw a sign at a random position clear of other signs, or nothing if there is no room.

        Args:
            drawing: What to draw on.
            color: A key of COLORS.
            content: Returns two digits, one shape or two shapes; called only once there is room.
        """
        for _ in range(_SIGN_TRIES):
            size = self.rng.uniform(*FONT_PIXELS) * drawing.scale
            width, height = (round(size * part + self.rng.uniform(4, 8) * drawing.scale) for part in (1.95, 1.25))
            box = self._random_box(drawing.image, width, height)
            if is_clear(box, drawing.signs, 4 * drawing.scale):
                break
        else:
            return
        plate, glyphs = self._plate(color, content(), (width, height), size)
        drawing.image.paste(plate, (box.left, box.top))
        drawing.signs.append(Sign(color, tuple(glyph.moved(-box.left, -box.top) for glyph in glyphs), box))

    def add_vehicle(self, drawing: Drawing, kind: str) -> None:
        """Draw a vehicle at a random angle and position clear of other vehicles, or nothing if there is no room."""
        for _ in range(_VEHICLE_TRIES):
            length = self.rng.uniform(*VEHICLE_PIXELS) * drawing.scale
            side = math.ceil(length)
            box = self._random_box(drawing.image, side, side)
            if is_clear(box, drawing.vehicles, 2 * drawing.scale):
                break
        else:
            return
        angle = self.rng.uniform(0, 2 * math.pi)
        light = self.rng.randint(225, 250)
        cover = Image.new("L", (side * _OVERSAMPLING,) * 2)
        half = length * _OVERSAMPLING / 2
        cos, sin, middle = half * math.cos(angle), half * math.sin(angle), cover.width / 2
        turned = [(middle + u * cos - v * sin, middle + u * sin + v * cos) for u, v in vehicle_outline(kind)]
        ImageDraw.Draw(cover).polygon(turned, fill=255)
        mask = cover.resize((side, side), Image.Resampling.BOX)
        drawing.image.paste((light, light, light), (box.left, box.top), mask)
        drawing.vehicles.append(Glyph(kind, box))

    def _random_box(self, image: Image.Image, width: int, height: int) -> Box:
        """Return a box of whole pixels, uniform over the image."""
        left = self.rng.randint(1, image.width - width - 1)
        top = self.rng.randint(1, image.height - height - 1)
        return Box(left, top, left + width, top + height)

    def _plate(
        self, color: str, content: Sequence[str], size: tuple[int, int], font_pixels: float
    ) -> tuple[Image.Image, list[Glyph]]:
        """Return a sign's plate and its glyphs: digits of `font_pixels`, or shapes as high as those."""
        factor = _OVERSAMPLING
        fill = tuple(int(min(255, max(0, part + self.rng.uniform(-14, 14)))) for part in COLORS[color])
        plate = Image.new("RGB", (size[0] * factor, size[1] * factor), fill)
        ImageDraw.Draw(plate).rectangle((0, 0, plate.width - 1, plate.height - 1), outline=_BORDER, width=2 * factor)
        if content[0].isdigit():
            boxes = _draw_digits(plate, content, self._font(round(font_pixels * factor)))
        else:
            boxes = _draw_shapes(plate, content, 0.38 * font_pixels * factor)
        glyphs = [Glyph(name, Box(*(edge / factor for edge in box))) for name, box in zip(content, boxes)]
        return plate.resize(size, Image.Resampling.BOX), glyphs

    def _font(self, size: int) -> ImageFont.FreeTypeFont:
        if size not in self._fonts:
            file = self._font_file
            self._fonts[size] = ImageFont.truetype(str(file), size) if file else ImageFont.load_default(size)
        return self._fonts[size]


def is_clear(box: Box, drawn: Sequence[Sign | Glyph], gap: float) -> bool:
    """Return whether a box keeps a distance of `gap` pixels from everything drawn."""
    return all(
        box.right + gap < other.left
        or other.right + gap < box.left
        or box.bottom + gap < other.top
        or other.bottom + gap < box.top
        for other in (one.box for one in drawn)
    )


def _draw_digits(plate: Image.Image, digits: Sequence[str], font: ImageFont.FreeTypeFont) -> list[Box]:
    """Draw digits in the middle of a plate and return their boxes, equal parts of the text's."""
    draw, text = ImageDraw.Draw(plate), "".join(digits)
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    x, y = (plate.width - right - left) / 2, (plate.height - bottom - top) / 2
    draw.text((x, y), text, font=font, fill=_LIGHT)
    edges = [x + left + (right - left) * k / len(digits) for k in range(len(digits) + 1)]
    return [Box(x0, y + top, x1, y + bottom) for x0, x1 in itertools.pairwise(edges)]


def _draw_shapes(plate: Image.Image, shapes: Sequence[str], half: float) -> list[Box]:
    """Draw shapes of height 2 `half` side by side in the middle of a plate and return their boxes."""
    draw, y = ImageDraw.Draw(plate), plate.height / 2
    middles = [plate.width / 2 + (k - (len(shapes) - 1) / 2) * 2.2 * half for k in range(len(shapes))]
    for name, x in zip(shapes, middles):
        draw.polygon([(x + half * u, y + half * v) for u, v in shape_outline(name)], fill=_LIGHT)
    return [Box(x - half, y - half, x + half, y + half) for x in middles]
