"""Photographs with small coloured signs, each carrying two digits: what the default model is trained and tested on.

The backgrounds are real photographs, from any folders of JPEG files. The published figures use those of the Debian
packages lomiri-wallpapers-16.04 and mate-backgrounds (LICENSES); every fourth one, by name, is held out.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

COLORS = {
    "red": (200, 30, 40),
    "green": (25, 130, 55),
    "blue": (35, 75, 205),
    "purple": (140, 50, 170),
    "black": (20, 20, 24),
}
QUESTIONS = (
    "What number is on the sign that is {}?",
    "Which digits are on the sign that is {}?",
    "What does the sign say that is {}?",
    "Read the number on the sign that is {}",
)
SIDE = 288  # pixels of the longer side, for which the sizes of signs are given
SHAPES = ((1.0, 1.0), (1.0, 1.0), (1.0, 0.75), (0.75, 1.0), (1.0, 0.67))  # width and height over the longer side
DIGIT_PIXELS = (12.0, 14.5)  # font size
_LIGHT, _BORDER = (250, 250, 250), (245, 245, 245)
_OVERSAMPLING = 4


@dataclass(frozen=True)
class Sign:
    """color: Its name. digits: What it says. box: left, top, right, bottom in pixels of the picture. size: Of the font."""

    color: str
    digits: str
    box: tuple[float, float, float, float]
    size: float

    def shifted(self, left: float, top: float, scale: float = 1.0) -> Sign:
        """The sign in a part of the picture that begins at (left, top), scaled."""
        x0, y0, x1, y1 = self.box
        box = tuple((v - o) * scale for v, o in zip((x0, y0, x1, y1), (left, top) * 2))
        return Sign(self.color, self.digits, box, self.size * scale)


def find_photographs(folders: list[Path], held_out: bool) -> list[Image.Image]:
    """Every fourth photograph of the folders (by name) when `held_out`, else the others."""
    paths = sorted((path for folder in folders for path in folder.rglob("*.jpg")), key=lambda path: path.name)
    # Several sizes of one drawing, not photographs.
    paths = [path for path in paths if "abstract" not in path.parts and "desktop" not in path.parts]
    if len(paths) < 8:
        raise SystemExit(f"found {len(paths)} photographs in {', '.join(map(str, folders))}; at least 8 are needed")
    photographs = []
    for number, path in enumerate(paths):
        if (number % 4 == 3) == held_out:
            photograph = Image.open(path).convert("RGB")
            photograph.thumbnail((1100, 1100), Image.LANCZOS)
            photographs.append(photograph)
    return photographs


class Painter:
    """Draws pictures; everything random comes from `rng`."""

    def __init__(self, photographs: list[Image.Image], font: Path, rng: random.Random):
        self.photographs, self.rng = photographs, rng
        self._font_file, self._fonts = str(font), {}

    def picture(self, side: int = SIDE, scale: float = 1.0, signs: int | None = None, shape=None, crowd=False) -> tuple[Image.Image, list[Sign]]:
        """A picture whose longer side has `side` pixels, with 3 or 4 signs `scale` times their usual size.

        Each sign has a colour of its own, unless it is a `crowd`.
        """
        width, height = (round(side * part) for part in shape or self.rng.choice(SHAPES))
        picture = self._background(width, height, (0.15, 0.5) if crowd else (0.45, 1.0))
        drawn: list[Sign] = []
        count = signs or self.rng.choice((3, 4))
        for color in self.rng.choices(list(COLORS), k=count) if crowd else self.rng.sample(list(COLORS), count):
            self._add_sign(picture, color, drawn, scale)
        return picture, drawn

    def question(self, color: str) -> str:
        return self.rng.choice(QUESTIONS).format(color)

    def _background(self, width: int, height: int, shares: tuple[float, float]) -> Image.Image:
        photograph = self.rng.choice(self.photographs)
        share = self.rng.uniform(*shares)
        w = min(photograph.width * share, photograph.height * share * width / height)
        h = w * height / width
        left, top = self.rng.uniform(0, photograph.width - w), self.rng.uniform(0, photograph.height - h)
        part = photograph.resize((width, height), Image.BICUBIC, box=(left, top, left + w, top + h))
        return part.transpose(Image.FLIP_LEFT_RIGHT) if self.rng.random() < 0.5 else part

    def _add_sign(self, picture: Image.Image, color: str, drawn: list[Sign], scale: float) -> None:
        """Somewhere uniformly, but not over another sign."""
        for _ in range(50):
            size = self.rng.uniform(*DIGIT_PIXELS) * scale
            width, height = (round(size * part + self.rng.uniform(4, 8) * scale) for part in (1.95, 1.25))
            left, top = self.rng.randint(1, picture.width - width - 1), self.rng.randint(1, picture.height - height - 1)
            gap = 4 * scale
            if all(left + width + gap < x0 or x1 + gap < left or top + height + gap < y0 or y1 + gap < top
                   for x0, y0, x1, y1 in (sign.box for sign in drawn)):  # fmt: skip
                break
        else:
            return
        digits = f"{self.rng.randrange(100):02d}"
        picture.paste(self._sign(color, digits, width, height, size), (left, top))
        drawn.append(Sign(color, digits, (left, top, left + width, top + height), size))

    def _sign(self, color: str, digits: str, width: int, height: int, size: float) -> Image.Image:
        factor = _OVERSAMPLING
        fill = tuple(int(min(255, max(0, part + self.rng.uniform(-14, 14)))) for part in COLORS[color])
        sign = Image.new("RGB", (width * factor, height * factor), fill)
        draw = ImageDraw.Draw(sign)
        draw.rectangle((0, 0, sign.width - 1, sign.height - 1), outline=_BORDER, width=2 * factor)
        font = self._font(round(size * factor))
        left, top, right, bottom = draw.textbbox((0, 0), digits, font=font)
        at = ((sign.width - right - left) / 2, (sign.height - bottom - top) / 2)
        draw.text(at, digits, font=font, fill=_LIGHT)
        return sign.resize((width, height), Image.BOX)

    def _font(self, size: int) -> ImageFont.FreeTypeFont:
        if size not in self._fonts:
            self._fonts[size] = ImageFont.truetype(self._font_file, size)
        return self._fonts[size]
