"""Trains the default model, and everything that it is compared with, from scratch.

    python examples/train_default_model.py --photographs FOLDER --font DejaVuSans-Bold.ttf --output MODEL

Four stages, whose results are kept in --work; rerun to resume:

1. encoder      vision tower and projector, on crops and small images: every token tells the colour of the sign and the
                digit there (linear heads, thrown away). Its outputs are whitened. Then frozen.
2. localise     the layers before `first_layer`, low resolution only: the attention map of the layer before
                `first_layer` is supervised to lie on the sign asked for. Then frozen.
3. answer       the later layers learn to answer, by the trainer of `flexattn train`, once per system, with the same
                start and steps: "attention" (FlexAttention), "none" (low resolution only), "random" and "center" (other
                selections of the same share of tokens).
4. evaluation   on images of held-out photographs, by `generate`, with 95 % Wilson intervals.

The supervision of the map in stage 2 stands in for what a large model learns from its data; all four systems share it.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import Progress
from sign_stages import BATCH, SIZES, SignCrops, train_encoder, train_localisation
from signs import QUESTIONS, SignPainter, SignQuestion, digits_of

from flexattn_cuda.analysis.intervals import wilson
from flexattn_cuda.cli import as_command, run_app
from flexattn_cuda.runs.files import write_atomically
from flexattn_cuda.runs.options import Option, Options
from studies.default_model.systems import fine_tune_late_layers, selecting
from studies.small.encoded_scenes import EncodedScenes, encode_scenes, resolutions_of
from studies.small.encoder_stage import whiten
from studies.small.evaluation import measure_selection
from studies.small.finetuning import FineTuning
from studies.small.objects import COLORS
from studies.small.photographs import find_photographs
from studies.small.presets import settings_for
from studies.small.results import write_csv
from studies.small.small_model import build_model, build_processor
from studies.small.stage import console
from studies.small.start import stored

RATE = 1e-2
SYSTEMS = "attention,none,random,center"
_LOCALISE_SCENES = 256  # held-out images of stage 2, which are not those of the evaluation


@dataclass(frozen=True)
class TrainingOptions(Options):
    """The options of the script."""

    photographs: Annotated[list[Path], Option("Folder of JPEG photographs; may be repeated.", metavar="DIR")]
    font: Annotated[Path, Option("DejaVuSans-Bold.ttf.", metavar="FILE")]
    output: Annotated[Path, Option("Folder of the model.", metavar="DIR")]
    work: Annotated[Path, Option("Folder of what the stages keep.", metavar="DIR")] = Path("out/default_model")
    systems: Annotated[str, Option("Comma-separated systems to train.")] = SYSTEMS
    encoder_steps: Annotated[int, Option("Steps of the encoder stage.", minimum=1)] = 2400
    localise_steps: Annotated[int, Option("Steps of the localise stage.", minimum=1)] = 900
    answer_steps: Annotated[int, Option("Steps of each system's answer stage.", minimum=1)] = 1500
    images: Annotated[int, Option("Number of images to train on.", minimum=1)] = 5000
    held_out: Annotated[int, Option("Number of images in the evaluation.", minimum=1)] = 500
    seed: Annotated[int, Option("Seed of weights and batches.", minimum=0)] = 0
    threads: Annotated[int, Option("Number of CPU threads.", minimum=1)] = 2


@dataclass(frozen=True)
class Result:
    """A system's accuracy on the held-out images, with Wilson's 95 % intervals: a row of default_model.csv."""

    system: str
    images: int
    exact: float
    exact_low: float
    exact_high: float
    digits: float
    digits_low: float
    digits_high: float

    @classmethod
    def of(cls, system: str, images: int, exact: int, digits: int) -> Result:
        """Compute the shares of `exact` answers and of right `digits`, of which each image has two."""
        of_digits = 2 * images
        return cls(
            system, images, exact / images, *wilson(exact, images), digits / of_digits, *wilson(digits, of_digits)
        )

    def __str__(self) -> str:
        return (
            f"{self.system}: exact {self.exact:.3f} [{self.exact_low:.3f}, {self.exact_high:.3f}], "
            f"per digit {self.digits:.3f} [{self.digits_low:.3f}, {self.digits_high:.3f}] on {self.images} images"
        )

    def columns(self) -> dict[str, str]:
        """Return the columns of the CSV file."""
        return {name: f"{v:.4f}" if isinstance(v, float) else v for name, v in asdict(self).items()}


class DefaultModel:
    """The model on its way through the stages."""

    def __init__(self, options: TrainingOptions):
        self.options = options
        settings, words = settings_for("flexattn", SIZES), [*(form.format("") for form in QUESTIONS), *COLORS]
        self.processor = build_processor(words, settings, SIZES)
        self.model = build_model(self.processor, settings, SIZES)
        self._resolutions = resolutions_of([settings])

    def train_encoder(self) -> None:
        """Run stage 1."""
        self._stage("encoder", self._train_encoder)
        self._stage("whiten", self._whiten)

    def encode_images(self) -> EncodedScenes:
        """Return the images to train on, as tokens of the encoder."""
        return stored(self.options.work / "images.pt", lambda: self._encode(False, 3, self.options.images))

    def train_localisation(self, images: EncodedScenes) -> float:
        """Run stage 2, and return the share of the HR tokens that its map selects."""
        held_out = stored(self.options.work / "held_out.pt", lambda: self._encode(True, 4, _LOCALISE_SCENES))
        steps, seed = self.options.localise_steps, self.options.seed + 5
        self._stage("localise", lambda: train_localisation(self.model, self.processor, images, held_out, steps, seed))
        return measure_selection(self.model, self.processor, images).share

    def train_answers(self, system: str, images: EncodedScenes, share: float) -> None:
        """Run stage 3 for a system, from the end of stage 2."""
        self.model.load_state_dict(torch.load(self.options.work / "localise.pt"))
        checkpoints = self.options.work / f"{system}.checkpoints"
        plan = FineTuning(checkpoints, self.options.answer_steps, BATCH, RATE, self.options.seed + 7)

        def run() -> None:
            fine_tune_late_layers(self.model, self.processor, images, system, share, plan)

        self._stage(system, run)
        shutil.rmtree(checkpoints, ignore_errors=True)

    @torch.no_grad()
    def evaluate(self, system: str, questions: list[SignQuestion], share: float) -> Result:
        """Run stage 4 for a system: greedy answers to all questions."""
        exact = digits = 0
        torch.manual_seed(0)
        with selecting(self.model, system, share), Progress(console=console, transient=True) as progress:
            for question in progress.track(questions, description=f"evaluating {system}"):
                given, expected = self._answer(question, system not in ("none", "HR off")), digits_of(question.sign)
                exact += given == list(expected)
                digits += sum(one == other for one, other in zip(given, expected))
        return Result.of(system, len(questions), exact, digits)

    def save(self, folder: Path) -> None:
        """Write the model and its processor."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)

    def painter(self, held_out: bool, seed: int) -> SignPainter:
        """Return a painter on training or held-out photographs."""
        photographs = find_photographs(self.options.photographs, held_out)
        return SignPainter(photographs, self.options.font, random.Random(seed))

    def _stage(self, name: str, run: Callable[[], None]) -> None:
        """Run a stage, or load the weights that it left."""

        def weights() -> dict[str, torch.Tensor]:
            run()
            return self.model.state_dict()

        self.model.load_state_dict(stored(self.options.work / f"{name}.pt", weights))

    def _train_encoder(self) -> None:
        painters = [self.painter(False, 1), self.painter(True, 2)]
        train_encoder(self.model, self.processor, *painters, self.options.encoder_steps)

    def _whiten(self) -> None:
        crops = SignCrops(self.painter(False, 8), self.processor.image_processor)
        whiten(self.model, crops.batch(128).pixels)

    def _encode(self, held_out: bool, seed: int, count: int) -> EncodedScenes:
        scenes = self.painter(held_out, seed).scenes(count)
        return encode_scenes(self.model, self.processor, scenes, count, self._resolutions)

    def _answer(self, question: SignQuestion, high_resolution: bool) -> list[str]:
        """Return the digits of the greedy answer."""
        inputs = dict(self.processor(images=question.image, text=self.processor.prompt(question.text)))
        if not high_resolution:
            inputs.pop("pixel_values_hr")
        output = self.model.generate(**inputs, max_new_tokens=3, do_sample=False)
        answer = self.processor.tokenizer.convert_ids_to_tokens(output[0, inputs["input_ids"].shape[1] :])
        return [token for token in answer if token.isdigit()]


def train(options: TrainingOptions) -> None:
    """Train the default model and what it is compared with; rerun to resume."""
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    default = DefaultModel(options)
    default.train_encoder()
    images = default.encode_images()
    share = default.train_localisation(images)
    console.log(f"the attention map selects {share:.2%} of the HR tokens; random and center select the same share")
    painter = default.painter(True, 6)
    questions = [painter.ask_about_any_sign() for _ in range(options.held_out)]
    results = []
    for system in options.systems.split(","):
        torch.manual_seed(options.seed)
        default.train_answers(system, images, share)
        for shown in (system, "HR off") if system == "attention" else (system,):
            results.append(evaluated(default, shown, questions, share))
            console.log(str(results[-1]))
        if system == "attention":
            default.save(options.output)
    write_csv(options.work / "default_model.csv", [result.columns() for result in results])
    console.log(f"{time.process_time() / 60:.1f} CPU minutes in this run")


def evaluated(default: DefaultModel, system: str, questions: list[SignQuestion], share: float) -> Result:
    """Evaluate a system, or return the result that an earlier run left."""
    file = default.options.work / f"result {system}.json"
    if not file.exists():
        write_atomically(file, json.dumps(asdict(default.evaluate(system, questions, share))))
    return Result(**json.loads(file.read_text()))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(as_command(train))
    run_app(app, "train_default_model.py")
