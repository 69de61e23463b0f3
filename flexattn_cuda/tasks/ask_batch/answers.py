"""A model that answers batches of lines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from flexattn_cuda.errors import InputError
from flexattn_cuda.inputs.image_sources import read_image
from flexattn_cuda.inputs.images import is_url
from flexattn_cuda.runs.progress import Progress
from flexattn_cuda.tasks import ask as answering
from flexattn_cuda.tasks.ask_batch.lines import Line, Lines, Result, Results, usable_lines
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
                image = self._image(line)
                lengths[number] = answering.prompt_length(self.model, self.processor, line.question, image)
            except InputError as error:
                too_long[number] = Result(error=" ".join(str(error).split()))
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
        images = {}
        for number, line in lines.items():
            try:
                images[number] = read_image(self._image(line))
            except InputError as error:
                results[number] = Result(error=" ".join(str(error).split()))
        if not images:
            return results
        questions = [lines[number].question for number in images]
        try:
            answers = answering.generate_answers(
                self.model, self.processor, [[image] for image in images.values()], questions, self.max_new_tokens
            )
        except torch.OutOfMemoryError:
            raise InputError(
                f"the GPU does not have enough memory for {len(images)} questions at a time; use a smaller batch size, "
                "finished answers are kept"
            ) from None
        texts = (answering.answer_text(self.processor, tokens) for tokens in answers)
        return results | {number: Result(answer=text) for number, text in zip(images, texts)}

    def _image(self, line: Line) -> str | Path:
        """Return the image's URL, or its path."""
        return line.image if is_url(line.image) else self.images / line.image
