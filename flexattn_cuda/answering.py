"""From a photograph and a question to an answer, and to a picture of what the model looked at.

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

from flexattn_cuda import build, checkpoints, viz
from flexattn_cuda.configuration import FlexAttnConfig, as_system
from flexattn_cuda.modeling import FlexAttnLlavaForConditionalGeneration
from flexattn_cuda.processing import FlexAttnLlavaProcessor, InputError, as_image, open_photo, upright_rgb
from flexattn_cuda.trace import Trace

DEFAULT_MODEL = Path(__file__).parent / "assets" / "default"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load(
    model: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    flexattn: FlexAttnConfig | None = None,
    system: str | None = None,
) -> tuple[FlexAttnLlavaForConditionalGeneration, FlexAttnLlavaProcessor]:
    """A model, ready to answer, and its processor.

    Args:
        model: A checkpoint folder or hub id in any of the three formats; None: the small model of this package.
        device: "cpu", "cuda" or "cuda:N"; None or "auto": the GPU where it can be used, else the CPU.
        dtype: "float32", "float16" or "bfloat16"; None: that of the checkpoint.
        flexattn: Settings of the mechanism in place of the checkpoint's.
        system: One of `configuration.SYSTEMS` in place of the checkpoint's, as `configuration.as_system` makes it.
    Raises:
        checkpoints.CheckpointError: There is no such checkpoint, or it cannot be loaded.
        InputError: The device or dtype is unknown, or cannot be used here.
    """
    device, dtype = choose_device(device), choose_dtype(dtype)
    folder = checkpoints.resolve_folder(DEFAULT_MODEL if model is None else model)
    config = checkpoints.load_config(folder)
    if system is not None:
        try:
            config = as_system(config, system)
        except ValueError as error:
            raise InputError(str(error)) from None
    try:
        loaded = FlexAttnLlavaForConditionalGeneration.from_pretrained(
            folder, config=config, dtype=dtype or "auto", flexattn=flexattn
        )
    except checkpoints.CheckpointError:
        raise
    except (ValueError, RuntimeError) as error:  # what transformers says of parts that do not fit together
        first_line = str(error).strip().splitlines()[0]
        raise checkpoints.CheckpointError(f"{folder} cannot be loaded: {first_line}") from error
    processor = FlexAttnLlavaProcessor.from_pretrained(folder, config=loaded.config)
    ids = processor.tokenizer.get_vocab().values()
    highest, rows = max(set(ids) - {processor.image_token_id}), loaded.get_input_embeddings().num_embeddings
    if highest >= rows:
        raise checkpoints.CheckpointError(
            f"{folder} has a tokenizer with ids up to {highest}, but its model embeds ids up to {rows - 1} only"
        )
    return loaded.eval().to(device), processor


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device meant; InputError where it is unknown or cannot be used, with the reason."""
    if device is None or device == "auto":
        return torch.device("cpu" if build.cuda_unavailable_reason() else "cuda")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in ("cpu", "cuda"):
        raise InputError(f"the device is {str(device)!r}; allowed: auto, cpu, cuda, cuda:N")
    if chosen.type == "cuda" and (reason := build.cuda_unavailable_reason(chosen.index)):
        raise InputError(f"the device {str(device)!r} cannot be used: {reason}")
    return chosen


def choose_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype meant, None for the checkpoint's own."""
    if dtype is None or dtype == "auto":
        return None
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise InputError(f"the dtype is {dtype!r}; allowed: auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


@dataclass
class Answer:
    """What a model answered.

    Attributes:
        text: The answer.
        tokens: Its token ids, without the end-of-sequence token.
        pieces: The text of each token.
        photo: The photograph, upright.
        trace: What every step looked at, if it was asked for; trace.steps[t] belongs to tokens[t].
    """

    text: str
    tokens: list[int]
    pieces: list[str]
    question: str
    photo: Image.Image
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
            check_picture_path(path)
        if self.trace is None:
            raise InputError("nothing was recorded; call ask with trace=True")
        if not self.trace.steps or not self.trace.steps[0]:
            raise InputError("the model looked at no high-resolution tokens, so there is nothing to draw")
        steps = _chosen(token, range(max(1, len(self.tokens))), "token")
        recorded = sorted(self.trace.steps[0])
        layers = recorded[:1] if layer is None else _chosen(layer, recorded, "layer")
        panels = [self._panel(step, number) for step in steps for number in layers]
        sheet = viz.sheet(self.photo, panels, title=f"{self.question}\n\u201c{self.text}\u201d")
        if path is not None:
            sheet.save(path)
        return sheet

    def _panel(self, step: int, layer: int) -> viz.Panel:
        traced = self.trace.steps[step][layer]
        map, mask = (part[0, -1, 0].cpu() for part in traced)  # one row of the batch, its last query row, one picture
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
    photo: str | Path | Image.Image,
    question: str,
    max_new_tokens: int = 256,
    on_text: Callable[[str], None] | None = None,
    trace: bool = False,
) -> Answer:
    """Asks a question about a photograph; the answer is the model's most probable one, token by token.

    Args:
        photo: A picture file or a PIL image.
        max_new_tokens: The answer's greatest length.
        on_text: Called with each piece of the answer as soon as it is known.
        trace: Record what every step looked at, for `Answer.draw`.
    Raises:
        InputError: A photo or question that cannot be used, or a prompt too long for the model.
    """
    if photo is None:
        raise InputError("there is a question but no photo")
    check_max_new_tokens(max_new_tokens)
    photo = open_photo(photo) if isinstance(photo, (str, os.PathLike)) else upright_rgb(as_image(photo))
    recorded = Trace() if trace else None
    streamer = _Pieces(processor.tokenizer, on_text)
    [tokens] = generate_answers(model, processor, [photo], [question], max_new_tokens, streamer, recorded)
    return Answer(
        text=answer_text(processor, tokens),
        tokens=tokens,
        pieces=streamer.pieces[: len(tokens)],
        question=question,
        photo=photo,
        trace=recorded,
    )


def generate_answers(
    model: FlexAttnLlavaForConditionalGeneration,
    processor: FlexAttnLlavaProcessor,
    photos: Sequence[Image.Image],
    questions: Sequence[str],
    max_new_tokens: int = 256,
    streamer: BaseStreamer | None = None,
    trace: Trace | None = None,
) -> list[list[int]]:
    """The most probable answers to questions about a photo each, as one batch.

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
    inputs = processor(images=list(photos), text=prompts).to(model.device)
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
    length, longest = processor.prompt_length(question), model.config.text_config.max_position_embeddings
    if length >= longest:
        raise InputError(f"the question is too long: the prompt takes {length} positions, the model has {longest}")
    return length


def check_max_new_tokens(max_new_tokens: int) -> None:
    """InputError where it is no length that an answer can have."""
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")


def check_picture_path(path: str | Path) -> None:
    """InputError where no picture can be saved under this name."""
    path = Path(path)
    Image.init()
    known = sorted(suffix for suffix, name in Image.registered_extensions().items() if name in Image.SAVE)
    if path.suffix.lower() not in known:
        raise InputError(f"{path} has no ending of a picture file; use .png or .jpg")
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
