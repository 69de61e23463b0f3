"""Find the layer whose attention map shows where the answer is, and fit the settings of FlexAttention to it.

The presets are made for LLaVA-7B. Another model may look at the right place earlier or later, and its maps may be
flatter or sharper. A handful of questions tells:

model = flexattn_cuda.attach(AutoModelForImageTextToText.from_pretrained("OpenGVLab/InternVL3-1B-hf"))
processor = flexattn_cuda.processor_for(model)
tuning = flexattn_cuda.tune(model, processor, [Pointed("image.jpg", "Which digits are on the red sign?", box)])
flexattn_cuda.save_adapter(model, "tuned")
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel

from flexattn_cuda import ops
from flexattn_cuda.analysis.overlay import cells_of_pixels
from flexattn_cuda.errors import InputError
from flexattn_cuda.families.attach import attached_model, refit
from flexattn_cuda.families.attached import AttachedModel
from flexattn_cuda.inputs.hr_processor import HRProcessor
from flexattn_cuda.inputs.image_sources import read_image
from flexattn_cuda.mechanism.config import FlexAttnConfig
from flexattn_cuda.mechanism.grid import pooled_sizes
from flexattn_cuda.mechanism.trace import LayerTrace, Trace

_STEPS = 20  # of the search for a threshold, which halves the interval


@dataclass(frozen=True)
class Pointed:
    """A question about an image, and where its answer is.

    Attributes:
        image: A file, a URL, or a PIL image.
        question: The question.
        box: (left, top, right, bottom) of what the answer is read from, in pixels of the upright image; None if that
            is not known.
    """

    image: str | Path | Image.Image
    question: str
    box: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class Tuning:
    """What was found.

    Attributes:
        settings: The model's settings now.
        measure: "boxes": how often a map ranks a cell inside the box above one outside (area under the ROC curve, 0.5
            by chance). "entropy": 1 minus a map's entropy over that of a flat one (0 for a flat map).
        scores: By layer, the mean of the measure over the examples; of every layer but the last.
        share: Share of the high-resolution tokens that the settings select, mean over examples and layers.
    """

    settings: FlexAttnConfig
    measure: str
    scores: dict[int, float]
    share: float

    @property
    def map_layer(self) -> int:
        """The layer whose map localises best: the one before the first that attends to HR tokens."""
        return self.settings.first_layer - 1


def tune(model: PreTrainedModel, processor: HRProcessor, examples: Sequence[Pointed], share: float = 0.1) -> Tuning:
    """Choose the first layer with high-resolution (HR) tokens and the threshold by the maps of the model itself.

    The layer before the first one with HR tokens becomes the one whose map localises best, and the threshold the one
    at which the maps from there on select `share` of the HR tokens. The model gets these settings. Projections that the
    new settings need start as copies of the model's own, so tune before training.

    Args:
        model: One that FlexAttention was attached to.
        processor: Its processor.
        examples: Questions, all of them with a box or none.
        share: Of the HR tokens that are to be selected, between 0 and 1; the paper's is about 0.1.

    Raises:
        InputError: If there are no examples, only some have a box, a box shows nothing of the image that the model
            sees, or the share is not between 0 and 1.
        ValueError: If FlexAttention is not attached to the model.
    """
    model = attached_model(model)
    with_box = [example.box is not None for example in examples]
    if not examples or any(with_box) != all(with_box):
        raise InputError(
            f"{sum(with_box)} of {len(examples)} examples have a box; pass at least one, and boxes for all or none"
        )
    if not 0 < share < 1:
        raise InputError(f"share is {share}; it must lie between 0 and 1, both excluded")
    seen = [_look(model, processor, example) for example in examples]
    scores = {layer: float(np.mean([one.score(layer) for one in seen])) for layer in range(len(seen[0].layers) - 1)}
    best = max(scores, key=lambda layer: scores[layer])
    settings = dataclasses.replace(model.flexattn_settings, first_layer=best + 1)
    threshold, reached = _threshold(settings, seen, share)
    refit(model, dataclasses.replace(settings, threshold=threshold))
    measure = "boxes" if all(with_box) else "entropy"
    return Tuning(model.flexattn_settings, measure, scores, reached)


def read_examples(path: Path) -> list[Pointed]:
    """Read questions from JSON lines with "image" (relative to the file), "question" and perhaps "box".

    Raises:
        InputError: If the file cannot be read, or a line is not such an object.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', error)}") from None
    return [_read_example(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def _read_example(path: Path, number: int, line: str) -> Pointed:
    try:
        record = json.loads(line)
        image, question, box = record["image"], record["question"], record.get("box")
        if not isinstance(image, str) or not isinstance(question, str):
            raise TypeError("image and question must be strings")
        if box is not None and (len(box) != 4 or not all(isinstance(edge, (int, float)) for edge in box)):
            raise TypeError("a box is [left, top, right, bottom] in pixels")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(
            f'line {number} of {path} is not an object with "image", "question" and perhaps "box": {error}'
        ) from None
    return Pointed(path.parent / image, question, None if box is None else tuple(box))


@dataclass(frozen=True)
class _Seen:
    """The maps of one example's last prompt row.

    Attributes:
        layers: By layer.
        valid_rect: [1, 1, 4] int32, the image inside its padding in LR cells.
        inside: [S_h, S_w] bool, cells of the box; None without one.
    """

    layers: dict[int, LayerTrace]
    valid_rect: torch.Tensor
    inside: np.ndarray | None

    def score(self, layer: int) -> float:
        """Return how well a layer's map localises, 1 at best."""
        attention_map = self.layers[layer].of_image(0, -1, 0)[0].double().cpu().numpy()
        top, left, bottom, right = self.valid_rect.flatten().tolist()
        valid = attention_map[top:bottom, left:right]
        if self.inside is None:
            return _sharpness(valid)
        return _ranking(valid, self.inside[top:bottom, left:right])

    def share(self, settings: FlexAttnConfig, threshold: float, layer: int) -> float:
        """Return the share of the HR tokens that a layer's map selects at a threshold."""
        traced = self.layers[layer]
        grids = traced.grids[0][0]
        lr_grid, hr_grid = (torch.tensor([[grid]], dtype=torch.int32) for grid in (grids.lr, grids.hr))
        selected = ops.select_tokens(
            traced.map[:, -1:].cpu(),
            lr_grid,
            hr_grid,
            hr_tokens=grids.hr.cells,
            scale=settings.scale,
            threshold=threshold,
            pool_grid=pooled_sizes(lr_grid, settings.pool) if settings.pool else None,
            valid_rect=self.valid_rect if settings.mask_padding else None,
        )
        return selected.count.item() / grids.hr.cells


@torch.no_grad()
def _look(model: AttachedModel, processor: HRProcessor, example: Pointed) -> _Seen:
    """Ask a question, and keep the maps of every layer."""
    image, trace = read_image(example.image), Trace(every_layer=True)
    inputs = processor(images=[image], text=processor.prompt(example.question)).to(model.device)
    with _nothing_selected(model):
        model(**inputs, flexattn_trace=trace)
    [layers] = trace.steps
    lr = layers[0].grids[0][0].lr
    rect = inputs.get("valid_rect", torch.tensor([[0, 0, *lr]])).cpu().to(torch.int32)
    inside = None
    if example.box is not None:
        inside = _cells_of_box(image, example.box, lr, processor)
        top, left, bottom, right = rect.flatten().tolist()
        shown = inside[top:bottom, left:right]
        if shown.all() or not shown.any():
            raise InputError(
                f"the box {example.box} covers {'all' if shown.all() else 'nothing'} of the {lr} cells that the model "
                "sees of the image; pass a smaller box inside of the image, in pixels"
            )
    return _Seen(layers, rect[None], inside)


@contextlib.contextmanager
def _nothing_selected(model: AttachedModel) -> Iterator[None]:
    """Let the model attend to low-resolution tokens alone, so that its maps are its own in every layer."""
    family = model.hr_family
    before = family.settings
    family.set_settings(dataclasses.replace(before, threshold=2 * before.scale, strategy="attention"))
    try:
        yield
    finally:
        family.set_settings(before)


def _cells_of_box(
    image: Image.Image, box: tuple[float, float, float, float], lr: tuple[int, int], processor: HRProcessor
) -> np.ndarray:
    """Return [S_h, S_w] bool: the cells that a box touches."""
    rows, cols = cells_of_pixels(*image.size, lr, processor.frame)
    left, top, right, bottom = (round(edge) for edge in box)
    inside = np.zeros(lr, dtype=bool)
    touched = [cells[max(first, 0) : max(last, 0)] for cells, first, last in ((rows, top, bottom), (cols, left, right))]
    inside[np.ix_(*(np.unique(cells[cells >= 0]) for cells in touched))] = True
    return inside


def _ranking(attention_map: np.ndarray, inside: np.ndarray) -> float:
    """Return the probability that a cell inside has more attention than one outside; ties count half."""
    ours, others = attention_map[inside], attention_map[~inside]
    above = (ours[:, None] > others).sum() + 0.5 * (ours[:, None] == others).sum()
    return float(above / (ours.size * others.size))


def _sharpness(attention_map: np.ndarray) -> float:
    """Return 1 minus the entropy of a map over that of a flat one: 0 for a flat map, 1 for a single cell."""
    p = attention_map[attention_map > 0] / attention_map.sum()
    return float(1 + (p * np.log(p)).sum() / np.log(attention_map.size))


def _threshold(settings: FlexAttnConfig, seen: Sequence[_Seen], share: float) -> tuple[float, float]:
    """Return the lowest threshold, to 2^-20 of the map's range, whose mean share is at most `share`, and its share."""
    layers = range(settings.first_layer - 1, len(seen[0].layers) - 1)

    def mean_share(threshold: float) -> float:
        return float(np.mean([one.share(settings, threshold, layer) for one in seen for layer in layers]))

    low, high = 0.0, settings.scale
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_share(middle) > share else (low, middle)
    return high, mean_share(high)
