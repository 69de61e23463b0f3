"""What the mechanism must know of one model: where its parts are, and how its images become tokens.

A family of models is a subclass of a few lines, most often of `FixedTower`. `attach(model, settings, family=...)` takes
one for a model that this package does not know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from flexattn_cuda import profiling
from flexattn_cuda.errors import InputError
from flexattn_cuda.mechanism.config import FlexAttnConfig
from flexattn_cuda.mechanism.grid import Grid, ImageGrids, cut_into_tiles, join_tiles
from flexattn_cuda.mechanism.rotary import RotaryTables, model_tables

Pixels = torch.Tensor | Sequence[torch.Tensor]
"""Images [n, 3, height, width], or n of them [3, height, width] where sizes differ; float, normalised."""


@dataclass(frozen=True)
class PromptWithImages:
    """A call that brings images.

    Attributes:
        input_ids: [B, N].
        attention_mask: [B, past + N], 0 for padding; None for none.
        grids: Of the images, in the order of the prompts.
        rows_per_prompt: Adjacent rows of the batch that repeat a prompt.
        past: Positions before the call.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    grids: list[ImageGrids]
    rows_per_prompt: int
    past: int


class Family:
    """One vision-language model with high-resolution (HR) tokens, as `mechanism/attach.py` sees it.

    Attributes:
        image_arguments: Arguments of the model's forward that bring the low-resolution (LR) view of the images. They
            are not passed on where this package embeds the images.
        row_arguments: Those among them that `generate` repeats for every row of a prompt (beams, samples), because the
            model derives positions from them.
        position_axes: Coordinates of a position: 1, or 3 for time, row and column (multi-axis RoPE).
        later_images: Whether a later call with the same key/value cache may bring images.
        causal_prompts: Whether a token of a prompt sees no later ones, those of its own image aside, so that a longer
            prompt begins with the keys of a shorter one.
        takes_features: Whether images may come as tokens that were encoded before; their grids must not depend on them.
    """

    image_arguments: ClassVar[tuple[str, ...]] = ("pixel_values",)
    row_arguments: ClassVar[tuple[str, ...]] = ()
    position_axes: ClassVar[int] = 1
    later_images: ClassVar[bool] = True
    causal_prompts: ClassVar[bool] = True
    takes_features: ClassVar[bool] = False

    def __init__(self, model: PreTrainedModel, settings: FlexAttnConfig) -> None:
        self.model = model
        self._settings = settings

    @property
    def settings(self) -> FlexAttnConfig:
        """Settings of the mechanism."""
        return self._settings

    def set_settings(self, settings: FlexAttnConfig) -> None:
        """Change the settings of the mechanism; the projections of the layers stay as they are."""
        self._settings = settings

    @property
    def text_model(self) -> PreTrainedModel:
        """The language model without its head."""
        text: PreTrainedModel = self.model.model.language_model
        return text

    @property
    def hr_layers(self) -> range:
        """Layers that attend to HR tokens."""
        return range(self.settings.first_layer, self.text_model.config.num_hidden_layers)

    @property
    def image_token_id(self) -> int:
        """The id that stands for an LR token in the prompt."""
        token: int = self.model.config.image_token_id
        return token

    @property
    def lr_side(self) -> int | None:
        """Side of the LR grid, if all images have the same."""
        return None

    @property
    def lr_size(self) -> int | None:
        """Side of the LR view in pixels, if all images have the same."""
        return None

    def grids(self, pixels_hr: Pixels) -> list[ImageGrids]:
        """Return the grids of n images; ValueError if they do not have a size that the model takes."""
        raise NotImplementedError

    def feature_grids(self, count: int) -> list[ImageGrids]:
        """Return the grids of `count` images whose tokens are given; ValueError if they depend on the images."""
        raise ValueError(
            f"image_features came to a {self.model.config.model_type} model, whose images have grids of their own; "
            "pass pixel_values_hr"
        )

    def encode_lr(self, pixels_hr: Pixels, arguments: dict[str, Any]) -> list[torch.Tensor]:
        """Return the LR tokens [S_h*S_w, D] of each of n images.

        Args:
            pixels_hr: The images in high resolution.
            arguments: Of the model's forward, with those of `image_arguments` that its caller gave. Without them the LR
                view is made from the HR one.

        Raises:
            ValueError: If they are not the LR views of as many images.
        """
        raise NotImplementedError

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode images [n, 3, height, width] of one size into their tokens [n, tokens, D], row-major."""
        raise NotImplementedError

    @torch.no_grad()
    def encode_tiles(self, tiles: torch.Tensor) -> torch.Tensor:
        """Encode tiles [n, 3, height, width] into their tokens [n, tokens of a tile, D], without gradients."""
        return self.encode(tiles)

    def encode_hr(self, image: torch.Tensor, grids: ImageGrids) -> torch.Tensor:
        """Return the HR tokens [grids.hr.cells, D] of an image [3, height, width], row-major, without gradients."""
        tiles = grids.tiles
        tokens = self.encode_tiles(torch.stack(cut_into_tiles(image, tiles)))
        return join_tiles(tokens, tiles, Grid(grids.hr.rows // tiles.rows, grids.hr.cols // tiles.cols))

    def rotary(self, text: PreTrainedModel, sequence: torch.Tensor, positions: torch.Tensor) -> RotaryTables:
        """Return the rotary tables [n, tables*r] of a language model at positions [axes, n]; dtype as `sequence`."""
        return model_tables(text, sequence, positions)

    def position_ids(self, prompt: PromptWithImages) -> torch.Tensor | None:
        """Return the positions of a prompt where they depend on its images; None where the model counts."""
        return None

    @property
    def position_offsets(self) -> torch.Tensor | None:
        """Distance of positions from a plain count, which the model keeps from call to call; None if it keeps none."""
        return None

    @position_offsets.setter
    def position_offsets(self, offsets: torch.Tensor) -> None:
        raise NotImplementedError


class FixedTower(Family):
    """A model whose vision tower takes squares of one size: the LR view is one, an HR image zoom x zoom of them."""

    takes_features: ClassVar[bool] = True

    @property
    def lr_side(self) -> int:
        vision = self.model.config.vision_config
        return int(vision.image_size // vision.patch_size)

    @property
    def lr_size(self) -> int:
        return int(self.model.config.vision_config.image_size)

    def grids(self, pixels_hr: Pixels) -> list[ImageGrids]:
        zoom = self.settings.zoom
        size = zoom * self.lr_size
        for image in pixels_hr:
            if tuple(image.shape) != (3, size, size):
                raise InputError(
                    f"an image of pixel_values_hr has shape {list(image.shape)}; with zoom {zoom} this model takes "
                    f"{[3, size, size]}"
                )
        return self.feature_grids(len(pixels_hr))

    def feature_grids(self, count: int) -> list[ImageGrids]:
        zoom, side = self.settings.zoom, self.lr_side
        return [ImageGrids(Grid(side, side), Grid(zoom * side, zoom * side), Grid(zoom, zoom))] * count

    def encode_lr(self, pixels_hr: Pixels, arguments: dict[str, Any]) -> list[torch.Tensor]:
        views, size = arguments.get("pixel_values"), self.lr_size
        if views is None:
            views = scaled_down(torch.stack(list(pixels_hr)), size, size)
        views = views.flatten(0, -4)  # some families have [prompts, views, 3, s, s]
        if len(views) != len(pixels_hr):
            raise ValueError(
                f"pixel_values holds {len(views)} views of {len(pixels_hr)} images: the processor also sends tiles of "
                "its own; use flexattn_cuda.processor_for(model)"
            )
        if tuple(views.shape[1:]) != (3, size, size):
            raise ValueError(f"pixel_values has shape {list(views.shape)}; it must be [n, 3, {size}, {size}]")
        with profiling.phase("encode_images"):
            return list(self.encode(views))


def scaled_down(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Scale images [n, 3, H, W] down to [n, 3, height, width], with antialiasing, in float32 or float64."""
    pixels = pixels if pixels.dtype == torch.float64 else pixels.float()
    return functional.interpolate(pixels, size=(height, width), mode="bilinear", align_corners=False, antialias=True)
