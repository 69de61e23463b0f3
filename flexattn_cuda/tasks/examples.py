"""The example questions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexattn_cuda.errors import InputError

_REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Example:
    """A question about an image, and its answer.

    Attributes:
        file: The image's name in questions.json.
        image: The image's path.
        question: The question.
        answer: The right answer.
    """

    file: str
    image: Path
    question: str
    answer: str


def examples_folder(given: Path | None) -> Path:
    """Return the folder that holds questions.json: the given one, or examples/ here or in the repository.

    Raises:
        InputError: If there is no questions.json.
    """
    candidates = [Path("examples"), _REPOSITORY / "examples"] if given is None else [given]
    for folder in candidates:
        if (folder / "questions.json").is_file():
            return folder
    raise InputError(f"there is no questions.json in {candidates[0]}; pass the folder of the examples with --examples")


def read_examples(folder: Path) -> list[Example]:
    """Read questions.json: a JSON list of objects with file, question and answer.

    Raises:
        InputError: If it holds anything else, or nothing.
    """
    path = folder / "questions.json"
    try:
        examples = [_example(folder, fields) for fields in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} is not a list of objects with file, question and answer: {error}") from None
    if not examples:
        raise InputError(f"{path} holds no questions")
    return examples


def _example(folder: Path, fields: Any) -> Example:
    file, question, answer = (fields[name] for name in ("file", "question", "answer"))
    if not all(isinstance(text, str) for text in (file, question, answer)):
        raise TypeError("a field is not a string")
    image = folder / file
    return Example(file, image if image.exists() else folder / "photographs" / file, question, answer)


def is_right(answer: str, example: Example) -> bool:
    """Return whether an answer is right, whatever its case, surrounding spaces and final stop."""
    return _plain(answer) == _plain(example.answer)


def _plain(text: str) -> str:
    return text.strip().rstrip(".").casefold()
