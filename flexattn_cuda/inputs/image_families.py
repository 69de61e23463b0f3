"""What the HR processor must know of a model family: how a prompt marks an image, and how its base view is made.

A family that is not listed is described in the same few lines:

    ImageFamily(token="<image>", cell=lambda config: config.vision_config.patch_size)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from PIL import Image

from flexattn_cuda.inputs.frames import FrameOf, centre_square, padded_square, whole_image
from flexattn_cuda.inputs.images import valid_rect_of

Options = Mapping[str, Any]  # keyword arguments of an image processor


@dataclass(frozen=True)
class Views:
    """The two views of n images.

    Attributes:
        inputs: What the image processor of the family returns for the base view; pixel_values [n, 3, H, W], or patches.
        hr: The same view with zoom times the sides, normalised: [n, 3, zoom*H, zoom*W] float32, or a list of n tensors
            [3, zoom*H, zoom*W] where the views differ in size.
        sides: (H, W) of each base view in pixels.
    """

    inputs: dict[str, torch.Tensor]
    hr: torch.Tensor | list[torch.Tensor]
    sides: list[tuple[int, int]]


def _as_configured(side: int) -> Options:
    return {}


@dataclass(frozen=True)
class ImageFamily:
    """A model family, as the HR processor sees it.

    Attributes:
        token: The image token.
        cell: Returns the side in pixels of an LR cell, the square of the base view behind one image token, for the
            model's configuration.
        mark: What a prompt contains for an image; None: `token`.
        before: Text that stands before the image tokens in the place of the mark.
        after: Text that stands after them.
        base_view: Returns the options of the image processor that leave the base view alone, for its side in pixels.
        sizes: Options of the image processor that are sizes in pixels and grow with the view.
        native_size: The view keeps the image's aspect ratio, and is sent as patches with image_grid_thw.
        centred_padding: The image processor can pad images to a square, around the centre (`do_pad`).
        stretched: The base view shows the whole image, whatever `do_center_crop` says.
        nested: The model takes pixel_values [B, images of a row, 3, H, W] and pixel_attention_mask.
        token_types: Name of the model input that is 1 at image tokens and 0 elsewhere; None: there is none.
        finish: Returns the text that is tokenized, of a prompt and the tokenizer; None: the prompt itself.
        text_options: Options of the tokenizer.
        bare_prompt: Prompt of a checkpoint without a chat template, with {images} and {question}; None: refuse.
    """

    token: str
    cell: Callable[[Any], int]
    mark: str | None = None
    before: str = ""
    after: str = ""
    base_view: Callable[[int], Options] = _as_configured
    sizes: tuple[str, ...] = ("size", "crop_size")
    native_size: bool = False
    centred_padding: bool = False
    stretched: bool = False
    nested: bool = False
    token_types: str | None = None
    finish: Callable[[str, Any], str] | None = None
    text_options: Options = field(default_factory=dict)
    bare_prompt: str | None = None

    @property
    def image_mark(self) -> str:
        """What a prompt contains for an image."""
        return self.mark or self.token

    def image_text(self, tokens: int) -> str:
        """Return the text that replaces the mark of an image of `tokens` image tokens."""
        return f"{self.before}{self.token * tokens}{self.after}"

    def views(self, image_processor: Any, images: Sequence[Image.Image], options: Options, zoom: int) -> Views:
        """Return both views of RGB images.

        Args:
            image_processor: The family's own, of transformers.
            images: At least one.
            options: Options of the image processor that differ from its configuration.
            zoom: How many times the sides of the base view the HR view has.
        """
        if self.native_size:
            return _native_views(image_processor, images, options, zoom)
        lr = self._fixed_view(image_processor, images, options)
        larger = {name: scaled(size, zoom) for name in self.sizes if (size := _value(image_processor, options, name))}
        hr = self._fixed_view(image_processor, images, {**options, **larger})
        return Views({"pixel_values": lr}, hr, [(lr.shape[-2], lr.shape[-1])] * len(images))

    def _fixed_view(self, image_processor: Any, images: Sequence[Image.Image], options: Options) -> torch.Tensor:
        """Return the base views [n, 3, H, W] at the size that the options name."""
        base = self.base_view(view_side(image_processor, options))
        one_by_one = [[image] for image in images]  # each a prompt of its own: OneVision pads images of one prompt
        pixels: torch.Tensor = image_processor(one_by_one, **{**options, **base}, return_tensors="pt")["pixel_values"]
        return pixels[:, 0] if pixels.ndim == 5 else pixels  # [n, views, 3, H, W], the base view first

    def valid_rect(
        self, image_processor: Any, options: Options, image: Image.Image, grid: tuple[int, int]
    ) -> tuple[int, int, int, int] | None:
        """Return (top, left, bottom, right) of an image in LR cells of a `grid`, None if the family does not pad it."""
        if not self._pads(image_processor, options):
            return None
        return valid_rect_of(image.width, image.height, grid[0])

    def frame(self, image_processor: Any) -> FrameOf:
        """Return what tells the part of an image that its views show, by the configuration of the image processor."""
        if self._pads(image_processor, {}):
            return padded_square
        crops = not self.stretched and _value(image_processor, {}, "do_center_crop")
        return centre_square if crops else whole_image

    def _pads(self, image_processor: Any, options: Options) -> bool:
        can_pad = self.centred_padding and hasattr(image_processor, "pad_to_square")
        return can_pad and bool(_value(image_processor, options, "do_pad"))


def view_side(image_processor: Any, options: Options) -> int:
    """Return the side in pixels of the square that an image processor makes; 0 if it makes none."""
    for name in ("crop_size", "size"):
        size = sizes_of(_value(image_processor, options, name))
        side = (size.get("height") or size.get("shortest_edge")) if isinstance(size, dict) else size
        if isinstance(side, int):
            return side
    return 0


def sizes_of(size: Any) -> Any:
    """Return a size as transformers writes it, an int, a list or a dict, without the fields that are not set."""
    if size is None or isinstance(size, (int, list, tuple)):
        return size
    return {name: value for name, value in (size if isinstance(size, dict) else vars(size)).items() if value}


def scaled(size: Any, zoom: int) -> Any:
    """Return a size, see `sizes_of`, with zoom times the sides."""
    size = sizes_of(size)
    if isinstance(size, dict):
        return {name: side * zoom for name, side in size.items()}
    return size * zoom if isinstance(size, int) else [side * zoom for side in size]


def _value(image_processor: Any, options: Options, name: str) -> Any:
    value = options.get(name)
    return getattr(image_processor, name, None) if value is None else value


def _native_views(image_processor: Any, images: Sequence[Image.Image], options: Options, zoom: int) -> Views:
    """Return the views of a family that keeps the aspect ratio (Qwen-VL), the base view as patches."""
    lr = dict(image_processor(list(images), **options, return_tensors="pt"))
    patch, merge = (_value(image_processor, options, name) for name in ("patch_size", "merge_size"))
    resample = _value(image_processor, options, "resample")
    fixed = {name: value for name, value in options.items() if name not in ("size", "min_pixels", "max_pixels")}
    sides = [(rows * patch, columns * patch) for _, rows, columns in lr["image_grid_thw"].tolist()]
    hr = []
    for image, (height, width) in zip(images, sides):
        # Its own rule for sizes would not always arrive at zoom times the sides, so it is resized beforehand.
        larger = image.resize((width * zoom, height * zoom), resample)
        made = image_processor([larger], **{**fixed, "do_resize": False}, return_tensors="pt")
        _, rows, columns = made["image_grid_thw"][0].tolist()
        hr.append(_pixels_of_patches(made["pixel_values"], rows, columns, patch, merge))
    return Views(lr, hr, sides)


def _pixels_of_patches(patches: torch.Tensor, rows: int, columns: int, patch: int, merge: int) -> torch.Tensor:
    """Return the image [3, rows*patch, columns*patch] of Qwen-VL's patches [rows*columns, 3*T*patch*patch].

    Patches are ordered by merge x merge blocks, and the T frames of an image are the same.
    """
    blocks = patches.view(rows // merge, columns // merge, merge, merge, 3, -1, patch, patch)[..., 0, :, :]
    return blocks.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, rows * patch, columns * patch)


# ----------------------------------------------------------------------------------------------------------- families


def _side(value: Any) -> int:
    """Return a side that some configurations write as [height, width]."""
    return int(value[0] if isinstance(value, (list, tuple)) else value)


def _patch(config: Any) -> int:
    return _side(config.vision_config.patch_size)


def _switched_off(side: int, name: str) -> Options:
    return {name: False}


def _one_tile(side: int) -> Options:
    """Options of LLaVA-NeXT's and OneVision's: one tile of the base view's size, which is then dropped."""
    return {"image_grid_pinpoints": [[side, side]]}


def _internvl_cell(config: Any) -> int:
    return round(_patch(config) / float(config.downsample_ratio))


def _idefics_cell(config: Any) -> int:
    return _patch(config) * int(config.scale_factor)


def _gemma3_cell(config: Any) -> int:
    return _side(config.vision_config.image_size) // math.isqrt(config.mm_tokens_per_image)


def _qwen_cell(config: Any) -> int:
    return _patch(config) * int(config.vision_config.spatial_merge_size)


def _paligemma_text(prompt: str, tokenizer: Any) -> str:
    """Return PaliGemma's text: the begin-of-sequence token stands after the images, a newline at the end."""
    images, mark, rest = prompt.rpartition("<image>")
    return f"{images}{mark}{tokenizer.bos_token}{rest}\n"


_LLAVA = ImageFamily(token="<image>", cell=_patch, centred_padding=True)
_ANYRES = ImageFamily(token="<image>", cell=_patch, base_view=_one_tile, stretched=True)
_IDEFICS = ImageFamily(
    token="<image>",
    cell=_idefics_cell,
    before="<fake_token_around_image><global-img>",
    after="<fake_token_around_image>",
    base_view=partial(_switched_off, name="do_image_splitting"),
    sizes=("size", "max_image_size"),
    nested=True,
)
_QWEN = ImageFamily(token="<|image_pad|>", cell=_qwen_cell, native_size=True, token_types="mm_token_type_ids")

# By `model_type` of the model's configuration.
FAMILIES: dict[str, ImageFamily] = {
    "llava": _LLAVA,
    "vipllava": _LLAVA,
    "llava_next": _ANYRES,
    "llava_onevision": _ANYRES,
    "internvl": ImageFamily(
        token="<IMG_CONTEXT>",
        cell=_internvl_cell,
        before="<img>",
        after="</img>",
        base_view=partial(_switched_off, name="crop_to_patches"),
    ),
    "idefics3": _IDEFICS,
    "smolvlm": _IDEFICS,
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "paligemma": ImageFamily(
        token="<image>",
        cell=_patch,
        finish=_paligemma_text,
        text_options={"add_special_tokens": False, "return_token_type_ids": True},
        bare_prompt="{images}{question}",
    ),
    "gemma3": ImageFamily(
        token="<image_soft_token>",
        cell=_gemma3_cell,
        mark="<start_of_image>",
        before="\n\n<start_of_image>",
        after="<end_of_image>\n\n",
        base_view=partial(_switched_off, name="do_pan_and_scan"),
        token_types="token_type_ids",
    ),
}
