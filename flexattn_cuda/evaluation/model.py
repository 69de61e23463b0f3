"""This package's models in lmms-eval.

lmms-eval --model flexattn --model_args pretrained=DIR,system=xattn --tasks pope --batch_size 8
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image

from flexattn_cuda.analysis.selections import selected_of_row
from flexattn_cuda.errors import InputError
from flexattn_cuda.evaluation.gqa import map_score
from flexattn_cuda.evaluation.plan import Asked, Key, Outcome, Runner, cut
from flexattn_cuda.evaluation.scoring import Candidate, score
from flexattn_cuda.inputs.image_sources import read_image
from flexattn_cuda.mechanism.trace import Trace
from flexattn_cuda.runs.processes import Processes
from flexattn_cuda.tasks.ask import answer_text, end_ids, generate_greedily, room, until_end
from flexattn_cuda.tasks.cropping import Cropper, low_resolution_maps
from flexattn_cuda.tasks.encoded import EncodedImage, encode_image, prompt_inputs
from flexattn_cuda.tasks.load import load_chosen
from flexattn_cuda.tasks.models import TrainingProcessor, selects
from flexattn_cuda.tasks.options import ModelOptions

_GREEDY = {"temperature": 0, "do_sample": False, "num_beams": 1}  # other values would change an answer
_CROPS_KEPT = 64  # questions whose crops are kept encoded: options to choose from come one by one


class FlexAttn(lmms):
    """A model of this package, as `--model flexattn` of lmms-eval.

    Args:
        pretrained: Checkpoint folder or hub id; by default the small model of this package.
        batch_size: Number of requests per batch.
        device: Device to run on; of several processes, each takes the GPU of its local rank.
        max_batch_size: Of `--batch_size auto`, which is refused.
        options: The other fields of `ModelOptions` that describe a model, such as system, adapter, preset and dtype;
            max_new_tokens is the maximum length of an answer where a task sets none.

    Attributes:
        cropper: Of the system "crop", whose questions are asked twice; None for others.
        runner: Has the batches answered.
        images_encoded: Number of images that were encoded so far.

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
        self.model, processor = load_chosen(chosen)
        self.processor = cast(TrainingProcessor, processor)
        self.cropper = Cropper.of(name, self.model, processor) if chosen.crops else None
        if self.cropper is not None:
            self.processor = self.cropper.pairs
        self.runner, self.images_encoded = Runner(show=self._rank == 0), 0
        self._kept: dict[str, EncodedImage] = {}
        self._crops: dict[tuple[tuple[str, ...], str], list[EncodedImage]] = {}
        self._chunk: int | None = None

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answer questions greedily, each up to the first of its task's stopping sequences.

        Where `generation_kwargs` of a task have `map_regions`, the name of a field of its documents with regions, each
        as left, top, right and bottom in shares of the image, the answer is a JSON object with the `answer` and
        `map_scores`, `gqa.map_score` of every layer's map.

        Raises:
            InputError: If a question or its images cannot be used, or its task asks for more than greedy answers, or
                for maps of a model that has none.
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
        scored = self._in_batches([_Scored.of(request) for request in requests], "answers scored", self._score)
        return [(loss, greedy) for loss, greedy in scored]

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Raise InputError: a task of several rounds decides what to ask by the answers before."""
        raise InputError(f"the task {requests[0].task_name} has several rounds, and flexattn answers single questions")

    def _answer(self, asked: Sequence[_Question], images: Sequence[Sequence[EncodedImage]]) -> list[Outcome]:
        trace = self._new_trace(every_layer=asked[0].regions is not None)
        prompts = [self._prompt(one.request.context, own) for one, own in zip(asked, images)]
        flat = [image.inputs for own in images for image in own]
        inputs = prompt_inputs(prompts, flat, self.processor.pad_id, self.model.device)
        limits = [min(asked[0].max_new_tokens, room(self.model, len(one["input_ids"]))) for one in prompts]
        ids = generate_greedily(self.model, self.processor, inputs, max(limits), flexattn_trace=trace)
        ends = end_ids(self.model, self.processor)
        outcomes = []
        for row, (one, own) in enumerate(zip(asked, images)):
            tokens = until_end(ids[row, : limits[row]].tolist(), ends)
            text = one.up_to_stop(answer_text(self.processor, tokens))
            if one.regions is not None:
                text = json.dumps({"answer": text, "map_scores": self._map_scores(one, own, trace, row)})
            length = len(prompts[row]["input_ids"])
            outcomes.append(self._outcome(text, length, own, trace, row, steps=len(tokens) + 1))
        return outcomes

    def _score(self, asked: Sequence[_Scored], images: Sequence[Sequence[EncodedImage]]) -> list[Outcome]:
        trace = self._new_trace()
        candidates = [one.candidate(self.task_dict, own) for one, own in zip(asked, images)]
        scores = score(self.model, self.processor, candidates, trace)
        lengths = [len(self._prompt(one.request.context, own)["input_ids"]) for one, own in zip(asked, images)]
        settings = self.model.flexattn_settings
        every_row = settings is not None and settings.hr_rows == "all"
        return [
            self._outcome(
                [found.loss, found.greedy], lengths[row], images[row], trace, row, lengths[row] - 1 if every_row else 0
            )
            for row, found in enumerate(scores)
        ]

    def _new_trace(self, every_layer: bool = False) -> Trace | None:
        return Trace(every_layer=every_layer) if selects(self.model) else None

    def _prompt(self, question: str, images: Sequence[EncodedImage]) -> dict[str, list[int]]:
        """Return the ids of a prompt, and what else the model takes of each position."""
        tokens = [self.processor.image_tokens_of(image.width, image.height) for image in images]
        return self.processor.conversation_inputs(self.processor.prompt(question, len(images)), tokens)

    def _outcome(
        self,
        result: Any,
        length: int,
        images: Sequence[EncodedImage],
        trace: Trace | None,
        row: int,
        query: int = -1,
        steps: int = 1,
    ) -> Outcome:
        text = length - sum(self.processor.image_tokens_of(image.width, image.height) for image in images)
        if trace is None or not images:
            return Outcome(result, 0.0, text)
        settings = self.model.flexattn_settings
        assert settings is not None
        return Outcome(result, 0.0, text, *selected_of_row(trace, row, len(images), settings.first_layer, query, steps))

    @property
    def has_maps(self) -> bool:
        """Whether the maps of the model's layers can be scored: it selects by them, or is a plain LLaVA."""
        return selects(self.model) or (self.model.flexattn_settings is None and self.cropper is None)

    def _map_scores(
        self, asked: _Question, images: Sequence[EncodedImage], trace: Trace | None, row: int
    ) -> dict[int, float]:
        """Return the score of each layer's map at the prompt's last row."""
        if not self.has_maps:
            raise InputError(
                f"the task {asked.request.task} scores attention maps, which this system does not have; leave it out"
            )
        [image] = images
        size = (image.width, image.height)
        regions = asked.request.doc(self.task_dict)[asked.regions]
        frame = self.processor.frame(*size)
        if trace is None:  # of a plain LLaVA, which is asked once more
            found = low_resolution_maps(self.model, self.processor, images, asked.request.context)
            maps = {layer: of_images[0] for layer, of_images in found.items()}
        else:
            maps = {layer: traced.of_image(row, -1, 0)[0] for layer, traced in sorted(trace.steps[0].items())}
        return {
            layer: map_score(attention.float().cpu().numpy(), frame, size, regions) for layer, attention in maps.items()
        }

    def _in_batches(self, asked: Sequence[Any], what: str, answer: Callable[..., list[Outcome]]) -> list[Any]:
        """Answer questions in the batches of `plan.cut`, and return the results in the order given."""
        of_document: dict[Key, tuple[str, ...]] = {}  # a document has a request for each of its options
        for one in asked:
            if one.request.key[:3] not in of_document:
                shown = one.request.images(self.task_dict)
                of_document[one.request.key[:3]] = tuple(map(pixels_hash, shown))
        digests = [of_document[one.request.key[:3]] for one in asked]
        planned = [Asked(one.request.key, one.alike, one.text(self.task_dict), own) for one, own in zip(asked, digests)]
        chunks = cut(planned, self.batch_size)
        chunk_of = {tuple(batch): number for number, chunk in enumerate(chunks) for batch in chunk}

        def answered(batch: list[int]) -> list[Outcome]:
            started = time.perf_counter()
            self._begin_chunk(chunk_of[tuple(batch)])
            before = self.images_encoded
            images = [self._shown(asked[number].request, digests[number]) for number in batch]
            outcomes = answer([asked[number] for number in batch], images)
            seconds = (time.perf_counter() - started) / len(batch)
            outcomes = [dataclasses.replace(one, seconds=seconds) for one in outcomes]
            return [dataclasses.replace(outcomes[0], images=self.images_encoded - before), *outcomes[1:]]

        self._chunk = None
        outcomes = self.runner.run(planned, chunks, answered, what)
        self._forget()
        return [one.result for one in outcomes]

    def _begin_chunk(self, number: int) -> None:
        if self._chunk != number:
            self._chunk = number
            self._forget()

    def _forget(self) -> None:
        self._kept.clear()
        self._crops.clear()

    def _shown(self, request: _Request, digests: tuple[str, ...]) -> list[EncodedImage]:
        """Return what a question is asked about: its images, of a system that crops each with its crop.

        Crops are made once for a question, by itself: the batches that it is in later decide nothing about them.
        """
        images = self._encoded(request, digests)
        if self.cropper is None or not images:
            return images
        question = (digests, request.context)
        if question not in self._crops:
            if len(self._crops) == _CROPS_KEPT:
                del self._crops[next(iter(self._crops))]
            windows, whole = self.cropper.windows(images, request.context), request.images(self.task_dict)
            self._crops[question] = [self.cropper.with_crop(*one) for one in zip(images, whole, windows)]
            self.images_encoded += len(windows)
        return self._crops[question]

    def _encoded(self, request: _Request, digests: Sequence[str]) -> list[EncodedImage]:
        """Return the images of a question, those encoded that were not in this chunk."""
        if any(digest not in self._kept for digest in digests):
            for digest, image in zip(digests, request.images(self.task_dict)):
                if digest not in self._kept:
                    self._kept[digest] = encode_image(self.model, self.processor, image)
                    self.images_encoded += 1
        return [self._kept[digest] for digest in digests]


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
        index: Number of the request among those about the document.
    """

    context: str
    detail: Any
    doc_to_visual: Callable[[Any], Any] | None
    doc_id: int
    task: str
    split: str
    index: int = 0

    @classmethod
    def of(cls, instance: Instance) -> _Request:
        return cls(*instance.args, index=instance.idx)

    @property
    def key(self) -> Key:
        return self.task, self.split, self.doc_id, self.index

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
        regions: Field of the document with the regions to score maps by, if they are to be scored.
    """

    request: _Request
    max_new_tokens: int
    stops: tuple[str, ...]
    regions: str | None = None

    @classmethod
    def of(cls, instance: Instance, model: FlexAttn) -> _Question:
        request = _Request.of(instance)
        options = dict(request.detail)
        greedily = options.get("do_sample") is False  # where a temperature changes nothing
        for name, greedy in _GREEDY.items():
            if options.get(name) not in (None, greedy) and not (greedily and name == "temperature"):
                raise InputError(
                    f"the task {request.task} asks for {name}={options[name]}, and flexattn answers greedily; pass "
                    f"--gen_kwargs {name}={greedy}"
                )
        until = options.get("until") or ()
        limit = options.get("max_new_tokens")
        stops = (until,) if isinstance(until, str) else tuple(until)
        length = model.max_new_tokens if limit is None else int(limit)
        return cls(request, length, stops, options.get("map_regions"))

    @property
    def alike(self) -> Hashable:
        return self.max_new_tokens, self.regions

    def text(self, tasks: Mapping[str, Any]) -> str:
        return self.request.context

    def up_to_stop(self, text: str) -> str:
        return min((text.partition(stop)[0] for stop in self.stops if stop), key=len, default=text).strip()


@dataclass(frozen=True)
class _Scored:
    """An answer to score."""

    request: _Request

    @classmethod
    def of(cls, instance: Instance) -> _Scored:
        return cls(_Request.of(instance))

    @property
    def alike(self) -> Hashable:
        return None

    def text(self, tasks: Mapping[str, Any]) -> str:
        return f"{self.request.context}\n{self.answer(tasks)}"

    def candidate(self, tasks: Mapping[str, Any], images: Sequence[EncodedImage]) -> Candidate:
        return Candidate(images, self.request.context, self.answer(tasks))

    def answer(self, tasks: Mapping[str, Any]) -> str:
        """Return the answer without the space before it, which the chat template writes where one belongs."""
        target = self.request.detail
        return str(target(self.request.doc(tasks)) if callable(target) else target).strip()


def pixels_hash(image: Image.Image) -> str:
    """Return a hash of the pixels of an RGB image."""
    return hashlib.blake2b(f"{image.size}".encode() + image.tobytes(), digest_size=16).hexdigest()
