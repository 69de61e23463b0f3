"""A model that answers batches of lines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from flexattn_cuda.errors import InputError
from flexattn_cuda.inputs.image_sources import read_image
from flexattn_cuda.runs.progress import Progress
from flexattn_cuda.runs.versions import FileVersion
from flexattn_cuda.tasks import ask as answering
from flexattn_cuda.tasks.ask_batch.lines import Lines, Result, Results, usable_lines
from flexattn_cuda.tasks.models import HRModel, QuestionProcessor

Batch = list[int]  # numbers of lines


@dataclass(frozen=True)
class Plan:
    """What is left to do.

    Attributes:
        batches: The batches to answer.
        too_long: Results of the lines that the model has no room for.
    """

    batches: list[Batch]
    too_long: Results


@dataclass(frozen=True)
class BatchModel:
    """A model with its processor, and how it is to answer.

    Attributes:
        model: The model.
        processor: Its processor.
        images: The folder that the paths of images are relative to.
        batch_size: Number of questions per batch.
        max_new_tokens: Maximum length of an answer in tokens.
    """

    model: HRModel
    processor: QuestionProcessor
    images: Path
    batch_size: int
    max_new_tokens: int

    def plan(self, lines: Lines, done: Results) -> Plan:
        """Cut the lines that are not done into batches of prompts of similar length, so that little of them is padding.

        The longest come first, so that a batch that does not fit into the memory fails at once.
        """
        lengths: dict[int, int] = {}
        too_long: Results = {}
        for number in sorted(usable_lines(lines) - done.keys()):
            try:
                line = lines[number]
                image = line.source(self.images)
                lengths[number] = answering.prompt_length(self.model, self.processor, line.question, image)
            except InputError as error:
                too_long[number] = _failed(error)
        order = sorted(lengths, key=lambda number: (-lengths[number], number))
        size = self.batch_size
        return Plan([order[start : start + size] for start in range(0, len(order), size)], too_long)

    def answer_share(
        self, lines: Lines, share: list[Batch], on_results: Callable[[Results], None], progress: Progress
    ) -> Results:
        """Answer batches, and hand the results of each on as soon as it is answered."""
        answered: Results = {}
        for batch in share:
            results = self.answer({number: lines[number] for number in batch})
            on_results(results)
            answered |= results
            progress.advance(len(batch))
        return answered

    def answer(self, lines: Lines) -> Results:
        """Answer lines as one batch, whose images are in memory only here.

        Raises:
            InputError: If the GPU does not have enough memory.
        """
        results: Results = {}
        images: dict[int, Image.Image] = {}
        versions: dict[int, FileVersion | None] = {}
        for number, line in lines.items():
            try:
                source = line.source(self.images)
                versions[number] = _version(source)
                images[number] = read_image(source)
            except InputError as error:
                results[number] = _failed(error)
        answered = self._answers({number: lines[number].question for number in images}, images)
        return results | {number: replace(result, image=versions[number]) for number, result in answered.items()}

    def _answers(self, questions: dict[int, str], images: dict[int, Image.Image]) -> Results:
        """Answer questions together or, if one of them cannot be answered, each by itself."""
        if not questions:
            return {}
        own_images = [[images[number]] for number in questions]
        try:
            answers = answering.generate_answers(
                self.model, self.processor, own_images, list(questions.values()), self.max_new_tokens
            )
        except torch.OutOfMemoryError:
            raise InputError(
                f"the GPU does not have enough memory for {len(images)} questions at a time; use a smaller batch size, "
                "finished answers are kept"
            ) from None
        except InputError as error:
            if len(questions) == 1:
                return dict.fromkeys(questions, _failed(error))
            alone = (self._answers({number: question}, images) for number, question in questions.items())
            return {number: result for one in alone for number, result in one.items()}
        texts = (answering.answer_text(self.processor, tokens) for tokens in answers)
        return {number: Result(answer=text) for number, text in zip(questions, texts)}


def _failed(error: InputError) -> Result:
    return Result(error=" ".join(str(error).split()))


def _version(source: str | Path) -> FileVersion | None:
    """Return the version of an image file; None for a URL, and for a file that cannot be read at all."""
    try:
        return FileVersion.of(source) if isinstance(source, Path) else None
    except (OSError, ValueError):  # ValueError: a null character in the name
        return None
