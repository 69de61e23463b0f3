"""Time and memory of every system, prefill by prefill and token by token in turn."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache

from flexattn_cuda import FlexAttnLlavaForConditionalGeneration
from flexattn_cuda.analysis.forced import ForcedSelection, forced, selected
from flexattn_cuda.analysis.measuring import Meter, Reading
from flexattn_cuda.mechanism.cache import HRCache
from model_cost.backbone import SHAPES, SIDE, Backbone, model_config
from model_cost.systems import System


@dataclass
class Measured:
    """What was measured of a system. decode: Seconds of each repetition, by token."""

    system: System
    prefill: list[float] = field(default_factory=list)
    decode: list[list[float]] = field(default_factory=list)
    prefill_bytes: int = 0
    decode_bytes: int = 0
    projected: int = 0  # HR tokens, over all layers and calls of a repetition

    @property
    def prefill_seconds(self) -> float:
        return statistics.median(self.prefill)

    @property
    def token_seconds(self) -> float:
        return statistics.median(seconds for run in self.decode for seconds in run)


class Generation:
    """One system's prompt and its tokens, call by call."""

    def __init__(self, backbone: Backbone, measured: Measured, tokens: int, meter: Meter):
        self.backbone, self.measured, self.meter = backbone, measured, meter
        self.cache = DynamicCache(config=backbone.config.text_config)
        self.selection = measured.system.selection(backbone, tokens)
        self.token: torch.Tensor | None = None

    def step(self) -> Reading:
        """Run the prompt at first, and the next token later."""
        system = self.measured.system
        with forced(self.selection):
            cost = self.meter(lambda: system.call(self.backbone, self.cache, self.token))
        if not cost.logits.isfinite().all():
            raise RuntimeError(f"{system.name}: the logits are not finite.")
        self.token = cost.logits[:, -1:].argmax(-1)
        return cost

    def count_projected(self) -> int:
        images = HRCache.beside(self.cache)
        return 0 if images is None else images.counters.projected


@torch.no_grad()
def measure(
    backbone: Backbone, systems: Sequence[System], tokens: int, repetitions: int, meter: Meter
) -> list[Measured]:
    """Measure the systems in turn, after one repetition that warms up."""
    found = [Measured(system) for system in systems]
    repeat(backbone, [Measured(system) for system in systems], 1, meter)
    for _ in range(repetitions):
        repeat(backbone, found, tokens, meter)
    return found


def repeat(backbone: Backbone, found: list[Measured], tokens: int, meter: Meter) -> None:
    generations = [Generation(backbone, measured, tokens, meter) for measured in found]
    for generation in generations:
        cost, measured = generation.step(), generation.measured
        measured.prefill.append(cost.seconds)
        measured.decode.append([])
        measured.prefill_bytes = max(measured.prefill_bytes, cost.extra_bytes)
    for _ in range(tokens):
        for generation in generations:
            cost, measured = generation.step(), generation.measured
            measured.decode[-1].append(cost.seconds)
            measured.decode_bytes = max(measured.decode_bytes, cost.extra_bytes)
    for generation in generations:
        generation.measured.projected = generation.count_projected()


@torch.no_grad()
def count_encoded_tiles() -> int:
    """Return how many of 9 tiles a prefill and four tokens encode, if the selection stays inside 2 of them."""
    torch.manual_seed(0)
    config = model_config(SHAPES["quick"], zoom=3)
    model = FlexAttnLlavaForConditionalGeneration(config).eval()
    tile = config.hr_side // 3
    grid = torch.zeros(config.hr_side, config.hr_side, dtype=torch.bool)
    grid[tile + 3 : tile + 9, tile // 2 : tile + tile // 2] = True  # across the border of two tiles of the middle row
    tokens = selected(grid.flatten().nonzero().flatten(), grid.numel(), "cpu")
    ids = torch.cat([torch.tensor([1]), torch.full((SIDE**2,), config.image_token_id), torch.tensor([5, 6])])[None]
    pixels = torch.randn(1, 3, config.flexattn.highres_size, config.flexattn.highres_size)
    cache = DynamicCache(config=config.text_config)
    with forced(ForcedSelection([tokens], len(config.hr_layers))):
        logits = model(input_ids=ids, pixel_values_hr=pixels, cache=cache).logits
        for _ in range(4):
            logits = model(input_ids=logits[:, -1:].argmax(-1), cache=cache).logits
    return HRCache.beside(cache).counters.encoded
