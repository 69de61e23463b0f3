"""The photograph with what the model looked at drawn over it: attention map as heat, selected regions outlined.

Maps and masks live on grids over the square that the image is padded to; here their cells are mapped back to the image:

    square side = max(W, H), image at offset ((side - W) // 2, (side - H) // 2), cell = side / grid side
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFont, features

LONGEST_SIDE = 4096  # pixels; a larger image, or a sheet of several, is drawn smaller
OUTLINE = (0, 230, 255)
HEAT_STOPS = ((255, 240, 60), (255, 140, 0), (225, 0, 50))  # weak, medium, strong attention
HEAT_OPACITY = 0.6  # of the strongest attention; none of the weakest
DIMMED, BRIGHTENED = 0.6, 1.12  # brightness of the image outside and inside the selected regions

_INK, _PAPER = (30, 30, 30), (255, 255, 255)
_NARROWEST = 420  # pixels of a sheet, so that its legend can be read


@dataclass
class Panel:
    """One image to draw.

    map: [S, S] float, attention over the low-resolution tokens.
    mask: [h, h] bool, the selected high-resolution tokens.
    caption: A line of text under the image.
    """

    map: np.ndarray
    mask: np.ndarray
    caption: str = ""


def cells_of_pixels(width: int, height: int, grid: int) -> tuple[np.ndarray, np.ndarray]:
    """Grid row of every pixel row [H] and grid column of every pixel column [W] of an image."""
    side = max(width, height)
    rows = ((np.arange(height) + (side - height) // 2 + 0.5) * grid / side).astype(np.intp)
    columns = ((np.arange(width) + (side - width) // 2 + 0.5) * grid / side).astype(np.intp)
    return rows, columns


def overlay(image: Image.Image, map: np.ndarray, mask: np.ndarray) -> Image.Image:
    """The image, of the same size, with the map as translucent heat and the selected regions bright and outlined.

    Args:
        image: RGB.
        map: [S, S] float; drawn from its smallest to its largest value on the image.
        mask: [h, h] bool.
    """
    rows, columns = cells_of_pixels(*image.size, mask.shape[0])
    selected = mask[rows[:, None], columns[None, :]]
    bright = ImageEnhance.Brightness(image).enhance(BRIGHTENED)
    dim = ImageEnhance.Brightness(image).enhance(DIMMED)
    drawn = Image.composite(bright, dim, Image.fromarray(selected))

    heat = _heat_of_pixels(image.size, map)
    opacity = Image.fromarray((heat * (255 * HEAT_OPACITY)).astype(np.uint8))
    drawn = Image.composite(Image.fromarray(heat_colour(heat)), drawn, opacity)

    drawn.paste(OUTLINE, mask=Image.fromarray(_outline(selected, max(image.size) / mask.shape[0])))
    return drawn


def sheet(image: Image.Image, panels: Sequence[Panel], title: str = "", columns: int | None = None) -> Image.Image:
    """Panels side by side above a legend. The first panel's image lies at (0, 0), a single one in its own size.

    Args:
        image: RGB; drawn smaller only where the images together would be longer than LONGEST_SIDE.
        title: Text under the panels, such as question and answer.
        columns: Panels to a row; about as many as there are rows when None.
    """
    columns = columns or math.ceil(math.sqrt(len(panels)))
    rows = math.ceil(len(panels) / columns)
    scale = min(1.0, LONGEST_SIDE / max(columns * image.width, rows * image.height))
    if scale < 1:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.LANCZOS)

    gap = 0 if len(panels) == 1 else 8
    width = max(_NARROWEST, columns * (image.width + gap) - gap)
    font = _font(min(28, max(13, width // 60)))
    line = _line_height(font)
    caption_width = image.width if columns > 1 else width
    captions = [_wrap(panel.caption, font, caption_width) for panel in panels]
    row_height = image.height + max(len(lines) for lines in captions) * line + gap
    legend = _legend(width, font, _wrap(title, font, width - line))
    result = Image.new("RGB", (width, rows * row_height + legend.height), _PAPER)
    pen = ImageDraw.Draw(result)
    for number, (panel, lines) in enumerate(zip(panels, captions)):
        left, top = number % columns * (image.width + gap), number // columns * row_height
        result.paste(overlay(image, panel.map, panel.mask), (left, top))
        for at, text in enumerate(lines):
            pen.text((left + line // 4, top + image.height + at * line), text, fill=_INK, font=font)
    result.paste(legend, (0, rows * row_height))
    return result


def heat_colour(heat: np.ndarray) -> np.ndarray:
    """[...] in 0..1 -> [..., 3] uint8, from HEAT_STOPS."""
    stops = np.array(HEAT_STOPS, dtype=np.float32)
    table = np.stack(
        [np.interp(np.linspace(0, 1, 256), np.linspace(0, 1, len(stops)), c) for c in stops.T],
        axis=-1,
    )
    return table.round().astype(np.uint8)[(np.clip(heat, 0, 1) * 255).astype(np.uint8)]


def _heat_of_pixels(size: tuple[int, int], map: np.ndarray) -> np.ndarray:
    """[H, W] float32 in 0..1; 0 everywhere where the map is constant over the image or not finite."""
    width, height = size
    side, grid = max(size), map.shape[0]
    rows, columns = cells_of_pixels(width, height, grid)
    on_image = map[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.float64)
    low, high = on_image.min(), on_image.max()
    if not high > low:
        return np.zeros((height, width), dtype=np.float32)
    heat = np.clip((map.astype(np.float64) - low) / (high - low), 0, 1).astype(np.float32)
    left, top = (side - width) // 2, (side - height) // 2
    box = tuple(x * grid / side for x in (left, top, left + width, top + height))
    return np.asarray(Image.fromarray(heat).resize(size, Image.Resampling.BILINEAR, box=box)).clip(0, 1)


def _outline(selected: np.ndarray, cell: float) -> np.ndarray:
    """[H, W] bool: the selected pixels within a few pixels of one that is not, or of the image's edge."""
    thick = int(min(max(1, round(max(selected.shape) / 400)), max(1, cell // 3)))
    padded = np.pad(selected, thick)
    inner = selected.copy()
    height, width = selected.shape
    for down in (0, thick, 2 * thick):
        for right in (0, thick, 2 * thick):
            inner &= padded[down : down + height, right : right + width]
    return selected & ~inner


def _legend(width: int, font: ImageFont.ImageFont, title: list[str]) -> Image.Image:
    """A strip that explains the colours, under the lines of the title."""
    line = _line_height(font)
    entries = [("heat", "attention, weak to strong"), ("region", "selected high-resolution region")]
    places, at, row = [], line // 2, 0
    for kind, text in entries:
        swatch = 3 * line if kind == "heat" else line
        wide = swatch + line // 2 + round(font.getlength(text)) + line
        if at > line // 2 and at + wide > width:
            at, row = line // 2, row + 1
        places.append((kind, text, at, row, swatch))
        at += wide
    top = len(title) * line + line // 2
    strip = Image.new("RGB", (width, top + (row + 1) * line * 3 // 2), _PAPER)
    pen = ImageDraw.Draw(strip)
    for number, text in enumerate(title):
        pen.text((line // 2, line // 4 + number * line), text, fill=_INK, font=font)
    for kind, text, at, row, swatch in places:
        y = top + row * line * 3 // 2
        if kind == "heat":
            ramp = heat_colour(np.tile(np.linspace(0, 1, swatch, dtype=np.float32), (line, 1)))
            strip.paste(Image.fromarray(ramp), (at, y))
        else:
            pen.rectangle((at, y, at + swatch, y + line - 1), outline=OUTLINE, width=max(2, line // 8))
        pen.text((at + swatch + line // 2, y - line // 8), text, fill=_INK, font=font)
    return strip


def _font(size: int) -> ImageFont.ImageFont:
    return ImageFont.load_default(size if features.check("freetype2") else None)


def _line_height(font: ImageFont.ImageFont) -> int:
    return round((font.getbbox("Ag")[3] - min(0, font.getbbox("Ag")[1])) * 1.3)


def _wrap(text: str, font: ImageFont.ImageFont, width: int) -> list[str]:
    """Lines no wider than `width` pixels; a word that is wider than that has a line of its own."""
    if not features.check("freetype2"):
        text = text.encode("latin-1", "replace").decode("latin-1")  # all that the bitmap font has
    lines: list[str] = []
    for paragraph in text.splitlines():
        current = ""
        for word in paragraph.split():
            longer = f"{current} {word}".strip()
            if current and font.getlength(longer) > width:
                lines.append(current)
                current = word
            else:
                current = longer
        lines.append(current)
    return lines
