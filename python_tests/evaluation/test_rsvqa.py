"""RSVQA-HRBEN: its files, and the accuracy of its categories."""

from __future__ import annotations

import json

import evaluation_data
import pytest

from flexattn_cuda.errors import InputError
from flexattn_cuda.evaluation import rsvqa
from flexattn_cuda.evaluation.data import unpacked_folder


@pytest.fixture
def folder(tmp_path):
    evaluation_data.write_rsvqa(tmp_path / "rsvqa_hrben")
    return tmp_path / "rsvqa_hrben"


def change(path, key: str, number: int, **fields) -> None:
    """Change the fields of a record; None removes a field."""
    content = json.loads(path.read_text())
    record = content[key][number]
    content[key][number] = {name: value for name, value in (record | fields).items() if value is not None}
    path.write_text(json.dumps(content))


def test_active_questions_of_presence_and_comparison_are_read(tmp_path):
    expected = evaluation_data.write_rsvqa(tmp_path / "rsvqa_hrben")
    found = rsvqa.read_rows(tmp_path / "rsvqa_hrben")
    assert found == [{**row, "image": str(row["image"])} for row in expected] and len(found) == 5


@pytest.mark.parametrize(
    "file, key, fields, message",
    [
        ("questions", "questions", {"question": None}, 'question 0 of .* has no "question" that is text'),
        ("questions", "questions", {"img_id": None}, 'question 0 of .* has no "img_id" that is a whole number'),
        ("questions", "questions", {"img_id": 55}, "question 0 of .* has no image; there should be .*55"),
        ("questions", "questions", {"answers_ids": [7]}, "question 0 of .* has no answer; put the answers of the same"),
        ("answers", "answers", {"answer": None}, 'an answer of .* has no "answer" that is text'),
    ],
)
def test_a_record_in_another_format_is_refused(folder, file, key, fields, message):
    change(folder / f"USGS_split_test_phili_{file}.json", key, 0, **fields)
    with pytest.raises(InputError, match=message):
        rsvqa.read_rows(folder)


def test_files_that_are_missing_or_of_another_format_are_refused(folder, monkeypatch):
    questions = folder / "USGS_split_test_phili_questions.json"
    questions.write_text("[]")
    with pytest.raises(InputError, match='has no "questions" that is a list'):
        rsvqa.read_rows(folder)
    questions.write_text('{"questions": [{"id": 1, "type": "area", "active": true}]}')
    with pytest.raises(InputError, match="has no active questions of the types presence, comp"):
        rsvqa.read_rows(folder)
    questions.unlink()
    with pytest.raises(InputError, match="has 0 files .*questions.json; leave one there"):
        rsvqa.read_rows(folder)
    monkeypatch.delenv("FLEXATTN_DATA", raising=False)
    with pytest.raises(InputError, match="is not on the hub; unpack RSVQA-HR .* to DIR/rsvqa_hrben, and set"):
        unpacked_folder(rsvqa.FOLDER, rsvqa.SOURCE)


@pytest.mark.parametrize(
    "answer, right", [("Yes", 1.0), ("yes.", 1.0), (" yes ", 1.0), ("yes, it is", 0.0), ("no", 0.0)]
)
def test_an_answer_is_compared_without_case_and_final_stop(answer, right):
    found = rsvqa.accuracies({"category": "presence", "answer": "yes"}, [answer])
    mean = {"category": "presence", "score": right}
    assert found == {"rsvqa_acc": right, "rsvqa_presence_acc": right, "rsvqa_mean_acc": mean}


def test_the_mean_of_the_categories_gives_each_the_same_weight():
    marks = [{"category": "presence", "score": score} for score in (1.0, 0.0, 0.0, 0.0)]
    assert rsvqa.mean_of_categories([*marks, {"category": "comparison", "score": 1.0}]) == (0.25 + 1) / 2
