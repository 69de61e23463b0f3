"""RefCOCO with large and small objects: which box does a sentence describe?

A row of `lmms-lab-encoder/RefCOCO` is an object: its `image`, its `bbox` (left, top, width and height in pixels), and
sentences that describe it, as `answer`. A model of LLaVA's training answers [left, top, right, bottom] in shares of the
square that the image is padded to. An answer is right if it overlaps the box by at least half, measured by intersection
over union. An object is large if its box takes more than 5 % of the image (section 5.5, table 4).
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from flexattn_cuda.errors import InputError
from flexattn_cuda.inputs.frames import padded_square

if TYPE_CHECKING:
    from datasets import Dataset

FIELDS = ("image", "bbox", "answer")
PARTS_OF_A_LARGE_OBJECT = 20  # of the image: 5 %
_REQUEST = "Please provide the bounding box coordinate of the region this sentence describes: "
_NUMBER = r"\s*(-?\d*\.?\d+)\s*"
_BOX = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]")


class Box(NamedTuple):
    """A rectangle in pixels of the image."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def area(self) -> float:
        """In pixels; 0 if it is turned inside out."""
        return max(0.0, self.right - self.left) * max(0.0, self.bottom - self.top)

    def overlap(self, other: Box) -> float:
        """Return intersection over union; 0 if neither has an area."""
        shared = Box(*map(max, self[:2], other[:2]), *map(min, self[2:], other[2:])).area
        union = self.area + other.area - shared
        return shared / union if union else 0.0


def one_per_sentence(rows: Dataset) -> Dataset:
    """Return a row for each sentence, with image, sentence, box (left, top, right, bottom), width and height.

    Raises:
        InputError: If the rows lack a field.
    """
    from datasets import Image as ImageFeature

    missing = [name for name in FIELDS if name not in rows.column_names]
    if missing:
        raise InputError(
            f"the rows of RefCOCO have no {missing[0]}; they have {', '.join(rows.column_names)}, and the fields of "
            f"lmms-lab-encoder/RefCOCO are {', '.join(FIELDS)}"
        )
    encoded = rows.select_columns(list(FIELDS)).cast_column("image", ImageFeature(decode=False))
    expanded = encoded.map(_expanded, batched=True, batch_size=64, remove_columns=list(FIELDS))
    return expanded.rename_column("picture", "image").cast_column("image", ImageFeature())


def _expanded(batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    rows = []
    for encoded, (left, top, width, height), sentences in zip(batch["image"], batch["bbox"], batch["answer"]):
        with Image.open(encoded["path"] if encoded["bytes"] is None else io.BytesIO(encoded["bytes"])) as image:
            size = {"width": image.width, "height": image.height}
        own = {"picture": encoded, "box": [left, top, left + width, top + height], **size}
        rows += [{**own, "sentence": sentence} for sentence in sentences]
    names = ("picture", "box", "width", "height", "sentence")
    return {name: [row[name] for row in rows] for name in names}


def images(doc: Mapping[str, Any]) -> list[Image.Image]:
    """Return the image of a question."""
    return [doc["image"]]


def prompt(doc: Mapping[str, Any]) -> str:
    """Return what is asked, in the words of LLaVA's training data."""
    return _REQUEST + doc["sentence"]


def accuracies(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return whether the answer is right, as a metric of all objects and of those of this size."""
    wanted, found = Box(*doc["box"]), box_in(results[0], doc["width"], doc["height"])
    right = float(found is not None and wanted.overlap(found) >= 0.5)
    size = "large" if is_large(wanted, doc["width"], doc["height"]) else "small"
    return {"refcoco_acc": right, f"refcoco_{size}_acc": right}


def is_large(box: Box, width: int, height: int) -> bool:
    """Return whether a box takes more than 5 % of an image of width x height pixels."""
    return box.area * PARTS_OF_A_LARGE_OBJECT > width * height


def box_in(answer: str, width: int, height: int) -> Box | None:
    """Return the first box of an answer about an image of width x height pixels; None if it has none."""
    found = _BOX.search(answer)
    if found is None:
        return None
    left, top, right, bottom = map(float, found.groups())
    frame = padded_square(width, height)
    return Box(
        frame.left + left * frame.width,
        frame.top + top * frame.height,
        frame.left + right * frame.width,
        frame.top + bottom * frame.height,
    )
