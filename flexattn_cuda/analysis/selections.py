"""What a recorded answer selected of an image, in numbers and in boxes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from flexattn_cuda.inputs.frames import FrameOf, Region
from flexattn_cuda.mechanism.grid import Grid
from flexattn_cuda.mechanism.trace import LayerTrace, Trace


@dataclass(frozen=True)
class ImageSelection:
    """What an answer selected of one image.

    Attributes:
        share: Of the HR tokens, on average over the answer's tokens and the layers that select.
        tiles: Tiles of the HR image that hold a selected token.
        regions: Rectangles around the connected cells that any token selected in any layer, from top to bottom.
    """

    share: float
    tiles: int
    regions: list[Region]


def selection_of(trace: Trace, image: int, size: tuple[int, int], frame_of: FrameOf) -> ImageSelection:
    """Return what the answer of a single prompt selected of one of its images.

    Args:
        trace: Of the answer. The map of the last layer counts for nothing: no layer attends to what it selects.
        image: Number of the image in the prompt.
        size: Width and height of the image in pixels.
        frame_of: Tells which part of an image the model saw.
    """
    traced = [layers[number] for layers in trace.steps for number in sorted(layers)[:-1]]
    masks = [_mask(one, image) for one in traced]
    union = np.logical_or.reduce(masks)
    regions = [frame_of(*size).in_pixels(cells, union.shape, size) for cells in connected(union)]
    on_image = [one for one in regions if one.left < one.right and one.top < one.bottom]  # and not on its padding
    return ImageSelection(float(np.mean(masks)), tiles_of(union, traced[0].grids[0][image].tiles), on_image)


def tiles_of(mask: np.ndarray, tiles: Grid) -> int:
    """Return the number of tiles that hold a token of a mask [HR rows, HR cols]."""
    per_tile = mask.reshape(tiles.rows, mask.shape[0] // tiles.rows, tiles.cols, mask.shape[1] // tiles.cols)
    return int(per_tile.any((1, 3)).sum())


class Selected(NamedTuple):
    """How much of the images of a prompt was selected.

    Attributes:
        tokens: HR tokens, on average over the layers that select and the steps.
        tiles: Tiles that hold a token that any of them selected.
    """

    tokens: float
    tiles: int


def selected_of_row(trace: Trace, row: int, images: int, first_layer: int, query: int = -1, steps: int = 1) -> Selected:
    """Return how much was selected for a row of a batch.

    Args:
        trace: Of the batch.
        row: Of the batch.
        images: Number of images of the row.
        first_layer: That attends to HR tokens. Maps that no layer uses count for nothing: those before the layer before
            it, and the last one.
        query: The query row of each step.
        steps: Number of steps that count.
    """
    traced = [
        layers[number]
        for layers in trace.steps[:steps]
        for number in [one for one in sorted(layers) if one >= first_layer - 1][:-1]
    ]
    tokens, tiles = 0.0, 0
    for image in range(images):
        masks = torch.stack([one.of_image(row, query, image)[1] for one in traced]).cpu().numpy()
        tokens += masks.sum() / len(masks)
        grids = traced[0].grids[row // (len(traced[0].map) // len(traced[0].grids))]
        tiles += tiles_of(masks.any(0), grids[image].tiles)
    return Selected(float(tokens), tiles)


def _mask(traced: LayerTrace, image: int) -> np.ndarray:
    mask: np.ndarray = traced.of_image(row=0, query=-1, image=image)[1].cpu().numpy()
    return mask


def connected(mask: np.ndarray) -> list[Region]:
    """Return the rectangles, in cells, around cells [rows, cols] bool that touch each other, also at a corner."""
    left = set(zip(*map(np.ndarray.tolist, mask.nonzero())))
    found = []
    while left:
        group, reached = [], [left.pop()]
        while reached:
            row, col = reached.pop()
            group.append((row, col))
            near = {(row + down, col + right) for down in (-1, 0, 1) for right in (-1, 0, 1)} & left
            left -= near
            reached += near
        rows, cols = zip(*group)
        found.append(Region(min(cols), min(rows), max(cols) + 1, max(rows) + 1))
    return sorted(found, key=lambda region: (region.top, region.left))
