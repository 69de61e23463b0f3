"""What the prefill of a prompt costs: floating-point operations, counted by torch while the model's own class runs.

The model has its real shapes on meta tensors, so nothing is allocated, and every figure is FlopCounterMode's: 2 for
each multiply-add of matrix products and convolutions. Attention over N keys counts as N x N, whatever causality saves.
Nothing can be read from meta tensors, so the counts of a selection are given (`mechanism.counts.KnownCounts`).
Two ways of running are counted, see `count`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedConfig

from flexattn_cuda.analysis.plots import check_plot
from flexattn_cuda.errors import InputError
from flexattn_cuda.families.llava.config import FlexAttnLlavaConfig
from flexattn_cuda.families.llava.config import as_system as llava_as_system
from flexattn_cuda.families.llava.model import FlexAttnLlavaForConditionalGeneration
from flexattn_cuda.mechanism.counts import KnownCounts
from flexattn_cuda.runs.files import os_errors_as_input_errors

# A part is what runs in modules of these names and in no other named here inside them.
_MODULES = {
    "vision": r"model\.vision_tower",
    "projector": r"model\.multi_modal_projector",
    "language model": r"model\.language_model|model\.language_model\..*\.(self_attn\.[qkvo]|cross_attn\.[qo])_proj",
    "HR projection": r".*\.[kv]_proj_hd|.*\.cross_attn\.[kv]_proj",
    "attention": r"model\.language_model\..*\.(self|cross)_attn",
    "head": r"lm_head",
}
PARTS = tuple(_MODULES)

SHAPES = {
    "7b": dict(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32, intermediate_size=11008
    ),
    "13b": dict(
        hidden_size=5120, num_hidden_layers=40, num_attention_heads=40, num_key_value_heads=40, intermediate_size=13824
    ),
}
COMPARED = ("llava", "hd", "xattn", "flexattn")  # Table 5 of the paper, and LLaVA itself
SHARE = 2250 / 5184  # of the HR tokens: what the published FLOPs fit
PAPER = {  # TFLOPs in Table 5, by the text tokens that go with the benchmark: MagnifierBench, TextVQA
    80: {"hd": 24.9, "xattn": 27.1, "flexattn": 17.1},
    55: {"hd": 24.5, "xattn": 26.7, "flexattn": 17.1},
}


def llava_shape(name: str) -> FlexAttnLlavaConfig:
    """Return the configuration of LLaVA-1.5 "7b" or "13b", as in llava-hf/llava-1.5-7b-hf: CLIP-L/14 at 336 pixels."""
    if name not in SHAPES:
        raise InputError(f"there is no shape {name!r}; allowed: {', '.join(SHAPES)}")
    tower = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, projection_dim=768,
        image_size=336, patch_size=14,
    )  # fmt: skip
    return FlexAttnLlavaConfig(
        vision_config=tower, text_config=LlamaConfig(**SHAPES[name], vocab_size=32064), image_token_index=32000
    )


def as_system(config: FlexAttnLlavaConfig, system: str, zoom: int | None = None) -> FlexAttnLlavaConfig:
    """Return `llava_as_system`'s configuration; InputError if there is no such system, or it does not fit."""
    try:
        return llava_as_system(config, system, zoom)
    except ValueError as error:
        raise InputError(str(error)) from error


@dataclass(frozen=True)
class Cost:
    """FLOPs of each of `PARTS`, for the mechanism as published and as run here; see `count`."""

    published: dict[str, int]
    here: dict[str, int]

    @property
    def published_tflops(self) -> float:
        return sum(self.published.values()) / 1e12

    @property
    def here_tflops(self) -> float:
        return sum(self.here.values()) / 1e12


def cost(
    config: FlexAttnLlavaConfig, text_tokens: int = 80, selected: int | None = None, tiles: int | None = None
) -> Cost:
    """Return the cost of a prompt with one image, as published and as run here. Arguments as in `count`."""
    return Cost(*(count(config, text_tokens, selected, tiles, published) for published in (True, False)))


def count(
    config: FlexAttnLlavaConfig,
    text_tokens: int,
    selected: int | None = None,
    tiles: int | None = None,
    published: bool = False,
) -> dict[str, int]:
    """Count the FLOPs of the prefill of one prompt with one image.

    Args:
        config: Of the model, as any system.
        text_tokens: Tokens of the prompt besides the image's.
        selected: M, HR tokens that each layer's map selects; by default SHARE of them. FlexAttention only.
        tiles: K, tiles in which any layer selects a token; by default all. FlexAttention only.
        published: If True, count as the released eager code runs: all tiles are encoded, HR scores are computed for
            every row, even where it does not use them, and logits for all rows. If False, as here: tiles are encoded on
            demand, only rows that see HR tokens meet them, and logits are those of the last row. Either way M tokens
            are projected in each layer; the released code repeats that at every token of the answer, which is not
            counted.

    Returns:
        FLOPs by part, in the order of PARTS.

    Raises:
        InputError: If a number is out of range.
    """
    selected, tiles = checked_selection(config, text_tokens, selected, tiles)
    if published and config.system == "flexattn":
        config = config.with_settings(dataclasses.replace(config.flexattn, hr_rows="all"))
    with torch.device("meta"):
        model = FlexAttnLlavaForConditionalGeneration(config).eval()
    text = model.model.language_model
    text.rotary_emb = _TablesFromCPU(text.config, type(text.rotary_emb))
    with torch.no_grad(), counted(model) as flops:
        model(
            **prompt(config, text_tokens, "meta"),
            tiles_on_demand=not published,
            logits_to_keep=0 if published else 1,
            hr_counts=KnownCounts(selected, tiles),
        )
    return flops


class _TablesFromCPU(nn.Module):
    """Rotary tables of a model on meta tensors, computed on the CPU, at positions that do not matter to the count.

    transformers 5.0 asks torch whether autocast is on for the device of the hidden states, and torch refuses to say so
    of the meta device.
    """

    def __init__(self, config: PreTrainedConfig, rotary_class: type[nn.Module]) -> None:
        super().__init__()
        self.tables = rotary_class(config)

    def forward(self, hidden: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        on_cpu = torch.empty(0, dtype=hidden.dtype)
        tables = self.tables(on_cpu, position_ids=torch.zeros(position_ids.shape, dtype=torch.long))
        return tuple(table.to(hidden.device) for table in tables)


def prompt(config: FlexAttnLlavaConfig, text_tokens: int, device: str) -> dict[str, torch.Tensor]:
    """Return arguments of the model for an image between text; token ids are real, pixels are not filled in."""
    text = int(config.image_token_id == 0)
    ids = torch.full((1, text_tokens + config.image_tokens), text)
    ids[0, 1 : 1 + config.image_tokens] = config.image_token_id
    settings = config.flexattn
    size = config.vision_config.image_size if settings is None else settings.lowres_size
    inputs = {"input_ids": ids, "pixel_values": torch.empty(1, 3, size, size, device=device)}
    if settings is not None:
        inputs["pixel_values_hr"] = torch.empty(1, 3, settings.highres_size, settings.highres_size, device=device)
    return inputs


def checked_selection(
    config: FlexAttnLlavaConfig, text_tokens: int, selected: int | None, tiles: int | None
) -> tuple[int, int]:
    """Return M and K of `count`, with their defaults; 0 for other systems. Raise InputError if they do not fit."""
    if text_tokens < 1:
        raise InputError(f"a prompt of {text_tokens} text tokens; it must have at least 1")
    if config.system != "flexattn":
        return 0, 0
    tokens, all_tiles = config.hr_side**2, config.flexattn.zoom**2
    selected = round(SHARE * tokens) if selected is None else selected
    tiles = all_tiles if tiles is None else tiles
    if not 0 <= selected <= tokens:
        raise InputError(
            f"{selected} selected tokens of an image that has {tokens} ({config.hr_side} x {config.hr_side})"
        )
    if not 0 <= tiles <= all_tiles:
        raise InputError(f"{tiles} tiles of an image that has {all_tiles}")
    if selected > tiles * (tokens // all_tiles):
        raise InputError(
            f"{selected} selected tokens do not fit into {tiles} tiles of {tokens // all_tiles} tokens each"
        )
    return selected, tiles


@contextlib.contextmanager
def counted(model: nn.Module) -> Iterator[dict[str, int]]:
    """Count what the model does inside the block, by part; each FLOP counts for the innermost module that has a part.

    The counts are complete when the block ends.
    """
    spent, running, seen = dict.fromkeys(PARTS, 0), ["language model"], 0
    counter = FlopCounterMode(display=False)

    def credit() -> None:
        nonlocal seen
        total = counter.get_total_flops()
        spent[running[-1]] += total - seen
        seen = total

    def enter(part: str):
        def hook(*_) -> None:
            credit()
            running.append(part)

        return hook

    def leave(*_) -> None:
        credit()
        running.pop()

    hooks = []
    for name, module in model.named_modules():
        part = next((part for part, pattern in _MODULES.items() if re.fullmatch(pattern, name)), None)
        if part is not None:
            hooks += [module.register_forward_pre_hook(enter(part)), module.register_forward_hook(leave)]
    try:
        with counter:
            yield spent
            credit()
    finally:
        for hook in hooks:
            hook.remove()


def selected_for(config: FlexAttnLlavaConfig, tflops: float, text_tokens: int) -> int:
    """Return the M at which FlexAttention as published costs this much, in or outside 0 .. h*h; cost is linear in M."""
    tokens = config.hr_side**2
    none, all_of_them = (sum(count(config, text_tokens, M, published=True).values()) for M in (0, tokens))
    return round((tflops * 1e12 - none) / (all_of_them - none) * tokens)


# -------------------------------------------------------------------------------------------------------------- figure


def by_resolution(
    config: FlexAttnLlavaConfig,
    systems: Sequence[str],
    zooms: Sequence[int],
    text_tokens: int,
    share: float,
    tile_share: float,
) -> dict[str, list[tuple[int, Cost]]]:
    """Return (side of the image in pixels, cost) of each system at each zoom; LLaVA has one resolution only.

    Args:
        config: Of the model, as any system.
        systems: Names from SYSTEMS.
        zooms: Zooms of the high-resolution image.
        text_tokens: Tokens of the prompt besides the image's.
        share: Share of the HR tokens that each layer selects.
        tile_share: Share of the tiles with a selected token.
    """
    points: dict[str, list[tuple[int, Cost]]] = {system: [] for system in systems}
    for system in systems:
        for zoom in zooms[:1] if system == "llava" else zooms:
            one = as_system(config, system, zoom)
            if system == "hd":
                one = one.with_settings(
                    dataclasses.replace(one.flexattn, zoom=zoom, highres_size=zoom * one.flexattn.lowres_size)
                )
            selected, tiles = round(share * one.hr_side**2), math.ceil(tile_share * zoom**2)
            side = one.vision_config.image_size if one.flexattn is None else one.flexattn.highres_size
            points[system].append((side, cost(one, text_tokens, selected, tiles)))
    return points


def plot(points: dict[str, list[tuple[int, Cost]]], path: str | Path) -> None:
    """Plot TFLOPs against the image's side (figure 4, right), as published and as run here.

    Raises:
        InputError: If matplotlib is missing, or the file cannot be written.
    """
    check_plot(path)
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter, ScalarFormatter

    figure = Figure(figsize=(7, 4.5))
    axes = figure.subplots()
    for number, (system, found) in enumerate(points.items()):
        sides = [side for side, _ in found]
        axes.plot(sides, [one.published_tflops for _, one in found], f"C{number}o--", label=f"{system}, as published")
        axes.plot(sides, [one.here_tflops for _, one in found], f"C{number}o-", label=f"{system}, here")
    axes.set(xlabel="side of the image in pixels", ylabel="TFLOPs of a prompt", yscale="log")
    axes.set_xticks(sorted({side for found in points.values() for side, _ in found}))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(3, 0.5)))
    axes.legend(fontsize="small")
    with os_errors_as_input_errors(Path(path)):
        figure.savefig(path, dpi=150, bbox_inches="tight")
