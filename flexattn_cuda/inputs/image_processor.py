"""Images to pixels, as the released preprocessing makes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import BatchFeature
from transformers.image_processing_base import ImageProcessingMixin

from flexattn_cuda.checkpoints import HubOptions, Part, checkpoint_format, vision_tower_folder
from flexattn_cuda.checkpoints.config import is_whole, read_config
from flexattn_cuda.checkpoints.files import read_json, refusing
from flexattn_cuda.errors import InputError
from flexattn_cuda.families.llava.config import FlexAttnLlavaConfig
from flexattn_cuda.inputs.images import as_image, flat_list, square_resized, upright_rgb, valid_rect_of

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_MAX_SIZE = 1 << 16  # pixels or tokens a side


@dataclass(frozen=True)
class ImageSizes:
    """The sizes that a model's configuration gives the image processor; see `FlexAttnLlavaImageProcessor`."""

    lowres_size: int
    highres_size: int | None
    lr_side: int
    image_tokens: int

    @classmethod
    def of(cls, config: FlexAttnLlavaConfig) -> ImageSizes:
        """Return the sizes of a model."""
        settings = config.flexattn
        return cls(
            lowres_size=config.vision_config.image_size if settings is None else settings.lowres_size,
            highres_size=None if settings is None else settings.highres_size,
            lr_side=config.lr_side,
            image_tokens=config.image_tokens,
        )


class FlexAttnLlavaImageProcessor(ImageProcessingMixin):
    """Turn images into pixel_values, pixel_values_hr and valid_rect.

    Args:
        lowres_size: Side in pixels of the low-resolution version.
        highres_size: Side in pixels of the high-resolution version, which the low-resolution one is made from; None
            (plain LLaVA): there is none.
        lr_side: Side S of the grid of low-resolution image tokens.
        image_tokens: Positions of the sequence that an image takes; None: S*S.
        image_mean: Mean of the vision tower's input for red, green and blue, in 0..1. Rounded down to 8 bits it is the
            colour of the padding.
        image_std: Standard deviation of the same.

    Raises:
        InputError: If a size is not a whole number of at least 1, or mean or std are not three positive numbers.
    """

    model_input_names = ["pixel_values", "pixel_values_hr", "valid_rect"]  # noqa: RUF012 (transformers' own form)

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
        self.lowres_size = _checked_size("lowres_size", lowres_size)
        self.highres_size = None if highres_size is None else _checked_size("highres_size", highres_size)
        self.lr_side = _checked_size("lr_side", lr_side)
        self.image_tokens = lr_side**2 if image_tokens is None else _checked_size("image_tokens", image_tokens, 1 << 24)
        self.image_mean = _checked_colour("image_mean", image_mean)
        self.image_std = _checked_colour("image_std", image_std)
        if not all(0 <= mean <= 1 for mean in self.image_mean) or min(self.image_std) <= 0:
            raise InputError("image_mean must lie in 0..1 and image_std above 0")

    @classmethod
    def from_config(
        cls, folder: str | Path, config: FlexAttnLlavaConfig, hub: HubOptions | None = None
    ) -> FlexAttnLlavaImageProcessor:
        """Return the image processor of a checkpoint folder of any format.

        Args:
            folder: Mean and std come from its preprocessor_config.json, else from that of its vision tower, else they
                are CLIP's.
            config: Gives the sizes.
            hub: Options for a vision tower on the hub.

        Raises:
            CheckpointError: If a file cannot be read, or has an impossible value.
        """
        with refusing(f"the image processor of {folder} cannot be made"):
            return cls(**asdict(ImageSizes.of(config)), **_mean_and_std(Path(folder), hub))

    def __call__(self, images: Any, return_tensors: str | None = "pt") -> BatchFeature:
        """Return the pixels of images.

        Args:
            images: A PIL image, an [H, W] or [H, W, 3 or 4] uint8 array, or a list of them.
            return_tensors: "pt" for tensors; None or "np" for arrays.

        Returns:
            pixel_values [n, 3, lowres, lowres] float32, pixel_values_hr [n, 3, highres, highres] float32 (absent for a
            plain LLaVA), valid_rect [n, 4] int32: (top, left, bottom, right) in cells of the S x S grid, half-open.

        Raises:
            InputError: If something is not an image, or there is none.
        """
        upright = [upright_rgb(as_image(image)) for image in flat_list(images)]
        if not upright:
            raise InputError("there is no image in the list of images")
        pixels = self._pixels(upright)
        values = {"pixel_values": pixels}
        if self.highres_size is not None:
            shape = (self.lowres_size, self.lowres_size)
            lowres = functional.interpolate(pixels, size=shape, mode="bilinear", align_corners=False, antialias=True)
            values = {"pixel_values": lowres, "pixel_values_hr": pixels}
        rects = [valid_rect_of(image.width, image.height, self.lr_side) for image in upright]
        values["valid_rect"] = torch.tensor(rects, dtype=torch.int32)
        if return_tensors != "pt":
            values = {name: value.numpy() for name, value in values.items()}
        return BatchFeature(values, tensor_type=return_tensors)

    def _pixels(self, images: Sequence[Any]) -> torch.Tensor:
        """Return normalised squares [n, 3, size, size] of the higher of the two resolutions."""
        size = self.highres_size or self.lowres_size
        colour = tuple(int(x * 255) for x in self.image_mean)
        mean, std = (torch.tensor(x, dtype=torch.float32).view(1, 3, 1, 1) for x in (self.image_mean, self.image_std))
        squares = np.stack([np.asarray(square_resized(image, size, colour)) for image in images])
        return (torch.from_numpy(squares).permute(0, 3, 1, 2).float() / 255 - mean) / std


def _checked_size(name: str, size: Any, limit: int = _MAX_SIZE) -> int:
    if not is_whole(size, 1, limit):
        raise InputError(f"{name} is {size!r}; it must be a whole number from 1 to {limit}")
    return size


def _checked_colour(name: str, values: Any) -> list[float]:
    numbers = list(values) if isinstance(values, (list, tuple)) else []
    if len(numbers) != 3 or not all(isinstance(x, (int, float)) and math.isfinite(x) for x in numbers):
        raise InputError(f"{name} is {values!r}; it must be three numbers")
    return numbers


def _mean_and_std(folder: Path, hub: HubOptions | None) -> dict[str, Any]:
    """Return image_mean and image_std as far as the folder, or else its vision tower, has them."""
    folders = [folder]
    if checkpoint_format(folder) == "released":
        folders.append(vision_tower_folder(folder, read_config(folder), hub, Part.CONFIG | Part.IMAGES))
    for one in folders:
        for values in (
            read_json(one / "processor_config.json").get("image_processor"),
            read_json(one / "preprocessor_config.json"),
        ):
            if values:
                return {name: values[name] for name in ("image_mean", "image_std") if values.get(name)}
    return {}
