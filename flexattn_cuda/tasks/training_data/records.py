"""Records of LLaVA's format, and what can be wrong with them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexattn_cuda.errors import InputError
from flexattn_cuda.inputs.questions import IMAGE


class BrokenRecordError(ValueError):
    """A record that cannot be trained on.

    Attributes:
        kind: What it is counted as, such as "missing image".
    """

    def __init__(self, kind: str, reason: str):
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True)
class Broken:
    """An entry in the list of broken records.

    Attributes:
        record: The record's number, from 0.
        kind: What it is counted as, such as "missing image".
        reason: What is wrong, in one sentence.
    """

    record: int
    kind: str
    reason: str

    @classmethod
    def of(cls, record: int, error: BrokenRecordError) -> Broken:
        return cls(record, error.kind, " ".join(str(error).split()))

    def __str__(self) -> str:
        return f"record {self.record}: {self.kind}: {self.reason}"


@dataclass(frozen=True)
class Turn:
    """A question and its answer.

    Attributes:
        question: The question, without image tags.
        images: Number of images that come with it.
        answer: The answer.
    """

    question: str
    images: int
    answer: str


@dataclass(frozen=True)
class Conversation:
    """A record in the form that it is trained on.

    Attributes:
        images: Paths of the images, in the order of their tags.
        turns: Questions and answers.
    """

    images: list[str]
    turns: list[Turn]


# --------------------------------------------------------------------------------------------------------- reading


def read_records(path: str | Path) -> list[Any]:
    """Read a JSON list, or the non-empty lines of a JSON Lines file (`.jsonl`).

    A line that is not JSON is returned as bytes, which `parse` refuses.

    Raises:
        InputError: If the file cannot be read or holds no records.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    records = _records_of_lines(content) if path.suffix == ".jsonl" else _records_of_list(content, path)
    if not records:
        raise InputError(f"{path} holds no records")
    return records


def _records_of_list(content: bytes, path: Path) -> list[Any]:
    try:
        records = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}; a file with an object per line must end in .jsonl") from None
    if not isinstance(records, list):
        raise InputError(f"{path} does not hold a list of records")
    return records


def _records_of_lines(content: bytes) -> list[Any]:
    records: list[Any] = []
    for line in content.split(b"\n"):
        if line.strip():
            try:
                records.append(json.loads(line))
            except (ValueError, RecursionError):
                records.append(line)
    return records


# --------------------------------------------------------------------------------------------------------- parsing


def parse(record: Any) -> Conversation:
    """Return a record's images and turns; raise BrokenRecordError if its form is wrong."""
    if not isinstance(record, dict):
        raise BrokenRecordError("not a record", "it is not a JSON object with conversations")
    images = _image_paths(record.get("image"))
    parts = record.get("conversations")
    if not isinstance(parts, list) or not parts:
        raise BrokenRecordError("empty conversation", 'there are no "conversations"')
    texts = [_text_of_part(part, number) for number, part in enumerate(parts)]
    if len(texts) % 2:
        raise BrokenRecordError("roles out of order", "the conversation ends with a question")
    turns = [_turn(question, answer) for question, answer in zip(texts[::2], texts[1::2])]
    _check_tags(sum(turn.images for turn in turns), len(images))
    return Conversation(images, turns)


def _image_paths(image: Any) -> list[str]:
    paths = [] if image is None else [image] if isinstance(image, str) else image
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise BrokenRecordError("not a record", '"image" is neither a path nor a list of paths')
    return paths


def _text_of_part(part: Any, number: int) -> str:
    if not isinstance(part, dict) or not all(isinstance(part.get(name), str) for name in ("from", "value")):
        raise BrokenRecordError("not a record", f'part {number} of the conversation has no strings "from" and "value"')
    expected = ("human", "gpt")[number % 2]
    if part["from"] != expected:
        raise BrokenRecordError(
            "roles out of order", f"part {number} of the conversation is from {part['from']!r}, not {expected!r}"
        )
    try:
        part["value"].encode()
    except UnicodeEncodeError:
        raise BrokenRecordError("not text", f"part {number} contains half of a surrogate pair") from None
    return part["value"]


def _turn(asked: str, answered: str) -> Turn:
    question, answer = asked.replace(IMAGE, "").strip(), answered.strip()
    if IMAGE in question:
        raise BrokenRecordError(
            "image tag in an image tag", f"a question still contains {IMAGE} when its {IMAGE} tags are removed"
        )
    if IMAGE in answer:
        raise BrokenRecordError("image tag in an answer", f"an answer contains {IMAGE}, the mark of an image")
    if not question or not answer:
        raise BrokenRecordError(f"empty {'answer' if question else 'question'}", "it contains no text")
    return Turn(question, asked.count(IMAGE), answer)


def _check_tags(tags: int, images: int) -> None:
    if tags > images:
        raise BrokenRecordError("image tag without an image", f"there are {tags} {IMAGE} tags for {images} images")
    if tags < images:
        raise BrokenRecordError("image without an image tag", f"there are {images} images for {tags} {IMAGE} tags")
