"""A little training data in LLaVA's format, and a model to train on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny
import tiny_checkpoint
from question_files import QUESTION, image

from flexattn_cuda import FlexAttnLlavaForConditionalGeneration, FlexAttnLlavaProcessor
from flexattn_cuda.tasks.train import Outcome, TrainOptions, train


def record(image: Any = None, *said: str, **others: Any) -> dict[str, Any]:
    """A record whose conversation is `said`, by turns, or a question and a short answer."""
    said = said or (("<image>\n" if image is not None else "") + QUESTION, "42")
    parts = [{"from": ("human", "gpt")[number % 2], "value": value} for number, value in enumerate(said)]
    return ({} if image is None else {"image": image}) | {"conversations": parts} | others


def write(folder: Path) -> tuple[Path, Path]:
    """Write eight records, one without an image, one with two questions; return (data, images)."""
    images = folder / "images"
    images.mkdir()
    records = []
    for number in range(8):
        image(seed=number).save(images / f"{number}.png")
        records.append(record(f"{number}.png", f"<image>\n{QUESTION}", "42 " * (1 + number % 3)))
    records[3] = record(None, "Hello?", "Yes, who is there?")
    records[5]["conversations"] += record(None, "And on the blue one?", "There is no blue one.")["conversations"]
    data = folder / "data.json"
    data.write_text(json.dumps(records))
    return data, images


def train_on(
    files: tuple[Path, Path], output: Path, model: str | Path | None = None, progress: bool = False, **options: Any
) -> Outcome:
    """Train a model on (data, images)."""
    data, images = files
    return train(TrainOptions(data=data, images=images, output=output, model=model, **options), progress)


def save_preset(folder: Path, preset: str) -> Path:
    """The small checkpoint with the settings of `tiny.PRESETS`."""
    tiny_checkpoint.save(folder)
    processor = FlexAttnLlavaProcessor.from_pretrained(folder)
    model = FlexAttnLlavaForConditionalGeneration.from_pretrained(folder, flexattn=tiny.PRESETS[preset])
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
