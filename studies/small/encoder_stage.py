"""The encoder: vision tower and projector learn to see signs and vehicles, are whitened, and frozen.

Linear heads, thrown away afterwards, tell from each token the colour of the sign, the glyphs and the vehicle there.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping

import torch
from PIL import Image

from studies.small.backbones import backbone_of
from studies.small.encoder_data import EncoderData
from studies.small.painter import Painter
from studies.small.presets import Preset
from studies.small.scenes import SIZES
from studies.small.stage import Stage, train_stage
from studies.small.token_labels import CLASSES, LabelledImages, TokenHeads

_NOTHING_WEIGHTS = (0.3, 0.1, 0.1, 0.15)
_HD_EVERY = 8  # steps from one batch of LLaVA-HD's tiles to the next


class EncoderStage(Stage):
    """Trains vision tower and projector on labelled images.

    Args:
        model: A vision-language model.
        heads: Trained along and not needed afterwards.
        next_batch: Returns the batch of a step.
        held_out: Batches that are measured, by name.
    """

    name, log_every = "encoder", 200

    def __init__(
        self,
        model,
        heads: TokenHeads,
        next_batch: Callable[[int], LabelledImages],
        held_out: Mapping[str, LabelledImages],
    ):
        self._model, self._heads, self._next_batch, self._held_out = model, heads, next_batch, held_out
        self._encode = backbone_of(model).encode
        self._modules = {
            "vision": model.model.vision_tower,
            "projector": model.model.multi_modal_projector,
            "heads": heads,
        }
        self.parameters = {
            f"{part}.{name}": parameter
            for part, module in self._modules.items()
            for name, parameter in module.named_parameters()
        }
        self.freeze(False)

    def freeze(self, frozen: bool = True) -> None:
        """Freeze the encoder and the heads, or let them learn."""
        for module in self._modules.values():
            module.requires_grad_(not frozen)

    def loss(self, step: int) -> torch.Tensor:
        """Return the heads' loss on the next batch."""
        batch = self._next_batch(step)
        return self._heads.loss(self._encode(self._model, batch.pixels), batch.labels)

    @torch.no_grad()
    def accuracies(self) -> dict[str, dict[str, float]]:
        """Return the accuracy on the held-out tokens that show something, by batch and by kind of label."""
        return {
            name: self._heads.accuracies(self._encode(self._model, batch.pixels), batch.labels)
            for name, batch in self._held_out.items()
        }

    def summary(self) -> str:
        """Return the accuracies as a line."""
        rows = (f"{name} {' '.join(f'{x:.2f}' for x in row.values())}" for name, row in self.accuracies().items())
        return "held-out tokens: " + "; ".join(rows)


def train_encoder(
    model,
    processor,
    photographs: list[Image.Image],
    held_out: list[Image.Image],
    preset: Preset,
    seed: int = 0,
    batch: int = 16,
) -> dict[str, dict[str, float]]:
    """Train, whiten and freeze the encoder.

    Args:
        model: An untrained model.
        processor: Of the model, with settings of zoom 3.
        photographs: Backgrounds to train on.
        held_out: Backgrounds of the images that are measured.
        preset: The number of steps, and the systems whose images the encoder must see.
        seed: Of all images.
        batch: Images per step.

    Returns:
        The accuracy on held-out tokens that show something, by kind of image and by kind of label.
    """
    images, cell, with_hd = backbone_of(model).images(processor), preset.sizes.cell, "hd" in preset.systems
    painters = [
        Painter(backgrounds, None, random.Random(f"encoder {seed} {number}"))
        for number, backgrounds in enumerate((photographs, held_out))
    ]
    data, test = (EncoderData(painter, images, cell, preset.zooms) for painter in painters)

    def next_batch(step: int) -> LabelledImages:
        return data.hd_batch(2 * batch) if with_hd and step % _HD_EVERY == 0 else data.batch(batch)

    heads = TokenHeads(model.config.text_config.hidden_size, CLASSES, _NOTHING_WEIGHTS)
    stage = EncoderStage(model, heads, next_batch, _held_out_batches(test, with_hd))
    train_stage(stage, preset.encoder_steps)
    stage.freeze()
    accuracies = stage.accuracies()
    whiten(model, data.batch(8 * batch).pixels)
    return accuracies


def _held_out_batches(data: EncoderData, with_hd: bool) -> dict[str, LabelledImages]:
    """Return a batch for every kind of image that a system sees."""
    low = data.images.lowres_size
    batches = {"low": LabelledImages.stack([data.whole() for _ in range(96)])}
    batches |= {"hd": data.hd_batch(64)} if with_hd else {}
    for zoom, size in itertools.product(data.zooms, SIZES):
        tiles = [data.tile(zoom * low, low, size) for _ in range(32)]
        batches[f"zoom {zoom} {size}"] = LabelledImages.stack(tiles)
    return batches


@torch.no_grad()
def whiten(model, pixels: torch.Tensor) -> None:
    """Turn the projector's output so that its channels are nearly uncorrelated, with mean 0 and variance 1.

    Glyphs are a small part of the encoder's variance: the language model learns to read them far sooner this way.

    Args:
        model: A vision-language model.
        pixels: [n, 3, s, s] float, normalised.
    """
    tokens = backbone_of(model).encode(model, pixels).flatten(0, 1)
    variance, directions = torch.linalg.eigh(torch.cov(tokens.T))
    turn = directions @ torch.diag((variance + 0.01 * variance.mean()).rsqrt()) @ directions.T
    last = model.model.multi_modal_projector.linear_2
    last.weight.copy_(turn @ last.weight)
    last.bias.copy_(turn @ (last.bias - tokens.mean(0)))
