"""The stages of the default model that see the low resolution alone: where to look, and how to answer.

Many questions about an image share a row, which sees each of them alone. Large signs are as large at the low resolution
as small ones are in a tile: what is learned about them serves every system, however it brings the tokens in.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace

import torch

from studies.default_model.questions import TASKS, SignScenes, sign_question
from studies.small.attention_maps import cross_entropy, mass_and_largest
from studies.small.encoded_scenes import EncodedScenes
from studies.small.low_resolution_stage import LowResolutionModel, Predictions
from studies.small.optimizer import train_first_layers, train_only
from studies.small.scenes import SIZES as SIGN_SIZES
from studies.small.stage import Stage

_IMAGES, _QUESTIONS = 12, 10  # of a step, and about an image
_MEASURED = 40  # held-out images of a size
_MAP_WEIGHT = 0.3  # of the maps' loss beside that of the answers
_TOO_FINE = ("read", "colourless")  # tasks that the low resolution of a small sign does not suffice for
Scenes = Mapping[str, SignScenes]
"""Encoded images with small and with large signs, keys of SIGN_SIZES."""


class _LanguageStage(Stage):
    """What both stages share.

    Args:
        model: A model inside `masked_attention`.
        images: To train on.
        held_out: To measure.
        seed: Of the questions.
        layers: Number of layers to run.
    """

    def __init__(self, model: LowResolutionModel, images: Scenes, held_out: Scenes, seed: int, layers: int):
        self.model, self.images, self.held_out, self.layers = model, images, held_out, layers
        self._seed = seed

    def predict(self, scenes: Scenes, sizes: list[str], rng: random.Random) -> Predictions:
        """Predict the answers to questions about random images, one for each of `sizes`."""
        parts = []
        for size in SIGN_SIZES:
            numbers = rng.sample(range(len(scenes[size].scenes)), sizes.count(size))
            parts.append(_asked(scenes[size], numbers, self.tasks(size), rng))
        batch = EncodedScenes(
            low=torch.cat([part.low for part in parts]),
            high={},
            valid_rect=torch.cat([part.valid_rect for part in parts]),
            scenes=[scene for part in parts for scene in part.scenes],
        )
        return self.model.predict(batch, range(len(batch.scenes)), self.layers)

    def tasks(self, size: str) -> dict[str, float]:
        """Return the shares of the tasks that are asked about signs of a size."""
        raise NotImplementedError

    def training_predictions(self, step: int) -> Predictions:
        """Predict the answers of a step."""
        rng = random.Random(f"{self.name} {self._seed} {step}")
        return self.predict(self.images, rng.choices(list(SIGN_SIZES), k=_IMAGES), rng)

    @torch.no_grad()
    def summary(self) -> str:
        """Return the held-out figures by size: mass on the signs, largest cell on them, right tokens."""
        rows = []
        for size in SIGN_SIZES:
            found = self.predict(self.held_out, [size] * _MEASURED, random.Random(size))
            looks = found.cells.any(-1)
            values = mass_and_largest(found.maps[0][looks], found.answer_cells[looks])
            mass, largest = (value.mean() for value in values)
            right = (found.logits.argmax(-1) == found.labels).float().mean()
            rows.append(f"{size} {mass:.2f} {largest:.2f} {right:.2f}")
        return "held-out mass, largest cell, right tokens: " + "; ".join(rows)


def _asked(scenes: SignScenes, numbers: list[int], tasks: dict[str, float], rng: random.Random) -> EncodedScenes:
    """Return scenes with random questions about each."""
    asked = []
    for number in numbers:
        scene, questions = scenes.scenes[number], []
        while len(questions) < _QUESTIONS:
            question = sign_question(rng.choices(list(tasks), list(tasks.values()))[0], scene.signs, rng)
            questions += [question] if question is not None else []
        asked.append(replace(scene, questions=tuple(questions)))
    return EncodedScenes(scenes.low[numbers], {}, scenes.valid_rect[numbers], asked)


class LocaliseStage(_LanguageStage):
    """Trains the layers before `first_layer` so that the map of the last of them lies on the signs asked for."""

    name, rate = "localise", 3e-2

    def __init__(self, model: LowResolutionModel, images: Scenes, held_out: Scenes, seed: int, first_layer: int):
        super().__init__(model, images, held_out, seed, first_layer)
        train_only(model.model, lambda name: False)
        self.parameters = train_first_layers(model.language, first_layer)

    def tasks(self, size: str) -> dict[str, float]:
        return TASKS

    def loss(self, step: int) -> torch.Tensor:
        """Return how far the maps are from the signs."""
        return map_losses(self.training_predictions(step))[0]


class AnswerStage(_LanguageStage):
    """Trains the whole language model to answer what can be seen at low resolution, and its maps."""

    name, rate = "answer", 2e-2

    def __init__(self, model: LowResolutionModel, images: Scenes, held_out: Scenes, seed: int):
        super().__init__(model, images, held_out, seed, len(model.language.layers))
        self.parameters = train_only(model.model, lambda name: "language_model" in name or "lm_head" in name)

    def tasks(self, size: str) -> dict[str, float]:
        return TASKS if size == "large" else {task: share for task, share in TASKS.items() if task not in _TOO_FINE}

    def loss(self, step: int) -> torch.Tensor:
        """Return the loss of the answers and of the maps."""
        predictions = self.training_predictions(step)
        return predictions.answer_loss() + _MAP_WEIGHT * map_losses(predictions).sum()


def map_losses(predictions: Predictions) -> torch.Tensor:
    """Return how far each layer's maps are from where they should lie, in the rows that look at something: [layers].

    The first map, which selects, lies on all of a sign; the later ones lie on the glyph that a row tells.
    """
    looks = predictions.cells.any(-1)
    cells = torch.stack([predictions.answer_cells[looks], *[predictions.cells[looks]] * (len(predictions.maps) - 1)])
    return cross_entropy(predictions.maps[:, looks], cells).mean(-1)
