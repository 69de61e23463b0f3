"""What every family must show (CONTRIBUTING.md), for LLaVA.

Without high-resolution (HR) tokens, the model is transformers' LLaVA: same weights, same logits. With them, gradients
reach the projections of HR tokens.
"""

from __future__ import annotations

import pytest
import tiny
import torch

from flexattn_cuda import FlexAttnLlavaForConditionalGeneration


def pair(tmp_path, **changes):
    """transformers' LLaVA, and this package's with the same weights, through a checkpoint in transformers' format."""
    plain = tiny.llava(**changes)
    plain.save_pretrained(tmp_path)
    ours = FlexAttnLlavaForConditionalGeneration.from_pretrained(tmp_path, flexattn=tiny.settings()).eval()
    ours.generation_config = plain.generation_config
    return plain, ours


def assert_equal_logits(ours: torch.Tensor, plain: torch.Tensor) -> None:
    assert (ours - plain).abs().max() <= 1e-5 * plain.abs().max()


def low(pixels: torch.Tensor) -> torch.Tensor:
    size = tiny.SIDE * tiny.PATCH
    return torch.nn.functional.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True)


@torch.no_grad()
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_forward(tmp_path, kv_heads):
    plain, ours = pair(tmp_path, kv_heads=kv_heads)
    inputs = tiny.left_padded(tiny.prompt(4, "image", 9), tiny.prompt(2, "image", 3, seed=1))
    inputs["pixel_values"] = low(tiny.images(2))
    seen = inputs["attention_mask"].bool()
    assert_equal_logits(ours(**inputs).logits[seen], plain(**inputs).logits[seen])


@torch.no_grad()
def test_generate(tmp_path):
    plain, ours = pair(tmp_path)
    inputs = tiny.left_padded(tiny.prompt(4, "image", 9), tiny.prompt(5, seed=1))
    inputs["pixel_values"] = low(tiny.images(1))
    expected_tokens, expected = tiny.generate(plain, **inputs)
    tokens, logits = tiny.generate(ours, **inputs)
    assert torch.equal(tokens, expected_tokens)
    assert_equal_logits(logits, expected)


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"cache_implementation": "static"}], ids=["beams", "static cache"]
)
def test_generate_options(tmp_path, options):
    plain, ours = pair(tmp_path)
    inputs = tiny.left_padded(tiny.prompt(4, "image", 9), tiny.prompt(2, "image", 4, seed=1))
    inputs["pixel_values"] = low(tiny.images(2))
    expected = plain.generate(**inputs, **options, max_new_tokens=5, do_sample=False)
    assert torch.equal(ours.generate(**inputs, **options, max_new_tokens=5, do_sample=False), expected)


@torch.no_grad()
def test_empty_selection(tmp_path):
    """HR pixels are there, but no cell passes the threshold."""
    plain, ours = pair(tmp_path)
    ours.config.flexattn_config = tiny.settings(threshold=255.0).to_dict()
    ids, pixels = tiny.prompt(4, "image", 9)[None], tiny.images(1)
    expected_tokens, expected = tiny.generate(plain, input_ids=ids, pixel_values=low(pixels))
    tokens, logits = tiny.generate(ours, input_ids=ids, pixel_values_hr=pixels)
    assert torch.equal(tokens, expected_tokens)
    assert_equal_logits(logits, expected)


def test_training_loss_and_gradients(tmp_path):
    plain, ours = pair(tmp_path)
    ids = torch.stack([tiny.prompt(4, "image", 9), tiny.prompt(2, "image", 11, seed=1)])
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0  # right padding
    labels = ids.masked_fill((ids == tiny.IMAGE) | (mask == 0), -100)
    inputs = dict(input_ids=ids, attention_mask=mask, labels=labels, pixel_values=low(tiny.images(2)))
    losses = []
    for model in (plain, ours):
        loss = model.train()(**inputs).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    theirs = dict(plain.named_parameters())
    floor = 1e-7 * max(p.grad.abs().max() for p in theirs.values() if p.grad is not None)  # rounding where it cancels
    for name, parameter in ours.named_parameters():
        if name in theirs and theirs[name].grad is not None:
            scale = theirs[name].grad.abs().max()
            assert (parameter.grad - theirs[name].grad).abs().max() <= 1e-4 * scale + floor, name


def test_gradients_reach_the_hr_projections():
    model = tiny.flex().train()
    inputs = tiny.image_question()
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -4:] = inputs["input_ids"][:, -4:]
    model(**inputs, labels=labels, use_cache=False).loss.backward()
    for layer in model.config.hr_layers:
        module = model.model.language_model.layers[layer].self_attn
        for projection in (module.k_proj_hd, module.v_proj_hd):
            assert projection.weight.grad is not None and projection.weight.grad.any()
