"""What a decoding step dispatches and reads, and that a step which lacked something is taken back and run again."""

from __future__ import annotations

import bench_decode
import pytest
import tiny
import torch
from tiny import image_question
from transformers import DynamicCache, StaticCache

from flexattn_cuda import Trace
from flexattn_cuda.mechanism.cache import HRCache
from flexattn_cuda.mechanism.cache_argument import CACHE_ARGUMENT
from flexattn_cuda.mechanism.context import HRContext
from flexattn_cuda.mechanism.pool import HRPool

OWN = ("assign_slots", "project_hr_kv", "hierarchical_attention", "select_tokens")
CAPACITY = (tiny.ZOOM * tiny.SIDE) ** 2  # slots for every token of an image


# Every cell but the smallest of a map is selected, so that a few steps select all tokens.
NEARLY_ALL = tiny.settings(threshold=0.0)


def settled_cache(model, steps=30):
    """Return the cache of a conversation whose pools hold every token, and the next token."""
    cache = DynamicCache(config=model.config.text_config)
    token = model(**image_question(), tiles_on_demand=False, past_key_values=cache).logits[:, -1:].argmax(-1)
    images = HRCache.beside(cache)
    while not images.is_settled or any(pool.used < pool.max_slots for pool in images.pools.values()):
        assert (steps := steps - 1)
        token = model(input_ids=token, past_key_values=cache).logits[:, -1:].argmax(-1)
    return cache, token


def dispatched_in_a_step(model, cache, token):
    """Return the names of the operators of one step, by HR layer."""
    with bench_decode.watch(model.config.flexattn.first_layer) as step:
        model(input_ids=token, past_key_values=cache)
    return [[name.split(".")[1] for name in step.by_layer[layer]] for layer in model.config.hr_layers]


@torch.no_grad()
def test_a_step_dispatches_four_operators_in_a_layer():
    model = tiny.flex(NEARLY_ALL)
    *layers, last = dispatched_in_a_step(model, *settled_cache(model))
    assert layers and all(found == list(OWN) for found in layers) and last == list(OWN[:-1])


@torch.no_grad()
def test_a_step_in_fixed_pools_counts_what_does_not_fit_besides():
    model = tiny.flex(tiny.PRESETS["released"])
    cache = StaticCache(config=model.config.text_config, max_cache_len=64)
    model(**image_question(), past_key_values=cache, hr_capacity=CAPACITY)
    for layer in dispatched_in_a_step(model, cache, torch.tensor([[5]])):
        assert [name for name in layer if name in OWN] == [name for name in OWN if name in layer]
        assert len(layer) <= len(OWN) + 2


@torch.no_grad()
def test_a_step_reads_once():
    model = tiny.flex(NEARLY_ALL)
    cache, token = settled_cache(model)
    with bench_decode.watch(model.config.flexattn.first_layer) as step:
        model(input_ids=token, past_key_values=cache)
    # masks.py looks at a mask on the CPU alone, and only where transformers passes one.
    assert [place.split(":")[0] for place in step.waits if not place.startswith("masks.py")] == ["context.py"]


def questions():
    """Return the inputs of two prompts, one of which has an image."""
    return tiny.left_padded(tiny.prompt(4, "image", 9), tiny.prompt(7, seed=2)) | {"pixel_values_hr": tiny.images(1)}


WAYS = {"plain": image_question, "batch": questions, "beams": lambda: questions() | {"num_beams": 3}}


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("preset", tiny.PRESETS)
def test_a_step_that_lacked_slots_or_tiles_is_run_again(monkeypatch, preset, way):
    """As if every step were expected to find all it needs: those that do not are repeated, and nothing shows."""
    expected_trace, found_trace, repeated = Trace(), Trace(), []
    model, inputs = tiny.flex(tiny.PRESETS[preset]), WAYS[way]()
    options = dict(max_new_tokens=24, do_sample=False, output_logits=True, return_dict_in_generate=True)
    expected = model.generate(**inputs, **options, hr_cache=False, flexattn_trace=expected_trace)
    monkeypatch.setattr(HRCache, "is_settled", True)
    monkeypatch.setattr(HRPool, "note_used", lambda pool, slots: setattr(pool, "used", slots))  # no room is made
    start_again = HRContext.start_again
    monkeypatch.setattr(HRContext, "start_again", lambda context: repeated.append(1) or start_again(context))
    found = model.generate(**inputs, **options, flexattn_trace=found_trace)
    assert repeated
    assert torch.equal(found.sequences, expected.sequences)
    assert (torch.stack(found.logits) - torch.stack(expected.logits)).abs().max() <= 1e-4
    for ours, theirs in zip(found_trace.steps, expected_trace.steps, strict=True):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[at].mask, theirs[at].mask) for at in ours)


@torch.no_grad()
def test_a_layer_with_a_hook_on_a_projection_is_counted_first(monkeypatch):
    """Like a layer with an adapter or quantised weights; the hook sees every token that is projected."""
    model, seen = tiny.flex(tiny.PRESETS["released"]), []
    for layer in model.config.hr_layers:
        projection = model.model.language_model.layers[layer].self_attn.k_proj_hd
        projection.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))
    monkeypatch.setattr(HRCache, "is_settled", True)
    output = model.generate(**image_question(), max_new_tokens=12, do_sample=False, return_dict_in_generate=True)
    assert sum(seen) == HRCache.beside(output[CACHE_ARGUMENT]).counters.projected > 0
