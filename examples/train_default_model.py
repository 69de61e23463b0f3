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
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from signs import COLORS, QUESTIONS, SIDE, Painter, Sign, find_photographs
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from torch import nn
from torch.nn import functional
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from flexattn_cuda import FlexAttnConfig, FlexAttnLlavaConfig, FlexAttnLlavaForConditionalGeneration, FlexAttnLlavaProcessor, Trace
from flexattn_cuda.processing import FlexAttnLlavaImageProcessor
from flexattn_cuda.vision import encode_pictures

PATCH, LOW, ZOOM, FIRST_LAYER, LAYERS, WIDTH, VISION_WIDTH = 8, 96, 3, 2, 4, 64, 96
S = LOW // PATCH
NO_COLOR, NO_DIGIT = len(COLORS), 10
TEMPLATE = "{{ '<image>' }}{% for part in messages[0]['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
console = Console()


def build_processor(folder: Path | None = None) -> FlexAttnLlavaProcessor:
    """A tokenizer of the words of the questions, and the released preprocessing."""
    words = sorted({word.strip("?").lower() for question in QUESTIONS for word in question.split()} - {"{}"})
    special = ["<pad>", "<s>", "</s>", "<image>", "<unk>"]
    vocabulary = {token: i for i, token in enumerate(special + words + sorted(COLORS) + list("0123456789"))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(r"[^a-z0-9<>/ ]"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(True)])
    tokenizer.add_special_tokens(special)
    tokenizer.decoder = decoders.Fuse()  # the digits of an answer follow each other
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    image_processor = FlexAttnLlavaImageProcessor(highres_size=LOW * ZOOM, lowres_size=LOW, lr_side=S)
    return FlexAttnLlavaProcessor(image_processor, fast, chat_template=TEMPLATE)


def build_model(processor: FlexAttnLlavaProcessor) -> FlexAttnLlavaForConditionalGeneration:
    flexattn = FlexAttnConfig(zoom=ZOOM, lowres_size=LOW, highres_size=LOW * ZOOM, first_layer=FIRST_LAYER, pool=0, warmup=None)
    tokenizer = processor.tokenizer
    config = FlexAttnLlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=VISION_WIDTH, intermediate_size=3 * VISION_WIDTH, num_hidden_layers=3, num_attention_heads=4, image_size=LOW,
            patch_size=PATCH, projection_dim=16,
        ).to_dict(),
        text_config=LlamaConfig(
            hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4,
            num_key_value_heads=4, vocab_size=len(tokenizer), max_position_embeddings=512, rms_norm_eps=1e-5,
            pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        ).to_dict(),
        image_token_index=processor.image_token_id,
        image_seq_length=S * S,
        vision_feature_layer=-1,
        flexattn_config=flexattn.to_dict(),
    )  # fmt: skip
    model = FlexAttnLlavaForConditionalGeneration(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and ("vision" in name or "projector" in name) and "embedding" not in name:
                nn.init.xavier_uniform_(weight)
            elif "patch_embedding" in name:
                nn.init.normal_(weight, std=(3 * PATCH**2) ** -0.5)
            elif "position_embedding" in name:
                weight.copy_(sinusoids())
            elif weight.ndim == 2 and "language_model" in name:
                nn.init.normal_(weight, std=0.3 if "embed_tokens" in name else 0.06)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval()


def sinusoids() -> torch.Tensor:
    """[1 + S*S, VISION_WIDTH]: positions to start from, waves over the columns and the rows; zeros for the class token."""
    quarter = VISION_WIDTH // 4
    angles = torch.arange(S)[:, None] * (math.pi / 2) * S ** -(torch.arange(quarter) / quarter)
    waves = 0.7 * torch.cat([angles.sin(), angles.cos()], 1)
    grid = torch.cat([waves[None].expand(S, S, -1), waves[:, None].expand(S, S, -1)], -1)
    return torch.cat([torch.zeros(1, VISION_WIDTH), grid.flatten(0, 1)])


def train_loop(name: str, steps: int, parameters: dict[str, nn.Parameter], rate: float, loss_of, report=None, every: int = 100) -> None:
    """Muon at `rate` for the matrices between layers, AdamW for the rest, one-cycle rates.

    `loss_of(step)` gives the loss of a batch, `report()` a text for the log.
    """
    matrices = {n: p for n, p in parameters.items() if p.ndim == 2 and "embed" not in n and "head" not in n}
    others = [p for n, p in parameters.items() if n not in matrices]
    optimizers = [
        torch.optim.Muon(list(matrices.values()), lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=2e-3, weight_decay=0.01, betas=(0.9, 0.98)),
    ]
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(o, o.param_groups[0]["lr"], total_steps=steps, pct_start=0.1, cycle_momentum=False)
        for o in optimizers
    ]
    start, average = time.process_time(), None
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(name, total=steps)
        for step in range(1, steps + 1):
            loss = loss_of(step)
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            for part in (*optimizers, *schedules):
                part.step()
            average = loss.item() if average is None else 0.95 * average + 0.05 * loss.item()
            progress.update(task, advance=1, description=f"{name}, loss {average:.3f}")
            if step % every == 0 or step == steps:
                seconds = time.process_time() - start
                console.log(f"{name} {step}/{steps} loss {average:.3f} {report() if report else ''} {seconds:.0f} CPU s")


# ------------------------------------------------------------------------------------------------------- 1. encoder


UNSURE = -100  # tokens that show too little of a sign or digit to learn from: without a loss


def token_labels(signs: list[Sign], with_digits: bool) -> list[torch.Tensor]:
    """Per token of a LOW x LOW picture: colour of the sign, first digit, second digit, each [S*S]."""
    color, digits = np.full((S, S), NO_COLOR), np.full((2, S, S), NO_DIGIT)
    most_color, most_digit = np.zeros((S, S)), np.zeros((2, S, S))
    edge, names = np.arange(S) * PATCH, list(COLORS)

    def overlap(low: float, high: float) -> np.ndarray:
        return np.clip(np.minimum(high, edge + PATCH) - np.maximum(low, edge), 0, None)

    def mark(label: np.ndarray, most: np.ndarray, value: int, share: np.ndarray, least: float, none: float) -> None:
        label[(share > none) & (share <= least) & (most == 0)] = UNSURE
        label[(share > least) & (share > most)] = value
        np.maximum(most, share, out=most)

    for sign in signs:
        x0, y0, x1, y1 = sign.box
        share = overlap(y0, y1)[:, None] * overlap(x0, x1) / min(PATCH**2, (x1 - x0) * (y1 - y0))
        mark(color, most_color, names.index(sign.color), share, 0.15, 0.0)
        if not with_digits:
            continue
        x, y, width, height = (x0 + x1) / 2, (y0 + y1) / 2, 0.68 * sign.size, 0.73 * sign.size  # of a digit in DejaVu Sans Bold
        for k, left in enumerate((x - width, x)):
            share = overlap(y - height / 2, y + height / 2)[:, None] * overlap(left, left + width) / (height * width)
            mark(digits[k], most_digit[k], int(sign.digits[k]), share, 0.3, 0.02)
    return [torch.from_numpy(label.flatten()) for label in (color, *digits)]


class EncoderData:
    """Crops at the resolution of the tiles, and whole small pictures."""

    def __init__(self, painter: Painter, image_processor: FlexAttnLlavaImageProcessor):
        self.painter, self.images = painter, image_processor

    def tile(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        rng, margin = self.painter.rng, LOW // 4
        picture, signs = self.painter.picture(LOW + margin, signs=rng.randint(2, 9), shape=(1, 1), crowd=True)
        left, top = rng.randint(0, margin), rng.randint(0, margin)
        crop = picture.crop((left, top, left + LOW, top + LOW))
        return self._pixels(crop), token_labels([sign.shifted(left, top) for sign in signs], True)

    def small(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        picture, signs = self.painter.picture(SIDE, shape=(1, 1))
        pixels = functional.interpolate(self._pixels(picture)[None], size=LOW, mode="bilinear", antialias=True)[0]
        return pixels, token_labels([sign.shifted(0, 0, 1 / ZOOM) for sign in signs], False)

    def batch(self, size: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        pairs = [self.small() if self.painter.rng.random() < 0.2 else self.tile() for _ in range(size)]
        return torch.stack([pixels for pixels, _ in pairs]), [torch.stack(parts) for parts in zip(*(labels for _, labels in pairs))]

    def _pixels(self, picture) -> torch.Tensor:
        mean, std = (torch.tensor(x)[:, None, None] for x in (self.images.image_mean, self.images.image_std))
        return (torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255 - mean) / std


def train_encoder(model, painter: Painter, held: Painter, processor, steps: int) -> None:
    data, test = EncoderData(painter, processor.image_processor), EncoderData(held, processor.image_processor).batch(96)
    heads = nn.ModuleList(nn.Linear(WIDTH, classes) for classes in (NO_COLOR + 1, NO_DIGIT + 1, NO_DIGIT + 1))
    weights = [torch.tensor([1.0] * (head.out_features - 1) + [none]) for head, none in zip(heads, (0.5, 0.3, 0.3))]
    parts = {"vision": model.model.vision_tower, "projector": model.model.multi_modal_projector, "heads": heads}
    parameters = {f"{part}.{name}": p for part, module in parts.items() for name, p in module.named_parameters()}

    def loss_of(_: int) -> torch.Tensor:
        pixels, labels = data.batch(16)
        tokens = encode_pictures(model.model, pixels)
        return sum(
            functional.cross_entropy(head(tokens).flatten(0, 1), label.flatten(), weight=weight)
            for head, label, weight in zip(heads, labels, weights)
        )

    @torch.no_grad()
    def report() -> str:
        tokens, right = encode_pictures(model.model, test[0]), []
        for head, label in zip(heads, test[1]):
            there = (label < head.out_features - 1) & (label != UNSURE)
            right.append((head(tokens).argmax(-1) == label)[there].float().mean().item())
        return "held-out tokens: colour {:.3f}, digits {:.3f} {:.3f}".format(*right)

    train_loop("encoder", steps, parameters, 1e-2, loss_of, report, 200)


@torch.no_grad()
def whiten(model, pixels: torch.Tensor) -> None:
    """Turns the projector's output so that its channels have mean 0 and variance 1 and are uncorrelated, nearly.

    The digits are a small part of the encoder's variance; the language model learns to read them far sooner like this.
    """
    tokens = encode_pictures(model.model, pixels).flatten(0, 1)
    variance, directions = torch.linalg.eigh(torch.cov(tokens.T))
    turn = directions @ torch.diag((variance + 0.01 * variance.mean()).rsqrt()) @ directions.T
    last = model.model.multi_modal_projector.linear_2
    last.weight.copy_(turn @ last.weight)
    last.bias.copy_(turn @ (last.bias - tokens.mean(0)))


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
                    self.signs.append([sign.shifted(-pad[0], -pad[1]) for sign in signs])
        self.low, self.high, self.live = torch.cat(low), torch.cat(high), torch.cat(live)

    def batch(self, rng: random.Random, processor, indices: list[int], hr: bool = True) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Inputs with labels, and the LR cells [n, S*S] of the signs that are asked for."""
        rows, cells = [], []
        for index in indices:
            sign = rng.choice(self.signs[index])
            question = rng.choice(QUESTIONS).format(sign.color)
            ids = prompt_ids(processor, question)
            answer = processor.tokenizer.convert_tokens_to_ids(list(sign.digits)) + [processor.tokenizer.eos_token_id]
            rows.append((ids + answer, len(ids)))
            cells.append(cells_of(sign))
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


def cells_of(sign: Sign) -> torch.Tensor:
    """[S*S] bool: LR cells that the sign touches."""
    side = SIDE / S
    x0, y0, x1, y1 = sign.box
    line = torch.arange(S)
    rows = (line * side < y1) & ((line + 1) * side > y0)
    columns = (line * side < x1) & ((line + 1) * side > x0)
    return (rows[:, None] & columns).flatten()


# ------------------------------------------------------------------------------------------------------ 2. localise


class MapOfLayer:
    """The attention map of the answer rows of one layer, with a gradient, which the operator's map has not."""

    def __init__(self, model, layer: int):
        self.attention = model.model.language_model.layers[layer].self_attn
        self.handle = self.attention.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, module, args, keywords) -> None:
        self.hidden, self.positions = keywords["hidden_states"], keywords["position_embeddings"]

    def __call__(self, inputs: dict[str, torch.Tensor], image_token: int) -> torch.Tensor:
        """[n, 3, S*S] mean over heads of the probabilities of the picture's tokens."""
        a, (n, length) = self.attention, self.hidden.shape[:2]
        q, k = (p(self.hidden).view(n, length, -1, a.head_dim).transpose(1, 2) for p in (a.q_proj, a.k_proj))
        q, k = apply_rotary_pos_emb(q, k, *self.positions)
        rows = torch.arange(length - 4, length - 1)
        logits = q[:, :, rows] @ k.transpose(-1, -2) * a.scaling
        hidden = (torch.arange(length) > rows[:, None]) | (inputs["attention_mask"] == 0)[:, None, None]
        maps = logits.masked_fill(hidden, -torch.inf).softmax(-1).mean(1)
        picture = (inputs["input_ids"] == image_token)[:, None].expand_as(maps)
        return maps[picture].view(n, len(rows), S * S)


def train_localisation(model, pictures: Pictures, held: Pictures, processor, steps: int, seed: int) -> None:
    rng, language = random.Random(seed), model.model.language_model
    parameters = trained(language, lambda name: name.startswith(("embed_tokens", *(f"layers.{i}." for i in range(FIRST_LAYER)))))
    map_of = MapOfLayer(model, FIRST_LAYER - 1)

    def run(source: Pictures, indices: list[int], rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, cells = source.batch(rng, processor, indices, hr=False)
        language(inputs_embeds=embeddings(model, inputs), attention_mask=inputs["attention_mask"], use_cache=False)
        return map_of(inputs, processor.image_token_id), cells[:, None].float()

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


def trained(model: nn.Module, wanted) -> dict[str, nn.Parameter]:
    """The parameters with the wanted names; all others are frozen."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(wanted(name))
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def embeddings(model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    picture = inputs["input_ids"] == model.config.image_token_id
    text = model.get_input_embeddings()(inputs["input_ids"])
    return text.masked_scatter(picture.unsqueeze(-1), inputs["image_features"])


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


def wilson(right: int, total: int) -> tuple[float, float]:
    """95 % interval of a share."""
    z, p = 1.959964, right / total
    middle, spread = p + z * z / (2 * total), z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return (middle - spread) / (1 + z * z / total), (middle + spread) / (1 + z * z / total)


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
            exact += given == list(sign.digits)
            digits += sum(one == other for one, other in zip(given, sign.digits))
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
    processor = build_processor()
    model = build_model(processor)

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
