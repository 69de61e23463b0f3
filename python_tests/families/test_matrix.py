"""Every family, attached: what CONTRIBUTING.md asks of one.

Without high-resolution (HR) images a model computes what it computed before. With them it computes what
support/eager_definition.py does on a twin to which nothing is attached, which knows nothing of this package.
"""

from __future__ import annotations

import copy
import dataclasses
import functools

import pytest
import torch
from eager_definition import Outcome, definition, hr_projections
from tiny_families import FAMILIES, Family
from transformers import PreTrainedModel

import flexattn_cuda
from flexattn_cuda import FlexAttnConfig, Trace
from flexattn_cuda.mechanism.cache import HRCache
from flexattn_cuda.mechanism.cache_argument import CACHE_ARGUMENT

FOUR = (1, 2, 1, 0)  # images of the prompts of a batch
ANSWER = 32  # tokens

families = pytest.mark.parametrize("family", FAMILIES.values(), ids=str)
presets = pytest.mark.parametrize("preset", ["released", "paper"])


def twins(family: Family, preset: str, dtype: torch.dtype = torch.float64) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Return a model, and the same one with FlexAttention attached, its HR projections unlike its own."""
    return _twins(family, preset, dtype)


@functools.cache
def _twins(family: Family, preset: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedModel]:
    plain = family.model(dtype=dtype)
    attached = flexattn_cuda.attach(copy.deepcopy(plain), family.settings(preset))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in family.text_model(attached).named_parameters():
            if "_proj_hd." in name:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
                parameter.add_(0.3 * parameter.std() * noise)
    return plain, attached


def expected(family: Family, preset: str, inputs: dict, **options) -> Outcome:
    """Return what the definition makes of inputs, on the plain twin and the other's HR projections."""
    plain, attached = twins(family, preset, inputs["pixel_values_hr"][0].dtype)
    settings = attached.flexattn_settings
    return definition(plain, family, inputs, settings, hr_projections(family.text_model(attached), settings), **options)


def assert_close(logits: torch.Tensor, wanted: torch.Tensor, seen: torch.Tensor, tolerance: float) -> None:
    """Both [B, N, V], compared at the positions [B, N] that are seen, as a share of the largest logit."""
    assert (logits - wanted)[seen].abs().max() <= tolerance * wanted[seen].abs().max()


def assert_same_selections(trace: Trace, wanted: Outcome, attached: PreTrainedModel) -> None:
    """The last prompt row's selections of the trace's only call, of every layer that the next one reads."""
    for layer, traced in trace.steps[0].items():
        if layer < len(attached.hr_family.text_model.layers) - 1:
            for row, images in enumerate(wanted.masks[layer]):
                for image, mask in enumerate(images):
                    assert torch.equal(traced.of_image(row, -1, image)[1], mask[-1])


# ------------------------------------------------------------------------------------------------------------- forward


@torch.no_grad()
@families
def test_without_hr_images_a_model_computes_what_it_computed_before(family):
    plain, attached = twins(family, "released", torch.float32)
    plain.set_attn_implementation("eager")  # which computes soft-caps; the default ignores them in older versions
    inputs = family.plain_inputs(FOUR, ragged=True)
    seen = inputs["attention_mask"].bool()
    assert_close(attached(**inputs).logits, plain(**inputs).logits, seen, 1e-5)


@torch.no_grad()
@families
@presets
def test_with_hr_images_it_computes_what_is_defined(family, preset):
    """A batch of four prompts with none to two images each, of different aspect ratios where the family allows."""
    attached, inputs, trace = twins(family, preset)[1], family.inputs(FOUR, ragged=True, dtype=torch.float64), Trace()
    wanted = expected(family, preset, inputs)
    assert_close(attached(**inputs, flexattn_trace=trace).logits, wanted.logits, inputs["attention_mask"].bool(), 1e-9)
    assert_same_selections(trace, wanted, attached)


@torch.no_grad()
@families
@presets
def test_so_it_does_in_float32(family, preset):
    attached, inputs, trace = twins(family, preset, torch.float32)[1], family.inputs(FOUR, ragged=True), Trace()
    wanted = expected(family, preset, inputs)
    assert wanted.margin > 1e-5  # otherwise rounding errors may select otherwise: choose another seed
    assert_close(attached(**inputs, flexattn_trace=trace).logits, wanted.logits, inputs["attention_mask"].bool(), 1e-4)
    assert_same_selections(trace, wanted, attached)


@torch.no_grad()
@presets
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_images_of_any_aspect_ratio_share_a_batch(name, preset):
    """1:3, 3:1 and 4:3, in prompts of one batch."""
    cell = FAMILIES[name].unit[0]
    views = tuple((cell * rows, cell * cols) for rows, cols in ((2, 6), (6, 2), (4, 3)))
    family = dataclasses.replace(FAMILIES[name], views=views)
    plain, attached = (
        family.model(dtype=torch.float64),
        flexattn_cuda.attach(family.model(dtype=torch.float64), family.settings(preset)),
    )
    inputs, trace = family.inputs((1, 1, 1), ragged=True, dtype=torch.float64), Trace()
    assert [tuple(image.shape[1:]) for image in inputs["pixel_values_hr"]] == [(2 * h, 2 * w) for h, w in views]
    settings = attached.flexattn_settings
    wanted = definition(plain, family, inputs, settings, hr_projections(family.text_model(attached), settings))
    assert_close(attached(**inputs, flexattn_trace=trace).logits, wanted.logits, inputs["attention_mask"].bool(), 1e-9)
    assert_same_selections(trace, wanted, attached)


@torch.no_grad()
@families
def test_the_lr_view_is_made_of_the_hr_image_where_it_is_absent(family):
    attached = twins(family, "released")[1]
    inputs = family.inputs((1,), dtype=torch.float64)
    made = attached(**{name: value for name, value in inputs.items() if name not in ("pixel_values", "image_grid_thw")})
    assert made.logits.isfinite().all() and made.logits.shape == attached(**inputs).logits.shape


# ------------------------------------------------------------------------------------------------------------ generate


def answer(family: Family, attached: PreTrainedModel, inputs: dict, **options):
    """Generate `ANSWER` tokens from inputs whose positions `generate` finds itself."""
    inputs = {name: value for name, value in inputs.items() if name != "position_ids"}
    return attached.generate(
        **inputs, max_new_tokens=ANSWER, min_new_tokens=ANSWER, do_sample=False, return_dict_in_generate=True,
        output_logits=True, **options,
    )  # fmt: skip


@torch.no_grad()
@families
@presets
def test_a_cached_answer_is_what_one_call_computes(family, preset):
    """Over 32 greedy tokens; `generate` returns logits in float32."""
    attached, inputs = twins(family, preset)[1], family.inputs((1, 2), ragged=True, dtype=torch.float64)
    length = inputs["input_ids"].shape[1]
    output = answer(family, attached, inputs)
    whole = family.extended(inputs, output.sequences[:, length:])
    wanted = expected(family, preset, whole, prompt_length=length).logits[:, length - 1 : -1]
    assert_close(torch.stack(output.logits, 1), wanted, torch.ones(wanted.shape[:2], dtype=torch.bool), 1e-6)
    assert torch.equal(output.sequences[:, length:], wanted.argmax(-1))
    assert HRCache.beside(output[CACHE_ARGUMENT]).counters.projected > 0


@torch.no_grad()
@families
def test_beams_share_the_images_of_their_prompt(family):
    """One beam search over a batch is that of each prompt alone."""
    attached = twins(family, "released")[1]
    both = family.inputs((1, 1), dtype=torch.float64)
    found = answer(family, attached, both, num_beams=3, num_return_sequences=2).sequences
    length = both["input_ids"].shape[1]
    for row in range(2):
        alone = {name: value[row : row + 1] for name, value in both.items() if name in _OF_ROWS} | of_image(both, row)
        expected_rows = answer(family, attached, alone, num_beams=3, num_return_sequences=2).sequences
        assert torch.equal(found[2 * row : 2 * row + 2, length:], expected_rows[:, length:])


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_beams_of_prompts_with_different_numbers_of_images_need_no_cache(name):
    family = FAMILIES[name]
    attached = twins(family, "released")[1]
    inputs = family.inputs((1, 2), ragged=True, dtype=torch.float64)
    cached, uncached = (answer(family, attached, inputs, num_beams=2, use_cache=use).sequences for use in (True, False))
    assert torch.equal(cached, uncached)


@torch.no_grad()
@families
def test_beams_without_hr_images_are_those_of_the_original(family):
    """In transformers' own format: it must encode plain images itself, before it repeats the rows."""
    plain, attached = twins(family, "released")
    plain.set_attn_implementation("eager")
    inputs = family.plain_inputs((1,), dtype=torch.float64)
    found, wanted = (
        answer(family, model, inputs, num_beams=2, output_scores=True).sequences_scores for model in (attached, plain)
    )
    assert (found - wanted).abs().max() <= 1e-4


_OF_ROWS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


def of_image(inputs: dict, number: int) -> dict:
    """Return the image arguments of one of several images."""
    if "image_grid_thw" in inputs:
        sizes = inputs["image_grid_thw"].prod(-1).tolist()
        patches = inputs["pixel_values"].split(sizes)[number]
        grid = inputs["image_grid_thw"][number : number + 1]
        return {"pixel_values": patches, "image_grid_thw": grid, "pixel_values_hr": [inputs["pixel_values_hr"][number]]}
    return {name: inputs[name][number : number + 1] for name in ("pixel_values", "pixel_values_hr")}


# ------------------------------------------------------------------------------------------------------------ training


@families
@presets
def test_gradients_are_those_of_the_definition(family, preset):
    """Of the HR projections and of the language model's own weights, for the loss of labelled answers."""
    plain, attached = twins(family, preset)
    inputs = family.inputs((1, 1), ragged=True, dtype=torch.float64)
    labels = inputs["input_ids"].clone()
    labels[:, :-4] = -100
    texts = [family.text_model(model) for model in (plain, attached)]
    projections = {name: parameter for name, parameter in texts[1].named_parameters() if "_proj_hd." in name}

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    wanted = loss(expected(family, preset, inputs, labels=labels).logits)
    wanted_of = torch.autograd.grad(wanted, [*projections.values(), *own_weights(texts[0])])
    output = attached(**inputs, labels=labels)
    found_of = torch.autograd.grad(loss(output.logits), [*projections.values(), *own_weights(texts[1])])
    assert abs(output.loss - wanted) <= 1e-6 * wanted  # transformers computes it in float32
    for found, wanted in zip(found_of, wanted_of):
        assert wanted.abs().max() > 0
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def own_weights(text: PreTrainedModel) -> list[torch.Tensor]:
    """Return the queries' weights of the layers before the last, which every row's output depends on."""
    return [layer.self_attn.q_proj.weight for layer in text.layers[1:-1]]


# ------------------------------------------------------------------------------------------------------------ adapters


@torch.no_grad()
@families
def test_an_adapter_brings_back_what_was_attached(family, tmp_path):
    plain, attached = twins(family, "paper", torch.float32)
    flexattn_cuda.save_adapter(attached, tmp_path)
    again = flexattn_cuda.attach(copy.deepcopy(plain), tmp_path)
    inputs = family.inputs((1,))
    assert again.flexattn_settings == attached.flexattn_settings
    assert torch.equal(again(**inputs).logits, attached(**inputs).logits)
    assert (tmp_path / "flexattn_adapter.safetensors").stat().st_size < 0.5 * sum(p.nbytes for p in plain.parameters())


# ------------------------------------------------------------------------------------------------------------- presets


@pytest.mark.parametrize("preset, share", [("released", 9 / 32), ("paper", 8 / 32)])
@families
def test_a_preset_is_fitted_to_the_model(family, preset, share):
    model = family.model()
    layers = len(family.text_model(model).layers)
    settings = flexattn_cuda.settings_for(model, preset)
    assert settings.first_layer == max(1, round(share * layers)) and settings.zoom == 3
    made = {"released": FlexAttnConfig.released, "paper": FlexAttnConfig.paper}[preset]()
    assert (settings.threshold, settings.hr_rows) == (made.threshold, made.hr_rows)
    if not family.any_size:
        assert settings.highres_size == 3 * settings.lowres_size == 3 * family.lr_images(1)[0].shape[-1]
    assert flexattn_cuda.attach(model, made).flexattn_settings == settings


@torch.no_grad()
@pytest.mark.parametrize("first_layer", [1, 4])
def test_a_model_with_other_settings_is_one_that_was_attached_with_them(first_layer):
    family = FAMILIES["internvl_qwen3"]
    settings = family.settings("paper", first_layer=first_layer)
    model = flexattn_cuda.attach(family.model(), family.settings("released"))
    flexattn_cuda.refit(model, settings)
    wanted = flexattn_cuda.attach(family.model(), settings)
    inputs = family.inputs((1, 2))
    assert model.flexattn_settings == wanted.flexattn_settings
    assert torch.equal(model(**inputs).logits, wanted(**inputs).logits)
    assert model.state_dict().keys() == wanted.state_dict().keys()


def test_settings_that_do_not_fit_leave_a_model_as_it_was():
    model = flexattn_cuda.attach(FAMILIES["internvl_qwen3"].model(), "paper")
    before = model.flexattn_settings
    with pytest.raises(ValueError, match="first_layer is 9, but the language model has layers 0 to 4"):
        flexattn_cuda.refit(model, FlexAttnConfig())
    assert model.flexattn_settings == before
