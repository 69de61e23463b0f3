"""A decoding step dispatches few operators and waits once for the device, or never; its answer is the same for that."""

from __future__ import annotations

import pytest
import tiny
import torch
from tiny import image_question
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, DynamicCache, StaticCache

from flexattn_cuda.mechanism import attention
from flexattn_cuda.mechanism.cache import HRCache
from flexattn_cuda.mechanism.cache_argument import CACHE_ARGUMENT
from flexattn_cuda.mechanism.context import HRContext

EVERYTHING = tiny.settings(threshold=-1.0)  # every token is selected by every map, so that later steps bring none


class Operators(TorchDispatchMode):
    """Lists the operators dispatched in the attention of each layer."""

    def __init__(self):
        super().__init__()
        self.layer, self.by_layer = None, {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.by_layer.setdefault(self.layer, []).append(str(operator))
        return operator(*args, **(kwargs or {}))

    def attend(self, module, *args, **kwargs):
        self.layer = module.layer_idx
        result = attention.flexattn_attention(module, *args, **kwargs)
        self.layer = None
        return result


class Waits(TorchFunctionMode):
    """Counts the calls that would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        names = ("tolist", "item", "nonzero", "cpu", "__bool__", "__int__", "__index__")
        self.count += getattr(function, "__name__", "") in names
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def a_late_step(cache, **options):
    """Return operators by layer, and waits, of the fourth step after a prompt."""
    model, operators, waits = tiny.flex(EVERYTHING), Operators(), Waits()
    cache = cache(model.config.text_config)
    logits = model(**image_question(), **{CACHE_ARGUMENT: cache}, **options).logits
    AttentionInterface.register(attention.NAME, operators.attend)
    try:
        for step in range(4):
            given = {"input_ids": logits[:, -1:].argmax(-1), CACHE_ARGUMENT: cache}
            if step < 3:
                logits = model(**given).logits
        operators.by_layer.clear()
        with operators, waits:
            model(**given)
    finally:
        AttentionInterface.register(attention.NAME, attention.flexattn_attention)
    return [operators.by_layer[layer] for layer in model.config.hr_layers], waits.count


def growing(config):
    return DynamicCache(config=config)


def static(config):
    return StaticCache(config=config, max_cache_len=64)


@pytest.mark.parametrize(
    ("cache", "options", "operators"),
    [(growing, {}, 4), (static, {"hr_capacity": 324}, 6)],
    ids=["growing pools", "fixed pools"],
)
def test_an_hr_layer_dispatches_few_operators(cache, options, operators):
    by_layer, _ = a_late_step(cache, **options)
    assert by_layer and max(map(len, by_layer)) <= operators, by_layer


def test_a_step_waits_once_for_all_layers():
    by_layer, waits = a_late_step(growing)
    assert len(by_layer) > 1 and waits == 1


@torch.no_grad()
def answer(model, monkeypatch, settled, **inputs):
    """Return tokens, logits, what is beside the cache, and how often a step was repeated."""
    repeats = []
    monkeypatch.setattr(HRCache, "is_settled", property(lambda _: settled))
    start_again = HRContext.start_again
    with monkeypatch.context() as patch:
        patch.setattr(HRContext, "start_again", lambda self: (repeats.append(self), start_again(self))[1])
        output = model.generate(
            **inputs, max_new_tokens=24, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    return output.sequences, torch.stack(output.logits, 1), HRCache.beside(output[CACHE_ARGUMENT]), len(repeats)


@pytest.mark.parametrize("way", ["plain", "text and images", "beams"])
def test_a_step_that_lacked_slots_or_tiles_is_repeated_with_the_same_answer(model, monkeypatch, way):
    inputs = image_question()
    if way != "plain":
        inputs = tiny.left_padded(tiny.prompt(4, "image", 9), tiny.prompt(7, seed=2))
        inputs |= {"pixel_values_hr": tiny.images(1)}
    inputs |= {"num_beams": 3} if way == "beams" else {}
    tokens, logits, images, repeats = answer(model, monkeypatch, False, **inputs)
    found = answer(model, monkeypatch, True, **inputs)
    assert torch.equal(found[0], tokens) and torch.equal(found[1], logits)
    assert repeats == 0 < found[3]
    assert found[2].counters == images.counters
    for layer, pool in images.pools.items():
        mine = found[2].pools[layer]
        assert mine.used == pool.used == int(mine.next_free) and torch.equal(mine.table, pool.table)
        assert torch.equal(mine.k[: mine.used], pool.k[: pool.used])


@torch.no_grad()
def test_a_hook_on_a_projection_is_called_in_every_step_that_projects(monkeypatch):
    """As adapters and quantised layers, it is no plain product: the layer's tokens are counted first."""
    model = tiny.flex()
    seen = []
    for layer in model.config.hr_layers:
        projection = model.model.language_model.layers[layer].self_attn.k_proj_hd
        projection.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))
    images = answer(model, monkeypatch, True, **image_question())[2]
    assert sum(seen) == images.counters.projected > 0
