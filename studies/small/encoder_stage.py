"""The encoder: vision tower and projector learn to see signs and vehicles, are whitened, and frozen.

Linear heads, thrown away afterwards, tell from each token the colour of the sign, the glyphs and the vehicle there.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping

import torch
from PIL import Image

from flexattn_cuda.families.llava.vision import encode_images
from studies.small.encoder_data import EncoderData
from studies.small.painter import Painter
from studies.small.scenes import SIZES
from studies.small.stage import Stage, train_stage
from studies.small.token_labels import CLASSES, LabelledImages, TokenHeads

_NOTHING_WEIGHTS = (0.3, 0.1, 0.1, 0.15)
_HD_EVERY = 8  # steps from one batch of LLaVA-HD's tiles to the next


class EncoderStage(Stage):
    """Trains vision tower and projector on labelled images.

    Args:
        model: A LLaVA.
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
        self._model, self._heads, self._next_batch, self._held_out = model.model, heads, next_batch, held_out
        self._modules = {
            "vision": self._model.vision_tower,
            "projector": self._model.multi_modal_projector,
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
        return self._heads.loss(encode_images(self._model, batch.pixels), batch.labels)

    @torch.no_grad()
    def accuracies(self) -> dict[str, dict[str, float]]:
        """Return the accuracy on the held-out tokens that show something, by batch and by kind of label."""
        return {
            name: self._heads.accuracies(encode_images(self._model, batch.pixels), batch.labels)
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
    steps: int,
    seed: int = 0,
    batch: int = 16,
) -> dict[str, dict[str, float]]:
    """Train, whiten and freeze the encoder.

    Args:
        model: From `build_model`.
        processor: From `build_processor`, with settings of zoom 3.
        photographs: Backgrounds to train on.
        held_out: Backgrounds of the images that are measured.
        steps: Optimizer steps.
        seed: Of all images.
        batch: Images per step.

    Returns:
        The accuracy on held-out tokens that show something, by kind of image and by kind of label.
    """
    images, patch = processor.image_processor, model.config.vision_config.patch_size
    data, test = (
        EncoderData(Painter(backgrounds, None, random.Random(f"encoder {seed} {number}")), images, patch)
        for number, backgrounds in enumerate((photographs, held_out))
    )

    def next_batch(step: int) -> LabelledImages:
        return data.hd_batch(2 * batch) if step % _HD_EVERY == 0 else data.batch(batch)

    heads = TokenHeads(model.config.text_config.hidden_size, CLASSES, _NOTHING_WEIGHTS)
    stage = EncoderStage(model, heads, next_batch, _held_out_batches(test))
    train_stage(stage, steps)
    stage.freeze()
    accuracies = stage.accuracies()
    whiten(model, data.batch(8 * batch).pixels)
    return accuracies


def _held_out_batches(data: EncoderData) -> dict[str, LabelledImages]:
    """Return a batch for every kind of image that a system sees."""
    low = data.images.lowres_size
    batches = {"low": LabelledImages.stack([data.whole() for _ in range(96)]), "hd": data.hd_batch(64)}
    for zoom, size in itertools.product((2, 3, 4), SIZES):
        tiles = [data.tile(zoom * low, low, size) for _ in range(32)]
        batches[f"zoom {zoom} {size}"] = LabelledImages.stack(tiles)
    return batches


@torch.no_grad()
def whiten(model, pixels: torch.Tensor) -> None:
    """Turn the projector's output so that its channels are nearly uncorrelated, with mean 0 and variance 1.

    Glyphs are a small part of the encoder's variance: the language model learns to read them far sooner this way.

    Args:
        model: A LLaVA.
        pixels: [n, 3, s, s] float, normalised.
    """
    tokens = encode_images(model.model, pixels).flatten(0, 1)
    variance, directions = torch.linalg.eigh(torch.cov(tokens.T))
    turn = directions @ torch.diag((variance + 0.01 * variance.mean()).rsqrt()) @ directions.T
    last = model.model.multi_modal_projector.linear_2
    last.weight.copy_(turn @ last.weight)
    last.bias.copy_(turn @ (last.bias - tokens.mean(0)))
