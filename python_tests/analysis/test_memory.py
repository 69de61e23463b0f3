"""The memory estimate against what models and caches really take."""

from __future__ import annotations

import pytest
import tiny
import tiny_checkpoint
import torch
from transformers import DynamicCache, LlamaConfig

from flexattn_cuda import FlexAttnConfig, FlexAttnLlavaConfig, FlexAttnLlavaForConditionalGeneration
from flexattn_cuda.analysis import memory
from flexattn_cuda.analysis.gpus import V100_16


def seven_billion(**flexattn) -> FlexAttnLlavaConfig:
    return FlexAttnLlavaConfig(flexattn_config=FlexAttnConfig(**flexattn).to_dict())  # LLaVA-1.5-7B is LLaVA's default


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_are_those_of_the_model(dtype):
    config = tiny_checkpoint.config()
    model = FlexAttnLlavaForConditionalGeneration(config).to(dtype)
    estimate = memory.estimate(config, dtype)
    assert estimate.all_weights == sum(p.numel() * p.element_size() for p in model.parameters())
    hr = [p for name, p in model.named_parameters() if "_proj_hd" in name]
    assert estimate.weights["HR projections"] == sum(p.numel() * p.element_size() for p in hr) > 0
    tower = model.model.vision_tower.parameters()
    assert estimate.weights["vision tower"] == sum(p.numel() * p.element_size() for p in tower)


def test_caches_are_those_of_the_model():
    config = tiny_checkpoint.config()
    model = FlexAttnLlavaForConditionalGeneration(config).eval()
    estimate = memory.estimate(config, torch.float32, text_positions=10)
    ids = torch.cat([torch.full((1, tiny.SIDE**2), tiny_checkpoint.IMAGE_ID), torch.full((1, 10), 5)], dim=1)
    assert estimate.positions == ids.shape[1]
    cache = DynamicCache(config=config.text_config)
    with torch.no_grad():
        model(input_ids=ids, pixel_values_hr=tiny.images(1), past_key_values=cache)
    taken = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert estimate.sequence_cache == taken

    tokens = (tiny.SIDE * tiny.ZOOM) ** 2
    one_layer = 2 * tokens * 2 * 8 * 4  # K and V, 2 heads of 8, float32
    assert estimate.hr_cache_all == 3 * one_layer  # layers 2, 3 and 4
    assert estimate.hr_features == tokens * (32 + 2 * 8) * 4


@pytest.mark.slow
def test_nothing_is_allocated_for_seven_billion_parameters():
    half, single = (memory.estimate(seven_billion(), dtype) for dtype in (torch.float16, torch.float32))
    assert single.all_weights == 2 * half.all_weights
    layer = 4096 * 4096 * 4 + 3 * 4096 * 11008 + 2 * 4096
    language = 32 * layer + 2 * 32000 * 4096 + 4096
    assert half.weights["language model"] == 2 * language
    assert half.weights["HR projections"] == 2 * 23 * 2 * 4096**2
    assert half.hr_cache_all == 23 * 2 * 5184 * 4096 * 2
    assert half.total < V100_16.memory < half.total_all  # barely: only a part of the HR tokens can be kept


@pytest.mark.parametrize(
    "settings, share",
    [({}, 0.43), ({"pool": 0}, 0.10), ({"strategy": "random", "ratio": 0.25}, 0.25), ({"strategy": "center"}, 0.1)],
)
def test_selected_share(settings, share):
    estimate = memory.estimate(seven_billion(**settings))
    assert estimate.selected_share == share
    assert estimate.hr_cache_selected == round(estimate.hr_cache_all * share)


def test_grouped_query_attention_shrinks_the_caches():
    text = LlamaConfig(num_key_value_heads=8, vocab_size=32064).to_dict()
    grouped = FlexAttnLlavaConfig(text_config=text, flexattn_config=FlexAttnConfig().to_dict())
    full, less = memory.estimate(seven_billion()), memory.estimate(grouped)
    assert less.sequence_cache * 4 == full.sequence_cache and less.hr_cache_all * 4 == full.hr_cache_all


def test_plain_llava_has_no_high_resolution_part():
    estimate = memory.estimate(FlexAttnLlavaConfig())
    assert estimate.hr_cache_all == estimate.hr_features == 0 and "HR projections" not in estimate.weights
