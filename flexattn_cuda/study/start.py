"""What the systems of a seed share: the encoder, the low-resolution stage, and the encoded pictures."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from flexattn_cuda.study import pretraining
from flexattn_cuda.study.encoded_scenes import EncodedScenes, encode_scenes, resolutions_of
from flexattn_cuda.study.evaluation import selection
from flexattn_cuda.study.presets import SYSTEMS, Preset, settings_for
from flexattn_cuda.study.pretraining import EncoderData
from flexattn_cuda.study.scenes import Painter, find_photographs, make_scenes, vocabulary
from flexattn_cuda.study.small_model import build_model, build_processor


def make_start(folder: Path, seed: int, preset: Preset, photographs: Sequence[Path], tell: Callable[[str], None]) -> None:
    """Trains what the systems of a seed share, and encodes its pictures at every resolution."""
    train, held_out = (find_photographs(photographs, part) for part in (False, True))
    flexattn = settings_for("flexattn", preset.sizes)
    torch.manual_seed(seed)
    processor = build_processor(vocabulary(), flexattn, preset.sizes)
    model = build_model(processor, flexattn, preset.sizes)
    found: dict[str, Any] = {"seconds": {}}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        begun = time.process_time()
        tell(name)
        yield
        found["seconds"][name] = round(time.process_time() - begun, 1)

    def stored(name: str, make: Callable[[], Any]) -> Any:
        path = folder / name
        if not path.exists():
            with stage(name.partition(".")[0]):
                made = make()
                torch.save(made, path.with_suffix(".new"))
            os.replace(path.with_suffix(".new"), path)
        return torch.load(path, weights_only=False, mmap=True)

    def encoder() -> dict[str, Any]:
        accuracy = pretraining.train_encoder(model, processor, train, held_out, preset.encoder_steps, seed)
        data = EncoderData(Painter(train, None, random.Random(f"whiten {seed}")), processor.image_processor, preset.sizes.patch)
        pretraining.whiten(model, data.batch(128)[0])
        return {"weights": model.state_dict(), "accuracy": accuracy}

    kept = stored("encoder.pt", encoder)
    model.load_state_dict(kept["weights"])
    found["encoder"] = kept["accuracy"]
    resolutions = resolutions_of(settings_for(system, preset.sizes) for system in SYSTEMS)

    def encoded(photos: list, count: int, number: int) -> EncodedScenes:
        return encode_scenes(model, processor, make_scenes(photos, count, 10 * seed + number), resolutions)

    pictures = stored("pictures.pt", lambda: encoded(train, preset.pictures, 0))
    stored("questions.pt", lambda: encoded(held_out, preset.questions, 1))
    checked = encode_scenes(model, processor, make_scenes(held_out, min(250, preset.questions), 10 * seed + 2), [])
    with stage("localise"):
        torch.manual_seed(seed)
        found["localise"] = pretraining.train_localisation(model, processor, pictures, checked, preset.localise_steps, seed)
        found["selected"] = selection(model, processor, pictures)
    # Plain LLaVA: what a system has beyond it starts as its configuration says.
    unfinished = folder / "start.new"
    shutil.rmtree(unfinished, ignore_errors=True)
    model.config.flexattn_config = None
    model.save_pretrained(unfinished, state_dict={name: weight for name, weight in model.state_dict().items() if "_proj_hd." not in name})
    processor.save_pretrained(unfinished)
    (unfinished / "start.json").write_text(json.dumps(found))
    os.replace(unfinished, folder / "start")
