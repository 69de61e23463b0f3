"""Draws what the model looked at over the image: the attention map as heat, the selected regions outlined.

Maps and masks are grids over the frame of the view that the model saw (`inputs/frames.py`), such as the square that an
image is padded to. Row r of a grid of R rows lies on the image at frame.top + [r, r + 1) * frame.height / R.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFont, features

from flexattn_cuda.inputs.frames import Frame, FrameOf, padded_square

MAX_SIDE = 4096  # pixels; a larger image, or a sheet of several, is scaled down
OUTLINE = (0, 230, 255)
HEAT_STOPS = ((255, 240, 60), (255, 140, 0), (225, 0, 50))  # weak, medium, strong attention
HEAT_OPACITY = 0.6  # of the strongest attention; the weakest is transparent
DIMMED, BRIGHTENED = 0.6, 1.12  # brightness of the image outside and inside the selected regions

_INK, _PAPER = (30, 30, 30), (255, 255, 255)
_GAP = 8  # pixels between drawings
_MIN_WIDTH = 420  # pixels of a sheet, so that its legend is readable


@dataclass
class Panel:
    """One overlay of a sheet.

    Attributes:
        attention: [rows, cols] float, attention map over the LR tokens.
        mask: [HR rows, HR cols] bool, the selected HR tokens.
        caption: Text under the image.
    """

    attention: np.ndarray
    mask: np.ndarray
    caption: str = ""


def cells_of_pixels(
    width: int, height: int, grid: int | tuple[int, int], frame_of: FrameOf = padded_square
) -> tuple[np.ndarray, np.ndarray]:
    """Return the grid row of every pixel row and the grid column of every pixel column of an image.

    Args:
        width: Of the image, in pixels.
        height: Of the image, in pixels.
        grid: Rows and columns over the frame, or the side of a square.
        frame_of: Returns the frame of an image.

    Returns:
        [height] and [width] int, -1 outside of the frame.
    """
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    frame = frame_of(width, height)
    return (_cells(height, frame.top, frame.height, rows), _cells(width, frame.left, frame.width, columns))


def _cells(pixels: int, start: float, length: float, cells: int) -> np.ndarray:
    """Return the cell of every pixel of one axis."""
    found = np.floor((np.arange(pixels) - start + 0.5) * cells / length).astype(np.intp)
    return np.where((found >= 0) & (found < cells), found, -1)


def overlay(
    image: Image.Image, attention: np.ndarray, mask: np.ndarray, frame_of: FrameOf = padded_square
) -> Image.Image:
    """Return the image with the attention map as translucent heat and the selected regions bright and outlined.

    Selected regions keep their colours, which a question may be about: there is no heat in them.

    Args:
        image: RGB.
        attention: [rows, cols] float, drawn from its minimum to its maximum on the image.
        mask: [HR rows, HR cols] bool.
        frame_of: Returns the frame of an image.

    Returns:
        RGB, of the image's size.
    """
    rows, columns = cells_of_pixels(*image.size, mask.shape, frame_of)
    selected = mask[rows[:, None], columns[None, :]] & (rows >= 0)[:, None] & (columns >= 0)
    bright = ImageEnhance.Brightness(image).enhance(BRIGHTENED)
    dim = ImageEnhance.Brightness(image).enhance(DIMMED)
    drawn = Image.composite(bright, dim, Image.fromarray(selected))

    frame = frame_of(*image.size)
    heat = np.where(selected, 0, _heat_of_pixels(image.size, attention, frame))
    opacity = Image.fromarray((heat * (255 * HEAT_OPACITY)).astype(np.uint8))
    drawn = Image.composite(Image.fromarray(heat_colour(heat)), drawn, opacity)

    cell = min(frame.height / mask.shape[0], frame.width / mask.shape[1])
    drawn.paste(OUTLINE, mask=Image.fromarray(_outline(selected, cell)))
    return drawn


def sheet(
    image: Image.Image, panels: Sequence[Panel], title: str = "", frame_of: FrameOf = padded_square
) -> Image.Image:
    """Return panels in about as many rows as columns, above a legend.

    The first panel's image starts at (0, 0). A single panel keeps the image's size up to MAX_SIDE.

    Args:
        image: RGB; scaled down only if the panels together would exceed MAX_SIDE.
        panels: At least one.
        title: Text under the panels, such as question and answer.
        frame_of: Returns the frame of an image.
    """
    layout = _Layout.of(image.size, [panel.caption for panel in panels])
    if layout.image_size != image.size:
        image = image.resize(layout.image_size, Image.Resampling.LANCZOS)
    legend = _legend(layout.width, layout.font, _wrap(title, layout.font, layout.width - layout.line))
    result = Image.new("RGB", (layout.width, layout.height + legend.height), _PAPER)
    pen = ImageDraw.Draw(result)
    for number, panel in enumerate(panels):
        left, top = layout.corner(number)
        result.paste(overlay(image, panel.attention, panel.mask, frame_of), (left, top))
        for row, text in enumerate(layout.captions[number]):
            position = (left + layout.line // 4, top + image.height + row * layout.line)
            pen.text(position, text, fill=_INK, font=layout.font)
    result.paste(legend, (0, layout.height))
    return result


def below_each_other(drawings: Sequence[Image.Image]) -> Image.Image:
    """Return drawings one below the other; a single one as it is."""
    if len(drawings) == 1:
        return drawings[0]
    height = sum(one.height + _GAP for one in drawings) - _GAP
    result = Image.new("RGB", (max(one.width for one in drawings), height), _PAPER)
    top = 0
    for one in drawings:
        result.paste(one, (0, top))
        top += one.height + _GAP
    return result


def beside(views: Sequence[Image.Image], caption: str, drawing: Image.Image) -> Image.Image:
    """Return views, one below the other and each with the caption, on the left of a drawing of the same images."""
    font = _font(max(13, drawing.width // 60))
    lines, line = _wrap(caption, font, drawing.width), _line_height(font)
    sheets = []
    for view in views:
        view = view.resize((drawing.width, max(1, round(view.height * drawing.width / view.width))))
        sheet = Image.new("RGB", (view.width, view.height + len(lines) * line), _PAPER)
        sheet.paste(view, (0, 0))
        for row, text in enumerate(lines):
            ImageDraw.Draw(sheet).text((line // 4, view.height + row * line), text, fill=_INK, font=font)
        sheets.append(sheet)
    left = below_each_other(sheets)
    result = Image.new("RGB", (left.width + _GAP + drawing.width, max(left.height, drawing.height)), _PAPER)
    result.paste(left, (0, 0))
    result.paste(drawing, (left.width + _GAP, 0))
    return result


@dataclass
class _Layout:
    """Where the panels of a sheet lie, in pixels.

        image    gap    image
        caption         caption
        gap

    Attributes:
        image_size: Width and height of each panel's image.
        columns: Panels per row.
        gap: Between panels.
        width: Of the sheet.
        row_height: Of a row of panels with their captions and the gap below.
        height: Of all rows.
        font: Of all text.
        line: Height of a line of text.
        captions: Lines of each panel's caption.
    """

    image_size: tuple[int, int]
    columns: int
    gap: int
    width: int
    row_height: int
    height: int
    font: ImageFont.ImageFont
    line: int
    captions: list[list[str]]

    @classmethod
    def of(cls, size: tuple[int, int], captions: Sequence[str]) -> _Layout:
        """Lay out panels with images of a size and with captions."""
        columns = math.ceil(math.sqrt(len(captions)))
        rows = math.ceil(len(captions) / columns)
        scale = min(1.0, MAX_SIDE / max(columns * size[0], rows * size[1]))
        if scale < 1:
            size = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
        gap = 0 if len(captions) == 1 else _GAP
        width = max(_MIN_WIDTH, columns * (size[0] + gap) - gap)
        font = _font(max(13, width // 60))
        line = _line_height(font)
        wrapped = [_wrap(caption, font, size[0] if columns > 1 else width) for caption in captions]
        row_height = size[1] + max(map(len, wrapped)) * line + gap
        return cls(size, columns, gap, width, row_height, rows * row_height, font, line, wrapped)

    def corner(self, number: int) -> tuple[int, int]:
        """Return the left and top of a panel."""
        row, column = divmod(number, self.columns)
        return column * (self.image_size[0] + self.gap), row * self.row_height


def heat_colour(heat: np.ndarray) -> np.ndarray:
    """Return the colours of HEAT_STOPS for heat in [0, 1]: [...] float -> [..., 3] uint8."""
    stops = np.array(HEAT_STOPS, dtype=np.float32)
    levels, at = np.linspace(0, 1, 256), np.linspace(0, 1, len(stops))
    table = np.stack([np.interp(levels, at, channel) for channel in stops.T], axis=-1)
    return table.round().astype(np.uint8)[(np.clip(heat, 0, 1) * 255).astype(np.uint8)]


def _heat_of_pixels(size: tuple[int, int], attention: np.ndarray, frame: Frame) -> np.ndarray:
    """Return each pixel's heat in [0, 1], [H, W] float32.

    It is 0 outside of the frame, and everywhere if the map is constant on the image or not finite.
    """
    heat_of_image = np.zeros((size[1], size[0]), dtype=np.float32)
    rows, columns = cells_of_pixels(*size, attention.shape, lambda width, height: frame)
    inside = np.ix_(*(np.flatnonzero(cells >= 0) for cells in (rows, columns)))
    on_image = attention[np.unique(rows[rows >= 0])][:, np.unique(columns[columns >= 0])].astype(np.float64)
    low, high = on_image.min(), on_image.max()
    if not high > low:
        return heat_of_image
    heat = np.clip((attention.astype(np.float64) - low) / (high - low), 0, 1).astype(np.float32)
    left, right = _span(columns, frame.left, frame.width, attention.shape[1])
    top, bottom = _span(rows, frame.top, frame.height, attention.shape[0])
    height, width = inside[0].size, inside[1].size
    resized = Image.fromarray(heat).resize((width, height), Image.Resampling.BILINEAR, (left, top, right, bottom))
    heat_of_image[inside] = np.asarray(resized).clip(0, 1)
    return heat_of_image


def _span(cells_of: np.ndarray, start: float, length: float, cells: int) -> tuple[float, float]:
    """Return where the pixels inside of the frame begin and end, in cells, on one axis."""
    inside = np.flatnonzero(cells_of >= 0)
    begin, end = ((edge - start) * cells / length for edge in (inside[0], inside[-1] + 1))
    return max(begin, 0.0), min(end, float(cells))


def _outline(selected: np.ndarray, cell: float) -> np.ndarray:
    """Return the selected pixels within a few pixels of an unselected one or of the image's edge, [H, W] bool."""
    thick = int(min(max(1, round(max(selected.shape) / 400)), max(1, cell // 3)))
    padded = np.pad(selected, thick)
    inner = selected.copy()
    height, width = selected.shape
    for down in (0, thick, 2 * thick):
        for right in (0, thick, 2 * thick):
            inner &= padded[down : down + height, right : right + width]
    return selected & ~inner


@dataclass(frozen=True)
class _LegendEntry:
    """An entry of the legend: a swatch, `indent` pixels from the left in a row of entries, and its text."""

    kind: str
    text: str
    swatch: int
    indent: int
    row: int


def _legend_entries(width: int, font: ImageFont.ImageFont) -> list[_LegendEntry]:
    """Place the entries side by side, and in further rows if they do not fit into `width`."""
    line = _line_height(font)
    entries: list[_LegendEntry] = []
    indent, row = line // 2, 0
    for kind, text, swatch in (
        ("heat", "attention, weak to strong", 3 * line),
        ("region", "selected high-resolution region", line),
    ):
        entry_width = swatch + line // 2 + round(font.getlength(text)) + line
        if indent > line // 2 and indent + entry_width > width:
            indent, row = line // 2, row + 1
        entries.append(_LegendEntry(kind, text, swatch, indent, row))
        indent += entry_width
    return entries


def _legend(width: int, font: ImageFont.ImageFont, title: list[str]) -> Image.Image:
    """Return a strip with the lines of the title and, below, what the colours mean."""
    line = _line_height(font)
    entries = _legend_entries(width, font)
    top = len(title) * line + line // 2
    strip = Image.new("RGB", (width, top + (entries[-1].row + 1) * line * 3 // 2), _PAPER)
    pen = ImageDraw.Draw(strip)
    for number, text in enumerate(title):
        pen.text((line // 2, line // 4 + number * line), text, fill=_INK, font=font)
    for entry in entries:
        x, y = entry.indent, top + entry.row * line * 3 // 2
        if entry.kind == "heat":
            ramp = heat_colour(np.tile(np.linspace(0, 1, entry.swatch, dtype=np.float32), (line, 1)))
            strip.paste(Image.fromarray(ramp), (x, y))
        else:
            pen.rectangle((x, y, x + entry.swatch, y + line - 1), outline=OUTLINE, width=max(2, line // 8))
        pen.text((x + entry.swatch + line // 2, y - line // 8), entry.text, fill=_INK, font=font)
    return strip


def _font(size: int) -> ImageFont.ImageFont:
    return ImageFont.load_default(size if features.check("freetype2") else None)


def _line_height(font: ImageFont.ImageFont) -> int:
    return round((font.getbbox("Ag")[3] - min(0, font.getbbox("Ag")[1])) * 1.3)


def _wrap(text: str, font: ImageFont.ImageFont, width: int) -> list[str]:
    """Break a text into lines of at most `width` pixels; a wider word gets a line of its own."""
    if not features.check("freetype2"):
        text = text.encode("latin-1", "replace").decode("latin-1")  # the bitmap font has no other characters
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
