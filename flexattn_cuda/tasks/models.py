"""What the tasks need of a model and its processor: this package's LLaVA, or any model that FlexAttention was attached
to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from PIL import Image
from transformers import BatchFeature, GenerationConfig, PreTrainedConfig

from flexattn_cuda.inputs.frames import Frame
from flexattn_cuda.mechanism.config import FlexAttnConfig


class HRModel(Protocol):
    """A model that takes high-resolution (HR) images.

    Attributes:
        flexattn_settings: Settings of the mechanism; None for a plain model.
    """

    config: PreTrainedConfig
    generation_config: GenerationConfig

    @property
    def device(self) -> torch.device: ...

    @property
    def flexattn_settings(self) -> FlexAttnConfig | None: ...

    def generate(self, **inputs: Any) -> torch.Tensor: ...


class QuestionProcessor(Protocol):
    """A processor that turns questions about images into what a model takes; `HRProcessor` documents the methods."""

    tokenizer: Any

    @property
    def cell(self) -> int: ...

    def prompt(self, question: str, images: int = 1) -> str: ...

    def prompt_length(self, question: str, image: Any = None) -> int: ...

    def frame(self, width: int, height: int) -> Frame: ...

    def __call__(self, images: Any = None, text: str | Sequence[str] | None = None) -> BatchFeature: ...


class TrainingProcessor(QuestionProcessor, Protocol):
    """A processor that also turns conversations into what a model is trained on.

    Attributes:
        image_token_id: The id of an image token.
        token_types: Name of the model input that is 1 at image tokens and 0 elsewhere; None: there is none.
    """

    image_token_id: int

    @property
    def token_types(self) -> str | None: ...

    @property
    def pad_id(self) -> int: ...

    @property
    def image_tokens(self) -> int | None: ...

    def image_tokens_of(self, width: int, height: int) -> int: ...

    def image_inputs(self, images: Sequence[Image.Image]) -> dict[str, Any]: ...

    def conversation_text(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str: ...

    def conversation_ids(self, text: str, image_tokens: Sequence[int]) -> list[int]: ...

    def conversation_inputs(self, text: str, image_tokens: Sequence[int]) -> dict[str, list[int]]: ...


def selects(model: HRModel) -> bool:
    """Return whether a model selects HR tokens by its attention maps."""
    settings = model.flexattn_settings
    return settings is not None and settings.system == "flexattn"


def on_device(inputs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a model's inputs, tensors or lists of tensors, on a device."""
    return {
        name: [one.to(device) for one in value] if isinstance(value, list) else value.to(device)
        for name, value in inputs.items()
    }


def max_positions(model: HRModel) -> int:
    """Return the maximum length of a model's sequence."""
    positions: int = model.config.get_text_config().max_position_embeddings
    return positions
