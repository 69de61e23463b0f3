"""Stand-ins for the photographs of the study."""

from __future__ import annotations

import numpy as np
from PIL import Image


def photograph(seed: int) -> Image.Image:
    """Return smooth noise."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((240, 180), Image.Resampling.BICUBIC)
