"""The example questions, and files to try the other commands with."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexattn_cuda.errors import InputError
from flexattn_cuda.inputs.images import image_size
from flexattn_cuda.inputs.questions import IMAGE
from flexattn_cuda.runs.files import os_errors_as_input_errors

_PACKAGED = Path(__file__).parents[1] / "assets" / "examples"


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
    """Return the folder that holds questions.json: the given one, or examples/ here, or the one in the package.

    Raises:
        InputError: If there is no questions.json.
    """
    candidates = [Path("examples"), _PACKAGED] if given is None else [given]
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


def write_examples(examples: list[Example], folder: Path) -> None:
    """Write the images, questions.jsonl for `flexattn ask-batch`, and records.json for `flexattn train`.

    Raises:
        InputError: If an image cannot be read, two have the same name, or a file cannot be written.
    """
    questions, records = [], []
    for example in examples:
        image_size(example.image)  # refused here, and not when the model is loaded
        name = example.image.name
        if any(record["image"] == name for record in records):
            raise InputError(f"two images of the examples are called {name}; rename one of them")
        with os_errors_as_input_errors(folder / name):
            if not (folder / name).exists() or not (folder / name).samefile(example.image):
                shutil.copyfile(example.image, folder / name)
        questions.append({"image": name, "question": example.question})
        turns = (("human", f"{IMAGE}\n{example.question}"), ("gpt", example.answer))
        records.append({"image": name, "conversations": [{"from": who, "value": text} for who, text in turns]})
    lines = "".join(json.dumps(question, ensure_ascii=False) + "\n" for question in questions)
    for file, text in (("questions.jsonl", lines), ("records.json", json.dumps(records, indent=2) + "\n")):
        with os_errors_as_input_errors(folder / file):
            (folder / file).write_text(text, encoding="utf-8")


def is_right(answer: str, example: Example) -> bool:
    """Return whether an answer is right, whatever its case, surrounding spaces and final stop."""
    return _plain(answer) == _plain(example.answer)


def _plain(text: str) -> str:
    return text.strip().rstrip(".").casefold()
