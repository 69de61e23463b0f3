"""Where the images of a batch of conversations stand in the sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flexattn_cuda.mechanism.grid import Grid


@dataclass
class ImageLayout:
    """The images of G prompts, I slots for each; a prompt with fewer images has empty slots.

    Attributes:
        lr_grid: S x S, the grid of an image's low-resolution tokens, which stand in the sequence.
        hr_grid: h x h, the grid of its high-resolution tokens, which do not.
        ranges: [G, I, 2] int32, the first sequence key of each image's LR tokens and one past the last; (0, 0) when
            absent.
        valid_rect: [G, I, 4] int32, the image inside its padding in LR cells; all 0 when absent.
        last_end: One past the last LR token of any image.
    """

    lr_grid: Grid
    hr_grid: Grid
    ranges: torch.Tensor
    valid_rect: torch.Tensor
    last_end: int = 0

    @property
    def prompts(self) -> int:
        """G."""
        return self.ranges.shape[0]

    @property
    def images(self) -> int:
        """I."""
        return self.ranges.shape[1]

    def present(self) -> torch.Tensor:
        """Return [G, I] bool, False for an empty slot."""
        return self.ranges[..., 1] > self.ranges[..., 0]

    def append(self, later: ImageLayout) -> None:
        """Add the images of the same prompts' next turn."""
        self.ranges = torch.cat([self.ranges, later.ranges.to(self.ranges.device)], dim=1)
        self.valid_rect = torch.cat([self.valid_rect, later.valid_rect.to(self.valid_rect.device)], dim=1)
        self.last_end = max(self.last_end, later.last_end)

    def crop(self, length: int) -> None:
        """Empty the slots of the images whose LR tokens are not all among the first `length` positions."""
        if self.last_end <= length:
            return
        gone = (self.ranges[..., 1] > length)[..., None]
        self.ranges = self.ranges.masked_fill(gone, 0)
        self.valid_rect = self.valid_rect.masked_fill(gone, 0)
        self.last_end = int(self.ranges.max())

    def select_prompts(self, prompts: torch.Tensor) -> None:
        """Keep the prompts of these numbers, in this order."""
        prompts = prompts.to(self.ranges.device)
        self.ranges, self.valid_rect = self.ranges[prompts], self.valid_rect[prompts]
