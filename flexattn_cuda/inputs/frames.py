"""Where the view that a model sees lies on the image that the user gave."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Frame(NamedTuple):
    """The rectangle that a view shows, in pixels of the image.

    It reaches beyond the image where the view pads it, and leaves margins out where the view crops it.
    """

    left: float
    top: float
    width: float
    height: float


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
