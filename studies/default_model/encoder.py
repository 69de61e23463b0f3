"""The first stage of the default model: every token of an image learns what it shows of a sign.

Linear heads, thrown away afterwards, tell from each half of a token the colour of the sign there, the glyph, and its
place counted from the left and from the right; others tell the token's own row and column. The projector's outputs are
then whitened, and all is frozen.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from flexattn_cuda.inputs.processor import FlexAttnLlavaImageProcessor
from studies.default_model.signs import LETTERS, MOST_GLYPHS, Look, SignPainter, photographed, signs_in_square
from studies.small.encoder_data import normalised_pixels
from studies.small.encoder_stage import EncoderStage
from studies.small.objects import COLORS, SHAPES, Sign
from studies.small.painter import REFERENCE_SIDE, SIDE
from studies.small.small_model import ModelSizes
from studies.small.stage import train_stage
from studies.small.token_labels import GLYPH, PLATE, LabelledImages, TokenHeads, TokenLabels

SIZES = ModelSizes(lowres=128, vision_layers=4, width=96, layers=5, heads=6)
HALVES = 2
BATCH = 16  # images
_PLACES = tuple(str(place) for place in range(MOST_GLYPHS))
CLASSES = {
    "colour": tuple(COLORS),
    "glyph": (*"0123456789", *LETTERS, *SHAPES),
    "from left": _PLACES,
    "from right": _PLACES,
}
_SIDE = tuple(map(str, range(SIZES.lr_side)))
_OWN_CLASSES = {"row": _SIDE, "column": _SIDE}  # of a token, whatever it shows
_NOTHING_WEIGHTS = {"colour": 0.5, "glyph": 0.2, "from left": 0.2, "from right": 0.2}
_WHOLE_SHARE = 0.2  # of whole images among those of a batch
_MARGIN = 32  # pixels that a tile's crop can move


def token_labels(signs: Sequence[Sign], with_glyphs: bool) -> list[torch.Tensor]:
    """Return what the tokens of a lowres x lowres image show: [S*S] for each of CLASSES and each half, row and column.

    A glyph's place is unsure if the end of the sign that it is counted from lies outside of the image.
    """
    labels = TokenLabels(SIZES.lr_side, SIZES.patch, CLASSES, HALVES)
    for sign in signs:
        labels.mark("colour", sign.color, sign.box, PLATE)
        if not with_glyphs:
            continue
        last = len(sign.glyphs) - 1
        first_inside, last_inside = (labels.is_inside(sign.glyphs[end].box) for end in (0, last))
        for place, glyph in enumerate(sign.glyphs):
            readable = labels.is_inside(glyph.box)
            labels.mark("glyph", glyph.name, glyph.box, GLYPH, readable)
            labels.mark("from left", str(place), glyph.box, GLYPH, readable and first_inside)
            labels.mark("from right", str(last - place), glyph.box, GLYPH, readable and last_inside)
    rows, columns = torch.meshgrid(*[torch.arange(SIZES.lr_side)] * 2, indexing="ij")
    return [*labels.tensors(), rows.flatten(), columns.flatten()]


class SignCrops(Dataset):
    """Batches of crops at the resolution of the tiles, with whole low-resolution images among them, by step.

    Args:
        photographs: Backgrounds.
        look: Of the signs.
        images: The processor's image processor.
        seed: Of all batches.
        count: Images in a batch.
    """

    def __init__(
        self,
        photographs: list[Image.Image],
        look: Look,
        images: FlexAttnLlavaImageProcessor,
        seed: str,
        count: int = BATCH,
    ):
        self.photographs, self.look, self.images, self.seed, self.count = photographs, look, images, seed, count

    def __getitem__(self, step: int) -> LabelledImages:
        painter = SignPainter(self.photographs, self.look, random.Random(f"{self.seed} {step}"))
        return LabelledImages.stack([self._image(painter) for _ in range(self.count)])

    def _image(self, painter: SignPainter) -> LabelledImages:
        return self.whole(painter) if painter.rng.random() < _WHOLE_SHARE else self.tile(painter)

    def tile(self, painter: SignPainter) -> LabelledImages:
        """Return a crop of a crowded image that was taken at three quarters to twice the resolution of the tiles."""
        rng, low = painter.rng, SIZES.lowres
        canvas = low + _MARGIN
        taken = round(canvas * rng.choice((0.75, 1.0, 1.0, 1.5, 2.0)))
        drawing = painter.crowd(taken, SIDE / REFERENCE_SIDE * taken / canvas)
        image = photographed(drawing.image, rng).resize((canvas, canvas), Image.Resampling.BICUBIC)
        left, top = rng.randint(0, _MARGIN), rng.randint(0, _MARGIN)
        crop, ratio = image.crop((left, top, left + low, top + low)), canvas / taken
        signs = [sign.moved(left / ratio, top / ratio, ratio) for sign in drawing.signs]
        return LabelledImages(normalised_pixels(crop, self.images), token_labels(signs, True))

    def whole(self, painter: SignPainter) -> LabelledImages:
        """Return an image at low resolution, where glyphs cannot be read."""
        drawing = painter.image(SIDE)
        pixels = self.images([photographed(drawing.image, painter.rng)])["pixel_values"][0]
        return LabelledImages(pixels, token_labels(signs_in_square(drawing, SIZES.lowres), False))


def train_encoder(model, data: SignCrops, held_out: SignCrops, steps: int, keep: Path) -> None:
    """Train vision tower and projector, resuming from `keep` if that exists."""
    kinds = {f"{kind} {half}": names for kind, names in CLASSES.items() for half in range(HALVES)}
    nothing_weights = [_NOTHING_WEIGHTS[kind.rpartition(" ")[0]] for kind in kinds] + [1.0] * len(_OWN_CLASSES)
    heads = TokenHeads(SIZES.width, kinds | _OWN_CLASSES, nothing_weights)
    held_out_batches = {"tiles": LabelledImages.stack([*map(held_out.tile, _painters(held_out, 96))])}
    stage = EncoderStage(model, heads, batches_from(data, steps), held_out_batches)
    stage.rate = 8e-3
    train_stage(stage, steps, keep)
    stage.freeze()


def batches_from(data: SignCrops, steps: int) -> Callable[[int], LabelledImages]:
    """Return a function that returns the batch of a step; a process of its own draws the ones after it."""
    batches: Iterator[LabelledImages] | None = None

    def batch(step: int) -> LabelledImages:
        nonlocal batches
        if batches is None:
            loader = DataLoader(data, None, sampler=range(step, steps + 1), num_workers=1, prefetch_factor=8)
            batches = iter(loader)
        return next(batches)

    return batch


def _painters(data: SignCrops, count: int) -> Iterator[SignPainter]:
    for number in range(count):
        yield SignPainter(data.photographs, data.look, random.Random(f"{data.seed} {number}"))
