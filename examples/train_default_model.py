"""Trains the default model, and everything that it is compared with, from nothing.

    python examples/train_default_model.py --photographs FOLDER [FOLDER ...] --font DejaVuSans-Bold.ttf --output MODEL

Four stages, each kept in --work and not done again:

1. encoder      vision tower and projector, on crops and small pictures: every token tells the colour of the sign under
                it and the digit under it (linear heads, thrown away). Its outputs are whitened. Then frozen.
2. localise     the layers before `first_layer`, low resolution only: the attention map of the layer before
                `first_layer` is supervised to lie on the sign that is asked for. Then frozen.
3. answer       the later layers learn to answer, once per system, same start, same steps: "attention" (FlexAttention),
                "none" (low resolution only), "random" and "center" (the selection replaced, same share of tokens).
4. evaluation   on pictures of held-out photographs, by `generate`, with 95 % Wilson intervals.

The supervision of the map in stage 2 is a device of this small training set, where the language model has seen nothing
else; it is shared by all four systems.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import time
from pathlib import Path

import torch
from rich.progress import Progress
from signs import QUESTIONS, SIDE, Painter, digits_of
from torch import nn
from torch.nn import functional

from flexattn_cuda import Trace
from flexattn_cuda.processing import FlexAttnLlavaImageProcessor
from flexattn_cuda.study.encoded_scenes import cells_of
from flexattn_cuda.study.pretraining import (
    MapOfLayer, TokenLabels, console, pixels_of, share_right, stacked, token_loss, train_loop, trained, whiten,
)  # fmt: skip
from flexattn_cuda.study.scenes import COLORS, Sign, find_photographs
from flexattn_cuda.study.presets import settings_for
from flexattn_cuda.study.small_model import ModelSizes, build_model, build_processor
from flexattn_cuda.study.statistics import wilson
from flexattn_cuda.vision import encode_pictures

SIZES = ModelSizes()
LOW, ZOOM, S, FIRST_LAYER, LAYERS = SIZES.lowres, 3, SIZES.lr_side, SIZES.first_layer, SIZES.layers


# ------------------------------------------------------------------------------------------------------- 1. encoder


CLASSES = {"colour": tuple(COLORS), "first digit": tuple("0123456789"), "second digit": tuple("0123456789")}


def token_labels(signs: list[Sign], with_digits: bool) -> list[torch.Tensor]:
    """Per token of a LOW x LOW picture: colour of the sign, first digit, second digit, each [S*S]."""
    labels = TokenLabels(S, SIZES.patch, CLASSES)
    for sign in signs:
        labels.mark("colour", sign.color, sign.box, 0.15, 0.0)
        if with_digits:
            for name, glyph in zip(("first digit", "second digit"), sign.glyphs):
                labels.mark(name, glyph.name, glyph.box, 0.3, 0.02)
    return labels.tensors()


class EncoderData:
    """Crops at the resolution of the tiles, and whole small pictures."""

    def __init__(self, painter: Painter, image_processor: FlexAttnLlavaImageProcessor):
        self.painter, self.images = painter, image_processor

    def tile(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        rng, margin = self.painter.rng, LOW // 4
        picture, signs = self.painter.picture(LOW + margin, signs=rng.randint(2, 9), shape=(1, 1), crowd=True)
        left, top = rng.randint(0, margin), rng.randint(0, margin)
        crop = picture.crop((left, top, left + LOW, top + LOW))
        return pixels_of(crop, self.images), token_labels([sign.moved(left, top) for sign in signs], True)

    def small(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        picture, signs = self.painter.picture(SIDE, shape=(1, 1))
        pixels = functional.interpolate(pixels_of(picture, self.images)[None], size=LOW, mode="bilinear", antialias=True)[0]
        return pixels, token_labels([sign.moved(0, 0, 1 / ZOOM) for sign in signs], False)

    def batch(self, size: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        pairs = [self.small() if self.painter.rng.random() < 0.2 else self.tile() for _ in range(size)]
        return stacked(pairs)


def train_encoder(model, painter: Painter, held: Painter, processor, steps: int) -> None:
    data, test = EncoderData(painter, processor.image_processor), EncoderData(held, processor.image_processor).batch(96)
    heads = nn.ModuleList(nn.Linear(SIZES.width, len(classes) + 1) for classes in CLASSES.values())
    weights = [torch.tensor([1.0] * (head.out_features - 1) + [none]) for head, none in zip(heads, (0.5, 0.3, 0.3))]
    parts = {"vision": model.model.vision_tower, "projector": model.model.multi_modal_projector, "heads": heads}
    parameters = {f"{part}.{name}": p for part, module in parts.items() for name, p in module.named_parameters()}

    def loss_of(_: int) -> torch.Tensor:
        pixels, labels = data.batch(16)
        return token_loss(encode_pictures(model.model, pixels), labels, heads, weights)

    @torch.no_grad()
    def report() -> str:
        tokens = encode_pictures(model.model, test[0])
        right = [share_right(tokens, label, head) for label, head in zip(test[1], heads)]
        return "held-out tokens: colour {:.3f}, digits {:.3f} {:.3f}".format(*right)

    train_loop("encoder", steps, parameters, 1e-2, loss_of, report, 200)


# ------------------------------------------------------------------------------------------- features of the pictures


class Pictures:
    """Encoded pictures and their signs, from which questions are drawn."""

    def __init__(self, model, processor, painter: Painter, count: int, name: str):
        low, high, live = [], [], []
        self.signs: list[list[Sign]] = []
        with Progress(console=console, transient=True) as progress, torch.no_grad():
            for _ in progress.track(range(count // 8), description=name):
                drawn = [painter.picture() for _ in range(8)]
                pixels = processor.image_processor([picture for picture, _ in drawn])
                lr, hr = model.encode(pixels["pixel_values"], pixels["pixel_values_hr"])
                low.append(lr.half()), high.append(hr.half()), live.append(pixels["image_live"])
                for picture, signs in drawn:  # signs in pixels of the padded square
                    pad = ((SIDE - picture.width) // 2, (SIDE - picture.height) // 2)
                    self.signs.append([sign.moved(-pad[0], -pad[1]) for sign in signs])
        self.low, self.high, self.live = torch.cat(low), torch.cat(high), torch.cat(live)

    def batch(self, rng: random.Random, processor, indices: list[int], hr: bool = True) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Inputs with labels, and the LR cells [n, S*S] of the signs that are asked for."""
        rows, cells = [], []
        for index in indices:
            sign = rng.choice(self.signs[index])
            question = rng.choice(QUESTIONS).format(sign.color)
            ids = prompt_ids(processor, question)
            answer = processor.tokenizer.convert_tokens_to_ids(list(digits_of(sign))) + [processor.tokenizer.eos_token_id]
            rows.append((ids + answer, len(ids)))
            cells.append(cells_of([sign.box], S, SIDE))
        longest = max(len(ids) for ids, _ in rows)
        pad = processor.tokenizer.pad_token_id
        input_ids = torch.tensor([[pad] * (longest - len(ids)) + ids for ids, _ in rows])
        labels = torch.full_like(input_ids, -100)
        labels[:, -3:] = input_ids[:, -3:]
        inputs = dict(
            input_ids=input_ids,
            attention_mask=(input_ids != pad).long(),
            labels=labels,
            image_features=self.low[indices].float(),
            image_live=self.live[indices],
        )
        if hr:
            inputs["hr_features"] = self.high[indices].float()
        return inputs, torch.stack(cells)


def prompt_ids(processor, question: str) -> list[int]:
    """The prompt with S*S image tokens; the picture itself comes as features."""
    ids = processor.tokenizer(processor.prompt(question))["input_ids"]
    at = ids.index(processor.image_token_id)
    return ids[:at] + [processor.image_token_id] * (S * S) + ids[at + 1 :]


# ------------------------------------------------------------------------------------------------------ 2. localise


def train_localisation(model, pictures: Pictures, held: Pictures, processor, steps: int, seed: int) -> None:
    rng, language = random.Random(seed), model.model.language_model
    parameters = trained(language, lambda name: name.startswith(("embed_tokens", *(f"layers.{i}." for i in range(FIRST_LAYER)))))
    map_of = MapOfLayer(model, FIRST_LAYER - 1)

    def run(source: Pictures, indices: list[int], rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, cells = source.batch(rng, processor, indices, hr=False)
        language(inputs_embeds=embeddings(model, inputs), attention_mask=inputs["attention_mask"], use_cache=False)
        length = inputs["input_ids"].shape[1]
        visible = torch.ones(length, length, dtype=torch.bool).tril() & (inputs["attention_mask"] == 1)[:, None, None]
        maps = map_of(visible | torch.eye(length, dtype=torch.bool))[:, -4:-1]  # rows of the padding see themselves
        picture = (inputs["input_ids"] == processor.image_token_id)[:, None].expand_as(maps)
        return maps[picture].view(len(maps), 3, S * S), cells[:, None].float()

    def loss_of(_: int) -> torch.Tensor:
        maps, cells = run(pictures, rng.sample(range(len(pictures.signs)), 48), rng)
        return -((maps + 1e-6).log() * cells).sum(-1).div(cells.sum(-1)).mean()

    @torch.no_grad()
    def report() -> str:
        maps, cells = run(held, list(range(len(held.signs))), random.Random(1))
        mass = (maps * cells).sum(-1).mean().item()
        at = maps.argmax(-1, keepdim=True)
        return f"held-out: mass on the sign {mass:.3f}, largest cell on it {cells.expand_as(maps).gather(-1, at).mean():.3f}"

    train_loop("localise", steps, parameters, 1e-2, loss_of, report)
    map_of.handle.remove()


def embeddings(model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    picture = inputs["input_ids"] == model.config.image_token_id
    return model.get_input_embeddings()(inputs["input_ids"]).masked_scatter(picture.unsqueeze(-1), inputs["image_features"])


# -------------------------------------------------------------------------------------------------------- 3. answer


@torch.no_grad()
def selected_share(model, pictures: Pictures, processor) -> float:
    """Average share of the HR tokens that the attention map of the layer before `first_layer` selects."""
    trace = Trace()
    inputs, _ = pictures.batch(random.Random(2), processor, list(range(256)))
    model(**inputs, use_cache=False, flexattn_trace=trace)
    return trace.steps[0][FIRST_LAYER - 1].mask.float().mean().item()


def train_answers(model, pictures: Pictures, held: Pictures, processor, system: str, share: float, steps: int, seed: int) -> None:
    rng, language = random.Random(seed), model.model.language_model
    if system in ("random", "center"):
        model.config.flexattn_config = model.config.flexattn_config | {"strategy": system, "ratio": share}
    for layer in language.layers[FIRST_LAYER:]:
        for name in ("k_proj", "v_proj"):
            getattr(layer.self_attn, f"{name}_hd").load_state_dict(getattr(layer.self_attn, name).state_dict())
    late = tuple(f"model.language_model.layers.{i}." for i in range(FIRST_LAYER, LAYERS))
    parameters = trained(model, lambda name: name.startswith((*late, "model.language_model.norm", "lm_head")))

    def loss_of(_: int) -> torch.Tensor:
        inputs, _ = pictures.batch(rng, processor, rng.sample(range(len(pictures.signs)), 48), hr=system != "none")
        return model(**inputs, use_cache=False).loss

    @torch.no_grad()
    def report() -> str:
        inputs, _ = held.batch(random.Random(1), processor, list(range(len(held.signs))), hr=system != "none")
        right = model(**inputs, use_cache=False).logits[:, -4:-2].argmax(-1) == inputs["input_ids"][:, -3:-1]
        return f"held-out, forced: digits {right.float().mean():.3f}, exact {right.all(-1).float().mean():.3f}"

    train_loop(system, steps, parameters, 1e-2, loss_of, report)
    model.config.flexattn_config = model.config.flexattn_config | {"strategy": "attention", "ratio": 0.1}


# ---------------------------------------------------------------------------------------------------- 4. evaluation


@torch.no_grad()
def evaluate(model, processor, questions: list[tuple], system: str, share: float) -> dict[str, float]:
    """Greedy answers of one system to all questions."""
    if system in ("random", "center"):
        model.config.flexattn_config = model.config.flexattn_config | {"strategy": system, "ratio": share}
    exact = digits = 0
    torch.manual_seed(0)
    with Progress(console=console, transient=True) as progress:
        for picture, sign, question in progress.track(questions, description=f"evaluating {system}"):
            inputs = dict(processor(images=picture, text=processor.prompt(question)))
            if system in ("none", "HR off"):
                inputs.pop("pixel_values_hr")
            output = model.generate(**inputs, max_new_tokens=3, do_sample=False)
            answer = processor.tokenizer.convert_ids_to_tokens(output[0, inputs["input_ids"].shape[1] :])
            given = [token for token in answer if token.isdigit()]
            exact += given == list(digits_of(sign))
            digits += sum(one == other for one, other in zip(given, digits_of(sign)))
    model.config.flexattn_config = model.config.flexattn_config | {"strategy": "attention", "ratio": 0.1}
    n = len(questions)
    row = {"system": system, "pictures": n}
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
    parser.add_argument("--pictures", type=int, default=5000)
    parser.add_argument("--held-out", type=int, default=500, help="pictures of the evaluation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    processor = build_processor([*(question.format("") for question in QUESTIONS), *COLORS], settings_for("flexattn", SIZES), SIZES)
    model = build_model(processor, settings_for("flexattn", SIZES), SIZES)

    def painter(held_out: bool, seed: int) -> Painter:
        return Painter(find_photographs(options.photographs, held_out), options.font, random.Random(seed))

    def stage(name: str, run) -> None:
        kept = options.work / f"{name}.pt"
        if not kept.exists():
            run()
            torch.save(model.state_dict(), kept)
        model.load_state_dict(torch.load(kept))

    stage("encoder", lambda: train_encoder(model, painter(False, 1), painter(True, 2), processor, options.encoder_steps))
    stage("whiten", lambda: whiten(model, EncoderData(painter(False, 8), processor.image_processor).batch(128)[0]))
    # Checks during training use pictures of held-out photographs, but not those of the evaluation.
    kept = options.work / "features.pt"
    if not kept.exists():
        sets = [Pictures(model, processor, painter(held, seed), count, name) for held, seed, count, name in
                ((False, 3, options.pictures, "encoding"), (True, 4, 256, "encoding held-out"))]  # fmt: skip
        torch.save([vars(part) for part in sets], kept)
    pictures, held = (Pictures.__new__(Pictures) for _ in range(2))
    for part, values in zip((pictures, held), torch.load(kept, weights_only=False)):
        vars(part).update(values)
    stage("localise", lambda: train_localisation(model, pictures, held, processor, options.localise_steps, options.seed + 5))
    share = selected_share(model, pictures, processor)
    console.log(f"the attention map selects {share:.2%} of the HR tokens; random and center select the same share")

    rows, asked = [], painter(True, 6)
    questions = []
    for _ in range(options.held_out):
        picture, signs = asked.picture()
        sign = asked.rng.choice(signs)
        questions.append((picture, sign, asked.question(sign.color)))
    for system in options.systems:
        torch.manual_seed(options.seed)
        model.load_state_dict(torch.load(options.work / "localise.pt"))
        stage(system, lambda: train_answers(model, pictures, held, processor, system, share, options.answer_steps, options.seed + 7))
        for shown in (system, "HR off") if system == "attention" else (system,):
            result = options.work / f"result {shown}.json"
            if not result.exists():
                result.write_text(json.dumps(evaluate(model, processor, questions, shown, share)))
            rows.append(json.loads(result.read_text()))
            console.log("{system}: exact {exact:.3f} [{exact_low:.3f}, {exact_high:.3f}], per digit {digits:.3f} "
                        "[{digits_low:.3f}, {digits_high:.3f}] on {pictures} pictures".format(**rows[-1]))  # fmt: skip
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
