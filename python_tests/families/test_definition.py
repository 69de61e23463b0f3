"""The definition that families are compared with (support/eager_definition.py), itself compared: with the original
models where no image is selected, with transformers' image processor, and with this package's LLaVA.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from pathlib import Path

import eager_definition
import numpy as np
import pytest
import tiny
import torch
from eager_definition import PlacedImage, definition, hr_coordinates, hr_projections, select
from tiny_families import FAMILIES, Family, patchify
from torch.nn import functional
from transformers import LlavaForConditionalGeneration, PreTrainedModel

from flexattn_cuda import FlexAttnConfig
from flexattn_cuda.mechanism.trace import Trace

IMAGES = (2, 1, 0)  # of the prompts of a batch
TOLERANCE = 1e-9
VECTORS = Path(__file__).parents[1] / "data" / "reference_vectors"
TINY_LLAVA = dataclasses.replace(
    FAMILIES["llava"], unit=(tiny.PATCH, tiny.PATCH), views=((tiny.SIDE * tiny.PATCH, tiny.SIDE * tiny.PATCH),)
)

families = pytest.mark.parametrize("family", FAMILIES.values(), ids=str)
presets = pytest.mark.parametrize("preset", ["released", "paper"])


@functools.cache
def built(family: Family) -> PreTrainedModel:
    """Return the float64 model of a family, whose attention is transformers' eager one."""
    model = family.model(dtype=torch.float64)
    model.set_attn_implementation("eager")
    return model


@pytest.fixture
def exact_softmax(monkeypatch) -> None:
    """Let eager attention keep float64, which it rounds to float32 in its softmax."""
    softmax = functional.softmax
    monkeypatch.setattr(functional, "softmax", lambda x, dim=None, dtype=None, **options: softmax(x, dim, **options))


def batch_of(family: Family, images: tuple[int, ...] = IMAGES) -> dict:
    return family.inputs(images, ragged=True, dtype=torch.float64)


def embedded(family: Family, inputs: dict) -> torch.Tensor:
    """Return the embeddings [B, N, D] that the original model hands to its language model."""
    model, seen = built(family), []
    keep = family.text_model(model).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with keep:
        model(**inputs)
    return seen[0]


# ----------------------------------------------------------------------------------------------------- tiny_families


@torch.no_grad()
@families
def test_the_original_model_puts_the_same_image_tokens_into_its_sequence(family):
    inputs = family.plain_inputs(IMAGES, ragged=True, dtype=torch.float64)
    model = built(family)
    tokens = embedded(family, inputs)[inputs["input_ids"] == model.config.image_token_id]
    for view, (rows, cols) in zip(family.lr_images(3, dtype=torch.float64), family.lr_grids(3)):
        ours = family.image_tokens(model, view)
        assert len(ours) == rows * cols
        assert (tokens[: rows * cols] - ours).abs().max() <= TOLERANCE
        tokens = tokens[rows * cols + family.extra_tokens :]
    assert not len(tokens)


@torch.no_grad()
@families
def test_image_tokens_differ_from_cell_to_cell_and_from_image_to_image(family):
    one, two = (family.image_tokens(built(family), view) for view in family.lr_images(4, dtype=torch.float64)[::3])
    assert one.std(0).mean() > 0.2 * one.std() and (one - two).std() > 0.2 * one.std()


def test_patches_are_ordered_as_by_transformers_image_processor():
    from transformers import Qwen2VLImageProcessor

    image = torch.rand(3, 32, 48)
    processor = Qwen2VLImageProcessor(patch_size=4, do_resize=False, do_rescale=False, do_normalize=False)
    theirs = processor(images=[image], return_tensors="pt", input_data_format="channels_first")
    assert theirs["image_grid_thw"].tolist() == [[1, 8, 12]]
    assert torch.equal(patchify(image), theirs["pixel_values"])


# -------------------------------------------------------------------------------------------------- eager_definition


@torch.no_grad()
@families
@presets
def test_where_no_image_is_selected_it_is_the_original_model(family, preset, exact_softmax):
    inputs, model = batch_of(family), built(family)
    outcome = definition(model, family, inputs, family.settings(preset, threshold=1e9))
    if family.extra_tokens:  # the original has no prompt without its own tiles and newlines
        plain = {name: inputs[name] for name in ("attention_mask", "position_ids")}
        embeddings = model.get_input_embeddings()(inputs["input_ids"])
        is_image = (inputs["input_ids"] == model.config.image_token_id)[..., None]
        plain["inputs_embeds"] = embeddings.masked_scatter(is_image, family.lr_tokens(model, inputs))
    else:
        plain = family.plain_inputs(IMAGES, ragged=True, dtype=torch.float64)
    real = inputs["attention_mask"].bool()
    assert (outcome.logits - model(**plain).logits)[real].abs().max() <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("family", [family for family in FAMILIES.values() if not family.extra_tokens], ids=str)
def test_generated_tokens_follow_at_the_same_positions_in_one_call(family, exact_softmax):
    """Without the families whose original prompts have tiles and newlines of their own."""
    inputs, model = batch_of(family), built(family)
    plain = family.plain_inputs(IMAGES, ragged=True, dtype=torch.float64)
    del plain["position_ids"]
    length = plain["input_ids"].shape[1]
    options = dict(max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
    generated = model.generate(**plain, **options)
    longer = family.extended(inputs, generated.sequences[:, length:])
    outcome = definition(model, family, longer, family.settings(threshold=1e9), prompt_length=length)
    logits = torch.stack(generated.logits, 1)  # in float32, whatever the model computes in
    assert (logits - outcome.logits[:, length - 1 : -1]).abs().max() <= 1e-6


@families
@presets
def test_part_of_an_image_is_selected_and_changes_the_answer(family, preset):
    inputs, model = batch_of(family), built(family)
    outcome = definition(model, family, inputs, family.settings(preset))
    nothing = definition(model, family, inputs, family.settings(preset, threshold=1e9))
    assert (outcome.logits - nothing.logits)[:2, -1].abs().amax(-1).min() > 0.05
    assert (outcome.logits - nothing.logits)[2].abs().max() == 0, "a prompt without an image"
    for masks in outcome.masks.values():
        selected = torch.cat([mask[-1].flatten() for prompt in masks for mask in prompt])
        assert selected.any() and not selected.all()
    assert outcome.margin > 1e-5, "a rounding error could change the selection"


@families
def test_without_zoom_an_hr_key_is_the_key_that_the_layer_makes_of_the_same_token(family, monkeypatch):
    """At the same position of the sequence: its tables, its norm and its rotary form."""
    inputs, model, layers = family.inputs((2,), dtype=torch.float64), built(family), []
    inputs["pixel_values_hr"] = family.lr_images(2, dtype=torch.float64)
    hr_keys = eager_definition._Call._hr_keys

    def watched(call, module, row):
        ours = hr_keys(call, module, row)
        call._recorded = []
        tables = call._tables[module.layer_idx]
        module.forward(hidden_states=call._scale * call.embeddings, position_embeddings=tables, attention_mask=None)
        (theirs,), call._recorded = call._recorded, None
        for one, other in zip(ours, theirs):
            of_images = torch.cat([other[:, image.span] for image in call.images[row]], 1)
            assert (one - of_images).abs().max() <= TOLERANCE
        layers.append(module.layer_idx)
        return ours

    monkeypatch.setattr(eager_definition._Call, "_hr_keys", watched)
    definition(model, family, inputs, family.settings(zoom=1))
    assert layers == [2, 3, 4]


def test_it_selects_as_the_released_implementation_does():
    arrays = np.load(VECTORS / "selection.npz")
    for case in json.loads((VECTORS / "selection.json").read_text())["cases"]:
        (width, height), margin, side = case["ori_size_wh"], case["margin_cells"], case["lr_side"]
        rect = (margin, 0, side - margin, side) if width > height else (0, margin, side, side - margin)
        image = PlacedImage(0, (side, side), (case["hr_side"],) * 2, torch.empty(0), rect)
        maps = torch.from_numpy(arrays[f"attn_{case['index']:02}"].sum(0)).view(1, side, side)
        mask, _ = select(FlexAttnConfig(threshold=case["threshold"]), maps, image)
        assert torch.equal(mask[0], torch.from_numpy(arrays[f"mask_{case['index']:02}"])), case


def test_the_pooled_grid_has_the_shape_of_the_image():
    image = PlacedImage(0, (2, 4), (4, 8), torch.empty(0), (0, 0, 2, 4))
    maps = torch.zeros(1, 2, 4)
    maps[0, 1, 0] = 1
    mask, _ = select(FlexAttnConfig(pool=2), maps, image)
    assert mask[0].int().tolist() == [[1] * 4 + [0] * 4] * 4, "one row of two cells, of which the first"


def test_hr_cells_lie_between_lr_cells_and_beyond_the_outermost():
    rows, cols = torch.meshgrid(torch.arange(2), torch.arange(3), indexing="ij")
    y, x = hr_coordinates(torch.stack([5 + rows, 5 + cols]), (4, 6))
    assert y[:, 0].tolist() == [4.75, 5.25, 5.75, 6.25] and torch.equal(y, y[:, :1].expand(4, 6))
    assert x[0].tolist() == [4.75, 5.25, 5.75, 6.25, 6.75, 7.25] and torch.equal(x, x[:1].expand(4, 6))
    (still,) = hr_coordinates(torch.full((1, 2, 3), 5), (4, 6))
    assert torch.equal(still, torch.full((4, 6), 5.0, dtype=torch.float64))


def compare_on_llava(preset: str, **call) -> None:
    """Compare a batch of three, with two images in one prompt and HR projections that are no copies."""
    settings, trace = tiny.PRESETS[preset], Trace()
    ours = tiny.flex(settings).double()
    plain = LlavaForConditionalGeneration(tiny.llava_config()).double().eval()
    plain.load_state_dict(ours.state_dict(), strict=False)
    inputs = tiny.mixed_batch()
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    inputs["pixel_values_hr"] = inputs["pixel_values_hr"].double()
    inputs["pixel_values"] = tiny.low_resolution(inputs)["pixel_values"]
    if "labels" in call:
        call["labels"] = torch.full_like(inputs["input_ids"], -100)
        call["labels"][:, -3:] = inputs["input_ids"][:, -3:]
    projections = hr_projections(ours.model.language_model, settings)
    outcome = definition(plain, TINY_LLAVA, inputs, settings, projections, **call)
    if "alpha" in call:
        call["hr_alpha"] = call.pop("alpha")
    with torch.no_grad():
        logits = ours(**inputs, **call, flexattn_trace=trace).logits
    assert (logits - outcome.logits)[inputs["attention_mask"].bool()].abs().max() <= TOLERANCE
    (steps,) = trace.steps
    assert sorted(steps) == sorted(outcome.masks) == [1, 2, 3, 4]
    for layer, row, image in itertools.product(steps, (0, 1), (0, 1)):
        if "labels" not in call and image < len(outcome.masks[layer][row]):
            assert torch.equal(steps[layer].of_image(row, -1, image)[1], outcome.masks[layer][row][image][-1])


@presets
def test_it_equals_this_package_on_llava(preset):
    compare_on_llava(preset)


@presets
def test_it_equals_this_package_on_llava_where_answers_are_scored(preset):
    compare_on_llava(preset, labels=True, alpha=0.25)  # the operator keeps alpha in float32


@presets
def test_it_equals_this_package_on_llava_where_drafts_follow_the_prompt(preset):
    compare_on_llava(preset, prompt_length=tiny.mixed_batch()["input_ids"].shape[1] - 3)
