"""What the systems of a seed share: the encoder, the low-resolution stages, and the encoded images."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image

from studies.small.backbones import BACKBONES
from studies.small.encoded_scenes import EncodedScenes, Resolution, encode_scenes, resolutions_of
from studies.small.encoder_stage import train_encoder
from studies.small.evaluation import measure_selection
from studies.small.low_resolution_stage import train_low_resolution
from studies.small.photographs import find_photographs
from studies.small.presets import Preset, settings_for
from studies.small.questions import vocabulary
from studies.small.scenes import make_scenes

Made = TypeVar("Made")

_CHECKED = 250  # scenes that the low-resolution stages are measured on


@dataclass(frozen=True)
class TrainedEncoder:
    """The model after the encoder stage.

    Attributes:
        weights: Of the whole model.
        accuracy: On held-out tokens, by kind of image and of label.
        seconds: CPU time of the stage.
    """

    weights: dict[str, torch.Tensor]
    accuracy: dict[str, dict[str, float]]
    seconds: float


def make_start(
    folder: Path, seed: int, preset: Preset, photographs: Sequence[Path], tell: Callable[[str], None]
) -> None:
    """Train what the systems of a seed share, and encode its images at every resolution.

    Writes encoder.pt, images.pt (to train on), questions.pt (to ask) and last the folder start, a checkpoint of plain
    LLaVA. Its start.json holds CPU seconds and held-out figures of the stages, and what the first map selects.

    Args:
        folder: The seed's folder.
        seed: The seed.
        preset: How much is done.
        photographs: Folders of JPEG files.
        tell: Takes progress messages.
    """
    _SeedStart(folder, seed, preset, photographs, tell).make()


class _SeedStart:
    def __init__(
        self, folder: Path, seed: int, preset: Preset, photographs: Sequence[Path], tell: Callable[[str], None]
    ):
        self.folder, self.seed, self.preset, self.tell = folder, seed, preset, tell
        self.photographs = find_photographs(photographs, held_out=False)
        self.held_out = find_photographs(photographs, held_out=True)
        self.backbone = BACKBONES[preset.sizes.backbone]
        torch.manual_seed(seed)
        settings = settings_for("flexattn", preset.sizes)
        assert settings is not None
        self.model, self.processor = self.backbone.build(vocabulary(), settings, preset.sizes)

    def make(self) -> None:
        encoder = stored(self.folder / "encoder.pt", self._train_encoder)
        self.model.load_state_dict(encoder.weights)
        resolutions = resolutions_of(settings_for(system, self.preset.sizes) for system in self.preset.systems)
        images = stored(self.folder / "images.pt", lambda: self._encode_images(resolutions))
        stored(self.folder / "questions.pt", lambda: self._encode_questions(resolutions))
        started = time.process_time()
        held_out = self._train_low_resolution(images)
        self._save(images, {
            "encoder": {"seconds": round(encoder.seconds), "accuracy": encoder.accuracy},
            "low resolution": {"seconds": round(time.process_time() - started), "held out": held_out},
        })  # fmt: skip

    def _train_encoder(self) -> TrainedEncoder:
        self.tell("encoder")
        started = time.process_time()
        accuracy = train_encoder(self.model, self.processor, self.photographs, self.held_out, self.preset, self.seed)
        return TrainedEncoder(self.model.state_dict(), accuracy, time.process_time() - started)

    def _encode_images(self, resolutions: Sequence[Resolution]) -> EncodedScenes:
        self.tell("images")
        return self._encode(self.photographs, self.preset.images, scenes_seed(self.seed, "training"), resolutions)

    def _encode_questions(self, resolutions: Sequence[Resolution]) -> EncodedScenes:
        self.tell("questions")
        return self._encode(self.held_out, self.preset.questions, scenes_seed(self.seed, "questions"), resolutions)

    def _train_low_resolution(self, images: EncodedScenes) -> dict[str, dict[str, float]]:
        self.tell("low resolution")
        torch.manual_seed(self.seed)
        count = min(_CHECKED, self.preset.questions)
        checked = self._encode(self.held_out, count, scenes_seed(self.seed, "checks"), [])
        return train_low_resolution(self.model, self.processor, images, checked, self.preset, self.seed)

    def _encode(
        self, photographs: list[Image.Image], count: int, seed: int, resolutions: Sequence[Resolution]
    ) -> EncodedScenes:
        return encode_scenes(self.model, self.processor, make_scenes(photographs, count, seed), count, resolutions)

    def _save(self, images: EncodedScenes, figures: dict[str, Any]) -> None:
        """Write the checkpoint, which is never seen half written."""
        unfinished = self.folder / "start.new"
        shutil.rmtree(unfinished, ignore_errors=True)
        self.backbone.save(self.model, self.processor, unfinished)
        model, processor = self.backbone.load_as(unfinished, settings_for("flexattn", self.preset.sizes))
        figures["selected"] = asdict(measure_selection(model, processor, images))
        (unfinished / "start.json").write_text(json.dumps(figures))
        os.replace(unfinished, self.folder / "start")


def scenes_seed(seed: int, use: str) -> int:
    """Return the seed of a seed's scenes for training, questions, or checks of the low-resolution stages."""
    return 10 * seed + ("training", "questions", "checks").index(use)


def selected_share(folder: Path) -> float:
    """Return the share of the HR tokens that the map of a seed's start selects."""
    return json.loads((folder / "start" / "start.json").read_text())["selected"]["share"]


def stored(path: Path, make: Callable[[], Made]) -> Made:
    """Return what a file holds; if it is missing, write what `make` returns, so that it is never seen half written."""
    if not path.exists():
        unfinished = path.with_suffix(".new")
        torch.save(make(), unfinished)
        os.replace(unfinished, path)
    return torch.load(path, weights_only=False, mmap=True)
