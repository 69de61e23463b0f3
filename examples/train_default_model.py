"""Trains the default model, and everything that it is compared with, from nothing.

    python examples/train_default_model.py --photographs FOLDER [FOLDER ...] --font DejaVuSans-Bold.ttf --output MODEL

Four stages, each kept in --work and not done again:

1. encoder      vision tower and projector, on crops and small images: every token tells the colour of the sign under
                it and the digit under it (linear heads, thrown away). Its outputs are whitened. Then frozen.
2. localise     the layers before `first_layer`, low resolution only: the attention map of the layer before
                `first_layer` is supervised to lie on the sign that is asked for. Then frozen.
3. answer       the later layers learn to answer, by the trainer of `flexattn train`, once per system, same start, same
                steps: "attention" (FlexAttention), "none" (low resolution only), "random" and "center" (the selection
                replaced, same share of tokens).
4. evaluation   on images of held-out photographs, by `generate`, with 95 % Wilson intervals.

The supervision of the map in stage 2 is a device of this small training set, where the language model has seen nothing
else; it is shared by all four systems.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.progress import Progress
from signs import QUESTIONS, SIDE, Painter, digits_of
from torch import nn

from flexattn_cuda.families.llava.vision import encode_images
from flexattn_cuda.inputs.processor import FlexAttnLlavaImageProcessor
from flexattn_cuda.runs.files import write_atomically
from studies.small import scenes
from studies.small.encoded_scenes import EncodedScenes, Pick, encode_scenes, resolutions_of
from studies.small.evaluation import selection
from studies.small.finetuning import Picks, fine_tune
from studies.small.presets import settings_for
from studies.small.pretraining import (
    MapOfLayer,
    TokenLabels,
    console,
    pixels_of,
    share_right,
    stacked,
    token_loss,
    train_loop,
    trained,
    whiten,
)  # fmt: skip
from studies.small.scenes import COLORS, Question, Scene, Sign, find_photographs
from studies.small.small_model import ModelSizes, build_model, build_processor
from studies.small.start import stored
from studies.small.statistics import wilson

SIZES = ModelSizes()
LOW, ZOOM, S, FIRST_LAYER = SIZES.lowres, 3, SIZES.lr_side, SIZES.first_layer
BATCH, RATE = 48, 1e-2


# ------------------------------------------------------------------------------------------------------- 1. encoder


CLASSES = {
    "colour": tuple(COLORS),
    "first digit": tuple("0123456789"),
    "second digit": tuple("0123456789"),
}


def token_labels(signs: list[Sign], with_digits: bool) -> list[torch.Tensor]:
    """Per token of a LOW x LOW image: colour of the sign, first digit, second digit, each [S*S]."""
    labels = TokenLabels(S, SIZES.patch, CLASSES)
    for sign in signs:
        labels.mark("colour", sign.color, sign.box, 0.15, 0.0)
        if with_digits:
            for name, glyph in zip(("first digit", "second digit"), sign.glyphs):
                labels.mark(name, glyph.name, glyph.box, 0.3, 0.02)
    return labels.tensors()


class EncoderData:
    """Crops at the resolution of the tiles, and whole small images."""

    def __init__(self, painter: Painter, image_processor: FlexAttnLlavaImageProcessor):
        self.painter, self.images = painter, image_processor

    def tile(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        rng, margin = self.painter.rng, LOW // 4
        image, signs = self.painter.image(LOW + margin, signs=rng.randint(2, 9), shape=(1, 1), crowd=True)
        left, top = rng.randint(0, margin), rng.randint(0, margin)
        crop = image.crop((left, top, left + LOW, top + LOW))
        return pixels_of(crop, self.images), token_labels([sign.moved(left, top) for sign in signs], True)

    def small(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        image, signs = self.painter.image(SIDE, shape=(1, 1))
        pixels = nn.functional.interpolate(
            pixels_of(image, self.images)[None], size=LOW, mode="bilinear", antialias=True
        )[0]
        return pixels, token_labels([sign.moved(0, 0, 1 / ZOOM) for sign in signs], False)

    def batch(self, size: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        pairs = [self.small() if self.painter.rng.random() < 0.2 else self.tile() for _ in range(size)]
        return stacked(pairs)


def train_encoder(model, painter: Painter, held: Painter, processor, steps: int) -> None:
    data, test = (
        EncoderData(painter, processor.image_processor),
        EncoderData(held, processor.image_processor).batch(96),
    )
    heads = nn.ModuleList(nn.Linear(SIZES.width, len(classes) + 1) for classes in CLASSES.values())
    weights = [torch.tensor([1.0] * (head.out_features - 1) + [none]) for head, none in zip(heads, (0.5, 0.3, 0.3))]
    parts = {
        "vision": model.model.vision_tower,
        "projector": model.model.multi_modal_projector,
        "heads": heads,
    }
    parameters = {f"{part}.{name}": p for part, module in parts.items() for name, p in module.named_parameters()}

    def loss_of(_: int) -> torch.Tensor:
        pixels, labels = data.batch(16)
        return token_loss(encode_images(model.model, pixels), labels, heads, weights)

    @torch.no_grad()
    def report() -> str:
        tokens = encode_images(model.model, test[0])
        right = [share_right(tokens, label, head) for label, head in zip(test[1], heads)]
        return "held-out tokens: colour {:.3f}, digits {:.3f} {:.3f}".format(*right)

    train_loop("encoder", steps, parameters, RATE, loss_of, report, 200)


# ----------------------------------------------------------------------------------------------------------- images


def asked_images(painter: Painter, count: int) -> Iterator[Scene]:
    """Images with a question of every form about every sign, as the study's scenes."""
    for _ in range(count):
        image, signs = painter.image()
        to_scene = (
            *scenes.square_corner(image),
            scenes.SIDE / SIDE,
        )  # whose boxes are in pixels of a square of scenes.SIDE
        signs = [sign.moved(*to_scene) for sign in signs]
        questions = tuple(
            Question("text", form.format(sign.color), tuple(digits_of(sign)), 2 * ((sign.box,),))
            for sign in signs
            for form in QUESTIONS
        )
        yield Scene(image, "small", painter.rng.choice(questions), questions, tuple(signs))


# ------------------------------------------------------------------------------------------------------ 2. localise


def train_localisation(model, images: EncodedScenes, held: EncodedScenes, processor, steps: int, seed: int) -> None:
    rng, language = random.Random(seed), model.model.language_model
    parameters = trained(
        language,
        lambda name: name.startswith(("embed_tokens", *(f"layers.{i}." for i in range(FIRST_LAYER)))),
    )
    map_of = MapOfLayer(model, FIRST_LAYER - 1)

    def run(source: EncodedScenes, picks: list[Pick]) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, cells = source.batch(picks, processor, None), source.answer_cells(picks)
        ids = inputs["input_ids"]
        image = ids == processor.image_token_id
        embedded = model.get_input_embeddings()(ids).masked_scatter(image.unsqueeze(-1), inputs["image_features"])
        language(inputs_embeds=embedded, attention_mask=inputs["attention_mask"], use_cache=False)
        length = ids.shape[1]
        visible = torch.ones(length, length, dtype=torch.bool).tril() & (inputs["attention_mask"] == 1)[:, None, None]
        maps = map_of(visible | torch.eye(length, dtype=torch.bool))[:, -4:-1]  # rows of the padding see themselves
        return maps[image[:, None].expand_as(maps)].view(len(maps), 3, S * S), cells[:, None].float()

    def loss_of(_: int) -> torch.Tensor:
        maps, cells = run(images, images.sample(rng, BATCH))
        return -((maps + 1e-6).log() * cells).sum(-1).div(cells.sum(-1)).mean()

    @torch.no_grad()
    def report() -> str:
        maps, cells = run(held, held.asked())
        mass = (maps * cells).sum(-1).mean().item()
        at = maps.argmax(-1, keepdim=True)
        return f"held-out: mass on the sign {mass:.3f}, largest cell on it {cells.expand_as(maps).gather(-1, at).mean():.3f}"

    train_loop("localise", steps, parameters, RATE, loss_of, report)
    map_of.handle.remove()


# -------------------------------------------------------------------------------------------------------- 3. answer


@contextmanager
def selecting(model, system: str, share: float) -> Iterator[None]:
    """Inside, the tokens are selected as the system selects them."""
    before = model.config.flexattn_config
    if system in ("random", "center"):
        model.config.flexattn_config = before | {"strategy": system, "ratio": share}
    try:
        yield
    finally:
        model.config.flexattn_config = before


def train_answers(
    model,
    images: EncodedScenes,
    processor,
    system: str,
    share: float,
    steps: int,
    seed: int,
    folder: Path,
) -> None:
    """By the trainer of `flexattn train`, from its latest checkpoint in `folder` where there is one."""
    for layer in model.model.language_model.layers[FIRST_LAYER:]:
        for name in ("k_proj", "v_proj"):
            getattr(layer.self_attn, f"{name}_hd").load_state_dict(getattr(layer.self_attn, name).state_dict())
    late = tuple(f"model.language_model.layers.{i}." for i in range(FIRST_LAYER, SIZES.layers))
    trained(model, lambda name: name.startswith((*late, "model.language_model.norm", "lm_head")))
    with selecting(model, system, share):
        settings = None if system == "none" else model.config.flexattn
        fine_tune(
            model, Picks(images, steps, BATCH, seed), lambda picks: images.batch(picks, processor, settings),
            folder, BATCH, RATE, seed, lambda text: console.log(f"{system}: {text}"),
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------------- 4. evaluation


@torch.no_grad()
def evaluate(model, processor, questions: list[tuple], system: str, share: float) -> dict[str, float]:
    """Greedy answers of one system to all questions."""
    exact = digits = 0
    torch.manual_seed(0)
    with selecting(model, system, share), Progress(console=console, transient=True) as progress:
        for image, sign, question in progress.track(questions, description=f"evaluating {system}"):
            inputs = dict(processor(images=image, text=processor.prompt(question)))
            if system in ("none", "HR off"):
                inputs.pop("pixel_values_hr")
            output = model.generate(**inputs, max_new_tokens=3, do_sample=False)
            answer = processor.tokenizer.convert_ids_to_tokens(output[0, inputs["input_ids"].shape[1] :])
            given = [token for token in answer if token.isdigit()]
            exact += given == list(digits_of(sign))
            digits += sum(one == other for one, other in zip(given, digits_of(sign)))
    n = len(questions)
    row = {"system": system, "images": n}
    for name, right, total in (("exact", exact, n), ("digits", digits, 2 * n)):
        low, high = wilson(right, total)
        row |= {name: right / total, f"{name}_low": low, f"{name}_high": high}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=Path, nargs="+", required=True, help="folders of JPEG photographs")
    parser.add_argument("--font", type=Path, required=True, help="DejaVuSans-Bold.ttf")
    parser.add_argument("--output", type=Path, required=True, help="where the model goes")
    parser.add_argument("--work", type=Path, default=Path("out/default_model"), help="what the stages keep")
    parser.add_argument("--systems", nargs="+", default=["attention", "none", "random", "center"])
    parser.add_argument("--encoder-steps", type=int, default=2400)
    parser.add_argument("--localise-steps", type=int, default=900)
    parser.add_argument("--answer-steps", type=int, default=1500)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--held-out", type=int, default=500, help="images of the evaluation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    processor = build_processor(
        [*(question.format("") for question in QUESTIONS), *COLORS],
        settings_for("flexattn", SIZES),
        SIZES,
    )
    model = build_model(processor, settings_for("flexattn", SIZES), SIZES)

    def painter(held_out: bool, seed: int) -> Painter:
        return Painter(find_photographs(options.photographs, held_out), options.font, random.Random(seed))

    def stage(name: str, run: Callable[[], None]) -> None:
        def weights() -> dict[str, torch.Tensor]:
            run()
            return model.state_dict()

        model.load_state_dict(stored(options.work / f"{name}.pt", weights))

    def encoded(held_out: bool, seed: int, count: int) -> EncodedScenes:
        resolutions = resolutions_of([settings_for("flexattn", SIZES)])
        return encode_scenes(model, processor, asked_images(painter(held_out, seed), count), count, resolutions)

    stage(
        "encoder",
        lambda: train_encoder(model, painter(False, 1), painter(True, 2), processor, options.encoder_steps),
    )
    stage(
        "whiten",
        lambda: whiten(model, EncoderData(painter(False, 8), processor.image_processor).batch(128)[0]),
    )
    # The figure of stage 2 is one of held-out photographs, but not of the images of the evaluation.
    images = stored(options.work / "images.pt", lambda: encoded(False, 3, options.images))
    held = stored(options.work / "held_out.pt", lambda: encoded(True, 4, 256))
    stage(
        "localise",
        lambda: train_localisation(model, images, held, processor, options.localise_steps, options.seed + 5),
    )
    share = selection(model, processor, images)["share"]
    console.log(f"the attention map selects {share:.2%} of the HR tokens; random and center select the same share")

    rows, asked = [], painter(True, 6)
    questions = []
    for _ in range(options.held_out):
        image, signs = asked.image()
        sign = asked.rng.choice(signs)
        questions.append((image, sign, asked.question(sign.color)))
    for system in options.systems:
        torch.manual_seed(options.seed)
        model.load_state_dict(torch.load(options.work / "localise.pt"))
        checkpoints = options.work / f"{system}.checkpoints"
        stage(system, lambda: train_answers(
            model, images, processor, system, share, options.answer_steps, options.seed + 7, checkpoints
        ))  # fmt: skip
        shutil.rmtree(checkpoints, ignore_errors=True)
        for shown in (system, "HR off") if system == "attention" else (system,):
            result = options.work / f"result {shown}.json"
            if not result.exists():
                write_atomically(result, json.dumps(evaluate(model, processor, questions, shown, share)))
            rows.append(json.loads(result.read_text()))
            console.log("{system}: exact {exact:.3f} [{exact_low:.3f}, {exact_high:.3f}], per digit {digits:.3f} "
                        "[{digits_low:.3f}, {digits_high:.3f}] on {images} images".format(**rows[-1]))  # fmt: skip
        if system == "attention":
            model.save_pretrained(options.output)
            processor.save_pretrained(options.output)
    with open(options.work / "default_model.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({name: f"{v:.4f}" if isinstance(v, float) else v for name, v in row.items()} for row in rows)
    console.log(f"{time.process_time() / 60:.1f} CPU minutes in this run")


if __name__ == "__main__":
    main()
