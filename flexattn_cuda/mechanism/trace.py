"""A record of what a model looked at, for overlays and for checks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from flexattn_cuda.mechanism.grid import BatchGrids


class LayerTrace(NamedTuple):
    """What one layer's attention map selected for the layer after it.

    Attributes:
        map: [B, R, I, C] float: head-summed probabilities of R query rows over the LR tokens of I images. Of an image
            with fewer than C, what follows them says nothing.
        mask: [B, R, I, T] bool: the HR tokens that this map selects.
        grids: Of the I images of each of G prompts; B / G rows of the batch share a prompt's.
    """

    map: torch.Tensor
    mask: torch.Tensor
    grids: BatchGrids

    def of_image(self, row: int, query: int, image: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return map and mask of one image in their grids, [rows, cols] each, for a row of the batch and its query."""
        grids = self.grids[row // (len(self.map) // len(self.grids))][image]
        attention_map, mask = self.map[row, query, image], self.mask[row, query, image]
        return attention_map[: grids.lr.cells].view(grids.lr), mask[: grids.hr.cells].view(grids.hr)


@dataclass
class Trace:
    """Pass `flexattn_trace=Trace()` to `generate` or to the model: every forward call appends one entry to `steps`.

    Attributes:
        steps: `steps[t][layer]` is a `LayerTrace`. With `generate`, step 0 is the prompt (its last row predicts the
            first answer token) and step t the call that predicts answer token t. Layers are counted from 0; the first
            is the layer before the first one with HR tokens. The last layer's map is recorded too, although nothing
            attends to what it selects.
        every_layer: Record the maps of the layers before that one too, although nothing attends to what they select.
    """

    steps: list[dict[int, LayerTrace]] = field(default_factory=list)
    every_layer: bool = False
