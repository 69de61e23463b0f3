"""RefCOCO: the box of an answer, and the size of an object."""

from __future__ import annotations

import pytest

from flexattn_cuda.evaluation import refcoco
from flexattn_cuda.evaluation.refcoco import Box


@pytest.mark.parametrize(
    "width, height, large",
    [(25, 20, False), (25, 20.01, True), (25.01, 20, True), (25, 19, False), (100, 100, True), (0, 100, False)],
)
def test_an_object_is_large_if_it_takes_more_than_5_percent(width, height, large):
    """25 x 20 pixels are exactly 5 % of 100 x 100."""
    assert refcoco.is_large(Box(3, 4, 3 + width, 4 + height), 100, 100) is large


def test_the_boundary_holds_for_every_size_of_image():
    for side in range(20, 2000, 20):  # a box of the image's width and a twentieth of its height
        assert not refcoco.is_large(Box(0, 0, 7 * side, side // 20), 7 * side, side)
        assert refcoco.is_large(Box(0, 0, 7 * side, side // 20 + 1), 7 * side, side)


def by_pixels(one: Box, other: Box) -> float:
    """Return intersection over union by counting whole pixels."""
    first, second = (
        {(x, y) for x in range(int(box.left), int(box.right)) for y in range(int(box.top), int(box.bottom))}
        for box in (one, other)
    )
    return len(first & second) / len(first | second) if first | second else 0.0


@pytest.mark.parametrize(
    "other", [(0, 0, 8, 6), (4, 3, 12, 9), (8, 0, 12, 6), (2, 2, 4, 4), (9, 9, 3, 3), (0, 0, 8, 12)]
)
def test_overlap_is_that_of_the_pixels(other):
    one = Box(0, 0, 8, 6)
    assert one.overlap(Box(*other)) == Box(*other).overlap(one) == pytest.approx(by_pixels(one, Box(*other)), abs=1e-12)


@pytest.mark.parametrize(
    "answer, box",
    [
        ("[0.25, 0.5, 0.75, 1.0]", (50, 50, 150, 150)),  # in the square of 200, from 50 above the image
        ("It is at [.25,0.5,.75,1].", (50, 50, 150, 150)),
        ("[0, 0, 1, 1] or [0.25, 0.5, 0.75, 1.0]", (0, -50, 200, 150)),
        ("[0.25, 0.5, 0.75]", None),
        ("the left one", None),
    ],
)
def test_a_box_is_read_in_the_square_that_the_image_is_padded_to(answer, box):
    assert refcoco.box_in(answer, 200, 100) == (None if box is None else Box(*box))


@pytest.mark.parametrize(
    "answer, right", [("[0.25, 0.5, 0.75, 1.0]", 1.0), ("[0.25, 0.75, 0.75, 1.0]", 1.0), ("?", 0.0)]
)
def test_half_an_overlap_is_right_and_counts_for_its_size(answer, right):
    doc = {"box": [50, 50, 150, 150], "width": 200, "height": 100}
    assert refcoco.accuracies(doc, [answer]) == {"refcoco_acc": right, "refcoco_large_acc": right}
    assert refcoco.accuracies(doc, ["[0.25, 0.76, 0.75, 1.0]"])["refcoco_acc"] == 0.0
