"""What the mechanism must know of LLaVA as this package has it, with sizes from its configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from flexattn_cuda.families.family import Family
from flexattn_cuda.families.llava.vision import encode_images
from flexattn_cuda.mechanism.config import FlexAttnConfig

if TYPE_CHECKING:
    from flexattn_cuda.families.llava.model import FlexAttnLlavaForConditionalGeneration


class LlavaFamily(Family):
    """One LLaVA model with high-resolution tokens, whose settings are those of its configuration at any time."""

    model: FlexAttnLlavaForConditionalGeneration

    def __init__(self, model: FlexAttnLlavaForConditionalGeneration) -> None:
        assert model.config.flexattn is not None  # to a plain LLaVA there is nothing to attach
        super().__init__(model, model.config.flexattn)

    @property
    def settings(self) -> FlexAttnConfig:
        settings = self.model.config.flexattn
        assert settings is not None
        return settings

    @property
    def hr_layers(self) -> range:
        return self.model.config.hr_layers

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return encode_images(self.model.model, pixels)
