"""A record of what a model looked at, for overlays and for checks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch


class LayerTrace(NamedTuple):
    """What one layer's attention map selected for the layer after it.

    map: [B, R, I, S*S] float: head-summed probabilities of R query rows over the LR tokens of I images.
    mask: [B, R, I, h*h] bool: the HR tokens that this map selects.
    """

    map: torch.Tensor
    mask: torch.Tensor


@dataclass
class Trace:
    """Pass `flexattn_trace=Trace()` to `generate` or to the model: every forward call appends one entry to `steps`.

    steps[t][layer] is a `LayerTrace`. With `generate`, step 0 is the prompt (its last row predicts the first answer
    token) and step t the call that predicts answer token t. Layers are counted from 0; the first is the layer before
    the first one with HR tokens. The last layer's map is recorded too, though nothing attends to what it selects.
    """

    steps: list[dict[int, LayerTrace]] = field(default_factory=list)
