"""What is drawn on the images: signs with glyphs, vehicles, their boxes and outlines."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

COLORS = {
    "red": (200, 30, 40),
    "green": (25, 130, 55),
    "blue": (35, 75, 205),
    "purple": (140, 50, 170),
    "black": (20, 20, 24),
}
SHAPES = ("star", "circle", "triangle", "square", "cross")
VEHICLES = ("car", "boat", "plane")

Point = tuple[float, float]


class Box(NamedTuple):
    """An axis-aligned rectangle in pixels, y down."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def width(self) -> float:
        return self.right - self.left

    @property
    def height(self) -> float:
        return self.bottom - self.top

    @property
    def middle(self) -> tuple[float, float]:
        return (self.left + self.right) / 2, (self.top + self.bottom) / 2

    def moved(self, left: float, top: float, scale: float = 1.0) -> Box:
        """Return the box in a crop that starts at (left, top) and is then scaled."""
        return Box(
            (self.left - left) * scale,
            (self.top - top) * scale,
            (self.right - left) * scale,
            (self.bottom - top) * scale,
        )


@dataclass(frozen=True)
class Glyph:
    """A digit, a shape or a vehicle with its box."""

    name: str
    box: Box

    def moved(self, left: float, top: float, scale: float = 1.0) -> Glyph:
        """Return the glyph in a crop that starts at (left, top) and is then scaled."""
        return Glyph(self.name, self.box.moved(left, top, scale))


@dataclass(frozen=True)
class Sign:
    """A coloured plate with two digits, one shape or two shapes."""

    color: str
    glyphs: tuple[Glyph, ...]
    box: Box

    def moved(self, left: float, top: float, scale: float = 1.0) -> Sign:
        """Return the sign in a crop that starts at (left, top) and is then scaled."""
        glyphs = tuple(glyph.moved(left, top, scale) for glyph in self.glyphs)
        return Sign(self.color, glyphs, self.box.moved(left, top, scale))


def shape_outline(name: str) -> list[Point]:
    """Return the corners of a shape within [-1, 1] x [-1, 1], y down. All shapes have about the same area."""
    if name == "circle":
        return _ring(24, 0.74)
    if name == "square":
        return [(-0.65, -0.65), (0.65, -0.65), (0.65, 0.65), (-0.65, 0.65)]
    if name == "triangle":
        return [(0, -0.95), (0.93, 0.88), (-0.93, 0.88)]
    if name == "cross":
        arm = 0.25
        quarter = [(arm, -1), (arm, -arm), (1, -arm)]
        return [corner for turn in range(4) for corner in (_turned(*point, turn) for point in quarter)]
    corners = [(k * math.pi / 5, 0.56 if k % 2 else 1.0) for k in range(10)]
    return [(radius * math.sin(angle), -radius * math.cos(angle)) for angle, radius in corners]


def vehicle_outline(kind: str) -> list[Point]:
    """Return the corners of a vehicle within the unit circle: a box, a pointed hull, or a fuselage with wings.

    All kinds have about the same area.
    """
    if kind == "car":
        return [(-0.89, -0.45), (0.89, -0.45), (0.89, 0.45), (-0.89, 0.45)]
    if kind == "boat":
        return [(-1.0, 0.0), (-0.3, -0.62), (0.3, -0.62), (1.0, 0.0), (0.3, 0.62), (-0.3, 0.62)]
    nose_to_wing = [(1.0, -0.14), (0.4, -0.2), (0.12, -0.97), (-0.24, -0.97)]
    wing_to_tail = [(-0.2, -0.2), (-0.65, -0.17), (-0.7, -0.52), (-0.88, -0.47)]
    half = nose_to_wing + wing_to_tail
    return half + [(u, -v) for u, v in reversed(half)]


def _ring(corners: int, radius: float) -> list[Point]:
    angles = [2 * math.pi * k / corners for k in range(corners)]
    return [(radius * math.cos(angle), radius * math.sin(angle)) for angle in angles]


def _turned(u: float, v: float, quarters: int) -> Point:
    for _ in range(quarters):
        u, v = -v, u
    return u, v
