"""Scenes as image tokens of the frozen encoder, at every resolution that a system uses."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from flexattn_cuda.mechanism.config import FlexAttnConfig
from studies.small.backbones import backbone_of
from studies.small.questions import TASKS, Question
from studies.small.scenes import Scene


class Resolution(NamedTuple):
    """A high resolution: `zoom` and `highres_size` of FlexAttnConfig."""

    zoom: int
    pixels: int


class Pick(NamedTuple):
    """A question about the scene with a number."""

    scene: int
    question: Question


@dataclass
class EncodedScenes:
    """n scenes as image tokens, without their pixels.

    Attributes:
        low: [n, S*S, D] half, tokens of the low-resolution images.
        high: By resolution, [n, h*h, D] half.
        valid_rect: [n, 4] int32, each image inside its padding, as the processor gives it.
        scenes: What was drawn and asked; without `image`.
    """

    low: torch.Tensor
    high: dict[Resolution, torch.Tensor]
    valid_rect: torch.Tensor
    scenes: list[Scene]

    def asked(self) -> list[Pick]:
        """Return the evaluation's question of each scene."""
        return [Pick(number, scene.asked) for number, scene in enumerate(self.scenes)]

    @cached_property
    def by_task(self) -> dict[str, list[int]]:
        """The numbers of the scenes that have questions of each task."""
        return {
            task: [n for n, scene in enumerate(self.scenes) if any(q.task == task for q in scene.questions)]
            for task in TASKS
        }

    def of_size(self, size: str) -> list[int]:
        """Return the numbers of the scenes with objects of a size."""
        return [number for number, scene in enumerate(self.scenes) if scene.size == size]

    def sample(self, rng: random.Random, count: int) -> list[Pick]:
        """Return questions for training: uniform over tasks, then over a task's scenes, then over their questions."""
        picks = []
        for task in rng.choices([task for task in TASKS if self.by_task[task]], k=count):
            number = rng.choice(self.by_task[task])
            of_task = [question for question in self.scenes[number].questions if question.task == task]
            picks.append(Pick(number, rng.choice(of_task)))
        return picks


@torch.no_grad()
def encode_scenes(
    model, processor, scenes: Iterable[Scene], count: int, resolutions: Sequence[Resolution]
) -> EncodedScenes:
    """Encode scenes with a model's vision tower and projector.

    All resolutions share the low-resolution tokens, so that systems differ in nothing but the high resolution.

    Args:
        model: With a trained encoder.
        processor: Of the model.
        scenes: The scenes, with their images.
        count: How many scenes there are.
        resolutions: High resolutions to encode, see `resolutions_of`.
    """
    backbone = backbone_of(model)
    images = backbone.images(processor)
    makers = {resolution: backbone.images(processor, resolution.pixels) for resolution in resolutions}
    cell, width = backbone.cell(model), model.config.text_config.hidden_size

    def empty_tokens(pixels: int) -> torch.Tensor:
        return torch.empty(count, (pixels // cell) ** 2, width, dtype=torch.half)

    encoded = EncodedScenes(
        low=empty_tokens(images.lowres_size),
        high={resolution: empty_tokens(resolution.pixels) for resolution in resolutions},
        valid_rect=torch.empty(count, 4, dtype=torch.int32),
        scenes=[],
    )
    for number, scene in enumerate(scenes):
        pixels = images([scene.image])
        encoded.low[number] = backbone.encode(model, pixels["pixel_values"])[0]
        encoded.valid_rect[number] = pixels["valid_rect"][0]
        for resolution, maker in makers.items():
            (image,) = pixels["pixel_values_hr"] if maker is images else maker([scene.image])["pixel_values_hr"]
            encoded.high[resolution][number] = backbone.encode_tiles(model, image, resolution.zoom)
        encoded.scenes.append(scene.without_image())
    return encoded


def resolutions_of(settings: Iterable[FlexAttnConfig | None]) -> list[Resolution]:
    """Return the high resolutions of systems, sorted and each once; None has none."""
    return sorted({Resolution(one.zoom, one.highres_size) for one in settings if one is not None})
