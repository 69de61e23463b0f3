"""What the tests of the small study share: stand-ins for photographs, and tables."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows that all have the same columns."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
