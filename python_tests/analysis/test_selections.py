"""What an answer selected, in numbers and boxes."""

import numpy as np
import torch

from flexattn_cuda import Trace
from flexattn_cuda.analysis.selections import connected, selection_of
from flexattn_cuda.inputs.frames import Region, padded_square, whole_image
from flexattn_cuda.mechanism.grid import Grid, ImageGrids
from flexattn_cuda.mechanism.trace import LayerTrace


def mask_of(*cells: tuple[int, int], side: int = 6) -> np.ndarray:
    mask = np.zeros((side, side), dtype=bool)
    for cell in cells:
        mask[cell] = True
    return mask


def traced(mask: np.ndarray) -> LayerTrace:
    grids = ImageGrids(Grid(3, 3), Grid(6, 6), Grid(2, 2))
    return LayerTrace(torch.zeros(1, 1, 1, 9), torch.from_numpy(mask).view(1, 1, 1, 36), [[grids]])


def test_cells_that_touch_also_at_a_corner_are_one_region():
    found = connected(mask_of((0, 0), (1, 1), (1, 2), (4, 5), (5, 3)))
    assert found == [Region(0, 0, 3, 2), Region(5, 4, 6, 5), Region(3, 5, 4, 6)]
    assert connected(mask_of()) == []


def test_a_selection_is_counted_over_tokens_and_layers_but_the_last():
    first, second, last = mask_of((0, 0), (0, 1)), mask_of((5, 5)), np.ones((6, 6), dtype=bool)
    steps = [{1: first, 2: first, 3: last}, {1: second, 2: first, 3: last}]
    trace = Trace([{layer: traced(mask) for layer, mask in step.items()} for step in steps])
    found = selection_of(trace, 0, (60, 60), padded_square)
    assert found.share == np.mean([2, 2, 1, 2]) / 36
    assert found.tiles == 2  # the first and the last of four
    assert found.regions == [Region(0, 0, 20, 10), Region(50, 50, 60, 60)]


def test_regions_lie_on_the_image_and_not_on_its_padding():
    trace = Trace([{1: traced(mask_of((2, 0), (2, 1), (0, 5))), 2: traced(mask_of())}])
    # An image of 60 x 40 in a square of 60: the first row of cells is padding.
    found = selection_of(trace, 0, (60, 40), padded_square).regions
    assert found == [Region(0, 10, 20, 20)]
    assert selection_of(trace, 0, (60, 30), whole_image).regions == [Region(50, 0, 60, 5), Region(0, 10, 20, 15)]
