"""RSVQA-HRBEN: yes-or-no questions about remote sensing images, as GeoChat and the paper evaluate it.

The folder is the published one of the high-resolution set: one file of questions, one of their answers, and the images.

    USGS_split_test_phili_questions.json   {"questions": [{"id": 1, "img_id": 7, "type": "presence", "question": "...",
                                                           "answers_ids": [1], "active": true}, ...]}
    USGS_split_test_phili_answers.json     {"answers": [{"id": 1, "answer": "yes", "active": true}, ...]}
    Data/7.tif

The paper's "Overall" is the accuracy over all questions: the figures of GeoChat in its table 2, 58.5, 83.2 and 72.3,
are no mean of two, and fit the same share of 44 % presence questions as those of LLaVA.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flexattn_cuda.errors import InputError
from flexattn_cuda.evaluation.data import SHORT_ANSWER, field, read_json

FOLDER = "rsvqa_hrben"
SOURCE = "RSVQA-HR (zenodo.org/records/6344367)"
CATEGORIES = {"presence": "presence", "comp": "comparison"}
"""By the type of a question; other types are not asked, as in the paper."""

_IMAGES = (".tif", ".png", ".jpg")


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the questions of a folder, each with its image's path, category and answer, in their order.

    Raises:
        InputError: If a file is missing or has another format, or a question lacks a field, its answer or its image.
    """
    file, answers = _only(folder, "questions"), _answers(_only(folder, "answers"))
    rows = []
    for question in field(read_json(file), "questions", list, str(file)):
        if not (isinstance(question, dict) and question.get("active", True) and question.get("type") in CATEGORIES):
            continue  # a split lists the questions of the others as inactive
        where = f"question {question.get('id')} of {file}"
        [*_, answer] = [None, *(answers.get(one) for one in field(question, "answers_ids", list, where))]
        if answer is None:
            raise InputError(f"{where} has no answer; put the answers of the same split beside it")
        image = _image(folder, field(question, "img_id", int, where), where)
        text = field(question, "question", str, where)
        category = CATEGORIES[question["type"]]
        rows.append({"image": str(image), "category": category, "question": text, "answer": answer})
    if not rows:
        raise InputError(f"{file} has no active questions of the types {', '.join(CATEGORIES)}")
    return rows


def _only(folder: Path, what: str) -> Path:
    files = sorted(folder.glob(f"*_{what}.json"))
    if len(files) != 1:
        raise InputError(
            f"{folder} has {len(files)} files *_{what}.json; leave one there, that of the split to evaluate"
        )
    return files[0]


def _answers(file: Path) -> dict[int, str]:
    records = field(read_json(file), "answers", list, str(file))
    given = [one for one in records if isinstance(one, dict) and one.get("active", True)]
    where = f"an answer of {file}"
    return {field(one, "id", int, where): field(one, "answer", str, where) for one in given}


def _image(folder: Path, number: int, where: str) -> Path:
    for suffix in _IMAGES:
        found = folder / "Data" / f"{number}{suffix}"
        if found.is_file():
            return found
    raise InputError(f"{where} has no image; there should be {folder / 'Data' / str(number)} with {', '.join(_IMAGES)}")


def prompt(doc: Mapping[str, Any]) -> str:
    """Return what is asked: the question, and the request for a short answer."""
    return f"{doc['question']}\n{SHORT_ANSWER}"


def accuracies(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Return whether the answer is right, whatever its case and final stop, for all metrics that it counts for."""
    right = float(_plain(results[0]) == _plain(doc["answer"]))
    mark = {"category": doc["category"], "score": right}
    return {"rsvqa_acc": right, f"rsvqa_{doc['category']}_acc": right, "rsvqa_mean_acc": mark}


def _plain(answer: str) -> str:
    return answer.strip().rstrip(".").casefold()


def mean_of_categories(marks: Sequence[Mapping[str, Any]]) -> float:
    """Return the mean of the categories' accuracies."""
    by_category: dict[str, list[float]] = {}
    for mark in marks:
        by_category.setdefault(mark["category"], []).append(mark["score"])
    return sum(sum(own) / len(own) for own in by_category.values()) / len(by_category)
