"""Overlays, judged by their pixels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flexattn_cuda.analysis import overlay as viz
from flexattn_cuda.inputs.frames import centre_square, whole_image

GREY = 100
DIM, BRIGHT = round(GREY * viz.DIMMED), round(GREY * viz.BRIGHTENED)


def grey(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), (GREY, GREY, GREY))


def no_map() -> np.ndarray:
    return np.zeros((6, 6), dtype=np.float32)


def mask(grid: int, *cells: tuple[int, int]) -> np.ndarray:
    result = np.zeros((grid, grid), dtype=bool)
    for cell in cells:
        result[cell] = True
    return result


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def marked(drawn: Image.Image) -> np.ndarray:
    """Return the pixels that are not merely dimmed, [H, W] bool."""
    return np.abs(pixels(drawn) - DIM).max(-1) > 1


# Image size, grid, a cell of the square, and its box on the image (left, top, right, bottom); None in the padding.
CELLS = [
    ((120, 120), 12, (0, 0), (0, 0, 10, 10)),
    ((120, 120), 12, (11, 4), (40, 110, 50, 120)),
    ((120, 60), 12, (3, 2), (20, 0, 30, 10)),
    ((120, 60), 12, (8, 11), (110, 50, 120, 60)),
    ((120, 60), 12, (2, 5), None),
    ((120, 60), 12, (9, 5), None),
    ((60, 120), 12, (0, 3), (0, 0, 10, 10)),
    ((60, 120), 12, (7, 8), (50, 70, 60, 80)),
    ((60, 120), 12, (7, 9), None),
    ((120, 70), 12, (2, 0), (0, 0, 10, 5)),
]


@pytest.mark.parametrize("size, grid, cell, box", CELLS)
def test_the_selected_region_is_marked_where_it_lies(size, grid, cell, box):
    drawn = viz.overlay(grey(*size), no_map(), mask(grid, cell))
    expected = np.zeros((size[1], size[0]), dtype=bool)
    if box is not None:
        left, top, right, bottom = box
        expected[top:bottom, left:right] = True
        assert tuple(pixels(drawn)[top, left]) == viz.OUTLINE == tuple(pixels(drawn)[bottom - 1, right - 1])
        middle = pixels(drawn)[(top + bottom) // 2, (left + right) // 2]
        assert np.abs(middle - BRIGHT).max() <= 1
    assert np.array_equal(marked(drawn), expected)
    assert drawn.size == size


def test_neighbouring_cells_are_outlined_as_one_region():
    drawn = pixels(viz.overlay(grey(120, 120), no_map(), mask(12, (4, 4), (4, 5))))
    outlined = (drawn == viz.OUTLINE).all(-1)
    assert outlined[40, 40:60].all() and outlined[49, 40:60].all() and outlined[40:50, 40].all()
    assert not outlined[42:48, 45:55].any()


def test_nothing_and_everything_selected():
    nothing = pixels(viz.overlay(grey(60, 40), no_map(), mask(12)))
    assert np.abs(nothing - DIM).max() <= 1
    everything = pixels(viz.overlay(grey(60, 40), no_map(), ~mask(12)))
    assert np.abs(everything[2:-2, 2:-2] - BRIGHT).max() <= 1
    assert (everything[0] == viz.OUTLINE).all() and (everything[:, -1] == viz.OUTLINE).all()


def test_a_selected_region_keeps_its_colours_under_heat():
    attention = no_map()
    attention[3, 2] = 1.0
    drawn = pixels(viz.overlay(grey(120, 120), attention, mask(12, (6, 4))))
    assert np.abs(drawn[62:68, 42:48] - BRIGHT).max() <= 1
    assert (drawn[72:78, 52:58, 0] > drawn[72:78, 52:58, 2] + 40).all(), "the cell beside it is as warm, and shows it"


@pytest.mark.parametrize("width", [600, 1200, 2400, 4096])
def test_the_legend_grows_with_the_image(width):
    legend = viz.sheet(grey(width, 100), [panel((5, 5))]).height - 100
    assert legend >= width / 30


@pytest.mark.parametrize("size", [(120, 120), (120, 60), (60, 120)])
def test_heat_is_strongest_where_the_map_is(size):
    attention = no_map()
    attention[3, 2] = 1.0
    drawn = pixels(viz.overlay(grey(*size), attention, mask(12)))
    redness = drawn[:, :, 0] - drawn[:, :, 2]
    side = max(size)
    left, top = (side - size[0]) // 2, (side - size[1]) // 2
    y, x = np.unravel_index(redness.argmax(), redness.shape)
    assert abs(x + left + 0.5 - 2.5 * side / 6) <= 1 and abs(y + top + 0.5 - 3.5 * side / 6) <= 1
    assert redness.max() > 60
    far = redness[:, -5:] if size[0] >= 120 else redness[-5:]
    assert np.abs(far).max() <= 1


def test_heat_is_scaled_to_the_image_and_not_to_its_padding():
    attention = no_map()
    attention[3, 2] = 1.0
    loud_padding = attention.copy()
    loud_padding[0] = 50.0
    image = grey(120, 40)  # rows 2 and 3 of 6
    expected = viz.overlay(image, attention, mask(12))
    assert np.array_equal(pixels(viz.overlay(image, loud_padding, mask(12)))[10:], pixels(expected)[10:])


@pytest.mark.parametrize("value", [0.0, 0.3, np.nan])
def test_a_map_without_contrast_gives_no_heat(value):
    drawn = pixels(viz.overlay(grey(50, 50), np.full((6, 6), value, dtype=np.float32), mask(12)))
    assert np.abs(drawn - DIM).max() <= 1


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 80))
def test_every_pixel_belongs_to_the_cell_that_covers_its_centre(width, height, grid):
    rows, columns = viz.cells_of_pixels(width, height, grid)
    side = max(width, height)
    for cells, offset in ((rows, (side - height) // 2), (columns, (side - width) // 2)):
        centres = np.arange(len(cells)) + offset + 0.5
        assert (cells * side <= centres * grid).all() and (centres * grid < (cells + 1) * side).all()
        assert cells.min() >= 0 and cells.max() < grid


# -------------------------------------------------------------------------------------------------------------- sheets


def panel(*cells, caption: str = "") -> viz.Panel:
    return viz.Panel(no_map(), mask(12, *cells), caption)


def test_a_single_panel_keeps_the_size_of_the_image():
    image = grey(600, 300)
    drawn = viz.sheet(image, [panel((5, 5), caption="layer 3")], title="What?\n42")
    assert drawn.width == 600 and drawn.height > 300
    alone = viz.overlay(image, no_map(), mask(12, (5, 5)))
    assert np.array_equal(pixels(drawn)[:300, :600], pixels(alone))
    below = pixels(drawn)[300:]
    assert (below == viz.OUTLINE).all(-1).any() and (below == viz.HEAT_STOPS[0]).all(-1).any()
    assert below.min() < 100  # there is text


def test_panels_lie_side_by_side():
    image = grey(240, 120)
    drawn = pixels(viz.sheet(image, [panel((5, 0)), panel((6, 11)), panel(), panel((5, 5))]))
    outlined = (drawn == viz.OUTLINE).all(-1)
    assert outlined[40, 0] and not outlined[40, 248 + 200]
    assert outlined[60:80, 248 + 239].all()
    assert drawn.shape[1] == 2 * 240 + 8
    assert viz.sheet(image, [panel()] * 5).width == 3 * 240 + 2 * 8


def test_only_huge_images_are_drawn_smaller():
    image = grey(viz.MAX_SIDE + 400, 300)
    drawn = viz.sheet(image, [panel()])
    assert drawn.width == viz.MAX_SIDE


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (200, 3)])
@pytest.mark.parametrize("text", ["", "a question " * 30, "x" * 300, "\u6587 \U0001f642\nsecond line"])
def test_any_size_and_text_can_be_drawn(size, text):
    drawn = viz.sheet(grey(*size), [panel((0, 0), caption=text)], title=text)
    assert drawn.width >= size[0] and drawn.height > size[1]


def test_the_same_input_gives_the_same_image():
    attention = np.random.default_rng(0).random((6, 6)).astype(np.float32)
    panels = [viz.Panel(attention, mask(12, (3, 3), (4, 4)), "caption")]
    first, second = (viz.sheet(grey(100, 80), panels, title="title").tobytes() for _ in range(2))
    assert first == second


# -------------------------------------------------------------------------------------------------------------- frames


@pytest.mark.parametrize(
    "frame_of, size, grid, cell, box",
    [
        (whole_image, (120, 60), (6, 12), (2, 3), (30, 20, 40, 30)),
        (whole_image, (60, 120), (12, 4), (11, 0), (0, 110, 15, 120)),
        (centre_square, (120, 60), (6, 6), (0, 0), (30, 0, 40, 10)),
        (centre_square, (120, 60), (6, 6), (5, 5), (80, 50, 90, 60)),
        (centre_square, (60, 120), (6, 6), (5, 2), (20, 80, 30, 90)),
    ],
)
def test_a_region_is_marked_where_the_view_shows_it(frame_of, size, grid, cell, box):
    chosen = np.zeros(grid, dtype=bool)
    chosen[cell] = True
    expected = np.zeros((size[1], size[0]), dtype=bool)
    left, top, right, bottom = box
    expected[top:bottom, left:right] = True
    assert np.array_equal(marked(viz.overlay(grey(*size), np.zeros(grid), chosen, frame_of)), expected)


@pytest.mark.parametrize(
    "frame_of, size, peak", [(whole_image, (120, 60), (35, 50)), (centre_square, (120, 60), (55, 50))]
)
def test_heat_lies_in_the_frame(frame_of, size, peak):
    attention = np.zeros((6, 12) if frame_of is whole_image else (6, 6))
    attention[5, 3 if frame_of is whole_image else 2] = 1
    drawn = pixels(viz.overlay(grey(*size), attention, np.zeros((6, 6), dtype=bool), frame_of))
    redness = drawn[:, :, 0] - drawn[:, :, 2]
    y, x = np.unravel_index(redness.argmax(), redness.shape)
    assert redness.max() > 60 and abs(x + 0.5 - peak[0]) <= 5 and y >= peak[1]
    if frame_of is centre_square:
        assert np.abs(redness[:, :30]).max() == np.abs(redness[:, 90:]).max() == 0


def test_a_sheet_of_scaled_panels_keeps_the_frame():
    image = grey(2 * viz.MAX_SIDE, 600)
    chosen = np.zeros((6, 6), dtype=bool)
    chosen[:, 0] = True
    drawn = viz.sheet(image, [viz.Panel(np.zeros((6, 6)), chosen)], frame_of=centre_square)
    columns = np.flatnonzero(marked(drawn.crop((0, 0, viz.MAX_SIDE, 300))).any(0))
    assert columns[0] == (viz.MAX_SIDE - 300) // 2 and columns[-1] == columns[0] + 49
