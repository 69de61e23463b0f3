"""The released implementation's own numbers, in the format of data/reference_vectors/README.md.

FLEXATTN_REFERENCE_VECTORS names another folder in that format. Nothing about its cases is known here: sizes, heads,
rope base, thresholds and layers are read from its json files, and a case of an unknown kind fails.
"""

from __future__ import annotations

import dataclasses
import json
import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import DynamicCache, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from flexattn_cuda import FlexAttnConfig, FlexAttnLlavaForConditionalGeneration, Trace, ops, reference
from flexattn_cuda.inputs.processor import FlexAttnLlavaImageProcessor
from flexattn_cuda.mechanism.cache import HRCache
from flexattn_cuda.mechanism.cache_argument import CACHE_ARGUMENT
from flexattn_cuda.mechanism.context import ContextOptions, HRContext
from flexattn_cuda.mechanism.grid import Grid, ImageGrids
from flexattn_cuda.mechanism.keys import KeyForm
from flexattn_cuda.mechanism.layout import ImageLayout
from flexattn_cuda.mechanism.rotary import RotaryTables, hr_rotary_tables
from flexattn_cuda.mechanism.rows import Rows
from flexattn_cuda.mechanism.tokens import HRTokens

FOLDER = Path(os.environ.get("FLEXATTN_REFERENCE_VECTORS") or Path(__file__).parents[1] / "data" / "reference_vectors")
RELEASED_IMAGE_ID = -200
LOGITS, MAPS, LAYER_OUTPUTS, FEATURES, PIXELS = (1e-3, 1e-5, 1e-4, 1e-4, 1e-5)  # the set's README, float32
HR_STRIDE, LR_STRIDE = 36, 12  # of the pixel samples, at every image size


def read_json(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text())


@cache
def arrays(name: str):
    return np.load(FOLDER / f"{name}.npz")


def tensor(name: str, key: str) -> torch.Tensor:
    array = torch.from_numpy(arrays(name)[key])
    return array.float() if array.dtype == torch.float16 else array


def ids(cases: list[dict], key: str) -> list[str]:
    return [str(case[key]) for case in cases]


def valid_rect_of(width: int, height: int, side: int) -> list[int]:
    margin = int((abs(width - height) // 2) / max(width, height) * side)
    return [margin, 0, side - margin, side] if width > height else [0, margin, side, side - margin]


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str) -> None:
    assert actual.shape == expected.shape, f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    worst = (actual - expected).abs().max().item()
    assert worst <= tolerance, f"{what}: off by {worst:.3g}, allowed {tolerance:.3g}"


# ----------------------------------------------------------------------------------------------------- selection

SELECTION = read_json("selection")["cases"]


@pytest.mark.parametrize("case", SELECTION, ids=ids(SELECTION, "index"))
def test_selection(case):
    side, hr_side = case["lr_side"], case["hr_side"]
    heads = tensor("selection", f"attn_{case['index']:02d}")
    expected = tensor("selection", f"mask_{case['index']:02d}")
    selected = ops.select_tokens(
        heads.sum(0)[None, None, None],
        torch.full((1, 1, 2), side, dtype=torch.int32),
        torch.full((1, 1, 2), hr_side, dtype=torch.int32),
        hr_tokens=hr_side**2,
        scale=255.0,
        threshold=case["threshold"],
        pool_grid=torch.full((1, 1, 2), 9, dtype=torch.int32),
        valid_rect=torch.tensor([[valid_rect_of(*case["ori_size_wh"], side)]], dtype=torch.int32),
    )
    assert torch.equal(selected.mask(1)[0, 0, 0].view(hr_side, hr_side), expected)
    assert selected.count.item() == case["selected"] == int(expected.sum())
    assert torch.equal(selected.index[0, : selected.count.item()].long(), expected.flatten().nonzero().flatten())


# --------------------------------------------------------------------------------------------------------- layer

LAYERS = read_json("layer")["cases"]


class Layer:
    """One attention layer with the weights of a case; layer 1 of a model whose layer 0 selects."""

    def __init__(self, case: dict):
        self.case, self.tag = case, case["tag"]
        weight = {name: self.array(f"w_{name}_proj") for name in ("q", "k", "v", "o", "k", "v")}
        head_dim, heads = case["head_dim"], case["num_heads"]
        config = LlamaConfig(
            hidden_size=weight["q"].shape[1],
            num_attention_heads=heads,
            num_key_value_heads=weight["k"].shape[0] // head_dim,
            head_dim=head_dim,
            rope_theta=case["rope_theta"],
            attn_implementation="flexattn",
        )
        self.attention = LlamaAttention(config, layer_idx=1).eval()
        self.attention.hr_key_form = KeyForm()
        for name in ("k_proj_hd", "v_proj_hd"):
            out_features, in_features = self.array(f"w_{name}").shape
            setattr(self.attention, name, torch.nn.Linear(in_features, out_features, bias=False))
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "k_proj_hd", "v_proj_hd"):
            getattr(self.attention, name).weight.data = self.array(f"w_{name}")
        self.rotary = LlamaRotaryEmbedding(config)
        lr_grid, hr_grid = Grid(*2 * [case["lr_side"]]), Grid(*2 * [case["hr_side"]])
        self.config = FlexAttnConfig(threshold=float(case["threshold"]), first_layer=1)
        begin, end = case["image_begin"], case["image_end"]
        cos, sin = self.rotary(self.array("hidden_states"), torch.arange(begin, end)[None])
        self.tables = hr_rotary_tables(RotaryTables(cos[0], sin[0]), lr_grid, hr_grid)
        valid_rect = torch.tensor([[valid_rect_of(*case["ori_size_wh"], lr_grid.rows)]], dtype=torch.int32)
        ranges = torch.tensor([[[begin, end]]], dtype=torch.int32)
        grids = [[ImageGrids(lr_grid, hr_grid, Grid(self.config.zoom, self.config.zoom))]]
        self.images = HRCache(
            settings=self.config,
            layout=ImageLayout(grids, ranges, valid_rect, last_end=end),
            tokens=HRTokens(
                grids=grids,
                features=tensor("layer", f"shared.hd_features_{hr_grid.rows}")[None],
                tables=RotaryTables(*(table[None] for table in self.tables)),
            ),
        )

    def array(self, name: str) -> torch.Tensor:
        return tensor("layer", f"{self.tag}.{name}")

    def run(self, hidden, first, rows, masks=None, cache=None, alpha=1.0):
        """-> output rows [N, D], and map [R, S*S] and mask [R, h*h] for the next layer."""
        trace = Trace()
        first_layer = 2 if masks is None else 1  # without masks it is the layer before the first one with HR tokens
        self.images.settings = dataclasses.replace(self.config, first_layer=first_layer)
        context = HRContext(self.images, rows, 2, options=ContextOptions(alpha, trace))
        if masks is not None:
            context.selected[0] = reference.list_tokens(masks[None, :, None])
        positions = torch.arange(first, first + hidden.shape[0])[None]
        out, _ = self.attention(
            hidden[None], self.rotary(hidden, positions), None, flexattn=context, **{CACHE_ARGUMENT: cache}
        )
        traced = trace.steps[0][1]
        return out[0], traced.map[0, :, 0], traced.mask[0, :, 0]


@torch.no_grad()
@pytest.mark.parametrize("case", LAYERS, ids=ids(LAYERS, "tag"))
def test_layer(case):
    layer = Layer(case)
    hidden = layer.array("hidden_states")
    assert hidden.shape[0] == case["N"]
    for name in ("cos", "sin"):
        sample = layer.array(f"hr_{name}_sample")
        assert_close(getattr(layer.tables, name)[::97], sample, 1e-5, f"HR {name} table")

    if case["mode"] == "inference":
        last = Rows(listed=torch.tensor([[case["N"] - 1]], dtype=torch.int32))
        out, attention_map, mask = layer.run(hidden, 0, last)
        assert_close(out[-1], layer.array("out_prefill_nohr_last"), LAYER_OUTPUTS, "last row without HR")
        assert_close(attention_map[0], layer.array("map_nohr"), MAPS, "map without HR")
        assert torch.equal(mask[0], layer.array("mask_out_nohr"))

        cache = DynamicCache()
        cache.update(torch.zeros(1, 1, 0, 1), torch.zeros(1, 1, 0, 1), 0)  # layer 0 of the cache is not used here
        out, attention_map, mask = layer.run(hidden, 0, last, layer.array("mask_in_prefill")[None], cache)
        rows = layer.array("out_rows") if f"{layer.tag}.out_rows" in arrays("layer") else slice(None)
        assert_close(out[rows], layer.array("out_prefill"), LAYER_OUTPUTS, "prefill output")
        assert_close(attention_map[0], layer.array("map_prefill"), MAPS, "prefill map")
        assert torch.equal(mask[0], layer.array("mask_out_prefill"))

        only = Rows(listed=torch.zeros(1, 1, dtype=torch.int32))
        decode = layer.array("hidden_states_decode")
        out, attention_map, mask = layer.run(decode, case["N"], only, layer.array("mask_in_decode")[None], cache)
        assert_close(out, layer.array("out_decode"), LAYER_OUTPUTS, "decode output")
        assert_close(attention_map[0], layer.array("map_decode"), MAPS, "decode map")
        assert torch.equal(mask[0], layer.array("mask_out_decode"))
    elif case["mode"] == "scoring/training":
        labels = torch.full((1, case["N"]), -100)
        for first, last in case["answer_spans"]:
            labels[0, first : last + 1] = 1
        rows = Rows.of_answers(layer.config, labels)
        assert torch.equal(rows.listed[0].long(), layer.array("rows"))
        out, attention_map, mask = layer.run(hidden, 0, rows, layer.array("mask_in"), alpha=case["alpha"])
        assert_close(out, layer.array("out_all"), LAYER_OUTPUTS, "output")
        assert_close(attention_map, layer.array("map_rows"), MAPS, "maps")
        assert torch.equal(mask, layer.array("mask_out"))
    else:
        pytest.fail(f"layer case {case['tag']} has an unknown mode {case['mode']!r}")


# --------------------------------------------------------------------------------------------------- whole model


def load_model(override: dict | None = None) -> FlexAttnLlavaForConditionalGeneration:
    extra = json.loads((FOLDER / "model" / "config.json").read_text()).get("extra", {})
    settings = FlexAttnConfig.from_extra(extra | (override or {}))
    return FlexAttnLlavaForConditionalGeneration.from_pretrained(FOLDER / "model", flexattn=settings).eval()


def preprocess(model, *names: str) -> dict[str, torch.Tensor]:
    processor = FlexAttnLlavaImageProcessor.from_config(FOLDER / "model", model.config)
    return dict(processor([Image.open(FOLDER / name) for name in names], return_tensors="pt"))


def expand(model, values: torch.Tensor, prompt: torch.Tensor, fill: int) -> torch.Tensor:
    """Values along a prompt in which one id stands for each image, with `fill` for each of the image's tokens."""
    tokens, parts = model.config.lr_side**2, []
    for value, token in zip(values.tolist(), prompt.tolist()):
        parts += [fill] * tokens if token == RELEASED_IMAGE_ID else [value]
    return torch.tensor(parts)


CASES = read_json("model_cases")["cases"]


class ModelCase:
    """A case of the whole model: its vectors, the model with the case's settings, and the case's image and prompt."""

    def __init__(self, case: dict):
        self.case, self.name = case, case["name"]
        self.model = load_model(case["extra_override"])
        self.model.generation_config.eos_token_id = None
        self.pixels = preprocess(self.model, case["image"])
        raw = self.expected("input_ids")
        self.input_ids = expand(self.model, raw, raw, self.model.config.image_token_id)[None]
        self.image = (self.input_ids[0] == self.model.config.image_token_id).nonzero().flatten()

    def expected(self, key: str) -> torch.Tensor:
        return tensor("model_cases", f"{self.name}.{key}")

    def holds(self, key: str) -> bool:
        return f"{self.name}.{key}" in arrays("model_cases")

    def check_inputs(self) -> None:
        sampled = self.pixels["pixel_values_hr"][0, :, ::HR_STRIDE, ::HR_STRIDE]
        assert_close(sampled, self.expected("pixel_sample"), PIXELS, "high-resolution pixels")
        sampled = self.pixels["pixel_values"][0, :, ::LR_STRIDE, ::LR_STRIDE]
        assert_close(sampled, self.expected("lowres_sample"), PIXELS, "low-resolution pixels")
        assert self.input_ids.shape[1] == self.case["prompt_positions"]
        begin, end = int(self.image[0]), int(self.image[-1]) + 1
        assert (begin, end) == (self.case["image_begin"], self.case["image_end"])

    def check_generation(self) -> None:
        trace = Trace()
        output = self.model.generate(
            self.input_ids,
            **self.pixels,
            max_new_tokens=self.case["num_steps"],
            do_sample=False,
            flexattn_trace=trace,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logits = torch.stack(output.logits, 1)[0]
        assert_close(logits, self.expected("logits"), LOGITS, "logits")
        tokens = output.sequences[0, self.input_ids.shape[1] :].tolist()
        assert tokens == self.case["greedy_tokens"] == self.expected("tokens").tolist()
        self._check_trace(trace)

    def _check_trace(self, trace: Trace) -> None:
        layers = self.case["map_layers"]
        counts = [[int(step[layer].mask.sum()) for layer in layers] for step in trace.steps]
        assert counts == self.case["counts"] == self.expected("counts").tolist()
        packed = arrays("model_cases")[f"{self.name}.mask_packed"]
        for t, masks in enumerate(np.unpackbits(packed, axis=-1)):
            for layer, mask in zip(layers, masks):
                traced = trace.steps[t][layer].mask.flatten()
                expected = torch.from_numpy(mask[: traced.numel()]).bool()
                assert torch.equal(traced, expected), f"mask, step {t}, layer {layer}"
        for t, maps in enumerate(self.expected("maps")):
            for layer, attention_map in zip(layers, maps):
                assert_close(trace.steps[t][layer].map[0, 0, 0], attention_map, MAPS, f"map, step {t}, layer {layer}")

    def check_prefill(self) -> None:
        rows = self.expected("prefill_rows").long()
        with_hr = self.model(input_ids=self.input_ids, **self.pixels).logits[0]
        assert_close(with_hr[rows], self.expected("prefill_row_logits"), LOGITS, "prefill with HR tokens")
        without = self.model(input_ids=self.input_ids, pixel_values=self.pixels["pixel_values"]).logits[0]
        assert_close(without[-1], self.expected("prefill_last_logits_no_hr"), LOGITS, "prefill without HR tokens")

    def check_features(self) -> None:
        """Which features a case holds differs: all, a sample, or means and norms."""
        prefill = self.model(input_ids=self.input_ids, tiles_on_demand=False, **self.pixels)
        features = HRCache.beside(prefill[CACHE_ARGUMENT]).tokens.features[0]
        if self.holds("hd_features"):
            assert_close(features, self.expected("hd_features"), FEATURES, "HR features")
        if self.holds("hd_sample"):
            sampled = features[self.expected("hd_sample_index").long()]
            assert_close(sampled, self.expected("hd_sample"), FEATURES, "HR features")
        if self.holds("hd_token_mean"):
            assert_close(features.mean(-1), self.expected("hd_token_mean"), FEATURES, "means of the HR features")
        if self.holds("hd_token_l2"):
            bound = FEATURES * features.shape[-1] ** 0.5
            assert_close(features.norm(dim=-1), self.expected("hd_token_l2"), bound, "norms of the HR features")
        if self.holds("lr_features"):
            self._check_lr_features()

    def _check_lr_features(self) -> None:
        """They enter the language model in place of embeddings."""
        output = self.model(input_ids=self.input_ids, **self.pixels, output_hidden_states=True)
        entering, expected = output.hidden_states[0][0, self.image], self.expected("lr_features")
        every = 1 if expected.shape[0] == len(self.image) else 8
        assert_close(entering[::every], expected, FEATURES, "LR features")


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("case", CASES, ids=ids(CASES, "name"))
def test_whole_model(case):
    case = ModelCase(case)
    case.check_inputs()
    case.check_generation()
    case.check_prefill()
    case.check_features()


# ------------------------------------------------------------------------------------------- scoring and training

SCORES = read_json("scoring_training")


@pytest.mark.slow
@torch.no_grad()
def test_option_losses():
    scoring, model = SCORES["scoring"], load_model()
    pixels, prompt = preprocess(model, scoring["image"]), tensor("scoring_training", "prompt_ids")
    map_layers = range(model.config.flexattn.first_layer - 1, model.config.text_config.num_hidden_layers)
    losses = []
    for number, option in enumerate(scoring["options"]):
        raw = torch.cat([prompt, torch.tensor(option)])
        input_ids = expand(model, raw, raw, model.config.image_token_id)[None]
        labels = torch.full_like(input_ids, -100)
        labels[0, -len(option) :] = input_ids[0, -len(option) :]
        trace = Trace()
        output = model(
            input_ids=input_ids,
            labels=labels,
            hr_alpha=scoring["alpha"],
            flexattn_trace=trace,
            use_cache=False,
            **pixels,
        )
        losses.append(output.loss.item())
        if f"option{number}.answer_row_logits" in arrays("scoring_training"):
            answer_logits = output.logits[0, -len(option) - 1 : -1]
            assert_close(
                answer_logits, tensor("scoring_training", f"option{number}.answer_row_logits"), LOGITS, "logits"
            )
        if f"option{number}.counts" in arrays("scoring_training"):
            counts = torch.stack([trace.steps[0][layer].mask[0, :, 0].sum(-1) for layer in map_layers])
            assert torch.equal(counts, tensor("scoring_training", f"option{number}.counts").long())
    assert_close(torch.tensor(losses), torch.tensor(scoring["losses"]), 1e-4, "option losses")
    assert int(np.argmin(losses)) == scoring["argmin"]


def released_name(name: str) -> str:
    """A parameter's name in the released format."""
    for here, there in (
        ("model.language_model.", "model."),
        ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ):
        if name.startswith(here):
            return there + name[len(here) :]
    return name


TRAINING = SCORES["training"]


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("run", TRAINING["runs"], ids=ids(TRAINING["runs"], "step"))
def test_training(run, checkpointing):
    model = load_model()
    model.requires_grad_(True).train()
    model.model.vision_tower.requires_grad_(False)
    if checkpointing:
        model.gradient_checkpointing_enable()
    alpha = model.config.flexattn.alpha(run["step"])
    assert alpha == pytest.approx(run["alpha"], abs=1e-12)
    raw, mask = (tensor("scoring_training", "train.input_ids"), tensor("scoring_training", "train.attention_mask"))
    raw_labels = tensor("scoring_training", "train.labels")

    def batch(values: torch.Tensor, fill: int, pad: int) -> torch.Tensor:
        rows = [expand(model, v[m], r[m], fill) for v, r, m in zip(values, raw, mask)]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)

    output = model(
        input_ids=batch(raw, model.config.image_token_id, 0),
        attention_mask=batch(mask.long(), 1, 0),
        labels=batch(raw_labels, -100, -100),
        hr_alpha=alpha,
        **preprocess(model, *TRAINING["images"]),
    )
    assert output.loss.item() == pytest.approx(run["loss"], abs=1e-4)
    output.loss.backward()
    norms = {
        released_name(name): None if weight.grad is None else weight.grad.norm().item()
        for name, weight in model.named_parameters()
    }
    for name, expected in run["grad_l2"].items():
        actual = norms.get(name)  # a projection before first_layer has no counterpart here, and no gradient there
        if expected is None:
            assert actual is None, f"{name} has a gradient"
        else:
            assert actual == pytest.approx(expected, rel=1e-3, abs=1e-9), name
