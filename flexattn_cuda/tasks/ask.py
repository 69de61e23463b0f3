"""Ask a question about an image, and see what the model looked at.

model, processor = flexattn_cuda.load()
answer = flexattn_cuda.ask(model, processor, "image.jpg", "Which digits are on the red sign?", trace=True)
print(answer.text)
answer.draw("overlay.png")
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers.generation.streamers import BaseStreamer

from flexattn_cuda.analysis import overlay as viz
from flexattn_cuda.analysis.selections import ImageSelection, selection_of
from flexattn_cuda.errors import InputError
from flexattn_cuda.inputs.frames import FrameOf, padded_square
from flexattn_cuda.inputs.image_sources import read_images
from flexattn_cuda.mechanism.trace import Trace
from flexattn_cuda.runs.files import check_image_path, os_errors_as_input_errors
from flexattn_cuda.tasks.models import HRModel, QuestionProcessor, max_positions, selects
from flexattn_cuda.tasks.options import MAX_NEW_TOKENS

# ---------------------------------------------------------------------------------------------------------- answers


@dataclass
class Answer:
    """An answer of a model.

    Attributes:
        text: The answer.
        tokens: Its token ids, without the end-of-sequence token.
        pieces: The text of each token.
        question: The question.
        images: The images, upright.
        seconds: From the images to the end of the answer.
        trace: What every step looked at, if it was recorded; trace.steps[t] belongs to tokens[t].
        frame_of: Tells which part of an image the model saw.
        cell: Side in pixels of an LR cell in the view that the model saw.
    """

    text: str
    tokens: list[int]
    pieces: list[str]
    question: str
    images: list[Image.Image]
    seconds: float = 0.0
    trace: Trace | None = field(default=None, repr=False)
    frame_of: FrameOf = field(default=padded_square, repr=False)
    cell: int = 1

    @property
    def image(self) -> Image.Image:
        """The first image."""
        return self.images[0]

    def selection(self, image: int = 0) -> ImageSelection:
        """Return what the answer selected of an image, counted from 0; InputError if nothing was recorded."""
        self._check_recorded()
        assert self.trace is not None
        return selection_of(self.trace, image, self.images[image].size, self.frame_of)

    def draw(
        self,
        path: str | Path | None = None,
        token: int | Sequence[int] | str = 0,
        layer: int | Sequence[int] | str | None = None,
        image: int | Sequence[int] | str = "all",
    ) -> Image.Image:
        """Draw the attention map and the selected regions over the image, one panel per token and layer.

        Args:
            path: Where to save the drawing; None saves nothing.
            token: Answer tokens to draw, counted from 0, or "all".
            layer: Layers whose map to draw, counted from 0, or "all"; the layer after one attends to what its map
                selects. None is the first layer that selects.
            image: Images to draw over, counted from 0, or "all"; they come one below the other.

        Raises:
            InputError: If there is no trace, token, layer or image to draw, or the file cannot be written.
        """
        if path is not None:
            check_image_path(path)
        self._check_recorded()
        assert self.trace is not None
        steps = _chosen(token, range(max(1, len(self.tokens))), "token")
        recorded = sorted(self.trace.steps[0])
        layers = recorded[:1] if layer is None else _chosen(layer, recorded, "layer")
        sheets = []
        for one in _chosen(image, range(len(self.images)), "image"):
            panels = [self._panel(step, number, one) for step in steps for number in layers]
            title = f"{self.question}\n\u201c{self.text}\u201d"
            sheets.append(viz.sheet(self.images[one], panels, title, self.frame_of))
        return _saved(viz.below_each_other(sheets), path)

    def draw_beside(self, low: Answer, path: str | Path | None = None, *drawn: Any) -> Image.Image:
        """Draw what the model answers from the low resolution, and the view that it sees then, beside `draw`.

        Args:
            low: The answer to the same question with `high_resolution=False`.
            path: Where to save the drawing; None saves nothing.
            drawn: The arguments of `draw` after its path.

        Raises:
            InputError: As `draw` does.
        """
        if path is not None:
            check_image_path(path)
        right = self.draw(None, *drawn)
        caption = f"from the low resolution alone: \u201c{low.text}\u201d"
        views = [self._low_view(number) for number in range(len(self.images))]
        return _saved(viz.beside(views, caption, right), path)

    def _low_view(self, image: int) -> Image.Image:
        """Return an image with the pixels of the low-resolution view that the model sees of it."""
        assert self.trace is not None
        whole, (traced, *_) = self.images[image], self.trace.steps[0].values()
        frame, lr = self.frame_of(*whole.size), traced.grids[0][image].lr
        width = max(1, round(whole.width * lr.cols * self.cell / frame.width))
        height = max(1, round(whole.height * lr.rows * self.cell / frame.height))
        return whole.resize((width, height), Image.Resampling.BICUBIC).resize(whole.size, Image.Resampling.NEAREST)

    def _check_recorded(self) -> None:
        if self.trace is None:
            raise InputError("nothing was recorded to draw; call ask with trace=True")
        if not self.trace.steps or not self.trace.steps[0]:
            raise InputError("the model looked at no high-resolution tokens, so there is nothing to draw")

    def _panel(self, step: int, layer: int, image: int) -> viz.Panel:
        assert self.trace is not None
        traced = self.trace.steps[step][layer]
        attention_map, mask = (part.cpu() for part in traced.of_image(row=0, query=-1, image=image))
        piece = f"\u201c{self.pieces[step].strip()}\u201d" if step < len(self.pieces) else "the end"
        share = mask.float().mean().item()
        return viz.Panel(
            attention_map.float().numpy(),
            mask.numpy(),
            f"for {piece} it read {share:.0%} of the image in high resolution (token {step}, layer {layer})",
        )


def _saved(drawing: Image.Image, path: str | Path | None) -> Image.Image:
    if path is not None:
        with os_errors_as_input_errors(Path(path)):
            drawing.save(path)
    return drawing


def _chosen(wanted: int | Sequence[int] | str, available: Sequence[int], what: str) -> list[int]:
    if wanted == "all":
        return list(available)
    numbers = [wanted] if isinstance(wanted, int) else wanted
    if isinstance(numbers, str) or not numbers or not all(number in available for number in numbers):
        raise InputError(f"the {what} to draw is {wanted!r}; there are {what}s {available[0]} to {available[-1]}")
    return list(numbers)


# ------------------------------------------------------------------------------------------------------- generation


def ask(
    model: HRModel,
    processor: QuestionProcessor,
    image: Any,
    question: str,
    max_new_tokens: int = MAX_NEW_TOKENS,
    on_text: Callable[[str], None] | None = None,
    trace: bool = False,
    high_resolution: bool = True,
) -> Answer:
    """Answer a question about one or several images, greedily: each token is the most probable one.

    Args:
        model: The model, as `load` returns it, or one that FlexAttention was attached to.
        processor: Its processor, as `load` or `processor_for` returns it.
        image: A file, URL, PIL image or what else `inputs.image_sources.read_images` takes, or a list of them.
        question: The question.
        max_new_tokens: Maximum length of the answer in tokens.
        on_text: Called with each piece of the answer as soon as it is known.
        trace: Record what every step looks at, for `Answer.draw`.
        high_resolution: If False, answer as the model would from the low-resolution view alone.

    Raises:
        InputError: If an image or the question cannot be used, the prompt is too long for the model, or it cannot leave
            out the high resolution.
    """
    _check_attached(model)
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}; it must be a whole number of at least 1")
    if not (high_resolution or selects(model)):
        raise InputError("this model has no FlexAttention, so there are no high-resolution tokens to leave out")
    recording = Recording(processor, on_text, trace)
    images = read_images(image)
    if not images:
        raise InputError("there is a question but no image; pass an image file or a PIL image")
    alpha = 1.0 if high_resolution else 0.0
    [tokens] = generate_answers(
        model, processor, [images], [question], max_new_tokens, recording.streamer, recording.trace, alpha
    )
    return recording.answer(question, images, tokens)


def generate_answers(
    model: HRModel,
    processor: QuestionProcessor,
    images: Sequence[Sequence[Image.Image]],
    questions: Sequence[str],
    max_new_tokens: int = MAX_NEW_TOKENS,
    streamer: BaseStreamer | None = None,
    trace: Trace | None = None,
    hr_alpha: float = 1.0,
) -> list[list[int]]:
    """Answer questions about images, greedily, as one batch.

    Args:
        model: The model.
        processor: Its processor.
        images: The images of each question, at least one.
        questions: The questions.
        max_new_tokens: Maximum length of an answer in tokens.
        streamer: Passed on to transformers; for a single question.
        trace: Filled with what every step looks at.
        hr_alpha: Weight of the attention with HR tokens.

    Returns:
        The token ids of each answer, without the end-of-sequence token; `answer_text` decodes them.

    Raises:
        InputError: If a question cannot be asked, or a prompt is too long for the model.
    """
    prompts = [processor.prompt(question, len(own)) for question, own in zip(questions, images)]
    inputs = processor(images=[list(own) for own in images], text=prompts).to(model.device)
    limits = [min(max_new_tokens, room(model, length)) for length in inputs["attention_mask"].sum(1).tolist()]
    options = {} if hr_alpha == 1.0 else {"hr_alpha": hr_alpha}  # a model without the mechanism knows no such weight
    ids = generate_greedily(model, processor, inputs, max(limits), streamer=streamer, flexattn_trace=trace, **options)
    # Each row has an end of its own: others of the batch may go on for longer, or have room for a longer answer.
    ends = end_ids(model, processor)
    return [until_end(row[:limit], ends) for row, limit in zip(ids.tolist(), limits)]


def until_end(tokens: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Return the token ids of an answer before the first that ends it, see `end_ids`."""
    return list(itertools.takewhile(lambda token: token not in ends, tokens))


def generate_greedily(
    model: HRModel, processor: QuestionProcessor, inputs: Mapping[str, Any], max_new_tokens: int, **options: Any
) -> torch.Tensor:
    """Generate the most probable token at every step.

    Args:
        model: The model.
        processor: Its processor.
        inputs: Of a batch of prompts, padded on the left, on the model's device.
        max_new_tokens: Maximum number of tokens.
        **options: Passed on to `generate`.

    Returns:
        [B, T] int64, the new tokens; after the end of a row comes padding.

    Raises:
        InputError: If the model's logits are NaN or infinite.
    """
    ends, pad = end_ids(model, processor), processor.tokenizer.pad_token_id
    ids = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        eos_token_id=ends,
        pad_token_id=ends[0] if pad is None else pad,
        logits_processor=[_require_finite],
        **options,
    )
    return ids[:, inputs["input_ids"].shape[1] :]


def _require_finite(_: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Return the logits [B, V]; raise InputError if those of a row are NaN or infinite: any token would be its argmax.

    A single logit may be minus infinity, of a token that is never chosen.
    """
    if not bool(logits.amax(-1).isfinite().all()):
        raise InputError(
            f"the model's logits are NaN or infinite in {logits.dtype}, so it cannot answer; if its weights are whole, "
            "choose a dtype of wider range, such as bfloat16 or float32"
        )
    return logits


def end_ids(model: HRModel, processor: QuestionProcessor) -> list[int]:
    """Return the token ids that end an answer."""
    end = model.generation_config.eos_token_id
    return [processor.tokenizer.eos_token_id] if end is None else [end] if isinstance(end, int) else list(end)


def answer_text(processor: QuestionProcessor, tokens: Sequence[int]) -> str:
    """Decode the token ids of an answer."""
    return processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def prompt_length(model: HRModel, processor: QuestionProcessor, question: str, image: Any = None) -> int:
    """Return the length of a question's prompt in tokens.

    Raises:
        InputError: If it leaves no room for an answer, or the image is needed and cannot be read.
    """
    length = processor.prompt_length(question, image)
    room(model, length)
    return length


def room(model: HRModel, length: int) -> int:
    """Return the maximum length of an answer to a prompt of so many tokens.

    Raises:
        InputError: If there is no room for an answer.
    """
    limit = max_positions(model)
    if length >= limit:
        raise InputError(
            f"the question is too long: its prompt takes {length} tokens, and the model has {limit} positions"
        )
    return limit - length


def _check_attached(model: Any) -> None:
    if not hasattr(model, "flexattn_settings"):
        raise InputError(f"this {type(model).__name__} has no FlexAttention; call flexattn_cuda.attach(model) first")


class TextPieces:
    """The text of an answer, token by token; a token that completes no character yields an empty piece.

    Attributes:
        pieces: The text of each token so far.
    """

    def __init__(self, tokenizer: Any):
        self.pieces: list[str] = []
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._text = ""

    def add(self, token: int) -> str:
        """Return the text that a token adds."""
        self._tokens.append(token)
        self.pieces.append("")
        return self._added(self._decoded().rstrip("\ufffd"))

    def end(self) -> str:
        """Return what is left: a character that the last tokens did not complete."""
        return self._added(self._decoded())

    def _decoded(self) -> str:
        return self._tokenizer.decode(self._tokens, skip_special_tokens=True)

    def _added(self, text: str) -> str:
        piece = text[len(self._text) :] if text.startswith(self._text) else ""
        if piece:
            self._text += piece
            self.pieces[-1] += piece
        return piece


class Recording:
    """What is heard of one answer while it is generated.

    Args:
        processor: Of the model.
        on_text: Called with each piece of the answer as soon as it is known.
        trace: Record what every step looks at.

    Attributes:
        streamer: An argument of transformers' `generate`.
        trace: An argument of this package's.
    """

    def __init__(self, processor: QuestionProcessor, on_text: Callable[[str], None] | None, trace: bool):
        self.streamer = _Streamer(processor.tokenizer, on_text)
        self.trace = Trace() if trace else None
        self._processor, self._started = processor, time.perf_counter()

    def answer(self, question: str, images: list[Image.Image], tokens: list[int]) -> Answer:
        """Return the answer, of which these are the token ids without the end-of-sequence token."""
        return Answer(
            text=answer_text(self._processor, tokens),
            tokens=tokens,
            pieces=self.streamer.pieces[: len(tokens)],
            question=question,
            images=images,
            seconds=time.perf_counter() - self._started,
            trace=self.trace,
            frame_of=self._processor.frame,
            cell=self._processor.cell,
        )


class _Streamer(BaseStreamer):
    """Calls a function with each piece of a single answer."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None] | None):
        self._texts, self._on_text = TextPieces(tokenizer), on_text
        self._prompt_passed = False

    @property
    def pieces(self) -> list[str]:
        return self._texts.pieces

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_passed:
            self._prompt_passed = True
            return
        for token in value.flatten().tolist():
            self._emit(self._texts.add(token))

    def end(self) -> None:
        self._emit(self._texts.end())

    def _emit(self, piece: str) -> None:
        if piece and self._on_text is not None:
            self._on_text(piece)
