"""The lines of the input and of the output."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexattn_cuda.errors import InputError
from flexattn_cuda.inputs.images import is_url
from flexattn_cuda.inputs.questions import check_question
from flexattn_cuda.runs.versions import FileVersion


@dataclass(frozen=True)
class Line:
    """A line of the input; `error` says why nothing can be asked, if so."""

    id: str | int
    image: str | None = None
    question: str | None = None
    error: str | None = None

    def source(self, folder: Path) -> str | Path:
        """Return the image's URL, or its path from the folder of the questions."""
        assert self.image is not None
        return self.image if is_url(self.image) else folder / self.image


@dataclass(frozen=True)
class Result:
    """What has become of a line: an answer, or an error in one sentence.

    Attributes:
        image: The image file that was asked about, as it was then; None for a URL.
    """

    answer: str | None = None
    error: str | None = None
    image: FileVersion | None = None

    def fields(self) -> dict[str, str]:
        """Return the fields of the output."""
        return {"answer": self.answer} if self.error is None else {"error": self.error}


@dataclass(frozen=True)
class Totals:
    """Number of results that hold an answer, and of those that hold an error."""

    answers: int
    errors: int

    @classmethod
    def of(cls, results: Iterable[Result]) -> Totals:
        """Count results."""
        failed = [result.error is not None for result in results]
        return cls(failed.count(False), failed.count(True))


Lines = dict[int, Line]  # by line number
Results = dict[int, Result]


def read_lines(content: bytes) -> Lines:
    """Return the lines by number; numbers count from 1 and include empty lines, which are left out."""
    texts = enumerate(content.split(b"\n"), start=1)
    return {number: _read_line(text, number) for number, text in texts if text.strip()}


def _read_line(text: bytes, number: int) -> Line:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Line(number, error=f"the line is not JSON: {getattr(error, 'msg', error)}")
    if not isinstance(record, dict):
        return Line(number, error="the line is not a JSON object with an image and a question")
    given = record.get("id")
    known = isinstance(given, (str, int)) and not isinstance(given, bool)
    image, question = (
        value if isinstance(value, str) else None for value in (record.get("image"), record.get("question"))
    )
    return Line(given if known else number, image, question, _error_of(record, known))


def _error_of(record: dict[str, Any], id_is_known: bool) -> str | None:
    if record.get("id") is not None and not id_is_known:
        return '"id" is neither a string nor an integer'
    for name in ("image", "question"):
        if not isinstance(record.get(name), str):
            return f'"{name}" is not a string' if name in record else f'there is no "{name}"'
    try:
        check_question(record["question"])
    except InputError as error:
        return str(error)
    return None


def usable_lines(lines: Lines) -> set[int]:
    """Return the numbers of the lines that can be asked."""
    return {number for number, line in lines.items() if line.error is None}
