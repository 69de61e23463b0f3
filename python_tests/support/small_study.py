"""What the tests of the small study share: stand-ins for photographs, and tables."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image


def photograph(seed: int) -> Image.Image:
    """Return smooth noise."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((240, 180), Image.Resampling.BICUBIC)


def read_csv(path: Path) -> list[dict[str, str]]:
    """Return the rows of a table."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))
