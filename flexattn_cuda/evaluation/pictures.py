"""Drawings of right and wrong answers with their maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexattn_cuda.evaluation.results import Picture, mark_of
from flexattn_cuda.inputs.image_sources import read_images
from flexattn_cuda.tasks.ask import ask
from flexattn_cuda.tasks.models import selects
from flexattn_cuda.tasks.options import EvalOptions

if TYPE_CHECKING:
    from flexattn_cuda.evaluation.model import FlexAttn

_WIDTH = 640  # pixels
_TOKENS = 8  # of the answer that is drawn; the map is that of its first token


def draw(
    options: EvalOptions, system: str, model: FlexAttn, task: Any, samples: Sequence[Mapping[str, Any]]
) -> list[Picture]:
    """Draw some right and some wrong answers of a system that has maps, the first of the task.

    Args:
        options: How many, and where.
        system: The system.
        model: Its model.
        task: lmms-eval's task, with its requests.
        samples: As lmms-eval logs them.
    """
    if not selects(model.model):
        return []
    name = task.config.task
    questions = {instance.doc_id: instance.args for instance in reversed(task.instances)}
    pictures = []
    for right in (True, False):
        chosen = [sample for sample in samples if _is_right(sample, task) is right][: options.pictures]
        for sample in chosen:
            context, _, doc_to_visual, doc_id, _, split = questions[sample["doc_id"]][:6]
            images = read_images(doc_to_visual(model.task_dict[name][split][doc_id]))
            if not images:
                continue
            file = f"{system}_{name}_{doc_id}.jpg"
            _draw(model, images, context, options.output / "pictures" / file)
            answers = ", ".join(map(str, sample["filtered_resps"]))
            pictures.append(Picture(file, right, context, answers, str(sample["target"])))
    return pictures


def _is_right(sample: Mapping[str, Any], task: Any) -> bool | None:
    """Return whether the first metric of a task says so; None if it gives no mark in [0, 1]."""
    first = next((name for name in task.aggregation() if name in sample), None)
    mark = None if first is None else mark_of(sample[first])
    return None if mark is None or not 0 <= mark <= 1 else mark >= 0.5


def _draw(model: FlexAttn, images: Sequence[Any], question: str, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    answer = ask(model.model, model.processor, list(images), question, max_new_tokens=_TOKENS, trace=True)
    drawing = answer.draw()
    if drawing.width > _WIDTH:
        drawing = drawing.resize((_WIDTH, round(drawing.height * _WIDTH / drawing.width)))
    drawing.save(path, quality=85)
