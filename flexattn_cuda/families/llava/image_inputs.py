"""The images of a forward call as its caller gives them: pixels, or tokens that were encoded before."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from flexattn_cuda.families.calls import check_valid_rect
from flexattn_cuda.families.llava.config import FlexAttnLlavaConfig
from flexattn_cuda.mechanism.call import NewImages, Span
from flexattn_cuda.mechanism.grid import ImageGrids


@dataclass(frozen=True)
class ImageInputs:
    """Arguments of `forward` about images; each is documented there."""

    pixel_values: torch.Tensor | None = None
    pixel_values_hr: torch.Tensor | None = None
    image_features: torch.Tensor | None = None
    hr_features: torch.Tensor | None = None
    valid_rect: torch.Tensor | None = None
    rows_per_prompt: int = 1

    @property
    def given(self) -> bool:
        return self._first() is not None

    @property
    def count(self) -> int:
        """n, the number of images."""
        first = self._first()
        return 0 if first is None else len(first)

    @property
    def have_hr(self) -> bool:
        return self.pixel_values_hr is not None or self.hr_features is not None

    def check_alternatives(self) -> None:
        """Raise ValueError unless the images come either as pixels or as features of both resolutions."""
        pixels = self.pixel_values is not None or self.pixel_values_hr is not None
        if pixels and (self.image_features is not None or self.hr_features is not None):
            raise ValueError("pass either pixels or features of the images")
        if self.hr_features is not None and self.image_features is None:
            raise ValueError("hr_features need image_features: the low-resolution tokens of the same images")

    def check_rows(self, batch: int) -> None:
        """Raise ValueError unless the rows of the batch are whole prompts."""
        if self.rows_per_prompt < 1 or batch % self.rows_per_prompt:
            raise ValueError(f"the batch has {batch} rows, which are not prompts of {self.rows_per_prompt} rows each")

    def check_hr(self, config: FlexAttnLlavaConfig) -> None:
        """Raise ValueError unless what came with the encoded images is of as many, and of the right size."""
        assert self.image_features is not None
        count, _, width = self.image_features.shape
        expected = [count, config.hr_grid.cells, width]
        if self.hr_features is not None and list(self.hr_features.shape) != expected:
            raise ValueError(
                f"hr_features has shape {list(self.hr_features.shape)}; for these prompts it must be {expected}"
            )
        if self.pixel_values_hr is not None and len(self.pixel_values_hr) != count:
            raise ValueError(f"pixel_values_hr holds {len(self.pixel_values_hr)} images; these prompts have {count}")
        if self.valid_rect is not None:
            check_valid_rect(self.valid_rect, [config.lr_grid] * count)

    def with_features(self, image_features: torch.Tensor, hr_features: torch.Tensor | None) -> ImageInputs:
        """Return the same images with their tokens."""
        return replace(self, image_features=image_features, hr_features=hr_features)

    def new_images(self, spans: list[list[Span]], grids: ImageGrids) -> NewImages:
        """Return what the mechanism needs to know of the images, which all have the same grids."""
        return NewImages(
            spans, [grids] * self.count, self.pixel_values_hr, self.hr_features, self.valid_rect, self.rows_per_prompt
        )

    def _first(self) -> torch.Tensor | None:
        alternatives = (self.pixel_values, self.pixel_values_hr, self.image_features)
        return next((images for images in alternatives if images is not None), None)
