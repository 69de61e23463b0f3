"""Sizes of token grids."""

from __future__ import annotations

from typing import NamedTuple


class Grid(NamedTuple):
    """Rows and columns of a grid of image tokens, which is stored row-major, top-left first."""

    rows: int
    cols: int

    @property
    def cells(self) -> int:
        return self.rows * self.cols

    def side(self, what: str) -> int:
        """Return the side of a square grid.

        Args:
            what: The grid's name in the error message.

        Raises:
            ValueError: If the grid is not square.
        """
        if self.rows != self.cols:
            raise ValueError(f"{what} is {self}; the operators take square grids only")
        return self.rows

    def __str__(self) -> str:
        return f"{self.rows} x {self.cols}"
