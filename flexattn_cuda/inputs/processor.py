"""Images and questions in, tensors out: the released preprocessing, the prompt, the tokenizers of all three formats.

image ─ upright RGB ─ padded to a square ─ highres_size² (bicubic) ─ mean, std ─► pixel_values_hr
                                           └─ lowres_size² (antialiased bilinear) ─► pixel_values
text  ─ tokenizer ─ every <image> becomes S*S image token ids (LLaVA-HD: S*S + h*h) ─► input_ids, attention_mask
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    BatchFeature,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from transformers.image_processing_base import ImageProcessingMixin

from flexattn_cuda import checkpoints
from flexattn_cuda.errors import CheckpointError, InputError
from flexattn_cuda.families.llava.config import FlexAttnLlavaConfig
from flexattn_cuda.inputs.images import (
    as_image,
    flat_list,
    square_resized,
    upright_rgb,
    valid_rect_of,
)
from flexattn_cuda.inputs.questions import IMAGE, check_question, user_message
from flexattn_cuda.inputs.sentencepiece import read_sentencepiece

RELEASED_IMAGE_ID = -200
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# The prompt of Vicuna v1, which the released weights and the 7B model were trained with.
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
VICUNA_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}" + VICUNA_SYSTEM + " {% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% elif message['role'] == 'assistant' %}ASSISTANT: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '</s>' }}{% else %}{{ ' ' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


class FlexAttnLlavaImageProcessor(ImageProcessingMixin):
    """Images -> pixel_values, pixel_values_hr, valid_rect.

    Args:
        lowres_size, highres_size: Sides in pixels of the two versions; highres_size None (plain LLaVA) makes the
            low-resolution one from the image itself.
        lr_side: Side S of the grid of low-resolution image tokens.
        image_tokens: Positions of the sequence that an image takes; S*S when None.
        image_mean, image_std: Of the vision tower, for values in 0..1. The mean, rounded down to 8 bits, also is the
            colour of the padding.
    """

    model_input_names = ["pixel_values", "pixel_values_hr", "valid_rect"]

    def __init__(
        self,
        lowres_size: int = 336,
        highres_size: int | None = 1008,
        lr_side: int = 24,
        image_tokens: int | None = None,
        image_mean: Sequence[float] = CLIP_MEAN,
        image_std: Sequence[float] = CLIP_STD,
        **kwargs: Any,
    ):
        super().__init__()
        self.lowres_size = lowres_size
        self.highres_size = highres_size
        self.lr_side = lr_side
        self.image_tokens = image_tokens or lr_side**2
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)

    @classmethod
    def from_config(cls, folder: str | Path, config: FlexAttnLlavaConfig) -> FlexAttnLlavaImageProcessor:
        """For a checkpoint folder of any format.

        Sizes come from `config`; mean and std from the preprocessor_config.json of the folder or of its vision tower,
        CLIP's where there is none.
        """
        return cls(**_sizes(config), **_mean_and_std(Path(folder)))

    def __call__(self, images: Any, return_tensors: str | None = "pt") -> BatchFeature:
        """
        Args:
            images: A PIL image, an [H, W] or [H, W, 3 or 4] uint8 array, or a list of them.
        Returns:
            pixel_values [n, 3, lowres, lowres] float32, pixel_values_hr [n, 3, highres, highres] float32 (absent for a
            plain LLaVA), valid_rect [n, 4] int32: (top, left, bottom, right) in cells of the S x S grid, half-open.
        Raises:
            InputError: Something that is not an image, or no image at all.
        """
        upright = [upright_rgb(as_image(image)) for image in flat_list(images)]
        if not upright:
            raise InputError("there is no image in the list of images")
        size = self.highres_size or self.lowres_size
        colour = tuple(int(x * 255) for x in self.image_mean)
        mean, std = (torch.tensor(x, dtype=torch.float32).view(1, 3, 1, 1) for x in (self.image_mean, self.image_std))
        squares = np.stack([np.asarray(square_resized(image, size, colour)) for image in upright])
        pixels = (torch.from_numpy(squares).permute(0, 3, 1, 2).float() / 255 - mean) / std
        values = {"pixel_values": pixels}
        if self.highres_size is not None:
            shape = (self.lowres_size, self.lowres_size)
            small = functional.interpolate(pixels, size=shape, mode="bilinear", align_corners=False, antialias=True)
            values = {"pixel_values": small, "pixel_values_hr": pixels}
        live = [valid_rect_of(image.width, image.height, self.lr_side) for image in upright]
        values["valid_rect"] = torch.tensor(live, dtype=torch.int32)
        if return_tensors != "pt":
            values = {name: value.numpy() for name, value in values.items()}
        return BatchFeature(values, tensor_type=return_tensors)


def _sizes(config: FlexAttnLlavaConfig) -> dict[str, int | None]:
    settings = config.flexattn
    return {
        "lowres_size": config.vision_config.image_size if settings is None else settings.lowres_size,
        "highres_size": None if settings is None else settings.highres_size,
        "lr_side": config.lr_side,
        "image_tokens": config.image_tokens,
    }


def _mean_and_std(folder: Path) -> dict[str, Any]:
    folders = [folder]
    if checkpoints.checkpoint_format(folder) == "released":
        folders.append(checkpoints.vision_tower_folder(folder, checkpoints.config.read_config(folder)))
    for place in folders:
        for values in (
            _read_json(place / "processor_config.json").get("image_processor"),
            _read_json(place / "preprocessor_config.json"),
        ):
            if values:
                return {name: values[name] for name in ("image_mean", "image_std") if values.get(name)}
    return {}


# --------------------------------------------------------------------------------------------------------- processor


class FlexAttnLlavaProcessor(ProcessorMixin):
    """Images and prompts for `FlexAttnLlavaForConditionalGeneration`.

    Args:
        image_processor: `FlexAttnLlavaImageProcessor`.
        tokenizer: Any tokenizer of transformers.
        image_token_id: The id that stands for an image token; the tokenizer's id of "<image>" when None.
        split_at_images: Tokenize the text between two "<image>" as texts of their own, as the released code does (its
            tokenizer then puts a space before each). Otherwise "<image>" is a token of the tokenizer.
        chat_template: Jinja template of the prompt; Vicuna v1 when None.
    """

    def __init__(
        self,
        image_processor: FlexAttnLlavaImageProcessor,
        tokenizer: Any,
        image_token_id: int | None = None,
        split_at_images: bool = False,
        chat_template: str | None = None,
        **kwargs: Any,
    ):
        known = tokenizer.get_vocab().get(IMAGE)
        if image_token_id is None and known is None:
            raise InputError(f"the tokenizer has no token {IMAGE}; pass image_token_id, or add the token to it")
        self.image_token = IMAGE
        self.image_token_id = known if image_token_id is None else image_token_id
        self.split_at_images = split_at_images or known != self.image_token_id
        super().__init__(image_processor, tokenizer, chat_template=chat_template or VICUNA_TEMPLATE)

    @property
    def image_tokens(self) -> int:
        """Image tokens of one image in the sequence: S*S, with LLaVA-HD S*S + h*h."""
        return self.image_processor.image_tokens

    @property
    def pad_id(self) -> int:
        """The id that stands in the padding, where the attention mask is 0."""
        pad, unknown = self.tokenizer.pad_token_id, self.tokenizer.unk_token_id
        return (unknown or 0) if pad is None else pad

    def prompt(self, question: str, images: int = 1) -> str:
        """The prompt that asks `question` about `images` images, up to where the answer begins."""
        check_question(question)
        return self.apply_chat_template([user_message(question, images)], add_generation_prompt=True)

    def prompt_length(self, question: str) -> int:
        """Positions that the prompt of `question` about one image takes in the sequence."""
        return len(self.expand_image_tokens(self.tokenize(self.prompt(question), add_special_tokens=True)))

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        return_tensors: str | None = "pt",
        padding: bool = True,
        padding_side: str = "left",
        add_special_tokens: bool = True,
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Args:
            images: None, a PIL image, a list of them in the order of the "<image>" marks of all texts, or one list per
                text.
            text: One prompt or a list of prompts, each with one "<image>" per image; a prompt without one is fine.
            return_tensors: "pt", or None for lists.
            padding: Make all rows as long as the longest.
            padding_side: Where the padding goes: "left" (generation) or "right".
            add_special_tokens: Begin with the tokenizer's begin-of-sequence token.
        Returns:
            input_ids, attention_mask [B, N] int64, and for images what `FlexAttnLlavaImageProcessor` returns.
        Raises:
            InputError: Images and "<image>" marks that do not match, or something that is neither.
        """
        unknown = sorted(name for name, value in kwargs.items() if value is not None)
        if unknown:
            raise TypeError(f"FlexAttnLlavaProcessor takes no {', '.join(unknown)}")
        if text is None:
            raise InputError("there is no text; every image needs a prompt with an <image> mark")
        if padding_side not in ("left", "right"):
            raise InputError(f"padding_side is {padding_side!r}; allowed: left, right")
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(one, str) for one in texts):
            raise InputError(f"text must be a string or a list of strings, not {text!r}")
        flat = flat_list(images)
        self._check_counts(texts, images, len(flat))

        rows = [self.expand_image_tokens(self.tokenize(one, add_special_tokens)) for one in texts]
        longest = max(len(row) for row in rows) if padding else 0
        fill = self.pad_id
        ids, mask = [], []
        for row in rows:
            gap = max(0, longest - len(row))
            sides = (gap, 0) if padding_side == "left" else (0, gap)
            ids.append([fill] * sides[0] + row + [fill] * sides[1])
            mask.append([0] * sides[0] + [1] * len(row) + [0] * sides[1])
        if return_tensors == "pt" and len({len(row) for row in ids}) > 1:
            raise InputError("texts of different lengths make no tensor without padding; pass padding=True")
        features = BatchFeature({"input_ids": ids, "attention_mask": mask}, tensor_type=return_tensors)
        if flat:
            features.update(self.image_processor(flat, return_tensors=return_tensors))
        return features

    def expand_image_tokens(self, ids: Sequence[int] | torch.Tensor) -> Any:
        """Ids [N] of one prompt with `image_tokens` ids for every image.

        Args:
            ids: An image stands as -200 (released format) or as one "<image>" id; one that is expanded stays as it is.
        Returns:
            A tensor for a tensor, a list for a list.
        """
        values = ids.tolist() if isinstance(ids, torch.Tensor) else list(ids)
        if values and not isinstance(values[0], int):
            raise InputError(
                "expand_image_tokens takes the ids of one prompt, [N]; expand the rows of a batch one by one"
            )
        expanded: list[int] = []
        for value, run in itertools.groupby(values):
            count = len(list(run))
            mark = value == RELEASED_IMAGE_ID or (value == self.image_token_id and count % self.image_tokens)
            expanded += [self.image_token_id] * (count * self.image_tokens) if mark else [value] * count
        if isinstance(ids, torch.Tensor):
            return torch.tensor(expanded, dtype=ids.dtype, device=ids.device)
        return expanded

    def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of one prompt, with one id for each image."""
        if not self.split_at_images:
            return self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        first, *rest = text.split(IMAGE)
        ids = list(self.tokenizer(first, add_special_tokens=add_special_tokens)["input_ids"])
        for part in rest:
            ids += [RELEASED_IMAGE_ID] + self.tokenizer(part, add_special_tokens=False)["input_ids"]
        return ids

    def _check_counts(self, texts: list[str], images: Any, count: int) -> None:
        marks = [text.count(IMAGE) for text in texts]
        if sum(marks) != count:
            raise InputError(
                f"the text has {sum(marks)} {IMAGE} marks, but {count} images came with it; "
                "put one mark into the text for every image"
            )
        if isinstance(images, (list, tuple)) and images and all(isinstance(part, (list, tuple)) for part in images):
            given = [len(flat_list(part)) for part in images]
            if given != marks:
                raise InputError(
                    f"the texts have {marks} {IMAGE} marks, but {given} images came with them, text by text"
                )

    # ---------------------------------------------------------------------------------------------------- checkpoints

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, *, config: FlexAttnLlavaConfig | None = None, **kwargs: Any
    ) -> FlexAttnLlavaProcessor:
        """From a folder (or hub id) in our own format, in transformers' LLaVA format, or in the released format.

        Args:
            config: The configuration of the model that is to be fed, where its sizes differ from the checkpoint's.
            kwargs: What transformers' AutoProcessor passes; not used.
        Raises:
            CheckpointError: The folder is missing, of an unknown format, or has no tokenizer.
        """
        folder = checkpoints.resolve_folder(name_or_path)
        form = checkpoints.checkpoint_format(folder)
        tokenizer = _load_tokenizer(folder, form)
        if form == "flexattn":
            values = _read_json(folder / "processor_config.json")
            if "image_processor" not in values:
                raise CheckpointError(f"{folder} has no processor: save one there with save_pretrained")
            images = values["image_processor"] | (_sizes(config) if config is not None else {})
            image_processor = FlexAttnLlavaImageProcessor(**images)
            settings = {name: values[name] for name in ("image_token_id", "split_at_images") if name in values}
        else:
            config = config or checkpoints.load_config(folder)
            image_processor = FlexAttnLlavaImageProcessor.from_config(folder, config)
            settings = {
                "image_token_id": config.image_token_id,
                "split_at_images": form == "released",
            }
            if form == "released" and len(tokenizer) == config.image_token_id:
                tokenizer.add_tokens([IMAGE], special_tokens=True)  # for decoding; the model never embeds it
        return cls(image_processor, tokenizer, chat_template=_chat_template(folder), **settings)


AutoProcessor.register(FlexAttnLlavaConfig, FlexAttnLlavaProcessor)


def _load_tokenizer(folder: Path, form: str) -> Any:
    """The tokenizer of a checkpoint.

    Our own format: tokenizer.json as it is. LLaVA format: what transformers makes of it. Released format:
    tokenizer.model, as the released code reads it.
    """
    has_json, has_model = (
        (folder / "tokenizer.json").is_file(),
        (folder / "tokenizer.model").is_file(),
    )
    if not has_json and not has_model:
        raise CheckpointError(f"{folder} has no tokenizer: neither tokenizer.json nor tokenizer.model")
    try:
        if has_model and (form == "released" or not has_json):
            tokenizer = _sentencepiece_tokenizer(folder)
        elif form == "llava":
            tokenizer = AutoTokenizer.from_pretrained(folder)
        else:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    except (ValueError, OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"the tokenizer in {folder} cannot be read: {error}") from error
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def _sentencepiece_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    settings = _read_json(folder / "special_tokens_map.json") | _read_json(folder / "tokenizer_config.json")
    prefix_everywhere = settings.get("legacy") is not False
    backend = read_sentencepiece(folder / "tokenizer.model", prefix_everywhere)

    def token(name: str, default: str | None) -> str | None:
        value = settings.get(f"{name}_token", default)  # text, or an object around the text
        return value["content"] if isinstance(value, dict) else value

    added = sorted(_read_json(folder / "added_tokens.json").items(), key=lambda item: item[1])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=token("bos", "<s>"),
        eos_token=token("eos", "</s>"),
        unk_token=token("unk", "<unk>"),
        pad_token=token("pad", None),
        add_bos_token=settings.get("add_bos_token", True),
        add_eos_token=settings.get("add_eos_token", False),
        clean_up_tokenization_spaces=False,
        model_max_length=settings.get("model_max_length") or 2048,
    )
    tokenizer.add_tokens([text for text, _ in added if text not in tokenizer.get_vocab()])
    return tokenizer


def _chat_template(folder: Path) -> str | None:
    """The prompt template that a checkpoint brings with it, in any of the places where transformers has kept it."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        template = _read_json(folder / name).get("chat_template")
        if isinstance(template, str):
            return template
    return None


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no object")
    return values
