"""Batches of questions about encoded scenes: a row for each question, or all questions of a scene in one row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from flexattn_cuda.mechanism.config import FlexAttnConfig
from flexattn_cuda.tasks.training_data import IGNORED
from studies.small.encoded_scenes import EncodedScenes, Pick
from studies.small.objects import Box
from studies.small.painter import SIDE
from studies.small.questions import Question


def question_batch(
    images: EncodedScenes, picks: Sequence[Pick], processor, settings: FlexAttnConfig | None, answers: bool = True
) -> dict[str, torch.Tensor]:
    """Return the arguments of the model's `forward` for questions, padded on the left.

    Args:
        images: The scenes asked about.
        picks: The questions, a row each.
        processor: Of the model.
        settings: Of the system, which say what resolution it sees; None for the low resolution alone.
        answers: Append the answers and add labels, for training and scoring; if False, end with the prompts, for
            `generate`.
    """
    tokenizer, image_id = processor.tokenizer, processor.image_token_id
    numbers = [pick.scene for pick in picks]
    batch = {"image_features": images.low[numbers].float()}
    image_tokens = images.low.shape[1]
    if settings is not None:
        batch["hr_features"] = images.high[settings.zoom, settings.highres_size][numbers].float()
        batch["valid_rect"] = images.valid_rect[numbers]
        image_tokens += batch["hr_features"].shape[1] if settings.system == "hd" else 0
    rows, labels = [], []
    for pick in picks:
        before, after = split_prompt(processor, pick.question)
        answer = answer_ids(tokenizer, pick.question) if answers else []
        rows.append(before + [image_id] * image_tokens + after + answer)
        labels.append(answer)
    length = max(map(len, rows))
    padding = [length - len(row) for row in rows]
    batch["input_ids"] = torch.tensor([[tokenizer.pad_token_id] * pad + row for pad, row in zip(padding, rows)])
    batch["attention_mask"] = (torch.arange(length) >= torch.tensor(padding)[:, None]).long()
    if answers:
        batch["labels"] = torch.tensor([[IGNORED] * (length - len(answer)) + answer for answer in labels])
    return batch


@dataclass(frozen=True)
class PackedScenes:
    """n scenes with all their questions, a row each, padded on the right; see `pack_scenes`.

    Attributes:
        input_ids: [n, N] int64.
        position_ids: [n, N] int64; every question has the positions that it has alone.
        labels: [n, N] int64.
        visible: [n, 1, N, N] bool, row i sees key j.
        image_features: [n, S*S, D] float32.
        cells: [n, N, S*S] bool, in the rows that predict an answer token: the LR cells that its boxes touch.
        answer_cells: [n, N, S*S] bool, in these rows: those that any box of the answer touches.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    visible: torch.Tensor
    image_features: torch.Tensor
    cells: torch.Tensor
    answer_cells: torch.Tensor


@dataclass
class _PackedRow:
    """A scene's image and questions, one after the other.

        part      0 … 0  0 … 0  1 … 1  2 … 2
        tokens    prompt image  end of prompt and answer of question 1, 2, …

    Attributes:
        shared: Number of tokens that the questions share.
        part: 0 for those, else the question's number from 1.
        looks: By row that predicts an answer token, the boxes to look at.
        boxes: By the same rows, all boxes of the answer.
    """

    shared: int
    ids: list[int]
    positions: list[int]
    labels: list[int]
    part: list[int]
    looks: dict[int, tuple[Box, ...]] = field(default_factory=dict)
    boxes: dict[int, tuple[Box, ...]] = field(default_factory=dict)

    @classmethod
    def of_shared(cls, ids: list[int]) -> _PackedRow:
        """Return a row of the tokens that all questions share."""
        return cls(len(ids), ids, list(range(len(ids))), [IGNORED] * len(ids), [0] * len(ids))

    def add(self, prompt: list[int], answer: list[int], question: Question) -> None:
        """Append a question: the end of its prompt, its answer, and the boxes that each answer token looks at."""
        rows = range(len(self.ids) + len(prompt) - 1, len(self.ids) + len(prompt) + len(answer) - 1)
        looks = (*question.looks, question.boxes)  # the end of the answer looks at all of it
        self.looks |= dict(zip(rows, looks, strict=True))
        self.boxes |= dict.fromkeys(rows, question.boxes)
        own = prompt + answer
        self.ids += own
        self.positions += range(self.shared, self.shared + len(own))
        self.labels += [IGNORED] * len(prompt) + answer
        self.part += [self.part[-1] + 1] * len(own)


def pack_scenes(images: EncodedScenes, numbers: Sequence[int], processor) -> PackedScenes:
    """Return scenes with all their questions for the low resolution; a question sees the image and itself alone.

    An image is far longer than a question: this costs a fraction of one row per question and computes the same.
    """
    area = images.low.shape[1]
    side = round(area**0.5)
    rows = [_pack(images.scenes[number].questions, area, processor) for number in numbers]
    length = max(len(row.ids) for row in rows)

    def padded(values: Iterable[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([one + [fill] * (length - len(one)) for one in values])

    part = padded((row.part for row in rows), -1)
    same_question = (part[:, None] == 0) | (part[:, None] == part[:, :, None])
    causal = torch.ones(length, length, dtype=torch.bool).tril()

    def cells(boxes: Iterable[dict[int, tuple[Box, ...]]]) -> torch.Tensor:
        found = torch.zeros(len(rows), length, area, dtype=torch.bool)
        for number, of_row in enumerate(boxes):
            for position, one in of_row.items():
                found[number, position] = cells_of(one, side)
        return found

    return PackedScenes(
        input_ids=padded((row.ids for row in rows), processor.tokenizer.pad_token_id),
        position_ids=padded((row.positions for row in rows), 0),
        labels=padded((row.labels for row in rows), IGNORED),
        visible=(causal & same_question)[:, None],
        image_features=images.low[list(numbers)].float(),
        cells=cells(row.looks for row in rows),
        answer_cells=cells(row.boxes for row in rows),
    )


def _pack(questions: Sequence[Question], image_tokens: int, processor) -> _PackedRow:
    before, _ = split_prompt(processor, questions[0])
    row = _PackedRow.of_shared(before + [processor.image_token_id] * image_tokens)
    for question in questions:
        _, after = split_prompt(processor, question)
        row.add(after, answer_ids(processor.tokenizer, question), question)
    return row


def split_prompt(processor, question: Question) -> tuple[list[int], list[int]]:
    """Return the prompt's token ids before and after its image token."""
    ids = processor.conversation_ids(processor.prompt(question.text), [processor.image_tokens])
    image = ids.index(processor.image_token_id)
    return ids[:image], ids[image + processor.image_tokens :]


def answer_ids(tokenizer, question: Question) -> list[int]:
    """Return the answer's token ids: one for each word, and the end."""
    return [*tokenizer.convert_tokens_to_ids(list(question.answer)), tokenizer.eos_token_id]


def answer_cells(images: EncodedScenes, picks: Sequence[Pick]) -> torch.Tensor:
    """Return the LR cells that each question's answer boxes touch, [n, S*S] bool."""
    side = round(images.low.shape[1] ** 0.5)
    return torch.stack([cells_of(pick.question.boxes, side) for pick in picks])


def cells_of(boxes: Iterable[Box], side: int) -> torch.Tensor:
    """Return the cells that any box touches, [side*side] bool, of a grid over the square of SIDE pixels."""
    start, cell = torch.arange(side) * (SIDE / side), SIDE / side
    touched = torch.zeros(side, side, dtype=torch.bool)
    for left, top, right, bottom in boxes:
        rows = (start < bottom) & (start + cell > top)
        columns = (start < right) & (start + cell > left)
        touched |= rows[:, None] & columns
    return touched.flatten()
