"""V* Bench as the paper scores it: the option with the minimum loss wins, and the first one is right.

Every question of `craigwu/vstar_bench` is an image beside a JSON file of the same name, in a folder for its category:

    direct_attributes/sa_4690.jpg
    direct_attributes/sa_4690.json    {"question": "...?", "options": ["The ... is red.", ...], ...}

The `text` of its `test_questions.jsonl`, which lmms-eval's own task `vstar_bench` asks, has options with letters.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexattn_cuda.errors import InputError
from flexattn_cuda.evaluation.data import SHORT_ANSWER, read_json

REPOSITORY = "craigwu/vstar_bench"
CATEGORIES = ("direct_attributes", "relative_position")
_IMAGES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class VStarQuestion:
    """A question of V* Bench.

    Attributes:
        category: One of `CATEGORIES`.
        image: Its image file.
        question: The question.
        options: The answers to choose from; the first is right.
    """

    category: str
    image: Path
    question: str
    options: list[str]


def read_questions(folder: Path) -> list[VStarQuestion]:
    """Read the questions of a folder in the format of `craigwu/vstar_bench`, ordered by category and name.

    Raises:
        InputError: If a category is missing, or a question lacks its image or a field.
    """
    questions: list[VStarQuestion] = []
    for category in CATEGORIES:
        files = sorted((folder / category).glob("*.json"))
        if not files:
            raise InputError(
                f"{folder / category} has no JSON files; V* Bench has the folders {' and '.join(CATEGORIES)}, with a "
                "JSON file beside every image"
            )
        questions += [_read_question(category, file) for file in files]
    return questions


def _read_question(category: str, file: Path) -> VStarQuestion:
    record = read_json(file)
    fields = record if isinstance(record, dict) else {}
    question, options = fields.get("question"), fields.get("options")
    texts = [question, *options] if isinstance(options, list) else []
    if len(texts) < 3 or not all(isinstance(text, str) and text.strip() for text in texts):
        raise InputError(f'{file} must have a "question" and at least two "options", all of them text')
    images = [found for suffix in _IMAGES if (found := file.with_suffix(suffix)).is_file()]
    if not images:
        raise InputError(f"{file} has no image beside it; it must have the same name and end in {', '.join(_IMAGES)}")
    return VStarQuestion(category, images[0], texts[0], texts[1:])


def prompt(doc: Mapping[str, Any]) -> str:
    """Return what is asked: the question, and the request for a short answer."""
    return f"{doc['question']}\n{SHORT_ANSWER}"


def accuracies(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, float]:
    """Return whether the right option has the minimum loss, as a metric of all questions and of the category.

    Args:
        doc: The question.
        results: (loss, greedy) of each option, which lmms-eval 0.7.3 hands on as text.
    """
    losses = [float((ast.literal_eval(one) if isinstance(one, str) else one)[0]) for one in results]
    right = float(losses.index(min(losses)) == 0)
    return {"vstar_acc": right, f"vstar_{doc['category']}_acc": right}
