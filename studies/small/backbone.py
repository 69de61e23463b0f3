"""What the study must know of the kind of vision-language model that it trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from flexattn_cuda.mechanism.config import FlexAttnConfig
from studies.small.small_model import ModelSizes


class SceneImages(Protocol):
    """Makes what the encoder takes of images, which it pads to a square.

    Attributes:
        lowres_size: Side of the low-resolution images in pixels.
        image_mean: Of the three channels, subtracted from values in [0, 1].
        image_std: Of the three channels, divided by.
    """

    lowres_size: int
    image_mean: Any
    image_std: Any

    def __call__(self, images: Any) -> Mapping[str, Any]:
        """Return pixel_values [n, 3, s, s], pixel_values_hr [n, 3, h, h] and valid_rect [n, 4] int32."""
        ...


class Backbone(ABC):
    """A kind of vision-language model."""

    @abstractmethod
    def build(self, texts: Iterable[str], flexattn: FlexAttnConfig, sizes: ModelSizes) -> tuple[Any, Any]:
        """Return an untrained model without high resolution, drawn from torch's generator, and its processor.

        Args:
            texts: Split into the tokenizer's words.
            flexattn: Settings of the processor's high-resolution images.
            sizes: Of the model.
        """

    @abstractmethod
    def images(self, processor: Any, highres_size: int | None = None) -> SceneImages:
        """Return what makes images of the processor's high resolution, or of another one in pixels."""

    @abstractmethod
    def cell(self, model: Any) -> int:
        """Return the side of an LR cell in pixels."""

    @abstractmethod
    def encode(self, model: Any, pixels: torch.Tensor) -> torch.Tensor:
        """Return the tokens [n, cells, D] of images [n, 3, s, s], row-major."""

    @abstractmethod
    def load_as(self, folder: Path, settings: FlexAttnConfig | None) -> tuple[Any, Any]:
        """Load a checkpoint as another system, with its processor; None is the plain model.

        Its forward takes `image_features`, and with high resolution `hr_features`.
        """

    @abstractmethod
    def save(self, model: Any, processor: Any, folder: Path) -> None:
        """Write a checkpoint of the system that a model was built or loaded as."""

    @abstractmethod
    def encode_tiles(self, model: Any, image: torch.Tensor, zoom: int) -> torch.Tensor:
        """Return the tokens [h*h, D] of an image [3, height, height] that is encoded in zoom x zoom tiles."""

    def asked_about(self, image: Image.Image) -> Image.Image:
        """Return a scene's image as `flexattn_cuda.ask` should be given it."""
        return image
