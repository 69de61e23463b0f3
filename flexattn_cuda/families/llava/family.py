"""What the mechanism must know of LLaVA."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from flexattn_cuda.families.llava.vision import cut_into_tiles, encode_images
from flexattn_cuda.mechanism.call import Span
from flexattn_cuda.mechanism.config import FlexAttnConfig
from flexattn_cuda.mechanism.grid import Grid

if TYPE_CHECKING:
    from flexattn_cuda.families.llava.model import FlexAttnLlavaForConditionalGeneration


class LlavaFamily:
    """A `Family` (mechanism/attach.py): one LLaVA model with high-resolution tokens."""

    def __init__(self, model: FlexAttnLlavaForConditionalGeneration) -> None:
        self.model = model

    @property
    def settings(self) -> FlexAttnConfig:
        settings = self.model.config.flexattn
        assert settings is not None  # of a plain LLaVA there is nothing to attach
        return settings

    @property
    def text_model(self) -> PreTrainedModel:
        text: PreTrainedModel = self.model.model.language_model
        return text

    @property
    def hr_layers(self) -> range:
        return self.model.config.hr_layers

    def cut_into_tiles(self, image: torch.Tensor, tiles: Grid) -> list[torch.Tensor]:
        return cut_into_tiles(image, tiles)

    @torch.no_grad()
    def encode_tiles(self, tiles: torch.Tensor) -> torch.Tensor:
        return encode_images(self.model.model, tiles)


def image_spans(is_image: torch.Tensor, images: int, tokens: int) -> list[list[Span]]:
    """Return where each image stands in each prompt.

    Args:
        is_image: [B, N] bool, True for an image token.
        images: How many images came with the prompts.
        tokens: Positions that an image takes.

    Raises:
        ValueError: If the image tokens are not so many images of `tokens` adjacent positions each.
    """
    spans = [_spans_of_row(row, tokens) for row in is_image.cpu()]
    expected = sum(len(row) for row in spans)
    if expected != images:
        raise ValueError(f"the prompts have room for {expected} images, but {images} came with them")
    return spans


def _spans_of_row(is_image: torch.Tensor, tokens: int) -> list[Span]:
    positions = is_image.nonzero().flatten()
    starts, ends = positions[::tokens], positions[tokens - 1 :: tokens]
    if len(positions) % tokens or bool((ends - starts != tokens - 1).any()):
        raise ValueError(
            f"a prompt has {len(positions)} image tokens, but every image takes {tokens} of them without a gap; build "
            "prompts with the model's processor"
        )
    return [Span(int(start), int(end) + 1) for start, end in zip(starts, ends)]
