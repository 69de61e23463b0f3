"""What this package adds to the arguments of a model's forward."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

from flexattn_cuda.families.family import Pixels
from flexattn_cuda.mechanism.trace import Trace

IMAGE_ARGUMENTS = ("pixel_values_hr", "image_features", "hr_features")
"""Those that bring images, which come with a prompt alone."""


@dataclass(frozen=True)
class ForwardArguments:
    """What the forward of an attached model takes beside its own arguments.

    Attributes:
        pixel_values_hr: The n images of the prompts in high resolution, in their order: [n, 3, zoom*s, zoom*s], or n
            tensors [3, zoom*H, zoom*W] where sizes differ; float, normalised. Without them no row sees HR tokens.
        image_features: n times [S_h*S_w, D] from `encode`, in place of pixels: LR tokens of images that are asked about
            more than once. Families whose images all have one size take them.
        hr_features: n times [h*w, D], likewise; without them no row sees HR tokens.
        valid_rect: [n, 4] int, (top, left, bottom, right) of each image inside its padding, in cells of its LR grid,
            half-open; the whole grid when absent.
        rows_per_prompt: This many adjacent rows of the batch are beams of one prompt, which share its images.
            `generate` sets it.
        prompt_length: Positions of the sequence up to the end of the prompt, where that is not the end of this call or,
            with a cache, of the previous one. `generate` sets it.
        flexattn_trace: Records maps and selections.
        hr_alpha: Weight of the attention with HR tokens, 0 to 1.
        hr_cache: Keep the keys and values of HR tokens beside the key/value cache; if False, and where gradients are
            recorded, every call projects what it attends to.
        hr_capacity: Slots of each layer's pool of HR keys, which then never grows (CUDA graphs, compiled decoding).
        tiles_on_demand: Encode a tile when a selection first reaches it; if False, and where gradients are recorded,
            encode all tiles at once.
    """

    pixel_values_hr: Pixels | None = None
    image_features: Pixels | None = None
    hr_features: Pixels | None = None
    valid_rect: torch.Tensor | None = None
    rows_per_prompt: int = 1
    prompt_length: int | None = None
    flexattn_trace: Trace | None = None
    hr_alpha: float = 1.0
    hr_cache: bool = True
    hr_capacity: int | None = None
    tiles_on_demand: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.hr_alpha <= 1:  # NaN too
            raise ValueError(f"hr_alpha is {self.hr_alpha}; it must be a weight from 0 to 1")
        if self.hr_capacity is not None and self.hr_capacity < 1:
            raise ValueError(f"hr_capacity is {self.hr_capacity}; it must be at least 1, or None for pools that grow")
        if self.pixel_values_hr is not None and (self.image_features is not None or self.hr_features is not None):
            raise ValueError("pass either pixels or features of the images")
        if self.hr_features is not None and self.image_features is None:
            raise ValueError("hr_features need image_features: the low-resolution tokens of the same images")
        if not self.have_hr and self.valid_rect is not None:
            raise ValueError("valid_rect came without pixel_values_hr, whose images it is about; pass both")

    @property
    def have_hr(self) -> bool:
        """Whether images come in high resolution."""
        return self.pixel_values_hr is not None or self.hr_features is not None

    @property
    def have_images(self) -> bool:
        """Whether images come that this package embeds."""
        return self.have_hr or self.image_features is not None

    @classmethod
    def pop_from(cls, arguments: dict[str, Any]) -> ForwardArguments:
        """Take these out of the arguments of a call; raise ValueError if one is out of range, or lacks another."""
        return cls(**{field.name: arguments.pop(field.name) for field in fields(cls) if field.name in arguments})
