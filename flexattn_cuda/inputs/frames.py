"""Where the view that a model sees lies on the image that the user gave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple


class Region(NamedTuple):
    """A rectangle in pixels of an image, or in cells of a grid, half-open."""

    left: int
    top: int
    right: int
    bottom: int


class Frame(NamedTuple):
    """The rectangle that a view shows, in pixels of the image.

    It reaches beyond the image where the view pads it, and leaves margins out where the view crops it.
    """

    left: float
    top: float
    width: float
    height: float

    def in_pixels(self, cells: Region, grid: Sequence[int], size: tuple[int, int]) -> Region:
        """Return a rectangle of cells of a view in pixels of the image, cut at its edges.

        Args:
            cells: The rectangle.
            grid: Rows and columns of the view.
            size: Width and height of the image.
        """
        width, height = size
        across, down = self.width / grid[1], self.height / grid[0]
        return Region(
            round(min(max(self.left + cells.left * across, 0), width)),
            round(min(max(self.top + cells.top * down, 0), height)),
            round(min(max(self.left + cells.right * across, 0), width)),
            round(min(max(self.top + cells.bottom * down, 0), height)),
        )


FrameOf = Callable[[int, int], Frame]
"""Returns the frame of an image of (width, height) pixels."""


def padded_square(width: int, height: int) -> Frame:
    """Return the square that an image is padded to, around its centre."""
    side = max(width, height)
    return Frame(-((side - width) // 2), -((side - height) // 2), side, side)


def whole_image(width: int, height: int) -> Frame:
    """Return the frame of a view that the whole image is stretched to."""
    return Frame(0, 0, width, height)


def centre_square(width: int, height: int) -> Frame:
    """Return the largest square around the centre, which a view crops."""
    side = min(width, height)
    return Frame((width - side) / 2, (height - side) / 2, side, side)
