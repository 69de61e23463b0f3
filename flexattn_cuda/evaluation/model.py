"""This package's models in lmms-eval.

lmms-eval --model flexattn --model_args pretrained=DIR,system=xattn --tasks pope --batch_size 8
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image

from flexattn_cuda.errors import InputError
from flexattn_cuda.evaluation.scoring import Candidate, Score, score
from flexattn_cuda.inputs.image_sources import read_image
from flexattn_cuda.runs.processes import Processes
from flexattn_cuda.runs.progress import Progress
from flexattn_cuda.tasks.ask import answer_text, generate_answers
from flexattn_cuda.tasks.load import load_chosen
from flexattn_cuda.tasks.models import TrainingProcessor
from flexattn_cuda.tasks.options import ModelOptions

_GREEDY = {"temperature": 0, "do_sample": False, "num_beams": 1}  # other values would change an answer


class FlexAttn(lmms):
    """A model of this package, as `--model flexattn` of lmms-eval.

    Args:
        pretrained: Checkpoint folder or hub id; by default the small model of this package.
        batch_size: Number of requests per batch.
        device: Device to run on; of several processes, each takes the GPU of its local rank.
        max_batch_size: Of `--batch_size auto`, which is refused.
        options: The other fields of `ModelOptions` that describe a model, such as system, adapter, preset and dtype;
            max_new_tokens is the maximum length of an answer where a task sets none.

    Raises:
        InputError: If an option is unknown or cannot be used.
        CheckpointError: If the model cannot be loaded.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
        **options: Any,
    ):
        super().__init__()
        known = sorted({field.name for field in dataclasses.fields(ModelOptions)} - {"model", "device"})
        if unknown := sorted(options.keys() - known):
            raise InputError(f"--model_args has {unknown[0]}; allowed: pretrained, {', '.join(known)}")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise InputError(f"--batch_size is {batch_size}; it must be a whole number of at least 1")
        self.batch_size = int(batch_size)
        processes = Processes()
        self._rank, self._world_size = processes.rank, processes.count
        self.device = processes.device(device)
        name = None if pretrained is None else str(pretrained)  # lmms-eval reads a name of digits as a number
        chosen = ModelOptions(model=name, device=str(self.device), **options)
        self.max_new_tokens = chosen.max_new_tokens
        self.model, self.processor = load_chosen(chosen)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answer questions greedily, each up to the first of its task's stopping sequences.

        Raises:
            InputError: If a question or its images cannot be used, or its task asks for more than greedy answers.
        """
        return self._in_batches([_Question.of(request, self) for request in requests], "answers", self._answer)

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Score answers; those to one question are scored together.

        Returns:
            For each request the mean cross-entropy of the answer's tokens, its end included, and whether the model
            would answer so. It is lmms-eval's convention that the smallest wins: models return a loss here.

        Raises:
            InputError: If a question, its images or an answer cannot be used.
        """
        scores = self._in_batches([_Scored.of(request) for request in requests], "answers scored", self._score)
        return [(found.loss, found.greedy) for found in scores]

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Raise InputError: a task of several rounds decides what to ask by the answers before."""
        raise InputError(f"the task {requests[0].task_name} has several rounds, and flexattn answers single questions")

    def _answer(self, asked: Sequence[_Question]) -> list[str]:
        images = [one.request.images(self.task_dict) for one in asked]
        texts = [one.request.context for one in asked]
        answers = generate_answers(self.model, self.processor, images, texts, asked[0].max_new_tokens)
        return [one.up_to_stop(answer_text(self.processor, tokens)) for one, tokens in zip(asked, answers)]

    def _score(self, asked: Sequence[_Scored]) -> list[Score]:
        candidates = [one.candidate(self.task_dict) for one in asked]
        return score(self.model, cast(TrainingProcessor, self.processor), candidates)

    def _in_batches(self, asked: Sequence[Any], what: str, run: Callable[[Sequence[Any]], list[Any]]) -> list[Any]:
        """Run questions of similar length together, the longest first, and return the results in the order given."""
        results: dict[int, Any] = {}
        with Progress(len(asked), what, enabled=self._rank == 0) as progress:
            for batch in _batches([one.order for one in asked], self.batch_size):
                results.update(zip(batch, run([asked[number] for number in batch])))
                progress.advance(len(batch))
        return [results[number] for number in range(len(asked))]


@dataclass(frozen=True)
class _Request:
    """What all kinds of requests have, in the order of lmms-eval's arguments.

    Attributes:
        context: The question.
        detail: How to generate, or the answer to score.
        doc_to_visual: Returns what a document shows.
        doc_id: Number of the document in its split.
        task: Name of the task.
        split: Name of the split of its data.
    """

    context: str
    detail: Any
    doc_to_visual: Callable[[Any], Any] | None
    doc_id: int
    task: str
    split: str

    @property
    def order(self) -> tuple[int, str, str, int]:
        return -len(self.context), self.task, self.split, self.doc_id

    def doc(self, tasks: Mapping[str, Any]) -> Any:
        return tasks[self.task][self.split][self.doc_id]

    def images(self, tasks: Mapping[str, Any]) -> list[Image.Image]:
        """Return the images, upright and in RGB; InputError if the document shows something else."""
        shown = [] if self.doc_to_visual is None else self.doc_to_visual(self.doc(tasks)) or []
        for one in shown:
            if not isinstance(one, Image.Image):
                raise InputError(
                    f"document {self.doc_id} of the task {self.task} shows a {type(one).__name__}; flexattn looks at "
                    "images only"
                )
        return [read_image(one) for one in shown]


@dataclass(frozen=True)
class _Question:
    """A question to answer.

    Attributes:
        max_new_tokens: Maximum length of the answer in tokens.
        stops: Texts that end the answer, and are no part of it.
    """

    request: _Request
    max_new_tokens: int
    stops: tuple[str, ...]

    @classmethod
    def of(cls, instance: Instance, model: FlexAttn) -> _Question:
        request = _Request(*instance.args)
        options = dict(request.detail)
        for name, greedy in _GREEDY.items():
            if options.get(name) not in (None, greedy):
                raise InputError(
                    f"the task {request.task} asks for {name}={options[name]}, and flexattn answers greedily; pass "
                    f"--gen_kwargs {name}={greedy}"
                )
        until = options.get("until") or ()
        limit = options.get("max_new_tokens")
        stops = (until,) if isinstance(until, str) else tuple(until)
        return cls(request, model.max_new_tokens if limit is None else int(limit), stops)

    @property
    def order(self) -> tuple[Any, ...]:
        return self.max_new_tokens, *self.request.order

    def up_to_stop(self, text: str) -> str:
        return min((text.partition(stop)[0] for stop in self.stops if stop), key=len, default=text).strip()


@dataclass(frozen=True)
class _Scored:
    """An answer to score."""

    request: _Request

    @classmethod
    def of(cls, instance: Instance) -> _Scored:
        return cls(_Request(*instance.args))

    @property
    def order(self) -> tuple[Any, ...]:
        return 0, *self.request.order

    def candidate(self, tasks: Mapping[str, Any]) -> Candidate:
        """Return the answer without the space before it, which the chat template writes where one belongs."""
        target, request = self.request.detail, self.request
        answer = target(request.doc(tasks)) if callable(target) else target
        return Candidate(request.images(tasks), request.context, str(answer).strip())


def _batches(orders: Sequence[tuple[Any, ...]], size: int) -> Iterator[list[int]]:
    """Cut the numbers of requests into batches whose orders agree in their first part, in this order."""
    numbers = sorted(range(len(orders)), key=lambda number: orders[number])
    for _, group in itertools.groupby(numbers, key=lambda number: orders[number][0]):
        members = list(group)
        yield from (members[start : start + size] for start in range(0, len(members), size))
