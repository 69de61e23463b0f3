"""GQA: its files, and the attention on the objects of a question."""

from __future__ import annotations

import json

import evaluation_data
import numpy as np
import pytest

from flexattn_cuda.errors import InputError
from flexattn_cuda.evaluation import gqa
from flexattn_cuda.inputs.frames import padded_square, whole_image


def by_definition(attention, frame, size, regions) -> float:
    """Return the sum over regions and cells of the cell's attention, times the share of the cell on the region."""
    rows, columns = attention.shape
    width, height = frame.width / columns, frame.height / rows
    total = 0.0
    for left, top, right, bottom in regions:
        for row in range(rows):
            for column in range(columns):
                x, y = frame.left + column * width, frame.top + row * height
                across = max(0.0, min(x + width, right * size[0]) - max(x, left * size[0]))
                down = max(0.0, min(y + height, bottom * size[1]) - max(y, top * size[1]))
                total += attention[row, column] / attention.sum() * across * down / (width * height)
    return total


@pytest.mark.parametrize("frame_of", [padded_square, whole_image])
@pytest.mark.parametrize("size", [(160, 120), (96, 144), (100, 100)])
def test_the_score_is_the_attention_on_the_regions(size, frame_of):
    attention = np.random.default_rng(size[0]).random((24, 24))
    regions = [(0.1, 0.2, 0.5, 0.9), (0.3, 0.0, 1.0, 0.4), (0.5, 0.5, 0.5, 0.9)]
    found = gqa.map_score(attention, frame_of(*size), size, regions)
    assert found == pytest.approx(by_definition(attention, frame_of(*size), size, regions), abs=1e-12)


def test_attention_on_the_padding_lies_on_no_object():
    attention = np.ones((4, 4))
    assert gqa.map_score(attention, padded_square(100, 50), (100, 50), [(0, 0, 1, 1)]) == pytest.approx(0.5)
    assert gqa.map_score(attention, padded_square(100, 50), (100, 50), []) == 0.0


def test_questions_are_read_with_the_regions_of_their_objects(tmp_path):
    evaluation_data.write_gqa(tmp_path)
    rows = gqa.read_rows(tmp_path)
    assert len(rows) == 4 and rows[2]["regions"] == []
    expected = [[10 / 160, 20 / 120, 60 / 160, 60 / 120], [40 / 160, 0.0, 70 / 160, 90 / 120]]
    assert rows[0]["regions"] == pytest.approx(np.array(expected)) and rows[0]["image"].endswith("images/0.jpg")


def change(path, *names, value) -> None:
    content = whole = json.loads(path.read_text())
    for name in names[:-1]:
        content = content[name]
    content[names[-1]] = value
    path.write_text(json.dumps(whole))


@pytest.mark.parametrize(
    "file, names, value, message",
    [
        ("questions", ("00", "imageId"), 3, 'question 00 of .* has no "imageId" that is text'),
        ("questions", ("00", "imageId"), "3", 'which question 00 of .* needs, has no "3" that is an object'),
        ("questions", ("00", "annotations"), {}, 'question 00 of .* has no "question" that is an object'),
        ("questions", ("00", "annotations", "question", "1"), "9", "question 00 of .* refers to object 9, of which"),
        ("scenes", ("0", "width"), None, "question 00 of .* refers to object 7"),
    ],
)
def test_a_record_in_another_format_is_refused(tmp_path, file, names, value, message):
    evaluation_data.write_gqa(tmp_path)
    change(tmp_path / {"questions": gqa.QUESTIONS, "scenes": gqa.SCENES}[file], *names, value=value)
    with pytest.raises(InputError, match=message):
        gqa.read_rows(tmp_path)


def test_missing_files_are_refused(tmp_path):
    evaluation_data.write_gqa(tmp_path)
    (tmp_path / "images" / "1.jpg").unlink()
    with pytest.raises(InputError, match=r"question 02 of .* is about .*1\.jpg, which is not there"):
        gqa.read_rows(tmp_path)
    (tmp_path / gqa.SCENES).unlink()
    with pytest.raises(InputError, match="val_sceneGraphs.json cannot be read as JSON"):
        gqa.read_rows(tmp_path)
