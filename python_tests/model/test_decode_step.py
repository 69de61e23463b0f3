"""What a decoding step dispatches and reads, and that a step which lacked something is taken back and run again."""

from __future__ import annotations

import pytest
import tiny
import torch
from tiny import image_question
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, DynamicCache

from flexattn_cuda import Trace
from flexattn_cuda.mechanism import attention
from flexattn_cuda.mechanism.cache import HRCache
from flexattn_cuda.mechanism.context import HRContext
from flexattn_cuda.mechanism.pool import HRPool

OWN = ("assign_slots", "project_hr_kv", "hierarchical_attention", "select_tokens")


class Dispatched(TorchDispatchMode):
    """Records the operators that attention dispatches, by layer."""

    def __init__(self):
        super().__init__()
        self.layer, self.by_layer = None, {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if self.layer is not None:
            self.by_layer.setdefault(self.layer, []).append(operator._opname)
        return operator(*args, **(kwargs or {}))


def settled_cache(model, steps=30):
    """Return the cache of a conversation whose next step needs no more tiles, and the next token."""
    cache = DynamicCache(config=model.config.text_config)
    token = model(**image_question(), tiles_on_demand=False, past_key_values=cache).logits[:, -1:].argmax(-1)
    while not HRCache.beside(cache).is_settled:
        assert (steps := steps - 1)
        token = model(input_ids=token, past_key_values=cache).logits[:, -1:].argmax(-1)
    return cache, token


@torch.no_grad()
def test_a_step_dispatches_four_operators_in_a_layer(monkeypatch):
    model = tiny.flex(tiny.PRESETS["released"])
    cache, token = settled_cache(model)
    dispatched = Dispatched()

    def watched(module, *args, **kwargs):
        dispatched.layer = module.layer_idx
        try:
            return attention.flexattn_attention(module, *args, **kwargs)
        finally:
            dispatched.layer = None

    monkeypatch.setitem(AttentionInterface._global_mapping, attention.NAME, watched)
    with dispatched:
        model(input_ids=token, past_key_values=cache)
    last = model.config.hr_layers[-1]
    for layer in model.config.hr_layers:
        assert dispatched.by_layer[layer] == list(OWN if layer < last else OWN[:-1])


@torch.no_grad()
def test_a_step_reads_once(monkeypatch):
    model = tiny.flex(tiny.PRESETS["released"])
    cache, token = settled_cache(model)
    reads, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: reads.append(tensor) or tolist(tensor))
    model(input_ids=token, past_key_values=cache)
    assert len(reads) == 1


@torch.no_grad()
@pytest.mark.parametrize("preset", tiny.PRESETS)
def test_a_step_that_lacked_slots_or_tiles_is_run_again(monkeypatch, preset):
    """As if every step were expected to find all it needs: those that do not are repeated, and nothing shows."""
    expected_trace, found_trace, repeated = Trace(), Trace(), []
    model = tiny.flex(tiny.PRESETS[preset])
    options = dict(max_new_tokens=24, do_sample=False, output_logits=True, return_dict_in_generate=True)
    expected = model.generate(**image_question(), **options, hr_cache=False, flexattn_trace=expected_trace)
    monkeypatch.setattr(HRCache, "is_settled", True)
    monkeypatch.setattr(HRPool, "note_used", lambda pool, slots: setattr(pool, "used", slots))  # no room is made
    start_again = HRContext.start_again
    monkeypatch.setattr(HRContext, "start_again", lambda context: repeated.append(1) or start_again(context))
    found = model.generate(**image_question(), **options, flexattn_trace=found_trace)
    assert repeated
    assert torch.equal(found.sequences, expected.sequences)
    assert (torch.stack(found.logits) - torch.stack(expected.logits)).abs().max() <= 1e-4
    for ours, theirs in zip(found_trace.steps, expected_trace.steps, strict=True):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[at].mask, theirs[at].mask) for at in ours)
