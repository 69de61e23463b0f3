"""What FlexAttention costs on top of the same language model without it: prefill and decode, as ratios within one run.

    python benchmarks/bench_model.py [--repetitions 5] [--csv model.csv] [--json model.json] [--plots DIR]
    python benchmarks/bench_model.py --device cuda --shape 7b --dtype float16

One random backbone, one prompt, image features given, logits of the last row only. The systems take turns, prefill by
prefill and token by token, and medians are compared. Selections are forced: a share of the HR tokens, the same in every
layer, chosen once (or, "churn", a tenth of it new at every step); the maps and the selection from them are computed all the
same. "off" projects all selected tokens again in every layer at every step, as the released code does.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch
from measuring import machine
from tables import print_table, write_csv
from transformers import CLIPVisionConfig, DynamicCache, LlamaConfig, LlamaForCausalLM, LlavaConfig

from flexattn_cuda import (
    FlexAttnConfig,
    FlexAttnLlavaConfig,
    FlexAttnLlavaForConditionalGeneration,
    ops,
)
from flexattn_cuda.mechanism import context as state
from flexattn_cuda.mechanism import selection
from flexattn_cuda.mechanism.cache import HRCache

SHAPES = {
    "default": dict(
        hidden_size=1024,
        num_hidden_layers=16,
        num_attention_heads=16,
        intermediate_size=2752,
        vocab_size=32000,
    ),
    "7b": dict(
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        intermediate_size=11008,
        vocab_size=32064,
    ),
    "quick": dict(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=96,
        vocab_size=128,
    ),
}
FIRST_LAYER = {"default": 9, "7b": 9, "quick": 2}
SIDE = 24  # of the LR grid
TEXT, HD_TOKENS = 64, 1024  # text tokens of the prompt; LLaVA-HD's extra image tokens
LIMITS = {  # what a ratio must not exceed, default shape on the CPU
    "prefill_m10": 1.10, "decode_m10": 1.10, "decode_m43": 1.25, "decode_m100": 1.50, "decode_m10_churn10": 1.50,
    "plain_over_transformers_prefill": 1.03, "plain_over_transformers_decode": 1.03, "prefill_m10_over_hd": 0.45,
    "tiles_encoded_2_of_9": 2,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ selections


class Forced:
    """Stands in for the selection: `steps[t]` is what every layer's map selects in the t-th call of the model."""

    def __init__(self, steps: list[ops.SelectedTokens], layers: int):
        self.steps, self.layers, self.calls = steps, layers, 0

    def __call__(self, *arguments) -> ops.SelectedTokens:
        selection.select(*arguments)  # its cost belongs to the model's
        step = min(self.calls // self.layers, len(self.steps) - 1)
        self.calls += 1
        return self.steps[step]


@contextlib.contextmanager
def forced(stand_in: Forced | None) -> Iterator[None]:
    real = state.select
    state.select = stand_in or real
    try:
        yield
    finally:
        state.select = real


def selected(tokens: torch.Tensor, total: int, device: str) -> ops.SelectedTokens:
    mask = torch.zeros(1, 1, 1, total, dtype=torch.bool)
    mask[..., tokens] = True
    index = torch.full((1, total), -1, dtype=torch.int32)
    index[0, : len(tokens)] = tokens.sort().values.int()
    bits = ops.pack_bits(torch.arange(total)[None, None] < len(tokens))
    count = torch.tensor([len(tokens)], dtype=torch.int32)
    return ops.SelectedTokens(*(part.to(device) for part in (mask, index, count, bits)))


def selections(share: float, churn: float, total: int, steps: int, device: str) -> list[ops.SelectedTokens]:
    """A random share of the tokens; with churn, so much of it is replaced at every later step by tokens not chosen before."""
    order = torch.randperm(total, generator=torch.Generator().manual_seed(1))
    count, new = round(share * total), round(churn * share * total)
    found = [order[new * step % (total - count + 1) :][:count] for step in range(steps if new else 1)]
    return [selected(tokens, total, device) for tokens in found]


# --------------------------------------------------------------------------------------------------------------- systems


@dataclass
class System:
    """One way of running the backbone, and what was measured of it."""

    name: str
    share: float | None = None  # of the HR tokens; None: no HR at all
    churn: float = 0.0
    on: bool = True
    prompt: str = "low"  # or "hd"
    transformers: bool = False
    prefill: list[float] = field(default_factory=list)  # seconds
    decode: list[list[float]] = field(default_factory=list)  # of each repetition, by token
    prefill_bytes: int = 0
    decode_bytes: int = 0
    projected: int = 0

    def seconds(self) -> tuple[float, float]:
        """Medians: of prefills, and of tokens."""
        return statistics.median(self.prefill), statistics.median(time for run in self.decode for time in run)


def systems() -> list[System]:
    return [
        System("transformers, sdpa", transformers=True),
        System("LLaVA"),
        System("M = 0", share=0.0),
        System("M = 10 %", share=0.1),
        System("M = 43 %", share=0.43),
        System("M = 100 %", share=1.0),
        System("M = 10 %, churn", share=0.1, churn=0.1),
        System("M = 10 %, off", share=0.1, on=False),
        System("M = 43 %, off", share=0.43, on=False),
        System("M = 100 %, off", share=1.0, on=False),
        System("LLaVA-HD", prompt="hd"),
    ]


class Backbone:
    """The model, its twin of transformers on the same weights, and the inputs."""

    def __init__(self, shape: str, zoom: int, dtype: torch.dtype, device: str):
        self.shape, self.device, self.zoom = shape, device, zoom
        torch.manual_seed(0)
        self.config = model_config(shape, zoom)
        with torch.device(device):
            default = torch.get_default_dtype()
            torch.set_default_dtype(dtype)
            self.model = FlexAttnLlavaForConditionalGeneration(self.config).eval()
            torch.set_default_dtype(default)
        text = LlamaConfig(**{**self.config.text_config.to_dict(), "attn_implementation": "sdpa"})
        with torch.device("meta"):
            self.twin = LlamaForCausalLM(text).eval()
        own = self.model.model.language_model.state_dict().items()
        weights = {f"model.{name}": value for name, value in own if "_hd." not in name}
        self.twin.load_state_dict(weights | {"lm_head.weight": self.model.lm_head.weight}, assign=True)
        self.twin.model.rotary_emb = type(self.twin.model.rotary_emb)(text).to(device)
        generator = torch.Generator().manual_seed(2)
        hidden = text.hidden_size

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator).to(device, dtype)

        begin = TEXT // 2
        words = torch.randint(3, text.vocab_size - 2, (TEXT,), generator=generator)
        image = torch.full((SIDE**2,), self.config.image_token_id)
        self.ids = torch.cat([words[:begin], image, words[begin:]])[None].to(device)
        self.features = normal(1, SIDE**2, hidden)
        self.hr_features = normal(1, self.config.hr_side**2, hidden)
        embedded = self.model.get_input_embeddings()(words.to(device)).detach()
        low = torch.cat([embedded[:begin], self.features[0], embedded[begin:]])[None]
        self.embeds = {
            "low": low,
            "hd": torch.cat([low[:, :begin], normal(1, HD_TOKENS, hidden), low[:, begin:]], 1),
        }

    @property
    def hr_tokens(self) -> int:
        return self.config.hr_side**2

    def start(self, system: System, steps: int) -> Forced | None:
        if system.share is None:
            return None
        return Forced(
            selections(system.share, system.churn, self.hr_tokens, steps, self.device),
            len(self.config.hr_layers),
        )

    def call(self, system: System, cache: DynamicCache, token: torch.Tensor | None = None) -> torch.Tensor:
        """Prefill, or one token -> logits of the last row."""
        common = dict(past_key_values=cache, use_cache=True, logits_to_keep=1)
        if system.transformers or system.prompt == "hd":
            model = self.twin if system.transformers else self.model
            given = {"input_ids": token} if token is not None else {"inputs_embeds": self.embeds[system.prompt]}
            return model(**given, **common).logits
        given = {"input_ids": self.ids if token is None else token}
        if token is None:
            given["image_features"] = self.features
            if system.share is not None:
                given["hr_features"] = self.hr_features
        return self.model(**given, **common, hr_cache=system.on).logits


def model_config(shape: str, zoom: int) -> FlexAttnLlavaConfig:
    """The vision tower is a small one: no time of it is measured."""
    patch = 14
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, patch_size=patch,
                              image_size=SIDE * patch, projection_dim=16)  # fmt: skip
    text = LlamaConfig(
        **SHAPES[shape],
        num_key_value_heads=SHAPES[shape]["num_attention_heads"],
        max_position_embeddings=4096,
    )
    values = LlavaConfig(vision_config=vision.to_dict(), text_config=text.to_dict(), image_token_index=text.vocab_size - 1,
                         image_seq_length=SIDE**2).to_dict()  # fmt: skip
    values.pop("model_type")
    settings = FlexAttnConfig(
        zoom=zoom,
        lowres_size=SIDE * patch,
        highres_size=SIDE * patch * zoom,
        first_layer=FIRST_LAYER[shape],
    )
    return FlexAttnLlavaConfig(**values, flexattn_config=settings.to_dict())


# ------------------------------------------------------------------------------------------------------------- measuring


class Clock:
    """Seconds and bytes of a call."""

    def __init__(self, device: str):
        self.cuda = device != "cpu"

    def time(self, function) -> tuple[float, torch.Tensor]:
        if self.cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        result = function()
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - begin, result

    def forget_peak(self) -> int:
        """Begins a new peak; bytes in use now."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        Path("/proc/self/clear_refs").write_text("5")
        return self._resident("VmRSS")

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.cuda else self._resident("VmHWM")

    @staticmethod
    def _resident(name: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) * 1024


@torch.no_grad()
def measure(backbone: Backbone, chosen: list[System], tokens: int, repetitions: int, clock: Clock) -> None:
    for repetition in range(repetitions + 1):  # the first one warms up
        caches, stand_ins, logits = {}, {}, {}
        for system in chosen:
            cache = caches[system.name] = DynamicCache(config=backbone.config.text_config)
            stand_ins[system.name] = backbone.start(system, tokens + 1)
            before = clock.forget_peak()
            with forced(stand_ins[system.name]):
                seconds, logits[system.name] = clock.time(lambda: backbone.call(system, cache))
            system.prefill_bytes = max(system.prefill_bytes, clock.peak() - before)
            if repetition:
                system.prefill.append(seconds)
        for system in chosen if repetition else []:
            system.decode.append([])
        for _ in range(tokens if repetition else 1):
            for system in chosen:
                token = logits[system.name][:, -1:].argmax(-1)
                before = clock.forget_peak()
                with forced(stand_ins[system.name]):
                    seconds, logits[system.name] = clock.time(lambda: backbone.call(system, caches[system.name], token))
                system.decode_bytes = max(system.decode_bytes, clock.peak() - before)
                if repetition:
                    system.decode[-1].append(seconds)
        for system in chosen:
            assert logits[system.name].isfinite().all(), f"{system.name} gives numbers that are not finite"
            images = HRCache.beside(caches[system.name])
            system.projected = 0 if images is None else images.projected


@torch.no_grad()
def tiles_encoded() -> int:
    """Of 9, when the selection stays inside 2: an image's pixels, the prefill and four tokens."""
    torch.manual_seed(0)
    config = model_config("quick", zoom=3)
    model = FlexAttnLlavaForConditionalGeneration(config).eval()
    side = config.hr_side // 3
    grid = torch.zeros(config.hr_side, config.hr_side, dtype=torch.bool)
    grid[side + 3 : side + 9, side // 2 : side + side // 2] = True  # in the middle row, over the border of two tiles
    stand_in = Forced([selected(grid.flatten().nonzero().flatten(), grid.numel(), "cpu")], len(config.hr_layers))
    ids = torch.cat([torch.tensor([1]), torch.full((SIDE**2,), config.image_token_id), torch.tensor([5, 6])])[None]
    cache = DynamicCache(config=config.text_config)
    with forced(stand_in):
        logits = model(
            input_ids=ids,
            pixel_values_hr=torch.randn(1, 3, *2 * [config.flexattn.highres_size]),
            past_key_values=cache,
        ).logits
        for _ in range(4):
            logits = model(input_ids=logits[:, -1:].argmax(-1), past_key_values=cache).logits
    return HRCache.beside(cache).encoded


def ratios(found: list[System]) -> dict[str, float]:
    """Of the medians; prefill, and decode per token."""
    by_name = {system.name: system.seconds() for system in found}

    def over(one: str, other: str, which: int) -> float:
        return by_name[one][which] / by_name[other][which]

    return {
        "prefill_m10": over("M = 10 %", "LLaVA", 0),
        "decode_m10": over("M = 10 %", "LLaVA", 1),
        "decode_m43": over("M = 43 %", "LLaVA", 1),
        "decode_m100": over("M = 100 %", "LLaVA", 1),
        "decode_m10_churn10": over("M = 10 %, churn", "LLaVA", 1),
        "plain_over_transformers_prefill": over("LLaVA", "transformers, sdpa", 0),
        "plain_over_transformers_decode": over("LLaVA", "transformers, sdpa", 1),
        "prefill_m10_over_hd": over("M = 10 %", "LLaVA-HD", 0),
    }


# --------------------------------------------------------------------------------------------------------------- results


def rows(found: list[System], extra: dict) -> list[dict]:
    plain = next(system.seconds() for system in found if system.name == "LLaVA")
    return [
        extra
        | {
            "system": system.name,
            "prefill_s": round(system.seconds()[0], 5),
            "prefill_over_llava": round(system.seconds()[0] / plain[0], 4),
            "decode_s_per_token": round(system.seconds()[1], 6),
            "decode_over_llava": round(system.seconds()[1] / plain[1], 4),
            "prefill_peak_mib": round(system.prefill_bytes / 2**20, 1),
            "decode_peak_mib": round(system.decode_bytes / 2**20, 1),
            "hr_tokens_projected": system.projected,
        }
        for system in found
    ]


def plot(folder: Path, found: list[System], by_zoom: list[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for system in found:
        if system.name in (
            "LLaVA",
            "M = 10 %",
            "M = 10 %, off",
            "M = 100 %",
            "M = 43 %, off",
            "LLaVA-HD",
        ):
            steps = [statistics.median(step) for step in zip(*system.decode)]
            total = [system.seconds()[0]]
            for step in steps:
                total.append(total[-1] + step)
            axes.plot(range(len(total)), total, label=system.name)
    axes.set(
        xlabel="generated tokens",
        ylabel="seconds since the prompt",
        title="Cost against generated length",
        ylim=(0, None),
    )
    axes.legend()
    figure.savefig(folder / "cost_by_length.png", dpi=150, bbox_inches="tight")
    if not by_zoom:
        return
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4.5))
    for axes, what, title in zip(panels, ("prefill_over_llava", "decode_over_llava"), ("Prefill", "Decode, per token")):
        for name in dict.fromkeys(row["system"] for row in by_zoom):
            if name != "LLaVA":
                points = [(row["zoom"], row[what]) for row in by_zoom if row["system"] == name]
                axes.plot(*zip(*points), marker="o", label=name)
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set(
            xlabel="zoom (side of the image in tiles)",
            ylabel="time over LLaVA's",
            title=title,
            ylim=(0, None),
        )
        axes.legend()
    figure.savefig(folder / "cost_by_resolution.png", dpi=150, bbox_inches="tight")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="default", choices=SHAPES, help="of the language model")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1, help="on the CPU (default: 1)")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument(
        "--zooms",
        default="",
        help="further image sizes for the plot, e.g. 1,2,4,5,6; zoom 3 is always measured",
    )
    parser.add_argument("--csv", type=Path, metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plots", type=Path, metavar="DIR")
    given = parser.parse_args(arguments)
    if given.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"there is no GPU for --device {given.device}")
    if given.plots and find_spec("matplotlib") is None:
        parser.error("--plots needs matplotlib: pip install matplotlib")
    torch.set_num_threads(given.threads)
    clock, dtype = Clock(given.device), getattr(torch, given.dtype)
    facts = machine(given.device).columns() | {
        "shape": given.shape,
        "dtype": given.dtype,
        "threads": given.threads,
    }

    found = systems()
    measure(
        Backbone(given.shape, 3, dtype, given.device),
        found,
        given.new_tokens,
        given.repetitions,
        clock,
    )
    by_zoom = []
    for zoom in sorted({3, *(int(zoom) for zoom in given.zooms.split(",") if zoom)}) if given.zooms else []:
        few = [
            system
            for system in systems()
            if system.name in ("LLaVA", "M = 10 %", "M = 10 %, off", "M = 43 %", "M = 100 %")
        ]
        measure(Backbone(given.shape, zoom, dtype, given.device), few, 4, 2, clock)
        by_zoom += rows(few, facts | {"zoom": zoom})
    numbers = ratios(found) | {"tiles_encoded_2_of_9": tiles_encoded()}

    table = rows(found, facts | {"zoom": 3})
    shown = [column for column in table[0] if column not in (*facts, "zoom")]
    print_table(f"{given.shape}: {SIDE**2 + TEXT} positions, {given.new_tokens} new tokens, medians of {given.repetitions} repetitions; "
                f"{facts['device']}, torch {facts['torch']}", shown, [[str(row[column]) for column in shown] for row in table])  # fmt: skip
    limited = given.shape == "default" and given.device == "cpu"
    print_table("Ratios", ["ratio", "measured", *(["limit"] if limited else [])],
                [[name, f"{value:.3f}", *([f"{LIMITS[name]:g}"] if limited else [])] for name, value in numbers.items()])  # fmt: skip
    if given.csv:
        write_csv(given.csv, table + [row for row in by_zoom if row["zoom"] != 3])
    if given.json:
        given.json.write_text(json.dumps({**facts, "ratios": numbers}, indent=2) + "\n")
    if given.plots:
        plot(given.plots, found, by_zoom)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
