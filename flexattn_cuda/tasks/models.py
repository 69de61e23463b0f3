"""What the tasks need of a model and its processor: this package's LLaVA, or any model that FlexAttention was attached
to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
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

    def prompt(self, question: str, images: int = 1) -> str: ...

    def prompt_length(self, question: str, image: Any = None) -> int: ...

    def frame(self, width: int, height: int) -> Frame: ...

    def __call__(self, images: Any = None, text: str | Sequence[str] | None = None) -> BatchFeature: ...


def max_positions(model: HRModel) -> int:
    """Return the maximum length of a model's sequence."""
    positions: int = model.config.get_text_config().max_position_embeddings
    return positions
