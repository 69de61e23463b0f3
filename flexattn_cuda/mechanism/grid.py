"""Sizes of token grids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch


class Grid(NamedTuple):
    """Rows and columns of a grid, which is stored row-major, top-left first."""

    rows: int
    cols: int

    @property
    def cells(self) -> int:
        return self.rows * self.cols

    def __str__(self) -> str:
        return f"{self.rows} x {self.cols}"


@dataclass(frozen=True)
class ImageGrids:
    """The grids of one image.

    Attributes:
        lr: Of its low-resolution tokens, which stand in the sequence.
        hr: Of its high-resolution tokens, which do not.
        tiles: Of the tiles that the HR tokens are encoded in, all of one size.

    Raises:
        ValueError: If the HR tokens cannot be cut into these tiles.
    """

    lr: Grid
    hr: Grid
    tiles: Grid

    def __post_init__(self) -> None:
        if (self.tiles.rows * self.tile.rows, self.tiles.cols * self.tile.cols) != self.hr:
            raise ValueError(
                f"an HR grid of {self.hr} tokens cannot be cut into {self.tiles} equal tiles; choose a grid that can"
            )

    @property
    def tile(self) -> Grid:
        """Grid of the tokens of one tile."""
        return Grid(self.hr.rows // max(self.tiles.rows, 1), self.hr.cols // max(self.tiles.cols, 1))


ABSENT = ImageGrids(Grid(0, 0), Grid(0, 0), Grid(0, 0))
"""The grids of an empty slot."""

BatchGrids = list[list[ImageGrids]]
"""The grids of G prompts with I image slots each, ABSENT in empty slots."""


def pooled_sizes(sizes: torch.Tensor, side: int) -> torch.Tensor:
    """Return the sizes of the grids of the same shapes whose longer side has `side` cells, where it has more than that.

    Args:
        sizes: [..., 2] int32, rows and columns.
        side: At least 1.

    Returns:
        [..., 2] int32.
    """
    longer = sizes.amax(-1, keepdim=True)
    pooled = (sizes * side / longer.clamp(min=1)).round().clamp(min=1).to(sizes.dtype)
    return torch.where(longer > side, pooled, sizes)


def cut_into_tiles(image: torch.Tensor, tiles: Grid) -> list[torch.Tensor]:
    """Cut an image [3, height, width] into a grid of equal views, row-major."""
    return [tile for row in image.chunk(tiles.rows, dim=1) for tile in row.chunk(tiles.cols, dim=2)]


def join_tiles(tokens: torch.Tensor, tiles: Grid, tile: Grid) -> torch.Tensor:
    """Return the tokens of a whole image, row-major, from those of the tiles that `cut_into_tiles` makes of it.

    Args:
        tokens: [tiles.cells, tile.cells, D], each tile's row-major.
        tiles: Tiles of the image.
        tile: Cells of each of them.

    Returns:
        [tiles.cells * tile.cells, D].
    """
    # [tile row, tile column, row, column, D] -> [tile row, row, tile column, column, D]
    return tokens.reshape(*tiles, *tile, tokens.shape[-1]).transpose(1, 2).flatten(0, 3)


def max_cells(grids: Iterable[Grid]) -> int:
    """Return the number of cells of the largest grid, 0 if there is none."""
    return max((grid.cells for grid in grids), default=0)


def flat(grids: BatchGrids) -> list[ImageGrids]:
    """Return the grids of all slots, prompt by prompt."""
    return [image for prompt in grids for image in prompt]


def sizes_tensor(grids: Sequence[Sequence[Grid]], device: torch.device) -> torch.Tensor:
    """Return [G, I, 2] int32, rows and columns."""
    return torch.tensor(grids, dtype=torch.int32).view(len(grids), -1, 2).to(device)
