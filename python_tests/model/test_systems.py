"""The systems that FlexAttention is compared with: LLaVA-HD and LLaVA-XAttn, as modes of the same model class."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import tiny
import tiny_checkpoint
import torch
from transformers import CLIPVisionConfig, DynamicCache, MistralConfig

from flexattn_cuda import (
    FlexAttnConfig,
    FlexAttnLlavaConfig,
    FlexAttnLlavaForConditionalGeneration,
    FlexAttnLlavaProcessor,
    Trace,
    reference,
)
from flexattn_cuda.analysis import memory
from flexattn_cuda.baselines import cross_attention
from flexattn_cuda.families.llava.config import as_system
from flexattn_cuda.mechanism.cache import HRCache
from flexattn_cuda.mechanism.config import SYSTEMS, settings_of
from flexattn_cuda.mechanism.grid import ABSENT, Grid, ImageGrids
from flexattn_cuda.mechanism.layout import ImageLayout
from flexattn_cuda.mechanism.rotary import RotaryTables
from flexattn_cuda.mechanism.tokens import HRTokens

LOW = tiny.SIDE * tiny.PATCH
HD, XATTN = settings_of("hd", LOW), settings_of("xattn", LOW)
TOLERANCE = (
    32 * 2.0**-24
)  # transformers computes rotary tables and norms in float32 in every dtype; 11 norms one after the other
BOTH = pytest.mark.parametrize("settings", [HD, XATTN], ids=["hd", "xattn"])


def prompt(model, *parts: int | str, seed: int = 0) -> torch.Tensor:
    """[N] ids, as `tiny.prompt`, with as many ids for an image as the system takes."""
    ids = []
    for number, part in enumerate(parts):
        image = torch.full((model.config.image_tokens,), tiny.IMAGE)
        ids.append(image if part == "image" else tiny.prompt(part, seed=seed + number))
    return torch.cat(ids)


def images(model, count: int, seed: int = 0) -> torch.Tensor:
    size = model.config.flexattn.highres_size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=model.dtype)


def expected_logits(model, ids: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """[N, V], by the definition in reference.py."""
    text, weights = model.config.text_config, model.state_dict()
    low, high = model.encode(None, pixels)
    tokens = low if model.config.system == "xattn" else torch.cat([low, high], 1)
    x = weights["model.language_model.embed_tokens.weight"][ids].clone()
    x[ids == tiny.IMAGE] = tokens.flatten(0, 1)
    sizes = dict(heads=text.num_attention_heads, kv_heads=text.num_key_value_heads, eps=text.rms_norm_eps, theta=1e4)
    return reference.llama(
        weights, x, **sizes, hr_tokens=high.flatten(0, 1) if model.config.system == "xattn" else None
    )


@torch.no_grad()
@BOTH
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("count", [1, 2])
def test_logits_are_those_of_the_definition(settings, kv_heads, count):
    model = tiny.flex(settings, kv_heads=kv_heads).double()
    ids, pixels = prompt(model, 3, *["image", 5] * count), images(model, count)
    logits = model(input_ids=ids[None], pixel_values_hr=pixels).logits[0]
    expected = expected_logits(model, ids, pixels)
    assert (logits - expected).abs().max() <= TOLERANCE * expected.abs().max()
    without = model(input_ids=ids[None], pixel_values_hr=torch.zeros_like(pixels)).logits[0]
    assert (without - expected).abs().max() > 1e-3 * expected.abs().max()


@torch.no_grad()
def test_xattn_without_output_projection_is_llava(tmp_path):
    plain = tiny.llava()
    plain.save_pretrained(tmp_path)
    llava = FlexAttnLlavaForConditionalGeneration.from_pretrained(tmp_path, flexattn=tiny.settings()).eval()
    xattn = FlexAttnLlavaForConditionalGeneration.from_pretrained(tmp_path, flexattn=XATTN).eval()
    assert all((layer.cross_attn.o_proj.weight == 0).all() for layer in xattn.model.language_model.layers)
    ids, pixels = prompt(xattn, 3, "image", 5)[None], images(xattn, 1)
    low = torch.nn.functional.interpolate(pixels, size=LOW, mode="bilinear", antialias=True)
    assert torch.equal(
        xattn(input_ids=ids, pixel_values_hr=pixels).logits, llava(input_ids=ids, pixel_values=low).logits
    )
    # Not because cross-attention is left out:
    for layer in xattn.model.language_model.layers:
        layer.cross_attn.o_proj.weight.copy_(layer.self_attn.o_proj.weight)
    assert not torch.equal(
        xattn(input_ids=ids, pixel_values_hr=pixels).logits, llava(input_ids=ids, pixel_values=low).logits
    )


@pytest.mark.slow
@torch.no_grad()
@BOTH
def test_generation_with_a_cache_equals_recomputation(settings):
    model = tiny.flex(settings).double()
    ids, pixels = prompt(model, 3, "image", 5)[None], images(model, 1)
    tokens, logits = tiny.generate(model, 12, input_ids=ids, pixel_values_hr=pixels)
    whole = torch.cat([ids, tokens], 1)
    expected = expected_logits(model, whole[0], pixels)[ids.shape[1] - 1 : -1]
    assert (logits[0] - expected).abs().max() <= TOLERANCE * expected.abs().max()
    for options in ({"hr_cache": False}, {"use_cache": False}, {"cache_implementation": "static"}):
        again = model.generate(input_ids=ids, pixel_values_hr=pixels, max_new_tokens=12, do_sample=False, **options)
        assert torch.equal(again, whole), options


@pytest.mark.slow
@torch.no_grad()
@BOTH
def test_a_row_of_a_batch_is_answered_as_if_it_were_alone(settings):
    model = tiny.flex(settings).double()
    pixels = images(model, 3)
    prompts = [prompt(model, 3, "image", 5), prompt(model, 6, seed=7), prompt(model, 2, "image", 4, "image", 3, seed=9)]
    tokens, logits = tiny.generate(model, **tiny.left_padded(*prompts), pixel_values_hr=pixels)
    for row, own in enumerate([pixels[:1], None, pixels[1:]]):
        inputs = {} if own is None else {"pixel_values_hr": own}
        alone, alone_logits = tiny.generate(model, input_ids=prompts[row][None], **inputs)
        assert torch.equal(alone[0], tokens[row])
        assert (alone_logits[0] - logits[row]).abs().max() <= TOLERANCE * logits.abs().max()


@torch.no_grad()
@BOTH
def test_beams_share_the_images(settings):
    model = tiny.flex(settings)
    inputs = tiny.left_padded(prompt(model, 3, "image", 5), prompt(model, 1, "image", 4, seed=3))
    pixels = images(model, 2)
    together = model.generate(**inputs, pixel_values_hr=pixels, num_beams=3, max_new_tokens=5, do_sample=False)
    for row in range(2):
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()][None]
        alone = model.generate(
            input_ids=ids, pixel_values_hr=pixels[row : row + 1], num_beams=3, max_new_tokens=5, do_sample=False
        )
        assert torch.equal(together[row, -5:], alone[0, -5:])


@torch.no_grad()
@BOTH
def test_a_conversation_goes_on_with_another_image(settings):
    model = tiny.flex(settings).double()
    pixels, cache = images(model, 2), DynamicCache(config=model.config.text_config)
    first, second = prompt(model, 3, "image", 5), prompt(model, 2, "image", 4, seed=5)
    model(input_ids=first[None], pixel_values_hr=pixels[:1], past_key_values=cache)
    turn = model(input_ids=second[None], pixel_values_hr=pixels[1:], past_key_values=cache).logits[0]
    if settings is XATTN:  # the first turn's rows saw the first image alone
        text, weights = model.config.text_config, model.state_dict()
        assert [k.shape[2] for k, _ in cache.flexattn.crossed.values()] == [
            2 * model.config.hr_side**2
        ] * text.num_hidden_layers
        high = model.encode(None, pixels)[1].flatten(0, 1)
        for layer, (k, v) in cache.flexattn.crossed.items():
            for kept, name in ((k, "k"), (v, "v")):
                weight = weights[f"model.language_model.layers.{layer}.cross_attn.{name}_proj.weight"]
                assert (
                    kept[0].transpose(0, 1).flatten(1) - high @ weight.T
                ).abs().max() <= TOLERANCE * high.abs().max()
    else:
        expected = expected_logits(model, torch.cat([first, second]), pixels)[len(first) :]
        assert (turn - expected).abs().max() <= TOLERANCE * expected.abs().max()


@torch.no_grad()
def test_an_image_that_was_cropped_out_of_the_cache_is_not_seen():
    model = tiny.flex(XATTN).double()
    pixels, text = images(model, 1), prompt(model, 4, seed=8)[None]
    cache = DynamicCache(config=model.config.text_config)
    model(input_ids=prompt(model, 3, "image", 5)[None], pixel_values_hr=pixels, past_key_values=cache)
    cache.crop(-(model.config.image_tokens + 5))  # to the three positions before the image
    alone = copy.deepcopy(cache)
    del alone.flexattn  # the same positions, with no image beside them
    seen = model(input_ids=text, past_key_values=cache).logits
    expected = model(input_ids=text, past_key_values=alone).logits
    assert (seen - expected).abs().max() <= TOLERANCE * expected.abs().max()


@torch.no_grad()
@BOTH
def test_features_of_another_size_or_number_are_refused(settings):
    model = tiny.flex(settings)
    ids, low, tokens = (prompt(model, 3, "image", 5)[None], torch.zeros(1, tiny.SIDE**2, 32), model.config.hr_side**2)
    for features in (torch.zeros(1, 2 * tokens, 32), torch.zeros(2, tokens, 32)):
        with pytest.raises(ValueError, match=f"for these prompts it must be .1, {tokens}, 32"):
            model(input_ids=ids, image_features=low, hr_features=features)
    with pytest.raises(ValueError, match="valid_rect has shape .7, 4.; it must be .1, 4."):
        model(input_ids=ids, image_features=low, hr_features=torch.zeros(1, tokens, 32), valid_rect=torch.zeros(7, 4))


def test_cross_attention_on_another_device_than_the_images():
    """Meta stands in for a second GPU: whatever is computed there must have been brought there."""
    module = cross_attention.CrossAttention(tiny.flex(XATTN).config.text_config, 0).to("meta")
    images = images_of(2)
    out = module(torch.zeros(2, 5, 32, device="meta"), cross_attention.CrossContext(images, cached=True))
    assert out.shape == (2, 5, 32) and out.device.type == "meta"


def images_of(prompts: int) -> HRCache:
    """Return images of this many prompts, the last of which has none."""
    lr_grid, hr_grid = Grid(tiny.SIDE, tiny.SIDE), Grid(*2 * [tiny.SIDE * tiny.ZOOM])
    grids = [[ImageGrids(lr_grid, hr_grid, Grid(tiny.ZOOM, tiny.ZOOM))] for _ in range(prompts - 1)] + [[ABSENT]]
    ranges = torch.tensor([[[1, 37]]] * (prompts - 1) + [[[0, 0]]], dtype=torch.int32)
    empty = torch.zeros(prompts, hr_grid.cells, 0)
    return HRCache(
        XATTN,
        ImageLayout(grids, ranges, torch.zeros(prompts, 1, 4), last_end=37),
        HRTokens(grids, torch.zeros(prompts, hr_grid.cells, 32), RotaryTables(empty, empty)),
    )


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_definition(settings, checkpointing):
    model = tiny.flex(settings).double().train()
    model.model.vision_tower.requires_grad_(False)
    ids, pixels = prompt(model, 3, "image", 5), images(model, 1)
    labels = ids.clone()
    labels[:-4] = -100
    names = [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and not (settings is XATTN and "projector" in name)
    ]
    parameters = dict(model.named_parameters())
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model(input_ids=ids[None], pixel_values_hr=pixels, labels=labels[None], use_cache=False).loss.backward()
    found = {name: parameters[name].grad.clone() for name in names}
    model.zero_grad()
    weights = dict(parameters)
    x = weights["model.language_model.embed_tokens.weight"][ids].clone()
    low, high = model.encode(None, pixels)
    x[ids == tiny.IMAGE] = (low if settings is XATTN else torch.cat([low, high], 1)).flatten(0, 1)
    logits = reference.llama(weights, x, heads=4, kv_heads=2, eps=model.config.text_config.rms_norm_eps, theta=1e4,
                             hr_tokens=high[0] if settings is XATTN else None)  # fmt: skip
    torch.nn.functional.cross_entropy(logits[:-1], labels[1:]).backward()
    for name in names:
        expected = parameters[name].grad
        assert (found[name] - expected).abs().max() <= 100 * TOLERANCE * expected.abs().max(), name


@torch.no_grad()
@BOTH
def test_saved_and_loaded_like_any_other_model(settings, tmp_path):
    model = tiny.flex(settings)
    model.save_pretrained(tmp_path)
    again = FlexAttnLlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert again.config.flexattn == settings
    assert all(torch.equal(p, again.state_dict()[name]) for name, p in model.state_dict().items())


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("hr_init", ["copy", "random"])
def test_a_checkpoint_of_one_system_starts_another(hr_init, tmp_path):
    tiny.flex(HD, kv_heads=2).save_pretrained(tmp_path)
    flex = FlexAttnLlavaForConditionalGeneration.from_pretrained(tmp_path, flexattn=tiny.settings(hr_init=hr_init))
    xattn = FlexAttnLlavaForConditionalGeneration.from_pretrained(
        tmp_path, flexattn=dataclasses.replace(XATTN, hr_init=hr_init)
    )
    plain = flex.model.language_model.layers[3].self_attn
    assert torch.equal(plain.k_proj_hd.weight, plain.k_proj.weight) == (hr_init == "copy")
    layer = xattn.model.language_model.layers[1]
    keys = layer.self_attn.k_proj.weight.view(2, 8, -1).repeat_interleave(2, 0).flatten(0, 1)  # two heads share a key
    assert torch.equal(layer.cross_attn.k_proj.weight, keys) == (hr_init == "copy")
    assert torch.equal(layer.cross_attn.q_proj.weight, layer.self_attn.q_proj.weight) == (hr_init == "copy")
    assert layer.cross_attn.q_proj.weight.abs().max() > 0 == layer.cross_attn.o_proj.weight.abs().max()


def test_a_checkpoint_that_lacks_its_own_projections_is_damaged(tmp_path):
    from safetensors.torch import load_file, save_file

    tiny.flex(XATTN).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop(next(name for name in weights if ".cross_attn.k_proj" in name))
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights"):
        FlexAttnLlavaForConditionalGeneration.from_pretrained(tmp_path)


@pytest.mark.slow
@BOTH
def test_prompts_of_the_processor_fit_the_system(settings, tmp_path):
    folder = tiny_checkpoint.save(tmp_path)
    model = FlexAttnLlavaForConditionalGeneration.from_pretrained(folder, flexattn=settings)
    processor = FlexAttnLlavaProcessor.from_pretrained(folder, config=model.config)
    inputs = processor(images=torch.zeros(40, 60, 3, dtype=torch.uint8).numpy(), text=processor.prompt("What is it?"))
    ids = inputs["input_ids"]
    assert int((ids == processor.image_token_id).sum()) == tiny.SIDE**2 + (64 if settings is HD else 0)
    assert inputs["pixel_values_hr"].shape[-1] == settings.highres_size
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] <= ids.shape[1] + 3
    processor.save_pretrained(tmp_path / "again")
    model.save_pretrained(tmp_path / "again")
    again = FlexAttnLlavaProcessor.from_pretrained(tmp_path / "again")
    assert again.image_tokens == model.config.image_tokens


def test_the_paper_s_sizes():
    names = {
        name: FlexAttnLlavaConfig(flexattn_config=s and s.to_dict()) for name in SYSTEMS for s in [settings_of(name)]
    }
    assert {name: config.image_tokens for name, config in names.items()} == dict.fromkeys(SYSTEMS, 576) | {
        "hd": 576 + 1024
    }
    assert {name: config.hr_side**2 for name, config in names.items()} == dict.fromkeys(SYSTEMS, 5184) | {
        "hd": 1024,
        "llava": 0,
    }
    assert len(names["xattn"].hr_layers) == 32 and len(names["flexattn"].hr_layers) == 23 and not names["hd"].hr_layers
    assert names["hd"].flexattn == FlexAttnConfig.hd() and names["xattn"].flexattn == FlexAttnConfig.xattn()
    for config in names.values():
        config.check()
    with pytest.raises(ValueError, match="no system 'hdx'; allowed: llava, hd, xattn"):
        settings_of("hdx")


@pytest.mark.slow
@pytest.mark.parametrize("start", [tiny.settings(threshold=70.0), HD, XATTN], ids=["flexattn", "hd", "xattn"])
def test_as_another_system_and_back_a_model_keeps_its_own_settings(start):
    config = tiny.flex(dataclasses.replace(start, first_layer=2, pool=3)).config
    for name in (name for name in SYSTEMS if name not in ("llava", "flexattn-paper")):
        other = as_system(config, name)
        expected = settings_of(name, LOW)
        for field in ("system", "zoom", "highres_size", "strategy"):
            assert getattr(other.flexattn, field) == getattr(expected, field)
        assert (other.flexattn.first_layer, other.flexattn.pool, other.flexattn.threshold) == (2, 3, start.threshold)
        assert as_system(other, config.system).flexattn == config.flexattn
    assert as_system(config, "llava").flexattn is None


def test_tiles_are_whole_patches():
    plain = FlexAttnLlavaConfig(vision_config=CLIPVisionConfig(image_size=224, patch_size=14).to_dict())
    assert as_system(plain, "hd").flexattn.tile_size == 140  # 2/3 of 224 pixels, down to ten patches
    plain.flexattn_config = FlexAttnConfig.hd(lowres_size=224, highres_size=298).to_dict()
    with pytest.raises(
        ValueError, match="tiles have 149 pixels a side, which is not a multiple of the 14-pixel patches"
    ):
        plain.check()


def test_xattn_is_for_llama_only():
    config = FlexAttnLlavaConfig(
        text_config=MistralConfig().to_dict(), flexattn_config=FlexAttnConfig.xattn().to_dict()
    )
    with pytest.raises(ValueError, match="layers of a LLaMA, not of a 'mistral'"):
        config.check()


@pytest.mark.slow
@pytest.mark.parametrize("settings", [HD, XATTN], ids=["hd", "xattn"])
def test_memory_of_a_system_is_what_it_takes(settings):
    config = tiny.flex(settings).config
    estimate = memory.estimate(config, torch.float32, text_positions=8)
    model = tiny.flex(settings)
    assert estimate.all_weights == sum(p.nbytes for p in model.parameters())
    cache = DynamicCache(config=config.text_config)
    with torch.no_grad():
        model(input_ids=prompt(model, 3, "image", 5)[None], pixel_values_hr=images(model, 1), past_key_values=cache)
    assert estimate.sequence_cache == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    kept = getattr(cache, "flexattn", None)
    crossed = [] if kept is None else [part for pair in kept.crossed.values() for part in pair]
    assert estimate.hr_cache_all == estimate.hr_cache_selected == sum(part.nbytes for part in crossed)
    assert estimate.hr_features == (0 if kept is None else kept.tokens.features.nbytes)


def test_there_is_nothing_to_trace():
    model, trace = tiny.flex(XATTN), Trace()
    with torch.no_grad():
        model(input_ids=prompt(model, 3, "image", 5)[None], pixel_values_hr=images(model, 1), flexattn_trace=trace)
    assert trace.steps == []
