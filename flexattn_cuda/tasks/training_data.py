"""Training data in LLaVA's format: read, checked before anything is trained, and made into tensors.

    [{"id": ..., "image": "a.jpg" or ["a.jpg", "b.jpg"], "conversations": [{"from": "human", "value": "<image>\nWhat is it?"},
                                                                           {"from": "gpt", "value": "A cat."}, ...]}, ...]

A record is what is trained on at a time; records are counted from 0. One that is broken costs itself alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from flexattn_cuda.errors import InputError
from flexattn_cuda.inputs.images import open_image
from flexattn_cuda.inputs.processor import FlexAttnLlavaProcessor
from flexattn_cuda.inputs.questions import IMAGE, user_message
from flexattn_cuda.runs.progress import Progress

IGNORED = -100  # the label of a position that nothing is learned from
_AT_ONCE = 1024  # images handed to the threads at a time


class BrokenRecord(ValueError):
    """A record that cannot be trained on.

    Attributes:
        kind: What is counted, such as "missing image".
    """

    def __init__(self, kind: str, reason: str):
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True)
class Broken:
    """A record that the check has found broken: its number from 0, what kind of thing is wrong, and a sentence."""

    record: int
    kind: str
    reason: str

    def __str__(self) -> str:
        return f"record {self.record}: {self.kind}: {self.reason}"


@dataclass(frozen=True)
class Conversation:
    """A record as it is trained on.

    Attributes:
        images: Paths of the images, in the order of their marks.
        turns: (question, number of images in it, answer).
    """

    images: list[str]
    turns: list[tuple[str, int, str]]


# -------------------------------------------------------------------------------------------------------------- reading


def read_records(path: str | Path) -> list[Any]:
    """The records of a JSON list, or of a JSONL file's lines that are not empty. A line that is no JSON stays bytes."""
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if path.suffix == ".jsonl":
        records = [_from_line(line) for line in content.split(b"\n") if line.strip()]
    else:
        try:
            records = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} is not JSON: {error}; a file with an object a line must end in .jsonl") from None
        if not isinstance(records, list):
            raise InputError(f"{path} holds no list of records")
    if not records:
        raise InputError(f"{path} holds no records")
    return records


def _from_line(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return line


def parse(record: Any) -> Conversation:
    """A record's images and turns; BrokenRecord where its form is wrong."""
    if not isinstance(record, dict):
        raise BrokenRecord("not a record", "it is not a JSON object with conversations")
    images = record.get("image")
    images = [] if images is None else [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
        raise BrokenRecord("not a record", '"image" is neither a path nor a list of paths')
    conversation = record.get("conversations")
    if not isinstance(conversation, list) or not conversation:
        raise BrokenRecord("empty conversation", 'there are no "conversations"')
    for number, part in enumerate(conversation):
        if not isinstance(part, dict) or not all(isinstance(part.get(name), str) for name in ("from", "value")):
            raise BrokenRecord(
                "not a record",
                f'part {number} of the conversation has no strings "from" and "value"',
            )
        expected = ("human", "gpt")[number % 2]
        if part["from"] != expected:
            raise BrokenRecord(
                "roles out of order",
                f"part {number} of the conversation is from {part['from']!r}, not {expected!r}",
            )
        try:
            part["value"].encode()
        except UnicodeEncodeError:
            raise BrokenRecord(
                "no text", f"part {number} holds half of a surrogate pair, which is no character"
            ) from None
    if len(conversation) % 2:
        raise BrokenRecord("roles out of order", "the conversation ends with a question")

    turns = []
    for asked, answered in zip(conversation[::2], conversation[1::2]):
        question, answer = asked["value"].replace(IMAGE, "").strip(), answered["value"].strip()
        if IMAGE in question:
            raise BrokenRecord(
                "image tag in an image tag",
                f"a question without its {IMAGE} tags still contains one",
            )
        if IMAGE in answer:
            raise BrokenRecord(
                "image tag in an answer",
                f"an answer contains {IMAGE}, the mark of an image's place",
            )
        if not question or not answer:
            raise BrokenRecord(f"empty {'answer' if question else 'question'}", "nothing is said there")
        turns.append((question, asked["value"].count(IMAGE), answer))
    marks = sum(count for _, count, _ in turns)
    if marks > len(images):
        raise BrokenRecord("image tag without an image", f"there are {marks} {IMAGE} tags for {len(images)} images")
    if marks < len(images):
        raise BrokenRecord("image without an image tag", f"there are {len(images)} images for {marks} {IMAGE} tags")
    return Conversation(images, turns)


# ----------------------------------------------------------------------------------------------------------- tokenising


def labelled_ids(
    processor: FlexAttnLlavaProcessor,
    turns: Sequence[tuple[str, int, str]],
    ends: Sequence[int] | None = None,
) -> tuple[list[int], list[int]]:
    """A conversation in token ids and in labels, equally long: the labels are -100 but for the answers, each with its end.

    Before an answer the ids are those of the prompt that asks for it, so what is learned is what `generate` continues.

    Args:
        turns: As in `Conversation`.
        ends: The ids that end an answer; the tokenizer's end-of-sequence id when None.
    Raises:
        BrokenRecord: The chat template cannot write the conversation down so.
    """
    ends = [processor.tokenizer.eos_token_id] if ends is None else list(ends)
    # Some templates leave it to the training code to end an answer, and some write questions alone.
    parts = _written(processor, turns, ends, "") or _written(
        processor, turns, ends, processor.tokenizer.eos_token or ""
    )
    if parts is None:
        if len(turns) > 1:
            raise BrokenRecord(
                "conversation that the chat template cannot write",
                f"the model's chat template writes single questions; this conversation has {len(turns)}",
            )
        [(question, images, answer)] = turns
        prompt = processor.tokenize(processor.prompt(question, images))
        parts = [(prompt, [*processor.tokenizer(answer, add_special_tokens=False)["input_ids"], ends[0]])]
    ids: list[int] = []
    labels: list[int] = []
    for asked, answered in parts:
        asked = processor.expand_image_tokens(asked)
        ids += [*asked, *answered]
        labels += [IGNORED] * len(asked) + answered
    return ids, labels


def _written(
    processor: FlexAttnLlavaProcessor,
    turns: Sequence[tuple[str, int, str]],
    ends: list[int],
    end: str,
) -> list[tuple[list[int], list[int]]] | None:
    """For each turn the ids up to its answer, from the answer before, and the answer's; None where this template cannot.

    It can where the ids of the conversation so far begin with those of the prompt before, and an answer has an end.
    """
    messages: list[dict[str, Any]] = []
    parts, before = [], []
    for question, images, answer in turns:
        messages.append(user_message(question, images))
        try:
            prompt = processor.tokenize(processor.apply_chat_template(messages, add_generation_prompt=True))
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer + end}]})
            whole = processor.tokenize(processor.apply_chat_template(messages))
        except TemplateError:
            return None
        if prompt[: len(before)] != before or whole[: len(prompt)] != prompt:
            return None
        answered = whole[len(prompt) :]
        last = next((place for place in reversed(range(len(answered))) if answered[place] in ends), None)
        if last is None:
            return None
        parts.append((prompt[len(before) :], answered[: last + 1]))
        before = whole[: len(prompt) + last + 1]
    return parts


def encode(
    processor: FlexAttnLlavaProcessor,
    conversation: Conversation,
    max_length: int,
    ends: Sequence[int] | None = None,
) -> tuple[list[int], list[int]]:
    """`labelled_ids` of a conversation; BrokenRecord where it does not fit into `max_length` positions."""
    ids, labels = labelled_ids(processor, conversation.turns, ends)
    places = ids.count(processor.image_token_id)
    if places != len(conversation.images) * processor.image_tokens:
        raise BrokenRecord(
            "conversation that the chat template cannot write",
            f"the model's chat template makes {places} image tokens for {len(conversation.images)} images",
        )
    answers = sum(label != IGNORED for label in labels)
    if answers > max_length:
        raise BrokenRecord("answer too long", f"the answers take {answers} tokens; the limit is {max_length}")
    if len(ids) > max_length:
        raise BrokenRecord(
            "record too long",
            f"the record takes {len(ids)} positions, {answers} of them answers; the limit is {max_length}",
        )
    return ids, labels


# -------------------------------------------------------------------------------------------------------------- checking


def check(
    records: Sequence[Any],
    images: str | Path,
    encode: Callable[[Conversation], Any],
    known_images: str | Path | None = None,
    progress: bool = False,
) -> list[Broken]:
    """Every record that cannot be trained on; each image is decoded once.

    Args:
        images: The folder that the images' paths are relative to.
        encode: Called with every conversation; a BrokenRecord or InputError that it raises is reported.
        known_images: A file in which the verdicts on images are kept; one whose size and time of change are still the
            same is not read again.
        progress: Tell on stderr how far it is, and every broken record as soon as it is found.
    """
    broken: dict[int, Broken] = {}

    def found(number: int, error: BrokenRecord) -> None:
        broken.setdefault(number, Broken(number, error.kind, " ".join(str(error).split())))
        report.say(str(broken[number]))

    users: dict[str, list[int]] = {}
    with Progress(len(records), "records checked", progress) as report:
        for number, record in enumerate(records):
            try:
                conversation = parse(record)
                encode(conversation)
                for image in conversation.images:
                    users.setdefault(image, []).append(number)
            except BrokenRecord as error:
                found(number, error)
            except InputError as error:
                found(number, BrokenRecord("conversation that cannot be asked", str(error)))
            report.advance(1)
    with (
        Progress(len(users), "images checked", progress) as report,
        _Verdicts(known_images) as verdicts,
    ):
        for image, error in verdicts.on(Path(images), users):
            for number in users[image] if error is not None else ():
                if number not in broken:
                    found(number, error)
            report.advance(1)
    return [broken[number] for number in sorted(broken)]


class _Verdicts:
    """Whether images can be read: a journal, an object a line with path, size, mtime_ns and error."""

    def __init__(self, path: str | Path | None):
        self._known: dict[tuple[str, int, int], str | None] = {}
        self._path = None if path is None else Path(path)

    def __enter__(self) -> _Verdicts:
        self._file = None
        if self._path is not None:
            self._file = open(self._path, "ab+")
            self._file.seek(0)
            for line in self._file:
                try:
                    one = json.loads(line)
                    self._known[one["path"], one["size"], one["mtime_ns"]] = one["error"]
                except (ValueError, KeyError, TypeError):
                    continue  # its writing was cut off
            self._file.write(b"\n")  # what comes next is not a part of such a line
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def on(self, folder: Path, images: Iterable[str]) -> Iterator[tuple[str, BrokenRecord | None]]:
        """(path, what is wrong with it or None) for every image."""
        images = iter(images)
        # Pillow decodes without holding the interpreter's lock.
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
            while some := list(islice(images, _AT_ONCE)):
                yield from zip(some, threads.map(lambda image: self._one(folder / image), some))

    def _one(self, path: Path) -> BrokenRecord | None:
        try:
            found = path.stat()
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            return BrokenRecord(
                "missing image" if missing else "unreadable image",
                _cannot_read(path, error.strerror),
            )
        except ValueError as error:  # a zero byte in the name
            return BrokenRecord("missing image", _cannot_read(path, error))
        key = str(path), found.st_size, found.st_mtime_ns
        if key not in self._known:
            try:
                open_image(path)
                error = None
            except InputError as refused:
                error = str(refused)
            self._known[key] = error
            if self._file is not None:
                line = json.dumps(dict(zip(("path", "size", "mtime_ns"), key)) | {"error": error}) + "\n"
                self._file.write(line.encode())
        return None if self._known[key] is None else BrokenRecord("unreadable image", self._known[key])


def _cannot_read(path: Path, reason: Any) -> str:
    return f"the image {path} cannot be read: {reason}"


# -------------------------------------------------------------------------------------------------------------- tensors


class Conversations(Dataset):
    """Records as the model takes them: input_ids [N], labels [N] and, where it has images, what the processor makes of them.

    An image that can no longer be read is told once; the next record that can be takes its place.

    Args:
        records: As `read_records` gives them.
        numbers: The numbers of those that are used.
        encode: (ids, labels) of a conversation.
        tell: Called with what is broken meanwhile.
    """

    def __init__(
        self,
        records: Sequence[Any],
        numbers: Sequence[int],
        images: str | Path,
        processor: FlexAttnLlavaProcessor,
        encode: Callable[[Conversation], tuple[list[int], list[int]]],
        tell: Callable[[Broken], None] = lambda broken: None,
    ):
        self._records, self._numbers = records, numbers
        self._images, self._processor, self._encode, self._tell = (
            Path(images),
            processor,
            encode,
            tell,
        )
        self._told: set[int] = set()

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        for place in range(index, index + len(self)):
            number = self._numbers[place % len(self)]
            try:
                return self._features(parse(self._records[number]))
            except InputError as error:
                if number not in self._told:
                    self._told.add(number)
                    self._tell(Broken(number, "unreadable image", " ".join(str(error).split())))
        raise InputError("no image of the training data can be read any more")

    def _features(self, conversation: Conversation) -> dict[str, torch.Tensor]:
        ids, labels = self._encode(conversation)
        features = {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}
        if conversation.images:
            features |= self._processor.image_processor(
                [open_image(self._images / image) for image in conversation.images]
            )
        return features


@dataclass(frozen=True)
class Collator:
    """Records -> a batch: input_ids, labels and attention_mask [B, N], padded on the right, and everything else in a row.

    What else a record has ([n, ...] for its n images: pixels, or features of them that were encoded before) is
    concatenated in the order of the records. Some may have no images.
    """

    pad_id: int

    def __call__(self, records: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        ids, labels = ([record[name] for record in records] for name in ("input_ids", "labels"))
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_id),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        }
        others = dict.fromkeys(name for record in records for name in record if name not in batch)
        return batch | {name: torch.cat([record[name] for record in records if name in record]) for name in others}
