"""From a photograph and a question to an answer, and to an image of what the model looked at.

model, processor = flexattn_cuda.load()
answer = flexattn_cuda.ask(model, processor, "photo.jpg", "Which digits stand on the red sign?", trace=True)
print(answer.text); answer.draw("looked_at.png")
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers.generation.streamers import BaseStreamer

from flexattn_cuda.analysis import overlay as viz
from flexattn_cuda.errors import InputError
from flexattn_cuda.families.llava.model import FlexAttnLlavaForConditionalGeneration
from flexattn_cuda.inputs.images import as_image, open_image, upright_rgb
from flexattn_cuda.inputs.processor import FlexAttnLlavaProcessor
from flexattn_cuda.mechanism.trace import Trace


@dataclass
class Answer:
    """What a model answered.

    Attributes:
        text: The answer.
        tokens: Its token ids, without the end-of-sequence token.
        pieces: The text of each token.
        image: The photograph, upright.
        trace: What every step looked at, if it was asked for; trace.steps[t] belongs to tokens[t].
    """

    text: str
    tokens: list[int]
    pieces: list[str]
    question: str
    image: Image.Image
    trace: Trace | None = field(default=None, repr=False)

    def draw(
        self,
        path: str | Path | None = None,
        token: int | Sequence[int] | str = 0,
        layer: int | Sequence[int] | str | None = None,
    ) -> Image.Image:
        """The photograph with attention map and selected regions, one panel for each token and layer.

        Args:
            path: Where to save it; None: nowhere.
            token: Which answer tokens, counted from 0; "all" for all of them.
            layer: Whose map, counted from 0: the layer after it attends to what the map selects. None: the first layer
                that selects; "all" for all that do.
        Raises:
            InputError: There is no trace, no such token or layer, or the file cannot be written.
        """
        if path is not None:
            check_image_path(path)
        if self.trace is None:
            raise InputError("nothing was recorded; call ask with trace=True")
        if not self.trace.steps or not self.trace.steps[0]:
            raise InputError("the model looked at no high-resolution tokens, so there is nothing to draw")
        steps = _chosen(token, range(max(1, len(self.tokens))), "token")
        recorded = sorted(self.trace.steps[0])
        layers = recorded[:1] if layer is None else _chosen(layer, recorded, "layer")
        panels = [self._panel(step, number) for step in steps for number in layers]
        sheet = viz.sheet(self.image, panels, title=f"{self.question}\n\u201c{self.text}\u201d")
        if path is not None:
            sheet.save(path)
        return sheet

    def _panel(self, step: int, layer: int) -> viz.Panel:
        traced = self.trace.steps[step][layer]
        map, mask = (part[0, -1, 0].cpu() for part in traced)  # one row of the batch, its last query row, one image
        side, hr_side = round(map.numel() ** 0.5), round(mask.numel() ** 0.5)
        piece = f" \u201c{self.pieces[step].strip()}\u201d" if step < len(self.pieces) else " (the end)"
        share = mask.float().mean().item()
        return viz.Panel(
            map.float().view(side, side).numpy(),
            mask.view(hr_side, hr_side).numpy(),
            f"token {step}{piece}, layer {layer}, {share:.0%} of the high-resolution tokens",
        )


def ask(
    model: FlexAttnLlavaForConditionalGeneration,
    processor: FlexAttnLlavaProcessor,
    image: str | Path | Image.Image,
    question: str,
    max_new_tokens: int = 256,
    on_text: Callable[[str], None] | None = None,
    trace: bool = False,
) -> Answer:
    """Asks a question about a photograph; the answer is the model's most probable one, token by token.

    Args:
        image: An image file or a PIL image.
        max_new_tokens: The answer's greatest length.
        on_text: Called with each piece of the answer as soon as it is known.
        trace: Record what every step looked at, for `Answer.draw`.
    Raises:
        InputError: An image or question that cannot be used, or a prompt too long for the model.
    """
    if image is None:
        raise InputError("there is a question but no image")
    check_max_new_tokens(max_new_tokens)
    image = open_image(image) if isinstance(image, (str, os.PathLike)) else upright_rgb(as_image(image))
    recorded = Trace() if trace else None
    streamer = _Pieces(processor.tokenizer, on_text)
    [tokens] = generate_answers(model, processor, [image], [question], max_new_tokens, streamer, recorded)
    return Answer(
        text=answer_text(processor, tokens),
        tokens=tokens,
        pieces=streamer.pieces[: len(tokens)],
        question=question,
        image=image,
        trace=recorded,
    )


def generate_answers(
    model: FlexAttnLlavaForConditionalGeneration,
    processor: FlexAttnLlavaProcessor,
    images: Sequence[Image.Image],
    questions: Sequence[str],
    max_new_tokens: int = 256,
    streamer: BaseStreamer | None = None,
    trace: Trace | None = None,
) -> list[list[int]]:
    """The most probable answers to questions about an image each, as one batch.

    Args:
        streamer: Handed to transformers; for a single question.
    Returns:
        Token ids of each answer, without the end-of-sequence token; `answer_text` makes text of them.
    Raises:
        InputError: A question that cannot be asked, or a prompt too long for the model.
    """
    longest = model.config.text_config.max_position_embeddings
    limits = [min(max_new_tokens, longest - prompt_length(model, processor, question)) for question in questions]
    prompts = [processor.prompt(question) for question in questions]
    inputs = processor(images=list(images), text=prompts).to(model.device)
    ends = end_ids(model, processor)
    ids = model.generate(
        **inputs,
        max_new_tokens=max(limits),
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        eos_token_id=ends,
        pad_token_id=processor.tokenizer.pad_token_id,
        streamer=streamer,
        flexattn_trace=trace,
    )
    # Each row ends at its own end: others of the batch may go on for longer, or have more room left for an answer.
    rows = (row[:limit] for row, limit in zip(ids[:, inputs["input_ids"].shape[1] :].tolist(), limits))
    return [list(itertools.takewhile(lambda token: token not in ends, row)) for row in rows]


def end_ids(model: FlexAttnLlavaForConditionalGeneration, processor: FlexAttnLlavaProcessor) -> list[int]:
    """The token ids that end an answer."""
    end = model.generation_config.eos_token_id
    return [processor.tokenizer.eos_token_id] if end is None else [end] if isinstance(end, int) else list(end)


def answer_text(processor: FlexAttnLlavaProcessor, tokens: Sequence[int]) -> str:
    """The text of an answer's token ids."""
    return processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def prompt_length(
    model: FlexAttnLlavaForConditionalGeneration, processor: FlexAttnLlavaProcessor, question: str
) -> int:
    """Positions that the prompt of a question takes; InputError where it leaves no room for an answer."""
    length, longest = (
        processor.prompt_length(question),
        model.config.text_config.max_position_embeddings,
    )
    if length >= longest:
        raise InputError(f"the question is too long: the prompt takes {length} positions, the model has {longest}")
    return length


def check_max_new_tokens(max_new_tokens: int) -> None:
    """InputError where it is no length that an answer can have."""
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")


def check_image_path(path: str | Path) -> None:
    """InputError where no image can be saved under this name."""
    path = Path(path)
    Image.init()
    known = sorted(suffix for suffix, name in Image.registered_extensions().items() if name in Image.SAVE)
    if path.suffix.lower() not in known:
        raise InputError(f"{path} has no ending of an image file; use .png or .jpg")
    check_writable(path)


def check_writable(path: Path) -> None:
    """InputError where no file can be written under this name."""
    if path.is_dir() or not path.parent.is_dir():
        reason = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise InputError(f"{path} cannot be written: {reason}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InputError(f"{path} cannot be written: permission denied")


class _Pieces(BaseStreamer):
    """Turns tokens into pieces of text as they come; a token that ends no character adds nothing yet."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None] | None):
        self.pieces: list[str] = []
        self._tokenizer, self._on_text = tokenizer, on_text
        self._tokens: list[int] | None = None  # None: the prompt has not passed yet
        self._text = ""

    def put(self, value: torch.Tensor) -> None:
        if self._tokens is None:
            self._tokens = []
            return
        self._tokens += value.flatten().tolist()
        self.pieces.append("")
        self._hand_over(self._decoded().rstrip("\ufffd"))

    def end(self) -> None:
        self._hand_over(self._decoded())

    def _decoded(self) -> str:
        return self._tokenizer.decode(self._tokens or [], skip_special_tokens=True)

    def _hand_over(self, text: str) -> None:
        piece = text[len(self._text) :] if text.startswith(self._text) else ""
        if not piece:
            return
        self._text += piece
        self.pieces[-1] += piece
        if self._on_text is not None:
            self._on_text(piece)


def _chosen(wanted: int | Sequence[int] | str, available: Sequence[int], what: str) -> list[int]:
    if wanted == "all":
        return list(available)
    numbers = [wanted] if isinstance(wanted, int) else wanted
    if isinstance(numbers, str) or not numbers or not all(number in available for number in numbers):
        raise InputError(f"the {what} to draw is {wanted!r}; there are {what}s {available[0]} to {available[-1]}")
    return list(numbers)
