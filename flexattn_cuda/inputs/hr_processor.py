"""Images and prompts to what a transformers VLM with FlexAttention takes, for any family of `image_families`.

image ─ upright RGB ─┬─ the family's own image processor, base view ──────────────► pixel_values, image_grid_thw
                     └─ the same with zoom times the sides ───────────────────────► pixel_values_hr
text  ─ every mark becomes as many image tokens as its base view has LR cells ────► input_ids, attention_mask

The family's image processor and tokenizer are used, not its processor class: several of those need torchvision or
other packages for videos, and those of LLaVA-NeXT and OneVision count the tokens of tiles that are not sent here.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, BatchFeature, ProcessorMixin
from transformers.processing_utils import ImagesKwargs, TextKwargs

from flexattn_cuda.checkpoints import HubOptions, Part, resolve_folder
from flexattn_cuda.checkpoints.files import first_line, refusing
from flexattn_cuda.errors import CheckpointError, InputError
from flexattn_cuda.inputs.chat_template import read_chat_template, refuse_special_texts, special_texts
from flexattn_cuda.inputs.frames import Frame
from flexattn_cuda.inputs.image_families import FAMILIES, ImageFamily, Options, Views, sizes_of, view_side
from flexattn_cuda.inputs.image_sources import read_images
from flexattn_cuda.inputs.marks import check_marks, checked_texts
from flexattn_cuda.inputs.questions import check_question, user_message

# Arguments that transformers' own processors take beside those of their tokenizer and image processor.
_OTHER_ARGUMENTS = ("return_mm_token_type_ids", "do_sample_frames")
_SIZES = ("size", "min_pixels", "max_pixels")
MAX_LR_TOKENS = 576  # of an image whose base view keeps its aspect ratio: as many as LLaVA-1.5 has


@dataclass(frozen=True)
class ProcessorParts:
    """What `HRProcessor` needs of a family's own processor, which may take the place of this.

    Attributes:
        image_processor: The family's image processor.
        tokenizer: The tokenizer.
        chat_template: Jinja template of the prompt; None: the tokenizer's, or there is none.
    """

    image_processor: Any
    tokenizer: Any
    chat_template: str | None = None

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **kwargs: Any) -> ProcessorParts:
        """Return the parts of a checkpoint, of which no weights are downloaded.

        Args:
            name_or_path: A folder, or a hub id.
            kwargs: As in transformers: revision, token, cache_dir, local_files_only, force_download, subfolder.

        Raises:
            CheckpointError: If the checkpoint is missing, or has no image processor or tokenizer.
        """
        folder = resolve_folder(name_or_path, HubOptions.pop_from(kwargs), Part.CONFIG | Part.INPUTS)
        with refusing(f"the processor of {folder} cannot be made"):
            images = AutoImageProcessor.from_pretrained(folder, **kwargs)
            tokenizer = AutoTokenizer.from_pretrained(folder, **kwargs)
        return cls(images, tokenizer, read_chat_template(folder))

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> None:
        """Save the parts in transformers' format."""
        self.image_processor.save_pretrained(folder, **kwargs)
        self.tokenizer.save_pretrained(folder, **kwargs)
        if self.chat_template is not None:
            Path(folder, "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")


class HRProcessor(ProcessorMixin):
    """A family's own processor, which also makes the HR view of every image.

    Args:
        processor: The family's own processor, or its `ProcessorParts`. It is not changed.
        family: What must be known of the family; `FAMILIES` lists those that are known.
        zoom: How many times the sides of the base view the HR view has, as the model's settings say.
        cell: Side in pixels of an LR cell of the model: `family.cell(model.config)`.
        max_lr_tokens: Maximum number of LR tokens of an image, where the base view keeps the image's aspect ratio
            (Qwen-VL); None: what the image processor's own `size` allows. A call with `size` decides for itself.

    Raises:
        InputError: If a number is not whole or less than 1, the tokenizer has no such image token, or the image
            processor divides by numbers that are not positive.
    """

    def __init__(self, processor: Any, family: ImageFamily, zoom: int, cell: int, max_lr_tokens: int | None = None):
        for name, value in dict(
            zoom=zoom, cell=cell, max_lr_tokens=1 if max_lr_tokens is None else max_lr_tokens
        ).items():
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name} is {value!r}; it must be a whole number of at least 1")
        deviation = getattr(processor.image_processor, "image_std", None)
        if deviation is not None and not all(_is_positive(one) for one in deviation):
            raise InputError(f"image_std of the image processor is {deviation}; it must be positive numbers")
        self.wrapped, self.family, self.zoom, self.cell = processor, family, zoom, cell
        self.max_lr_tokens = max_lr_tokens
        self.image_processor, self.tokenizer = processor.image_processor, processor.tokenizer
        self.chat_template = getattr(processor, "chat_template", None) or self.tokenizer.chat_template
        self.image_token = family.token
        self.image_token_id = self.tokenizer.get_vocab().get(family.token)
        if self.image_token_id is None:
            raise InputError(f"the tokenizer has no token {family.token}, which stands for an image in this family")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.wrapped!r}, zoom={self.zoom}, cell={self.cell})"

    @property
    def model_input_names(self) -> list[str]:
        """Names of all values that a call may return."""
        own = [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]
        types = [self.family.token_types] if self.family.token_types else []
        return list(dict.fromkeys([*own, *types, "pixel_values_hr", "valid_rect"]))

    # -------------------------------------------------------------------------------------------------------- prompts

    def prompt(self, question: str, images: int = 1) -> str:
        """Return the prompt that asks `question` about `images` images, up to where the answer begins.

        Raises:
            InputError: If the question is empty, or contains the text of a special token, or there is no chat template.
            CheckpointError: If the chat template fails, or does not mark every image.
        """
        check_question(question)
        message, mark = user_message(question, images), self.family.image_mark
        if self.chat_template is None and self.family.bare_prompt is not None:
            self._refuse_special_texts([message])
            return self.family.bare_prompt.format(images=mark * images, question=question)
        with refusing("the chat template of the checkpoint fails", InputError):
            prompt = self.conversation_text([message], add_generation_prompt=True)
        if prompt.count(mark) != images:
            raise CheckpointError(
                f"the chat template of the checkpoint writes {prompt.count(mark)} {mark} marks for {images} images"
            )
        return prompt

    def conversation_text(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        """Return the text of a conversation, with one mark of the family for every image.

        Raises:
            InputError: If a message contains the text of a special token, or there is no chat template.
        """
        self._refuse_special_texts(messages)
        if self.chat_template is None:
            raise InputError("the checkpoint has no chat template; write the prompt yourself, or set chat_template")
        text: str = self.apply_chat_template(messages, add_generation_prompt=add_generation_prompt)
        return text

    def conversation_ids(self, text: str, image_tokens: Sequence[int]) -> list[int]:
        """Return the ids of the text of a conversation, as a call would.

        Args:
            text: As `conversation_text` or `prompt` returns it.
            image_tokens: Number of image tokens of each of its images.

        Raises:
            InputError: If images and marks do not match.
        """
        return self.conversation_inputs(text, image_tokens)["input_ids"]

    def conversation_inputs(self, text: str, image_tokens: Sequence[int]) -> dict[str, list[int]]:
        """Return the ids of the text of a conversation and what else the model takes of each position.

        Args:
            text: As for `conversation_ids`.
            image_tokens: As for `conversation_ids`.

        Raises:
            InputError: If images and marks do not match.
        """
        mark = self.family.image_mark
        check_marks(mark, [text.count(mark)], None, len(image_tokens))
        rows = self._tokenized([text], image_tokens, {"return_tensors": None})
        return {name: values[0] for name, values in rows.items() if name != "attention_mask"}

    def _refuse_special_texts(self, messages: list[dict[str, Any]]) -> None:
        special = [*special_texts(self.tokenizer), self.family.image_mark, self.image_token]
        refuse_special_texts(messages, special, self.tokenizer.eos_token)

    def prompt_length(self, question: str, image: Any = None) -> int:
        """Return how many positions of the sequence the prompt of `question` about one image takes.

        Args:
            question: The question.
            image: The image, read only by families whose base view keeps its aspect ratio (Qwen-VL), which need it.

        Raises:
            InputError: As `prompt` does, or if the image is needed and missing or cannot be read.
        """
        if image is None and self.family.native_size:
            raise InputError("the length of this family's prompts depends on the image; pass image=")
        tokens = self.image_tokens
        if tokens is None:
            [read] = read_images(image)
            tokens = self.image_tokens_of(*read.size)
        return len(self.conversation_ids(self.prompt(question), [tokens]))

    # --------------------------------------------------------------------------------------------------------- inputs

    @property
    def pad_id(self) -> int:
        """The id of the padding, where the attention mask is 0."""
        tokenizer = self.tokenizer
        return next((one for one in (tokenizer.pad_token_id, tokenizer.unk_token_id) if one is not None), 0)

    @property
    def token_types(self) -> str | None:
        """Name of the model input that is 1 at image tokens and 0 elsewhere; None: there is none."""
        return self.family.token_types

    @cached_property
    def image_tokens(self) -> int | None:
        """Image tokens of one image in the sequence; None: they depend on the image (Qwen-VL)."""
        if self.family.native_size:
            return None
        any_image = [Image.new("RGB", (32, 32))]
        return self._tokens(self.family.views(self.image_processor, any_image, {}, zoom=1))[0]

    def image_tokens_of(self, width: int, height: int) -> int:
        """Return the image tokens of an image of width x height pixels."""
        if self.image_tokens is not None:
            return self.image_tokens
        size = sizes_of(self._with_limit({}).get("size", self.image_processor.size))
        limits = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
        with _refusing_images():
            patches: int = self.image_processor.get_number_of_image_patches(height, width, limits)
        return patches // int(self.image_processor.merge_size) ** 2

    def image_inputs(self, images: Sequence[Image.Image]) -> dict[str, Any]:
        """Return what the model takes of upright RGB images, one after the other: [n, 3, H, W] in every family, which
        the forward of a model that FlexAttention was attached to takes too."""
        options = self._with_limit({})
        return self._image_inputs(self._views(images, options), images, options)

    def frame(self, width: int, height: int) -> Frame:
        """Return the part of an image of width x height pixels that its views show."""
        return self.family.frame(self.image_processor)(width, height)

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        audio: Any = None,
        padding: bool | str = True,
        padding_side: str = "left",
        return_tensors: str | None = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Return what the model takes. Special tokens in `text` are special: it is a prompt, not a question.

        Args:
            images: None, one image, a list of them in the order of the marks of all texts, or one list per text; an
                image is a path, URL, bytes, PIL image, array or tensor, see `read_image`.
            text: One prompt or a list of prompts, each with one mark of the family per image.
            videos: None.
            audio: None.
            padding: As in transformers.
            padding_side: "left" (generation) or "right".
            return_tensors: "pt"; "np" or None for arrays.
            kwargs: Other options of the tokenizer or the image processor, or text_kwargs and images_kwargs.

        Returns:
            input_ids, attention_mask [B, N] int64 and the inputs of the family; for n images also pixel_values_hr
            [n, 3, zoom*H, zoom*W] float32, a list of n tensors [3, zoom*H, zoom*W] for Qwen-VL, and, where the family
            pads images, valid_rect [n, 4] int32: (top, left, bottom, right) in LR cells, half-open.

        Raises:
            InputError: If images and marks do not match, something is not an image, or an option is not possible.
            TypeError: If an option is unknown.
        """
        if videos is not None or audio is not None:
            raise InputError("FlexAttention takes images and text; leave out videos and audio")
        texts = checked_texts(text, self.family.image_mark)
        for_text, for_images = self._sorted_options(kwargs)
        for_text = {"padding": padding, "padding_side": padding_side, "return_tensors": return_tensors, **for_text}
        marks = [one.count(self.family.image_mark) for one in texts]
        flat = read_images(images)
        check_marks(self.family.image_mark, marks, images, len(flat))
        values: dict[str, Any] = {}
        tokens: list[int] = []
        if flat:
            views = self._views(flat, for_images)
            tokens = self._tokens(views)
            values = self._image_inputs(views, flat, for_images)
            if self.family.nested:
                values |= _nested(values["pixel_values"], marks)
        if return_tensors != "pt":
            values = {name: _as_arrays(value) for name, value in values.items()}
        features = BatchFeature(dict(self._tokenized(texts, tokens, for_text)))
        features.update(values)
        return features

    def _sorted_options(self, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the options of the tokenizer and of the image processor among the arguments of a call."""
        known = set(ImagesKwargs.__annotations__)
        known |= set(getattr(getattr(self.image_processor, "valid_kwargs", None), "__annotations__", {}))
        for_images = dict(kwargs.pop("images_kwargs", None) or {})
        for_text = dict(kwargs.pop("text_kwargs", None) or {})
        for name, value in {**kwargs.pop("common_kwargs", {}), **kwargs}.items():
            if name in TextKwargs.__annotations__ or name in _OTHER_ARGUMENTS:
                for_text[name] = value
            elif name in known:
                for_images[name] = value
            elif value is not None:
                raise TypeError(f"{type(self).__name__} takes no {name}")
        for_images = {name: value for name, value in for_images.items() if value is not None}
        for_images.pop("return_tensors", None)
        self._check_image_options(for_images)
        return for_text, self._with_limit(for_images)

    def _with_limit(self, options: Options) -> Options:
        """Return options of the image processor that keep to `max_lr_tokens`, unless they name a size themselves."""
        if self.max_lr_tokens is None or not self.family.native_size or not options.keys().isdisjoint(_SIZES):
            return options
        own = sizes_of(self.image_processor.size)
        longest = min(own["longest_edge"], self.max_lr_tokens * self.cell**2)
        return {**options, "size": {"shortest_edge": min(own["shortest_edge"], longest), "longest_edge": longest}}

    def _check_image_options(self, options: Options) -> None:
        base = self.family.base_view(view_side(self.image_processor, options))
        for name, value in base.items():
            if options.get(name, value) != value:
                raise InputError(f"{name}={options[name]!r} would send tiles of the model's own; leave it out")
        if options.get("do_resize", True) is False:
            raise InputError("do_resize=False leaves no larger view of an image; leave it out")

    def _views(self, images: Sequence[Image.Image], options: Options) -> Views:
        with _refusing_images():
            return self.family.views(self.image_processor, images, options, self.zoom)

    def _tokens(self, views: Views) -> list[int]:
        """Return the number of image tokens of each image: the LR cells of its base view."""
        return [(height // self.cell) * (width // self.cell) for height, width in views.sides]

    def _image_inputs(self, views: Views, images: Sequence[Image.Image], options: Options) -> dict[str, Any]:
        values: dict[str, Any] = {**views.inputs, "pixel_values_hr": views.hr}
        grids = [(height // self.cell, width // self.cell) for height, width in views.sides]
        rects = [
            self.family.valid_rect(self.image_processor, options, image, grid) for image, grid in zip(images, grids)
        ]
        if rects[0] is not None:
            values["valid_rect"] = torch.tensor(rects, dtype=torch.int32)
        return values

    def _tokenized(self, texts: Sequence[str], tokens: Sequence[int], options: dict[str, Any]) -> dict[str, Any]:
        """Return the tokenizer's output for prompts whose images take `tokens` image tokens each."""
        options = dict(options)
        mark_types = options.pop("return_mm_token_type_ids", None)
        types = "mm_token_type_ids" if mark_types else None if mark_types is False else self.family.token_types
        options.pop("do_sample_frames", None)
        bos = self.tokenizer.bos_token
        has_bos = bool(bos) and all(text.startswith(bos) for text in texts)  # as the chat templates of Gemma write it
        options = {"add_special_tokens": not has_bos, **self.family.text_options, **options}
        return_tensors = options.pop("return_tensors")
        if len(texts) == 1 and self.tokenizer.pad_token is None and options.get("padding") is True:
            options["padding"] = False  # nothing to pad, and transformers would ask for a token

        prompts = [text if self.family.finish is None else self.family.finish(text, self.tokenizer) for text in texts]
        values = dict(self.tokenizer(self._expanded(prompts, tokens), **options))
        self._check_image_tokens(values["input_ids"], sum(tokens))
        if types:
            values[types] = [[int(token == self.image_token_id) for token in row] for row in values["input_ids"]]
        if return_tensors == "pt" and len({len(row) for row in values["input_ids"]}) > 1:
            raise InputError("texts of different lengths make no tensor without padding; pass padding=True")
        return dict(BatchFeature(values, tensor_type=return_tensors))

    def _expanded(self, prompts: Sequence[str], tokens: Sequence[int]) -> list[str]:
        """Return the prompts with the text of every image in place of its mark."""
        counts = iter(tokens)
        expanded = []
        for prompt in prompts:
            first, *rest = prompt.split(self.family.image_mark)
            expanded.append(first + "".join(self.family.image_text(next(counts)) + part for part in rest))
        return expanded

    def _check_image_tokens(self, rows: Sequence[Sequence[int]], expected: int) -> None:
        found = sum(list(row).count(self.image_token_id) for row in rows)
        if found != expected:
            raise InputError(
                f"the prompts hold {found} image tokens of the {expected} of their images; "
                "truncate less (max_length), or leave the image token out of the texts"
            )

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Save the family's own processor, which transformers loads without this package."""
        return self.wrapped.save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, family: ImageFamily, zoom: int, cell: int, **kwargs: Any
    ) -> HRProcessor:
        """Return the processor of a checkpoint; `processor_for` knows the other arguments of a loaded model.

        Raises:
            CheckpointError: If the checkpoint is missing, or has no image processor or tokenizer.
        """
        return cls(ProcessorParts.from_pretrained(pretrained_model_name_or_path, **kwargs), family, zoom, cell)


def processor_for(
    model: Any,
    processor: Any = None,
    family: ImageFamily | None = None,
    max_lr_tokens: int | None = MAX_LR_TOKENS,
    **hub: Any,
) -> HRProcessor:
    """Return the processor of a model that FlexAttention was attached to.

    Args:
        model: The model; `model.flexattn_settings.zoom` gives the size of the HR view.
        processor: The family's own processor, or the folder or hub id of a checkpoint that has it; None: that of the
            checkpoint that the model was loaded from.
        family: What must be known of a family that `FAMILIES` does not list.
        max_lr_tokens: Maximum number of LR tokens of an image, for Qwen-VL: its own processor would send an image of
            up to 16384 tokens as it is, and the HR view would only enlarge it. None: what that processor allows.
        hub: revision, token, cache_dir, local_files_only, force_download and subfolder, as in transformers, for a
            processor that is loaded.

    Raises:
        InputError: If FlexAttention is not attached, the family is unknown, or the processor is another model's.
        CheckpointError: If the checkpoint's processor cannot be loaded.
    """
    settings = getattr(model, "flexattn_settings", None)
    if settings is None:
        raise InputError("the model has no FlexAttention; call flexattn_cuda.attach(model) first")
    config = model.config
    family = _family_of(model) if family is None else family
    if family.token_types and family.token_types not in inspect.signature(type(model).forward).parameters:
        family = replace(family, token_types=None)  # Qwen-VL before transformers 5.3
    if processor is None or isinstance(processor, (str, Path)):
        processor = _loaded_parts(config, processor, hub)
    made = HRProcessor(processor, family, settings.zoom, family.cell(config), max_lr_tokens)
    expected = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
    if expected != made.image_token_id:
        raise InputError(
            f"{family.token} has the id {made.image_token_id} in the tokenizer, and {expected} in the model; "
            "pass the processor of this model"
        )
    return made


def _family_of(model: Any) -> ImageFamily:
    kind = model.config.model_type
    if kind not in FAMILIES:
        raise InputError(
            f"the model family {kind!r} is unknown; known: {', '.join(sorted(FAMILIES))}; "
            "describe another one with family="
        )
    return FAMILIES[kind]


def _loaded_parts(config: Any, name: str | Path | None, hub: dict[str, Any]) -> ProcessorParts:
    """Return the parts of a named checkpoint, or of the one that a model was loaded from, in the same revision."""
    if name is None:
        name = config._name_or_path
        hub = {"revision": getattr(config, "_commit_hash", None), **hub}
    if not name:
        raise InputError("the model was not loaded from a checkpoint; pass its processor")
    return ProcessorParts.from_pretrained(name, **hub)


def _nested(pixels: torch.Tensor, counts: Sequence[int]) -> dict[str, torch.Tensor]:
    """Return the images of each of B rows side by side, as Idefics3 takes them.

    Args:
        pixels: [n, 3, H, W].
        counts: Images of each row; their sum is n.

    Returns:
        pixel_values [B, max(counts), 3, H, W], zero where a row has fewer images, and pixel_attention_mask
        [B, max(counts), H, W] int64.
    """
    values = pixels.new_zeros((len(counts), max(counts), *pixels.shape[1:]))
    mask = torch.zeros((len(counts), max(counts), *pixels.shape[2:]), dtype=torch.int64)
    for row, (count, end) in enumerate(zip(counts, itertools.accumulate(counts))):
        values[row, :count] = pixels[end - count : end]
        mask[row, :count] = 1
    return {"pixel_values": values, "pixel_attention_mask": mask}


def _is_positive(number: Any) -> bool:
    return isinstance(number, (int, float)) and 0 < number < math.inf


@contextmanager
def _refusing_images() -> Iterator[None]:
    """Turn what a family's image processor raises, such as on an image 300 times as wide as high, into InputError."""
    try:
        yield
    except (InputError, TypeError):  # TypeError: an unknown option
        raise
    except (ValueError, ArithmeticError) as error:
        raise InputError(f"an image cannot be used by this model's image processor: {first_line(error)}") from error


def _as_arrays(value: Any) -> Any:
    return [one.numpy() for one in value] if isinstance(value, list) else value.numpy()
