"""The stages of the default model before its answers: the encoder, and where to look."""

from __future__ import annotations

import random

import torch
from signs import SIDE, SignPainter
from torch.nn import functional

from flexattn_cuda.inputs.processor import FlexAttnLlavaImageProcessor
from studies.small.attention_maps import LayerMap, causal_visibility, cross_entropy, mass_and_largest, record_maps
from studies.small.batches import answer_cells, question_batch
from studies.small.encoded_scenes import EncodedScenes, Pick
from studies.small.encoder_data import normalised_pixels
from studies.small.encoder_stage import EncoderStage
from studies.small.objects import COLORS, Sign
from studies.small.optimizer import train_first_layers
from studies.small.small_model import DEFAULT_SIZES as SIZES
from studies.small.stage import Stage, train_stage
from studies.small.token_labels import GLYPH, PLATE, LabelledImages, TokenHeads, TokenLabels

ZOOM = 3
BATCH = 48  # questions
DIGITS = ("first digit", "second digit")
CLASSES = {"colour": tuple(COLORS), **dict.fromkeys(DIGITS, tuple("0123456789"))}
_NOTHING_WEIGHTS = (0.5, 0.3, 0.3)


def token_labels(signs: list[Sign], with_digits: bool) -> list[torch.Tensor]:
    """Return what each token of a lowres x lowres image shows: colour, first digit and second digit, each [S*S]."""
    labels = TokenLabels(SIZES.lr_side, SIZES.patch, CLASSES)
    for sign in signs:
        labels.mark("colour", sign.color, sign.box, PLATE)
        for kind, glyph in zip(DIGITS, sign.glyphs if with_digits else ()):
            labels.mark(kind, glyph.name, glyph.box, GLYPH)
    return labels.tensors()


class SignCrops:
    """Crops at the resolution of the tiles, and whole low-resolution images, with labels of their tokens."""

    def __init__(self, painter: SignPainter, images: FlexAttnLlavaImageProcessor):
        self.painter, self.images = painter, images

    def tile(self) -> LabelledImages:
        """Return a crop of a crowded image."""
        rng, low = self.painter.rng, SIZES.lowres
        margin = low // 4
        drawing = self.painter.crowd(low + margin, rng.randint(2, 9))
        left, top = rng.randint(0, margin), rng.randint(0, margin)
        crop = drawing.image.crop((left, top, left + low, top + low))
        labels = token_labels([sign.moved(left, top) for sign in drawing.signs], True)
        return LabelledImages(normalised_pixels(crop, self.images), labels)

    def whole(self) -> LabelledImages:
        """Return an image at low resolution, where digits cannot be read."""
        drawing = self.painter.image(SIDE, shape=(1, 1))
        pixels = normalised_pixels(drawing.image, self.images)[None]
        pixels = functional.interpolate(pixels, size=SIZES.lowres, mode="bilinear", antialias=True)[0]
        return LabelledImages(pixels, token_labels([sign.moved(0, 0, 1 / ZOOM) for sign in drawing.signs], False))

    def batch(self, count: int) -> LabelledImages:
        """Return crops, and a whole image in five."""
        images = [self.whole() if self.painter.rng.random() < 0.2 else self.tile() for _ in range(count)]
        return LabelledImages.stack(images)


def train_encoder(model, processor, painter: SignPainter, held_out: SignPainter, steps: int) -> None:
    """Train vision tower and projector: each token tells the colour of the sign and the digit there."""
    data = SignCrops(painter, processor.image_processor)
    test = SignCrops(held_out, processor.image_processor).batch(96)
    heads = TokenHeads(SIZES.width, CLASSES, _NOTHING_WEIGHTS)
    train_stage(EncoderStage(model, heads, lambda step: data.batch(16), {"colour, digits": test}), steps)


class LocaliseStage(Stage):
    """Trains the layers before `first_layer` so that the map of the last of them lies on the sign asked for."""

    name = "localise"

    def __init__(self, model, processor, images: EncodedScenes, held_out: EncodedScenes, recorded: LayerMap, seed: int):
        self._model, self._processor, self._recorded = model, processor, recorded
        self._images, self._held_out, self._rng = images, held_out, random.Random(seed)
        self._language = model.model.language_model
        self.parameters = train_first_layers(self._language, SIZES.first_layer)

    def loss(self, step: int) -> torch.Tensor:
        """Return how far the maps of random questions are from their signs."""
        picks = self._images.sample(self._rng, BATCH)
        return cross_entropy(*self._maps_and_cells(self._images, picks)).mean()

    @torch.no_grad()
    def summary(self) -> str:
        """Return what the maps of held-out questions lie on."""
        mass, largest = mass_and_largest(*self._maps_and_cells(self._held_out, self._held_out.asked()))
        return f"held-out: mass on the sign {mass.mean():.3f}, largest cell on it {largest.mean():.3f}"

    def _maps_and_cells(self, images: EncodedScenes, picks: list[Pick]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the maps of the rows that predict digits and the end, [n, 3, S*S], and their cells, [n, 1, S*S]."""
        inputs = question_batch(images, picks, self._processor, None)
        ids, attention_mask = inputs["input_ids"], inputs["attention_mask"]
        image = ids == self._processor.image_token_id
        embedded = self._model.get_input_embeddings()(ids)
        embedded = embedded.masked_scatter(image.unsqueeze(-1), inputs["image_features"])
        self._language(inputs_embeds=embedded, attention_mask=attention_mask, use_cache=False)
        # Rows of the padding see themselves: a softmax over nothing is NaN, and so would be the gradients.
        visible = causal_visibility(attention_mask) | torch.eye(ids.shape[1], dtype=torch.bool)
        maps = self._recorded.map(visible)[:, -4:-1]
        maps = maps[image[:, None].expand_as(maps)].view(len(maps), 3, SIZES.lr_side**2)
        return maps, answer_cells(images, picks)[:, None].float()


def train_localisation(model, processor, images: EncodedScenes, held_out: EncodedScenes, steps: int, seed: int) -> None:
    """Run the localise stage."""
    with record_maps(model, [SIZES.first_layer - 1]) as (recorded,):
        train_stage(LocaliseStage(model, processor, images, held_out, recorded, seed), steps)
