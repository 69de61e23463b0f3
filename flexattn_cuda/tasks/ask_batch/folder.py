"""One question about every image of a folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flexattn_cuda.runs.progress import Progress
from flexattn_cuda.tasks.ask_batch.answers import BatchModel
from flexattn_cuda.tasks.ask_batch.lines import Line, Result, Results, Totals


def answer_folder(
    model: BatchModel,
    names: Sequence[str],
    question: str,
    on_result: Callable[[str, Result], None],
    progress: bool = False,
) -> Totals:
    """Answer a question about images, in batches, as `answer_questions` does for a file of questions.

    Args:
        model: The model, and the folder of the images.
        names: Of the images in the folder, at least one.
        question: The question.
        on_result: Called with the name of each image and what has become of it, batch by batch: in the order of the
            names, or the largest first in families whose prompts depend on the size of the image.
        progress: Print progress on stderr.

    Raises:
        InputError: If the question cannot be asked, or the GPU does not have enough memory.
    """
    model.processor.prompt(question)  # raises once what would otherwise be said of every image
    lines = {number: Line(number, name, question) for number, name in enumerate(names, start=1)}

    def hand_on(results: Results) -> None:
        for number in sorted(results):
            on_result(names[number - 1], results[number])

    plan = model.plan(lines, {})
    hand_on(plan.too_long)
    with Progress(len(lines) - len(plan.too_long), "images", progress) as shown:
        results = plan.too_long | model.answer_share(lines, plan.batches, hand_on, shown)
    return Totals.of(results.values())
