"""What each token of an image shows: the labels that the encoder learns from, and the heads that learn them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from studies.small.objects import COLORS, SHAPES, VEHICLES, Box, Glyph, Sign

Classes = Mapping[str, Sequence[str]]
"""By kind of label, the classes that its head tells apart, besides "nothing"."""

GLYPHS = (*"0123456789", *SHAPES)
CLASSES = {"colour": tuple(COLORS), "glyph": GLYPHS, "position": ("first", "second"), "vehicle": VEHICLES}
UNSURE = -100  # a token that shows too little of an object to learn from; cross_entropy ignores it
READABLE_PIXELS = 6.0  # height from which a glyph, and length from which a vehicle, can be told apart


class Thresholds(NamedTuple):
    """A token that shows a share of an object above `shown` is labelled with it; up to `hidden`, with nothing."""

    hidden: float
    shown: float


PLATE = Thresholds(hidden=0.0, shown=0.15)
GLYPH = Thresholds(hidden=0.02, shown=0.3)


class TokenLabels:
    """Labels of the tokens of a square image, marked object by object.

    Args:
        side: Tokens per side.
        patch: Side of a token in pixels.
        classes: Kinds of labels and their classes.
        parts: Parts of a token, from left to right, that are labelled each: a token may show two narrow glyphs.

    Attributes:
        labels: By kind, [side, side * parts] int64: a class, the number of classes for "nothing", or UNSURE.
    """

    def __init__(self, side: int, patch: int, classes: Classes = CLASSES, parts: int = 1):
        self.side, self.patch, self.classes, self.parts = side, patch, classes, parts
        self.labels = {kind: np.full((side, side * parts), len(names)) for kind, names in classes.items()}
        self._max_share = {kind: np.zeros((side, side * parts)) for kind in classes}

    def share(self, box: Box) -> np.ndarray:
        """Return how much of a box each part of a token shows, of what it could at most, [side, side * parts]."""
        width = self.patch / self.parts
        columns = _overlap(box.left, box.right, self.side * self.parts, width)
        rows = _overlap(box.top, box.bottom, self.side, self.patch)
        return rows[:, None] * columns / min(self.patch * width, box.width * box.height)

    def mark(self, kind: str, name: str, box: Box, thresholds: Thresholds, readable: bool = True) -> None:
        """Label the tokens of an object, where no other object of the kind shows more.

        Tokens between the thresholds become UNSURE, as do all of an object that is not readable.
        """
        share, max_share, label = self.share(box), self._max_share[kind], self.labels[kind]
        if not readable:
            label[(share > thresholds.hidden) & (max_share == 0)] = UNSURE
            return
        label[(share > thresholds.hidden) & (share <= thresholds.shown) & (max_share == 0)] = UNSURE
        label[(share > thresholds.shown) & (share > max_share)] = list(self.classes[kind]).index(name)
        np.maximum(max_share, share, out=max_share)

    def add_sign(self, sign: Sign) -> None:
        """Mark a sign's colour, its glyphs and, if there are two, which is which."""
        self.mark("colour", sign.color, sign.box, PLATE)
        for position, glyph in zip(self.classes["position"], sign.glyphs):
            readable = glyph.box.height >= READABLE_PIXELS and self.is_inside(glyph.box)
            self.mark("glyph", glyph.name, glyph.box, GLYPH, readable)
            self.mark("position", position, glyph.box, GLYPH, readable and len(sign.glyphs) > 1)

    def add_vehicle(self, vehicle: Glyph) -> None:
        """Mark a vehicle's kind."""
        readable = vehicle.box.width >= READABLE_PIXELS and self.is_inside(vehicle.box)
        self.mark("vehicle", vehicle.name, vehicle.box, GLYPH, readable)

    def is_inside(self, box: Box) -> bool:
        """Return whether over 60 % of a box is in the image: at the edge of a tile, objects are cut."""
        size = self.side * self.patch
        width = max(0, min(box.right, size) - max(box.left, 0))
        height = max(0, min(box.bottom, size) - max(box.top, 0))
        return width * height > 0.6 * box.width * box.height

    def tensors(self) -> list[torch.Tensor]:
        """Return the labels, [side * side] for each kind and, of a kind, for each part."""
        labels = (torch.from_numpy(label).view(-1, self.parts) for label in self.labels.values())
        return [part for label in labels for part in label.unbind(-1)]


def _overlap(low: float, high: float, count: int, width: float) -> np.ndarray:
    """Return how much of the interval from `low` to `high` each of `count` intervals of a width covers, [count]."""
    start = np.arange(count) * width
    return np.clip(np.minimum(high, start + width) - np.maximum(low, start), 0, None)


class LabelledImages(NamedTuple):
    """An image or a batch with the labels of its tokens.

    pixels: [3, s, s] or [n, 3, s, s] float32, normalised.
    labels: For each kind of label, [tokens] or [n, tokens] int64.
    """

    pixels: torch.Tensor
    labels: list[torch.Tensor]

    @classmethod
    def stack(cls, images: Sequence[LabelledImages]) -> LabelledImages:
        """Return single images as a batch."""
        labels = [torch.stack(of_kind) for of_kind in zip(*(image.labels for image in images))]
        return cls(torch.stack([image.pixels for image in images]), labels)


class TokenHeads(nn.Module):
    """Linear heads that tell from a token what is drawn there, one for each kind of label.

    Args:
        width: Channels of a token.
        classes: Kinds of labels and their classes.
        nothing_weights: By kind, the weight of "nothing" in the loss: most tokens show nothing.
    """

    def __init__(self, width: int, classes: Classes, nothing_weights: Sequence[float]):
        super().__init__()
        self.kinds = tuple(classes)
        self.heads = nn.ModuleList(nn.Linear(width, len(names) + 1) for names in classes.values())
        self._weights = [
            torch.tensor([1.0] * len(names) + [weight]) for names, weight in zip(classes.values(), nothing_weights)
        ]

    def loss(self, tokens: torch.Tensor, labels: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the cross-entropy of tokens [n, tokens, D], summed over the heads."""
        return sum(
            functional.cross_entropy(head(tokens).flatten(0, 1), label.flatten(), weight=weight)
            for head, label, weight in zip(self.heads, labels, self._weights)
        )

    def accuracies(self, tokens: torch.Tensor, labels: Sequence[torch.Tensor]) -> dict[str, float]:
        """Return each head's accuracy on the tokens that show something, without the kinds that no token shows."""
        found = {}
        for kind, head, label in zip(self.kinds, self.heads, labels):
            shown = (label < head.out_features - 1) & (label != UNSURE)
            if shown.any():
                found[kind] = (head(tokens).argmax(-1) == label)[shown].float().mean().item()
        return found
