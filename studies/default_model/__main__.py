"""Trains the default model, and everything that it is compared with, from scratch.

    python -m studies.default_model --photographs FOLDER --fonts FOLDER --output MODEL

Stages, whose results are kept in --work; stop it at any moment and run it again to go on:

1. encoder      vision tower and projector, on crops and small images: every token tells the colour of the sign, the
                glyph there and its place (linear heads, thrown away). Its outputs are whitened. Then frozen.
2. images       photographs with small signs and with large ones, as tokens of the encoder.
3. localise     the layers before `first_layer`, low resolution only: the attention map of the layer before
                `first_layer` is supervised to lie on the signs asked for.
4. answer       the whole language model, low resolution only, learns to answer what can be seen there: all about large
                signs, and where small ones are. The layers before `first_layer` are then frozen.
5. systems      the later layers learn to answer about small signs, by the trainer of `flexattn train`, once per system,
                with the same start and steps: "attention" (FlexAttention), "none" (low resolution only), "random" and
                "center" (other selections of the same share of tokens).
6. evaluation   on images of held-out photographs, by `generate`, with 95 % Wilson intervals.

The supervision of the maps stands in for what a large model learns from its data; all four systems share it.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image
from torch import nn

from flexattn_cuda.cli import as_command, run_app
from flexattn_cuda.runs.files import write_atomically
from flexattn_cuda.runs.options import Option, Options
from studies.default_model.encoder import SIZES, SignCrops, train_encoder
from studies.default_model.evaluation import Condition, Result, conditions, evaluate
from studies.default_model.fonts import FONTS, HELD_OUT_FONTS, find_fonts
from studies.default_model.language import AnswerStage, LocaliseStage, Scenes
from studies.default_model.processor import build_processor
from studies.default_model.questions import SignScenes, sign_question
from studies.default_model.signs import Look, SignPainter, photographed, signs_in_square
from studies.default_model.start import start_language
from studies.default_model.systems import fine_tune_late_layers, selecting
from studies.small.attention_maps import record_maps
from studies.small.encoded_scenes import encode_scenes, resolutions_of
from studies.small.encoder_stage import whiten
from studies.small.evaluation import measure_selection
from studies.small.finetuning import FineTuning
from studies.small.low_resolution_stage import LowResolutionModel, masked_attention
from studies.small.painter import SIDE
from studies.small.photographs import find_photographs
from studies.small.presets import settings_for
from studies.small.results import write_csv
from studies.small.scenes import SIZES as SIGN_SIZES
from studies.small.scenes import Scene
from studies.small.small_model import build_model, draw_weights
from studies.small.stage import console, train_stage
from studies.small.start import stored

RATE = 8e-3
BATCH = 40  # questions, in stage 5
SYSTEMS = "attention,none,random,center"
_THRESHOLD = 12.0  # of the maps: the first one misses 4 % of the glyphs of small signs, and 14 % at the released 48
_HELD_OUT_SCENES = 200  # of each size at most, in stages 3 and 4
_SCALES = {"small": (0.6, 1.4), "large": tuple(SIDE / SIZES.lowres * scale for scale in (0.8, 1.2))}
"""Ranges of the signs' scale: large ones at the low resolution are as large as small ones in a tile."""
_SIDES = (288, 384, 384, 600)  # pixels of the longer side of an image


@dataclass(frozen=True)
class TrainingOptions(Options):
    """The options of the script."""

    photographs: Annotated[list[Path], Option("Folder of JPEG photographs; may be repeated.", metavar="DIR")]
    fonts: Annotated[list[Path], Option("Folder of fonts; may be repeated.", metavar="DIR")]
    output: Annotated[Path, Option("Folder of the model.", metavar="DIR")]
    work: Annotated[Path, Option("Folder of what the stages keep.", metavar="DIR")] = Path("out/default_model")
    systems: Annotated[str, Option("Comma-separated systems to train.")] = SYSTEMS
    encoder_steps: Annotated[int, Option("Steps of the encoder stage.", minimum=3)] = 6500
    localise_steps: Annotated[int, Option("Steps of the localise stage.", minimum=3)] = 200
    answer_steps: Annotated[int, Option("Steps of the answer stage.", minimum=3)] = 4000
    steps: Annotated[int, Option("Steps of each system.", minimum=3)] = 1600
    images: Annotated[int, Option("Number of images to train on, of each size of the signs.", minimum=1)] = 4000
    held_out: Annotated[int, Option("Number of pictures in each condition of the evaluation.", minimum=1)] = 500
    seed: Annotated[int, Option("Seed of weights and batches.", minimum=0)] = 0
    threads: Annotated[int, Option("Number of CPU threads.", minimum=1)] = 2


class DefaultModel:
    """The model on its way through the stages."""

    def __init__(self, options: TrainingOptions):
        self.options = options
        settings = replace(settings_for("flexattn", SIZES), threshold=_THRESHOLD)
        self.processor = build_processor(settings)
        torch.manual_seed(options.seed)
        self.model = build_model(self.processor, settings, SIZES)
        self._resolutions = resolutions_of([settings])
        self._encoder = nn.ModuleDict(
            {"vision": self.model.model.vision_tower, "projector": self.model.model.multi_modal_projector}
        )

    def train_encoder(self) -> None:
        """Run stage 1."""
        self._stage("encoder", self._encoder, self._train_encoder)
        self._stage("whitened", self._encoder, self._whiten)

    def encode_images(self, held_out: bool) -> Scenes:
        """Run stage 2: return the images to train on, or those to measure the training by."""
        count = min(_HELD_OUT_SCENES, self.options.images) if held_out else self.options.images
        return {size: self._encoded(size, held_out, count) for size in SIGN_SIZES}

    def train_language(self, images: Scenes) -> float:
        """Run stages 3 and 4, and return the share of the HR tokens that the map selects."""
        self._stage("localise", self.model, lambda: self._train_localisation(images))
        self._stage("answer", self.model, lambda: self._train_answers(images))
        return measure_selection(self.model, self.processor, images["small"]).share

    def train_system(self, system: str, images: SignScenes, share: float) -> None:
        """Run stage 5 for a system, from the end of stage 4."""
        self.model.load_state_dict(torch.load(self._kept("answer.pt")))
        checkpoints = self._kept(f"{system}.checkpoints")
        plan = FineTuning(checkpoints, self.options.steps, BATCH, RATE, self.options.seed)

        def run() -> None:
            fine_tune_late_layers(self.model, self.processor, images, system, share, plan)

        self._stage(system, self.model, run)
        shutil.rmtree(checkpoints, ignore_errors=True)

    def evaluate(self, system: str, condition: Condition, share: float) -> Result:
        """Run stage 6 for a system and a condition, or return the result that an earlier run left."""
        file = self._kept(f"result {system}, {condition.name}.json")
        if not file.exists():
            torch.manual_seed(0)
            photographs, count = self._photographs[True], self.options.held_out
            with selecting(self.model, system, share):
                result = evaluate(self.model, self.processor, system, condition, photographs, count)
            write_atomically(file, json.dumps(asdict(result)))
        return Result(**json.loads(file.read_text()))

    def save(self, folder: Path) -> None:
        """Write the model and its processor."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)

    def _kept(self, name: str) -> Path:
        return self.options.work / name

    def _stage(self, name: str, part: nn.Module, run: Callable[[], None]) -> None:
        """Run a stage, which changes a part of the model, or load the weights that it left."""

        def weights() -> dict[str, torch.Tensor]:
            run()
            return part.state_dict()

        torch.manual_seed(self.options.seed)
        part.load_state_dict(stored(self._kept(f"{name}.pt"), weights))

    @cached_property
    def _photographs(self) -> dict[bool, list[Image.Image]]:
        """The photographs to train on, and the held-out ones."""
        return {held_out: find_photographs(self.options.photographs, held_out) for held_out in (False, True)}

    def _look(self, held_out: bool) -> Look:
        return Look(find_fonts(self.options.fonts, HELD_OUT_FONTS if held_out else FONTS))

    def _crops(self, held_out: bool, seed: str) -> SignCrops:
        return SignCrops(self._photographs[held_out], self._look(held_out), self.processor.image_processor, seed)

    def _train_encoder(self) -> None:
        draw_weights(self._encoder, SIZES)
        data, held_out = self._crops(False, f"encoder {self.options.seed}"), self._crops(True, "encoder held out")
        train_encoder(self.model, data, held_out, self.options.encoder_steps, self._kept("encoder.keep"))

    def _whiten(self) -> None:
        data = self._crops(False, f"whiten {self.options.seed}")
        whiten(self.model, torch.cat([data[step].pixels for step in range(8)]))

    def _encoded(self, size: str, held_out: bool, count: int) -> SignScenes:
        resolutions = self._resolutions if size == "small" and not held_out else []
        file = self._kept(f"{size}{' held out' if held_out else ''}.pt")
        scenes = self._scenes(size, held_out, count)
        return SignScenes.of(
            stored(file, lambda: encode_scenes(self.model, self.processor, scenes, count, resolutions))
        )

    def _scenes(self, size: str, held_out: bool, count: int) -> Iterator[Scene]:
        """Yield photographs with signs of a size."""
        rng = random.Random(f"scenes {self.options.seed} {size} {held_out}")
        look = replace(self._look(held_out), scale=_SCALES[size])
        painter = SignPainter(self._photographs[held_out], look, rng)
        while count:
            drawing = painter.image(rng.choice(_SIDES))
            signs = signs_in_square(drawing)
            question = sign_question("read", signs, rng) if signs else None
            if question is not None:
                yield Scene(photographed(drawing.image, rng), size, question, (), signs)
                count -= 1

    def _train_localisation(self, images: Scenes) -> None:
        with self._low_resolution() as model:
            start_language(self.model, self.processor, images["large"])
            stage = LocaliseStage(model, images, self.encode_images(True), self.options.seed, SIZES.first_layer)
            train_stage(stage, self.options.localise_steps, self._kept("localise.keep"))

    def _train_answers(self, images: Scenes) -> None:
        with self._low_resolution() as model:
            stage = AnswerStage(model, images, self.encode_images(True), self.options.seed)
            train_stage(stage, self.options.answer_steps, self._kept("answer.keep"))

    @contextmanager
    def _low_resolution(self) -> Iterator[LowResolutionModel]:
        layers = range(SIZES.first_layer - 1, SIZES.layers)
        with masked_attention(self.model), record_maps(self.model, layers) as maps:
            yield LowResolutionModel(self.model, self.processor, maps)


def train(options: TrainingOptions) -> None:
    """Train the default model and what it is compared with; rerun to resume."""
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    tests = conditions(options.fonts)
    default = DefaultModel(options)
    default.train_encoder()
    images = default.encode_images(False)
    share = default.train_language(images)
    console.log(f"the attention map selects {share:.2%} of the HR tokens; random and center select the same share")
    results = []
    for system in options.systems.split(","):
        default.train_system(system, images["small"], share)
        if system == "attention":
            default.save(options.output)
            asked = [*((system, condition) for condition in tests), ("HR off", tests[0])]
        else:
            asked = [(system, tests[0])]
        for name, condition in asked:
            results.append(default.evaluate(name, condition, share))
            console.log(str(results[-1]))
    write_csv(options.work / "default_model.csv", [result.columns() for result in results])
    console.log(f"{time.process_time() / 60:.1f} CPU minutes in this run")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(as_command(train))
    run_app(app, "studies.default_model")
