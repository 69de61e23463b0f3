"""Attention maps and selections in JSON."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from flexattn_cuda.mechanism.trace import LayerTrace
from flexattn_cuda.serve.images import ServedImage

Step = Mapping[int, LayerTrace]
"""What one forward call looked at, by layer."""


def image_view(image: ServedImage) -> dict[str, Any]:
    """Return the size of an image and the frame of its grids: left, top, width and height in pixels of the image."""
    return {"width": image.width, "height": image.height, "frame": [float(side) for side in image.frame]}


def token_view(step: Step, row: int, images: Sequence[ServedImage], piece: str, end: bool) -> dict[str, Any]:
    """Return what the model looked at when it predicted a token.

    Args:
        step: Of the whole batch.
        row: The row of the batch.
        images: Of that row.
        piece: The text of the token.
        end: Whether it is the one that ends the answer.
    """
    layers = {
        str(layer): [_of_image(traced, row, number) for number in range(len(images))] for layer, traced in step.items()
    }
    return {"text": piece, "end": end, "layers": layers}


def _of_image(traced: LayerTrace, row: int, image: int) -> dict[str, Any]:
    """Return a map as bytes, 255 for its peak, and the selection as bits, both row by row, in base64."""
    attention, mask = (part.cpu() for part in traced.of_image(row=row, query=-1, image=image))
    levels = attention.float() / attention.float().max().clamp_min(torch.finfo(torch.float32).tiny) * 255
    return {
        "map": _grid(levels.round().to(torch.uint8).numpy()),
        "selected": _grid(mask.numpy(), np.packbits(mask.numpy())),
        "share": mask.float().mean().item(),
    }


def _grid(values: np.ndarray, packed: np.ndarray | None = None) -> dict[str, Any]:
    data = values if packed is None else packed
    return {"rows": values.shape[0], "columns": values.shape[1], "data": base64.b64encode(data.tobytes()).decode()}
