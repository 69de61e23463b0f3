"""What all systems of the study share: the encoder, trained first, and the language model before it sees a high resolution.

1. encoder      vision tower and projector, on parts of images at every resolution that a system uses: linear heads,
                thrown away, tell from each token the colour of the sign, the glyphs and the vehicle under it.
2. whiten       the image tokens are turned to uncorrelated channels of variance 1. Then the encoder is frozen.
3. localise     low resolution only: the attention map of the layer before `first_layer` is supervised to lie on the
                answer boxes.
4. answer       low resolution only: the whole language model learns to answer about large objects; the maps of that layer
                and of all later ones are supervised.

Nothing here knows a system: each starts from the same weights.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from torch import nn
from torch.nn import functional
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from flexattn_cuda.errors import InputError
from flexattn_cuda.families.llava.vision import encode_images
from flexattn_cuda.inputs.processor import FlexAttnLlavaImageProcessor
from flexattn_cuda.mechanism import attention
from studies.small.encoded_scenes import EncodedScenes
from studies.small.scenes import (
    COLORS,
    REFERENCE_SIDE,
    SHAPES,
    SIDE,
    SIZES,
    TASKS,
    VEHICLES,
    Box,
    Glyph,
    Painter,
    Sign,
)

console = Console()
GLYPHS = tuple("0123456789") + SHAPES
CLASSES = {
    "colour": tuple(COLORS),
    "glyph": GLYPHS,
    "place": ("first", "second"),
    "vehicle": VEHICLES,
}
"""What the heads of the encoder stage tell apart, besides "nothing"."""
_NOTHING_WEIGHT = (0.3, 0.1, 0.1, 0.15)  # most tokens show nothing
_IMAGES_AT_ONCE, _MAP_WEIGHT = (
    24,
    0.3,
)  # of the low-resolution stage: a batch; the maps' loss beside that of the answers
UNSURE = -100  # tokens that show too little of an object to learn from: without a loss
READABLE_PIXELS = 6.0  # height from which a glyph, and length from which a vehicle is told apart


def require_muon() -> None:
    """InputError where torch has none."""
    if not hasattr(torch.optim, "Muon"):
        raise InputError(f"the study trains with Muon, which torch has from 2.9 on; this is torch {torch.__version__}")


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon at `rate` for the matrices between layers, AdamW at 2e-3 for the rest. What they remember is in the parts: the
    state of this one is empty.

    Args:
        parameters: By name; embeddings and heads are known by theirs.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], rate: float):
        matrices = {n: p for n, p in parameters.items() if p.ndim == 2 and "embed" not in n and "head" not in n}
        others = [p for n, p in parameters.items() if n not in matrices]
        self.parts = (
            torch.optim.Muon(list(matrices.values()), lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=2e-3, weight_decay=0.01, betas=(0.9, 0.98)),
        )
        super().__init__(self._groups(), {})

    def _groups(self) -> list[dict[str, Any]]:
        """The parts' own dicts, so that a schedule of this one changes their rates."""
        return [group for part in self.parts for group in part.param_groups]

    def step(self, closure: None = None) -> None:
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = self._groups()


def one_cycle(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.OneCycleLR:
    """Each group's rate rises to its own in the first tenth of the steps, and falls to nearly nothing."""
    rates = [group["lr"] for group in optimizer.param_groups]
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rates, total_steps=steps, pct_start=max(0.1, 2 / steps), cycle_momentum=False
    )


def train_loop(
    name: str,
    steps: int,
    parameters: dict[str, nn.Parameter],
    rate: float,
    loss_of: Callable[[int], torch.Tensor],
    report: Callable[[], str] | None = None,
    every: int = 100,
) -> None:
    """`MuonAndAdamW` at one-cycle rates.

    Args:
        loss_of: Gives the loss of a batch; called with the number of the step, from 1.
        report: Gives a text for the log, `every` so many steps and at the end.
    """
    optimizer = MuonAndAdamW(parameters, rate)
    schedule = one_cycle(optimizer, steps)
    start, average = time.process_time(), None
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(name, total=steps)
        for step in range(1, steps + 1):
            loss = loss_of(step)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            optimizer.step()
            schedule.step()
            average = loss.item() if average is None else 0.95 * average + 0.05 * loss.item()
            progress.update(task, advance=1, description=f"{name}, loss {average:.3f}")
            if step % every == 0 or step == steps:
                seconds = time.process_time() - start
                console.log(
                    f"{name} {step}/{steps} loss {average:.3f} {report() if report else ''} {seconds:.0f} CPU s"
                )


def trained(model: nn.Module, wanted: Callable[[str], bool]) -> dict[str, nn.Parameter]:
    """The parameters with the wanted names; all others are frozen."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(wanted(name))
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# ------------------------------------------------------------------------------------------------------- 1. encoder


class TokenLabels:
    """Per token of a square image the class of what is drawn there; made object by object.

    labels: By name [side, side] int64: a class, "nothing" (the number of classes), or UNSURE.
    """

    def __init__(self, side: int, patch: int, classes: dict[str, Sequence[str]] = CLASSES):
        self.side, self.patch, self.classes = side, patch, classes
        self.edge = np.arange(side) * patch
        self.labels = {name: np.full((side, side), len(values)) for name, values in classes.items()}
        self._most = {name: np.zeros((side, side)) for name in classes}

    def share(self, box: Box) -> np.ndarray:
        """[side, side] what a token shows of a box, over all that it could show."""
        x0, y0, x1, y1 = box
        columns, rows = (
            np.clip(np.minimum(high, self.edge + self.patch) - np.maximum(low, self.edge), 0, None)
            for low, high in ((x0, x1), (y0, y1))
        )
        return rows[:, None] * columns / min(self.patch**2, (x1 - x0) * (y1 - y0))

    def mark(self, name: str, value: str, box: Box, least: float, none: float, readable: bool = True) -> None:
        """Tokens that show more than `least` of the box get the class; those between `none` and `least` have no loss.

        Nor has any of an object that cannot be read.
        """
        share, most, label = self.share(box), self._most[name], self.labels[name]
        if not readable:
            label[(share > none) & (most == 0)] = UNSURE
            return
        label[(share > none) & (share <= least) & (most == 0)] = UNSURE
        label[(share > least) & (share > most)] = list(self.classes[name]).index(value)
        np.maximum(most, share, out=most)

    def add_sign(self, sign: Sign) -> None:
        self.mark("colour", sign.color, sign.box, 0.15, 0.0)
        for place, glyph in zip(self.classes["place"], sign.glyphs):
            readable = glyph.box[3] - glyph.box[1] >= READABLE_PIXELS and self._is_inside(glyph.box)
            self.mark("glyph", glyph.name, glyph.box, 0.3, 0.02, readable)
            self.mark("place", place, glyph.box, 0.3, 0.02, readable and len(sign.glyphs) > 1)

    def add_vehicle(self, vehicle: Glyph) -> None:
        length = vehicle.box[2] - vehicle.box[0]
        self.mark(
            "vehicle",
            vehicle.name,
            vehicle.box,
            0.3,
            0.02,
            length >= READABLE_PIXELS and self._is_inside(vehicle.box),
        )

    def _is_inside(self, box: Box) -> bool:
        """Whether more than 60 % of the box are in the image; at the edge of a tile an object is cut."""
        x0, y0, x1, y1 = box
        size = self.side * self.patch
        seen = max(0, min(x1, size) - max(x0, 0)) * max(0, min(y1, size) - max(y0, 0))
        return seen > 0.6 * (x1 - x0) * (y1 - y0)

    def tensors(self) -> list[torch.Tensor]:
        """[side * side] per name."""
        return [torch.from_numpy(label.flatten()) for label in self.labels.values()]


class EncoderData:
    """Parts of crowded images at the resolution of a tile, and whole low-resolution images, with token labels.

    Args:
        painter: Draws; its generator also chooses the parts.
        images: Preprocessing of a processor with highres_size.
        patch: Side in pixels of a token.
    """

    def __init__(self, painter: Painter, images: FlexAttnLlavaImageProcessor, patch: int):
        self.painter, self.images, self.patch = painter, images, patch

    def tile(self, resolution: int, side: int, size: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """side x side pixels of an image whose longer side is scaled to `resolution`."""
        painter, rng, density = self.painter, self.painter.rng, SIDE / resolution
        canvas = side + side // 4
        drawn = round(canvas * density)
        shares = (0.15, 0.5) if resolution > 200 else (0.3, 0.8)
        scale = SIZES[size] * SIDE / REFERENCE_SIDE
        crowd = (drawn / SIDE / SIZES[size]) ** 2  # of a usual image's room for objects
        signs: list[Sign] = []
        vehicles: list[Glyph] = []
        if rng.random() < 0.65:
            image = painter.background(drawn, drawn, shares)
            for color in rng.choices(list(COLORS), k=min(12, max(2, round(crowd * rng.uniform(15, 45))))):
                painter.add_sign(image, color, self._on_a_sign, signs, scale)
        else:
            image = painter.ground(drawn, drawn)
            for kind in rng.choices(VEHICLES, k=min(16, max(2, round(crowd * rng.uniform(20, 80))))):
                painter.add_vehicle(image, kind, vehicles, scale)
        left, top = rng.randint(0, canvas - side), rng.randint(0, canvas - side)
        part = image.resize((canvas, canvas), Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))
        ratio = canvas / drawn
        labels = TokenLabels(side // self.patch, self.patch)
        for sign in signs:
            labels.add_sign(sign.moved(left / ratio, top / ratio, ratio))
        for vehicle in vehicles:
            labels.add_vehicle(vehicle.moved(left / ratio, top / ratio, ratio))
        return pixels_of(part, self.images), labels.tensors()

    def _on_a_sign(self) -> tuple[str, ...]:
        """Digits, which are the hardest to read, twice as often."""
        rng = self.painter.rng
        return self.painter.content(rng.choices(TASKS[:3], (1, 1, 2))[0], rng.randrange(2))

    def whole(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """An image at low resolution."""
        rng, low = self.painter.rng, self.images.lowres_size
        scene = self.painter.scene(rng.choice(TASKS), rng.choice(list(SIZES)))
        labels = TokenLabels(low // self.patch, self.patch)
        for sign in scene.signs:
            labels.add_sign(sign.moved(0, 0, low / SIDE))
        for vehicle in scene.vehicles:
            labels.add_vehicle(vehicle.moved(0, 0, low / SIDE))
        return self.images([scene.image])["pixel_values"][0], labels.tensors()

    def batch(self, count: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """[count, 3, lowres, lowres] and per entry of CLASSES [count, tokens]: tiles of zoom 2, 3 and 4, and whole images."""
        rng, low, pairs = self.painter.rng, self.images.lowres_size, []
        for _ in range(count):
            zoom = rng.choices((1, 2, 3, 4), (0.25, 0.15, 0.45, 0.15))[0]
            size = rng.choices(list(SIZES), (0.6, 0.4))[0]
            pairs.append(self.whole() if zoom == 1 else self.tile(zoom * low, low, size))
        return stacked(pairs)

    def hd_batch(self, count: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Tiles of the image of 4/3 lowres that LLaVA-HD cuts into 2 x 2: [count, 3, 2/3 lowres, 2/3 lowres]."""
        low, rng = self.images.lowres_size, self.painter.rng
        return stacked(
            [self.tile(low * 4 // 3, low * 2 // 3, rng.choices(list(SIZES), (0.3, 0.7))[0]) for _ in range(count)]
        )


def pixels_of(image: Image.Image, images: FlexAttnLlavaImageProcessor) -> torch.Tensor:
    """[3, H, W] normalised, at the image's own size."""
    mean, std = (torch.tensor(x)[:, None, None] for x in (images.image_mean, images.image_std))
    return (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - mean) / std


def stacked(
    pairs: list[tuple[torch.Tensor, list[torch.Tensor]]],
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Images with their labels as a batch: [n, 3, s, s], and each kind of label [n, tokens]."""
    return torch.stack([pixels for pixels, _ in pairs]), [
        torch.stack(parts) for parts in zip(*(labels for _, labels in pairs))
    ]


def token_loss(
    tokens: torch.Tensor,
    labels: Sequence[torch.Tensor],
    heads: Sequence[nn.Linear],
    weights: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Cross-entropy of what each head tells from tokens [n, tokens, D], summed over the heads; weights: Of a head's classes."""
    return sum(
        functional.cross_entropy(head(tokens).flatten(0, 1), label.flatten(), weight=weight)
        for head, label, weight in zip(heads, labels, weights)
    )


def share_right(tokens: torch.Tensor, label: torch.Tensor, head: nn.Linear) -> float:
    """Of the tokens that show something; nan where none does."""
    there = (label < head.out_features - 1) & (label != UNSURE)
    return (head(tokens).argmax(-1) == label)[there].float().mean().item()


def train_encoder(
    model,
    processor,
    photographs: list[Image.Image],
    held_out: list[Image.Image],
    steps: int,
    seed: int = 0,
    font: Path | None = None,
    batch: int = 16,
) -> dict[str, dict[str, float]]:
    """Stages 1 and 2.

    Args:
        model, processor: From `build_model` and `build_processor`; the processor with settings of zoom 3.
    Returns:
        The share of right tokens on held-out photographs, by kind of image and of class.
    """
    config = model.config
    patch, width = config.vision_config.patch_size, config.text_config.hidden_size
    data, test = (
        EncoderData(
            Painter(photographs, font, random.Random(f"encoder {seed} {number}")),
            processor.image_processor,
            patch,
        )
        for number, photographs in enumerate((photographs, held_out))
    )
    low = processor.image_processor.lowres_size
    tests = {"low": stacked([test.whole() for _ in range(96)]), "hd": test.hd_batch(64)}
    for zoom, size in itertools.product((2, 3, 4), SIZES):
        tests[f"zoom {zoom} {size}"] = stacked([test.tile(zoom * low, low, size) for _ in range(32)])
    heads = nn.ModuleList(nn.Linear(width, len(classes) + 1) for classes in CLASSES.values())
    weights = [torch.tensor([1.0] * (head.out_features - 1) + [none]) for head, none in zip(heads, _NOTHING_WEIGHT)]
    parts = {
        "vision": model.model.vision_tower,
        "projector": model.model.multi_modal_projector,
        "heads": heads,
    }
    for module in parts.values():
        module.requires_grad_()
    parameters = {f"{part}.{name}": p for part, module in parts.items() for name, p in module.named_parameters()}

    def loss_of(step: int) -> torch.Tensor:
        pixels, labels = data.hd_batch(2 * batch) if step % 8 == 0 else data.batch(batch)
        return token_loss(encode_images(model.model, pixels), labels, heads, weights)

    @torch.no_grad()
    def accuracies() -> dict[str, dict[str, float]]:
        right: dict[str, dict[str, float]] = {}
        for kind, (pixels, labels) in tests.items():
            tokens = encode_images(model.model, pixels)
            shares = {name: share_right(tokens, label, head) for name, head, label in zip(CLASSES, heads, labels)}
            right[kind] = {name: share for name, share in shares.items() if not math.isnan(share)}
        return right

    def report() -> str:
        return "held-out tokens: " + "; ".join(
            f"{kind} {' '.join(f'{x:.2f}' for x in row.values())}" for kind, row in accuracies().items()
        )

    train_loop("encoder", steps, parameters, 1e-2, loss_of, report, 200)
    for module in parts.values():
        module.requires_grad_(False)
    right = accuracies()
    whiten(model, data.batch(8 * batch)[0])
    return right


@torch.no_grad()
def whiten(model, pixels: torch.Tensor) -> None:
    """Turns the projector's output so that its channels have mean 0 and variance 1 and are uncorrelated, nearly.

    The glyphs are a small part of the encoder's variance; the language model learns to read them far sooner like this.

    Args:
        pixels: [n, 3, s, s] float, normalised, as `EncoderData.batch` gives them.
    """
    tokens = encode_images(model.model, pixels).flatten(0, 1)
    variance, directions = torch.linalg.eigh(torch.cov(tokens.T))
    turn = directions @ torch.diag((variance + 0.01 * variance.mean()).rsqrt()) @ directions.T
    last = model.model.multi_modal_projector.linear_2
    last.weight.copy_(turn @ last.weight)
    last.bias.copy_(turn @ (last.bias - tokens.mean(0)))


# ------------------------------------------------------------------------------------ 3., 4. low resolution


class MapOfLayer:
    """The attention map of one layer, with a gradient, which the operator's map has not."""

    def __init__(self, model, layer: int):
        self.attention = model.model.language_model.layers[layer].self_attn
        self.handle = self.attention.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, module, args, keywords) -> None:
        self.hidden, self.positions = keywords["hidden_states"], keywords["position_embeddings"]

    def __call__(self, visible: torch.Tensor) -> torch.Tensor:
        """The mean over heads of the probabilities of the latest call, [n, N, N], where row i sees key j: `visible`, [n, 1, N, N] bool."""
        a, (n, length) = self.attention, self.hidden.shape[:2]
        q, k = (p(self.hidden).view(n, length, -1, a.head_dim).transpose(1, 2) for p in (a.q_proj, a.k_proj))
        q, k = apply_rotary_pos_emb(q, k, *self.positions)
        return (q @ k.transpose(-1, -2) * a.scaling).masked_fill(~visible, -torch.inf).softmax(-1).mean(1)


def train_low_resolution(
    model,
    processor,
    images: EncodedScenes,
    held_out: EncodedScenes,
    first_layer: int,
    localise_steps: int,
    answer_steps: int,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Stages 3 and 4: the language model learns where to look, and to answer from the low resolution.

    Answers are learned about large objects, which the low resolution shows. The encoder writes them as it writes small ones
    at high resolution: what is learned here serves every system, whichever way it brings the tokens in. Stage 3 alone comes
    first, as a map that lies on the sign is what lets the later layers learn to read it.

    Args:
        model: A plain LLaVA, without high resolution.
        first_layer: The maps of the layer before it and, in stage 4, of all later ones are supervised to lie on what the
            question's `looks` say of each answer token.
    Returns:
        By task and size, on held-out images: the first map's mass on the answer cells, how often its largest cell is one of
        them, and the share of exact answers.
    """
    rng = random.Random(f"low resolution {seed}")
    language, layers = model.model.language_model, model.model.language_model.layers
    maps_of = [MapOfLayer(model, layer) for layer in range(first_layer - 1, len(layers))]
    by_size = {size: [number for number, scene in enumerate(images.scenes) if scene.size == size] for size in SIZES}

    def run(
        source: EncodedScenes, numbers: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of every row that predicts an answer token: logits, label, maps of the layers over the image, and where they should lie."""
        packed = source.packed(numbers, processor)
        image = packed["input_ids"] == processor.image_token_id
        embedded = model.get_input_embeddings()(packed["input_ids"]).masked_scatter(
            image.unsqueeze(-1), packed["image_features"]
        )
        hidden = language(
            inputs_embeds=embedded,
            attention_mask=packed["visible"],
            position_ids=packed["position_ids"],
            use_cache=False,
        ).last_hidden_state
        rows, begin, area = (
            packed["cells"].any(-1),
            int(image[0].int().argmax()),
            packed["cells"].shape[-1],
        )
        mapped = maps_of[: len(language.layers) - (first_layer - 1)]  # those of the layers that have run
        maps = [map_of(packed["visible"])[rows][:, begin : begin + area] for map_of in mapped]
        labels = packed["labels"].roll(-1, 1)[rows]  # a row predicts the label after it
        return model.lm_head(hidden[rows]), labels, torch.stack(maps), packed["cells"][rows].float()

    def off_boxes(maps: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
        return -((maps + 1e-6).log() * cells).sum(-1).div(cells.sum(-1)).mean(-1).sum()

    def localise_loss(_: int) -> torch.Tensor:
        return off_boxes(*run(images, rng.sample(range(len(images.scenes)), _IMAGES_AT_ONCE))[2:])

    def answer_loss(_: int) -> torch.Tensor:
        logits, labels, maps, cells = run(images, rng.sample(by_size["large"], _IMAGES_AT_ONCE))
        return functional.cross_entropy(logits, labels) + _MAP_WEIGHT * off_boxes(maps, cells)

    @torch.no_grad()
    def found() -> dict[str, dict[str, float]]:
        result: dict[str, dict[str, float]] = {}
        asked = replace(held_out, scenes=[replace(scene, questions=(scene.asked,)) for scene in held_out.scenes])
        for task, size in itertools.product(TASKS, SIZES):
            chosen = [k for k, scene in enumerate(held_out.scenes) if (scene.asked.task, scene.size) == (task, size)]
            logits, labels, maps, cells = run(asked, chosen)
            right = (logits.argmax(-1) == labels).view(len(chosen), -1).all(1)
            maps = maps[0]
            largest = cells.gather(-1, maps.argmax(-1, keepdim=True))
            row = {"mass": (maps * cells).sum(-1), "largest": largest, "right": right.float()}
            result[f"{task} {size}"] = {name: value.mean().item() for name, value in row.items()}
        return result

    def report() -> str:
        return "held-out mass, largest cell, right: " + "; ".join(
            f"{kind} " + " ".join(f"{x:.2f}" for x in row.values()) for kind, row in found().items()
        )

    early = ("embed_tokens", *(f"layers.{i}." for i in range(first_layer)))
    try:
        language.set_attn_implementation("sdpa")  # takes the mask of packed questions
        language.layers = layers[:first_layer]  # the map needs no later one
        trained(model, lambda name: False)
        train_loop(
            "localise",
            localise_steps,
            trained(language, lambda name: name.startswith(early)),
            1e-2,
            localise_loss,
            report,
        )
        language.layers = layers
        parameters = trained(model, lambda name: "language_model" in name or "lm_head" in name)
        train_loop("answer", answer_steps, parameters, 1e-2, answer_loss, report)
        return found()
    finally:
        language.layers = layers
        language.set_attn_implementation(attention.NAME)
        for map_of in maps_of:
            map_of.handle.remove()
