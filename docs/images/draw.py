"""Draw the diagrams of the documentation.

    python docs/images/draw.py            # writes the .svg files beside this script

The grids of `selection.svg` are computed: a made-up attention map goes through the released rule of the selection.
"""

from __future__ import annotations

import math
from pathlib import Path

HERE = Path(__file__).parent
INK, GREY, LIGHT = "#1f2937", "#6b7280", "#e5e7eb"
LR, HR, TEXT, MAP = "#4f6bed", "#0e9f8e", "#9ca3af", "#e8710a"
PALE = {LR: "#e3e8fd", HR: "#d7f3ef", TEXT: "#eef0f3", MAP: "#fdebd9", INK: "#ffffff"}
ROWS, POOLED, FINE = 24, 9, 72  # the LR grid, the pooled grid, the HR grid
THRESHOLD = 48 / 255


class Drawing:
    """An SVG in the making; coordinates are pixels from the top left."""

    def __init__(self, width: int, height: int):
        self.width, self.height = width, height
        self.parts: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, colour: str = INK, label: str = "") -> None:
        """Draw a rounded box with lines of centred text."""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{PALE[colour]}" stroke="{colour}" '
            'stroke-width="1.5"/>'
        )
        lines = label.split("\n") if label else []
        for number, line in enumerate(lines):
            self.text(x + width / 2, y + height / 2 + 5 + 17 * (number - (len(lines) - 1) / 2), line, anchor="middle")

    def cell(self, x: float, y: float, width: float, height: float, fill: str, opacity: float = 1.0) -> None:
        """Fill a rectangle without an outline."""
        self.parts.append(
            f'<rect x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}" fill="{fill}" '
            f'fill-opacity="{opacity:.3f}" shape-rendering="crispEdges"/>'
        )

    def frame(self, x: float, y: float, width: float, height: float) -> None:
        """Outline a rectangle."""
        self.parts.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="none" stroke="{GREY}"/>')

    def text(self, x: float, y: float, words: str, *, size: int = 14, colour: str = INK, anchor: str = "start") -> None:
        """Write one line of text."""
        words = words.replace("&", "&amp;").replace("<", "&lt;")
        self.parts.append(
            f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" text-anchor="{anchor}">{words}</text>'
        )

    def arrow(self, *points: tuple[float, float], colour: str = GREY) -> None:
        """Draw a line through the points, with a head at its end."""
        path = " ".join(f"{x},{y}" for x, y in points)
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8" '
            f'marker-end="url(#{colour[1:]})"/>'
        )

    def save(self, name: str) -> None:
        """Write the file."""
        heads = "".join(
            f'<marker id="{colour[1:]}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
            f'orient="auto-start-reverse"><path d="M0,0 L10,5 L0,10 z" fill="{colour}"/></marker>'
            for colour in (GREY, LR, HR, MAP)
        )
        body = "\n".join(self.parts)
        (HERE / name).write_text(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'font-family="Helvetica, Arial, DejaVu Sans, sans-serif">\n<defs>{heads}</defs>\n'
            f'<rect width="{self.width}" height="{self.height}" fill="#ffffff"/>\n{body}\n</svg>\n'
        )


# ---------------------------------------------------------------------------------------------------------- mechanism


def mechanism() -> None:
    """Draw the way from an image to the answer."""
    drawing = Drawing(960, 470)
    drawing.box(20, 150, 90, 70, INK, "image")
    drawing.box(160, 60, 140, 56, LR, "downscaled\n336 × 336")
    drawing.box(160, 254, 140, 56, HR, "full size\n3 × 3 tiles")
    drawing.arrow((110, 170), (135, 170), (135, 88), (158, 88))
    drawing.arrow((110, 200), (135, 200), (135, 282), (158, 282))
    drawing.box(340, 60, 130, 250, INK, "vision tower\n+ projector")
    drawing.arrow((300, 88), (338, 88), colour=LR)
    drawing.arrow((300, 282), (338, 282), colour=HR)
    drawing.text(319, 330, "a tile is encoded when it is first needed", size=12, colour=GREY, anchor="middle")

    _sequence(drawing, 520, 70)
    drawing.arrow((470, 88), (518, 88), colour=LR)
    drawing.box(520, 140, 420, 40, INK, "layers 0 … k−1: plain self-attention")
    drawing.arrow((730, 108), (730, 138))
    drawing.box(700, 226, 240, 72, MAP, "map of the layer before:\nthe last query row over\nthe 24 × 24 LR tokens")
    drawing.arrow((820, 180), (820, 224), colour=MAP)
    drawing.text(520, 214, "72 × 72 HR tokens,", size=13, colour=HR)
    drawing.text(520, 231, "outside of the sequence", size=13, colour=HR)
    _grid(drawing, 540, 240, 96)
    drawing.arrow((470, 290), (538, 290), colour=HR)
    drawing.arrow((700, 268), (640, 280), colour=MAP)
    drawing.text(672, 258, "selects", size=13, colour=MAP, anchor="middle")

    drawing.box(
        520,
        378,
        420,
        66,
        INK,
        "layer k and later: N sequence keys, and the keys\nand values W'K, W'V of the M selected HR tokens",
    )
    drawing.arrow((588, 338), (588, 376), colour=HR)
    drawing.arrow((925, 376), (925, 300), colour=MAP)
    drawing.text(915, 345, "the next layer's map", size=13, colour=MAP, anchor="end")
    drawing.save("mechanism.svg")


def _sequence(drawing: Drawing, x: float, y: float) -> None:
    """Draw the tokens of a prompt."""
    kinds = [TEXT] * 2 + [LR] * 14 + [TEXT] * 7
    for number, kind in enumerate(kinds):
        drawing.cell(x + number * 18.2, y, 16, 34, kind, 0.85)
    drawing.text(x, y - 10, "the sequence: text and 576 LR tokens", size=13, colour=GREY)


def _grid(drawing: Drawing, x: float, y: float, side: float) -> None:
    """Draw the HR tokens as a grid with a selected region."""
    cells = 12
    step = side / cells
    for row in range(cells):
        for column in range(cells):
            chosen = 3 <= row <= 5 and 7 <= column <= 10
            drawing.cell(x + column * step, y + row * step, step - 1, step - 1, HR, 1.0 if chosen else 0.2)


# ---------------------------------------------------------------------------------------------------------- selection


def _made_up_map() -> list[list[float]]:
    """Return a map with a strong and a weak spot over a faint background."""

    def at(row: int, column: int) -> float:
        strong = math.exp(-((row - 7) ** 2 + (column - 16) ** 2) / 5.0)
        weak = 0.3 * math.exp(-((row - 18) ** 2 + (column - 5) ** 2) / 3.0)
        return strong + weak + 0.05 * (1 + math.sin(7 * row + 3 * column))

    return [[at(row, column) for column in range(ROWS)] for row in range(ROWS)]


def _max_pooled(chosen: list[list[bool]]) -> list[list[bool]]:
    """Return the adaptive max-pool to POOLED x POOLED, with torch's windows."""
    windows = [(i * ROWS // POOLED, -(-(i + 1) * ROWS // POOLED)) for i in range(POOLED)]
    return [
        [any(chosen[row][column] for row in range(*rows) for column in range(*columns)) for columns in windows]
        for rows in windows
    ]


def selection() -> None:
    """Draw the released rule: normalise, threshold, pool, and open the HR tokens."""
    drawing = Drawing(960, 290)
    values = _made_up_map()
    low, high = min(map(min, values)), max(map(max, values))
    normal = [[(value - low) / (high - low) for value in row] for row in values]
    chosen = [[value > THRESHOLD for value in row] for row in normal]
    pooled = _max_pooled(chosen)
    step = FINE // POOLED
    opened = [[pooled[row // step][column // step] for column in range(FINE)] for row in range(FINE)]

    side, top = 192, 46
    panels = (
        (normal, MAP, "attention map, 24 × 24", "min–max normalised to a"),
        (chosen, MAP, "a · 255 > 48", f"{sum(map(sum, chosen))} of 576 cells chosen"),
        (pooled, LR, "max-pooled to 9 × 9", f"{sum(map(sum, pooled))} of 81 cells"),
        (opened, HR, "nearest cell, 72 × 72", f"{sum(map(sum, opened))} of 5184 HR tokens"),
    )
    for number, (grid, colour, title, caption) in enumerate(panels):
        left = 24 + number * 240
        _heat(drawing, left, top, side, grid, colour)
        drawing.text(left, top - 14, title)
        drawing.text(left, top + side + 24, caption, size=13, colour=GREY)
        if number:
            drawing.arrow((left - 40, top + side / 2), (left - 8, top + side / 2))
    drawing.save("selection.svg")


def _heat(drawing: Drawing, x: float, y: float, side: float, grid: list, colour: str) -> None:
    """Draw a grid of numbers between 0 and 1; equal neighbours of a row become one rectangle."""
    step = side / len(grid)
    for row, values in enumerate(grid):
        start = 0
        for column in range(1, len(values) + 1):
            if column < len(values) and values[column] == values[start]:
                continue
            if values[start]:
                drawing.cell(
                    x + start * step, y + row * step, (column - start) * step, step, colour, float(values[start])
                )
            start = column
    drawing.frame(x, y, side, side)


# ---------------------------------------------------------------------------------------------------------- attention


def attention() -> None:
    """Draw which keys each query row sees, for both presets."""
    drawing = Drawing(960, 400)
    for left, title, rows in (
        (40, "preset released: answer rows see HR keys", 4),
        (520, "preset paper: all rows see them", 16),
    ):
        _keys_seen(drawing, left, 80, hr_rows=rows)
        drawing.text(left, 30, title, size=16)
    drawing.save("attention.svg")


def _keys_seen(drawing: Drawing, x: float, y: float, hr_rows: int) -> None:
    """Draw one N x (N+M) matrix of 16 queries, 16 sequence keys and 7 selected HR keys; the last 3 rows are answers."""
    queries, selected, answers, step = 16, 7, 3, 16
    for row in range(queries):
        for column in range(row + 1):
            drawing.cell(x + column * step, y + row * step, step - 1, step - 1, LR if 2 <= column < 11 else TEXT, 0.85)
        if row >= queries - hr_rows:
            for column in range(selected):
                drawing.cell(x + (queries + 0.7 + column) * step, y + row * step, step - 1, step - 1, HR, 0.9)
    wide = queries * step
    drawing.frame(x - 1, y - 1, wide, wide)
    drawing.frame(x + wide + 0.7 * step - 1, y - 1, selected * step, wide)
    drawing.text(x, y - 12, "N sequence keys (LR tokens in blue)", size=13, colour=GREY)
    drawing.text(x + wide + 12, y - 12, "M HR keys", size=13, colour=HR)
    drawing.text(
        x, y + wide + 24, f"the last {answers} rows are the answer so far; the row before them", size=13, colour=GREY
    )
    drawing.text(x, y + wide + 42, "is the last prompt row, which predicts its first token", size=13, colour=GREY)


# -------------------------------------------------------------------------------------------------------------- rooms


def rooms() -> None:
    """Draw which room may import which."""
    drawing = Drawing(960, 570)
    layers = (
        ("cli", "one file per command", INK),
        ("serve, evaluation", "HTTP API and web page; models and tasks for lmms-eval", INK),
        ("tasks", "load, ask, chat, ask-batch, train", INK),
        ("analysis", "FLOPs, memory, overlays", INK),
        ("families", "what the mechanism must know about a base model", LR),
        ("baselines", "the paper's other systems", LR),
        ("mechanism", "FlexAttention for any decoder: attention, cache, selection", LR),
        ("ops", "the operators; registration: shapes, derivatives", HR),
        ("csrc/torch", "schemas, argument checks, dispatch; launches nothing", HR),
        ("csrc/include", "plain params structs and launch functions, without torch", HR),
        ("csrc/kernels, csrc/cpu", "the CUDA kernels; the same operators on the CPU", HR),
    )
    for number, (name, what, colour) in enumerate(layers):
        top = 20 + number * 49
        drawing.box(20, top, 620, 36, colour)
        drawing.text(36, top + 23, name, size=15)
        drawing.text(230, top + 23, what, size=13, colour=GREY)
        if number:
            drawing.arrow((330, top - 13), (330, top - 1))
    beside = (
        ("inputs", "images, processor, tokenizers"),
        ("checkpoints", "three formats in, one out"),
        ("runs", "options, files, processes, progress"),
    )
    for number, (name, what) in enumerate(beside):
        top = 118 + number * 62
        drawing.box(690, top, 250, 50, TEXT)
        drawing.text(706, top + 21, name, size=15)
        drawing.text(706, top + 39, what, size=13, colour=GREY)
    drawing.text(690, 330, "A room may import any room below it", size=13, colour=GREY)
    drawing.text(690, 348, "and none above it.", size=13, colour=GREY)
    drawing.text(690, 378, "The three rooms on the right serve the", size=13, colour=GREY)
    drawing.text(690, 396, "others; they know no task and", size=13, colour=GREY)
    drawing.text(690, 414, "no command.", size=13, colour=GREY)
    drawing.save("rooms.svg")


def main() -> None:
    mechanism()
    selection()
    attention()
    rooms()


if __name__ == "__main__":
    main()
