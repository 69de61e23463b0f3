"""Conversations with an attached model: later turns, with and without another image, and two at a time."""

from __future__ import annotations

import pytest
import torch
from tiny_families import FAMILIES, IMAGE, Family
from transformers import DynamicCache, PreTrainedModel

import flexattn_cuda
from flexattn_cuda.mechanism.cache_argument import CACHE_ARGUMENT

ANSWER = 4  # tokens
LATER_IMAGES = [family for family in FAMILIES.values() if family.name not in ("paligemma", "gemma3")]


def attached(family: Family) -> PreTrainedModel:
    return flexattn_cuda.attach(family.model(dtype=torch.float64), family.settings())


def say(model: PreTrainedModel, ids: torch.Tensor, cache: DynamicCache, **images) -> tuple[torch.Tensor, torch.Tensor]:
    """Continue a conversation, all of whose ids [1, N] are given; return the longer ids, and the answer's logits."""
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER, do_sample=False,
        return_dict_in_generate=True, output_logits=True, **images, **{CACHE_ARGUMENT: cache},
    )  # fmt: skip
    return output.sequences, torch.stack(output.logits, 1)


def two_turns(family: Family) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[dict, dict], dict]:
    """Return the ids of two turns with an image each, the images of each turn, and those of both."""
    inputs = family.inputs((2,), dtype=torch.float64)
    rows, cols = family.lr_grids(1)[0]
    first_image = (inputs["input_ids"][0] == IMAGE).nonzero()[: rows * cols]
    turns = inputs["input_ids"].tensor_split([int(first_image[-1]) + 3], dim=1)
    names = [name for name in ("pixel_values", "pixel_values_hr", "image_grid_thw") if name in inputs]
    images = [dict.fromkeys(names), dict.fromkeys(names)]
    for number, of_turn in enumerate(images):
        for name in names:
            of_turn[name] = inputs[name][number : number + 1]
        if "image_grid_thw" in inputs:  # whose patches are packed
            sizes = inputs["image_grid_thw"].prod(-1).tolist()
            of_turn["pixel_values"] = inputs["pixel_values"].split(sizes)[number]
    return turns, tuple(images), {name: inputs[name] for name in names}


@torch.no_grad()
@pytest.mark.parametrize("family", LATER_IMAGES, ids=str)
def test_an_image_in_a_later_turn_is_what_one_call_without_a_cache_computes(family):
    model, cache = attached(family), DynamicCache()
    (first, second), (image, later_image), both = two_turns(family)
    ids, _ = say(model, first, cache, **image)
    prompt = torch.cat([ids, second], 1)
    ids, logits = say(model, prompt, cache, **later_image)

    labels = torch.full_like(ids, -100)  # the rows that predict an answer see HR tokens
    for begin in (first.shape[1], prompt.shape[1]):
        labels[:, begin : begin + ANSWER] = ids[:, begin : begin + ANSWER]
    types = {} if family.image_types is None else {family.image_types: (ids == IMAGE).long()}
    known = {name: value for name, value in types.items() if name in family.inputs((1,))}
    whole = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, use_cache=False, **both, **known)
    wanted = whole.logits[:, prompt.shape[1] - 1 : -1]
    assert (logits - wanted).abs().max() <= 1e-6 * wanted.abs().max()  # `generate` returns float32


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES.values(), ids=str)
def test_a_conversation_does_not_notice_another_one_between_its_turns(family):
    model, answers = attached(family), []
    other = family.inputs((2,), seed=1, dtype=torch.float64)
    del other["position_ids"]
    (first, _), (image, _), _ = two_turns(family)
    for interrupted in (False, True):
        cache = DynamicCache()
        ids, _ = say(model, first, cache, **image)
        if interrupted:
            model.generate(**other, max_new_tokens=ANSWER)
        answers.append(say(model, torch.cat([ids, torch.tensor([[5, 6, 7]])], 1), cache)[1])
    assert torch.equal(*answers)
