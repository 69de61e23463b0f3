"""What the systems of a seed share: the encoder, the low-resolution stage, and the encoded images."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from flexattn_cuda import checkpoints
from flexattn_cuda.families.llava.model import FlexAttnLlavaForConditionalGeneration
from flexattn_cuda.inputs.processor import FlexAttnLlavaProcessor
from flexattn_cuda.mechanism.config import FlexAttnConfig
from studies.small import pretraining
from studies.small.encoded_scenes import EncodedScenes, encode_scenes, resolutions_of
from studies.small.evaluation import selection
from studies.small.presets import SYSTEMS, Preset, settings_for
from studies.small.scenes import find_photographs, make_scenes, vocabulary
from studies.small.small_model import build_model, build_processor


def make_start(
    folder: Path,
    seed: int,
    preset: Preset,
    photographs: Sequence[Path],
    tell: Callable[[str], None],
) -> None:
    """Trains what the systems of a seed share, and encodes its images at every resolution.

    Written into `folder`: encoder.pt, images.pt (to train on), questions.pt (to ask), and last the folder start, a checkpoint
    of plain LLaVA with start.json: CPU seconds and held-out figures of the stages, and what the first map selects.
    """
    train, held_out = (find_photographs(photographs, part) for part in (False, True))
    torch.manual_seed(seed)
    processor = build_processor(vocabulary(), settings_for("flexattn", preset.sizes), preset.sizes)
    model = build_model(processor, None, preset.sizes)

    def encoder() -> dict[str, Any]:
        tell("encoder")
        begun = time.process_time()
        accuracy = pretraining.train_encoder(model, processor, train, held_out, preset.encoder_steps, seed)
        return {
            "weights": model.state_dict(),
            "accuracy": accuracy,
            "seconds": time.process_time() - begun,
        }

    def encoded(
        name: str,
        photographs: list,
        count: int,
        number: int,
        resolutions: Sequence[tuple[int, int]],
    ) -> EncodedScenes:
        tell(name)
        return encode_scenes(
            model,
            processor,
            make_scenes(photographs, count, 10 * seed + number),
            count,
            resolutions,
        )

    kept = stored(folder / "encoder.pt", encoder)
    model.load_state_dict(kept["weights"])
    resolutions = resolutions_of(settings_for(system, preset.sizes) for system in SYSTEMS)
    images = stored(folder / "images.pt", lambda: encoded("images", train, preset.images, 0, resolutions))
    stored(
        folder / "questions.pt",
        lambda: encoded("questions", held_out, preset.questions, 1, resolutions),
    )

    begun = time.process_time()
    torch.manual_seed(seed)
    checked = encoded("low resolution", held_out, min(250, preset.questions), 2, [])
    first_layer, steps = preset.sizes.first_layer, (preset.localise_steps, preset.answer_steps)
    low = pretraining.train_low_resolution(model, processor, images, checked, first_layer, *steps, seed)
    found = {
        "encoder": {"seconds": round(kept["seconds"]), "accuracy": kept["accuracy"]},
        "low resolution": {"seconds": round(time.process_time() - begun), "held out": low},
    }
    unfinished = folder / "start.new"
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    processor.save_pretrained(unfinished)
    settings = settings_for("flexattn", preset.sizes)
    found["selected"] = selection(*load(unfinished, settings), images)
    (unfinished / "start.json").write_text(json.dumps(found))
    os.replace(unfinished, folder / "start")


def stored(path: Path, make: Callable[[], Any]) -> Any:
    """What `make` gives, kept in a file that is never seen half written; what the file holds, where there is one."""
    if not path.exists():
        unfinished = path.with_suffix(".new")
        torch.save(make(), unfinished)
        os.replace(unfinished, path)
    return torch.load(path, weights_only=False, mmap=True)


def load(
    folder: Path, settings: FlexAttnConfig | None
) -> tuple[FlexAttnLlavaForConditionalGeneration, FlexAttnLlavaProcessor]:
    """A checkpoint as another system; None is plain LLaVA."""
    config = checkpoints.load_config(folder).with_settings(settings)
    model = FlexAttnLlavaForConditionalGeneration.from_pretrained(folder, config=config)
    return model.eval(), FlexAttnLlavaProcessor.from_pretrained(folder, config=config)
