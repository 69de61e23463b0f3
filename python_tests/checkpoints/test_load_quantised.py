"""Checkpoints of all three formats, quantised while they are loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import quantised
import tiny
import tiny_checkpoint
import torch
from quantised import kinds
from torch import nn
from transformers import BitsAndBytesConfig, LlavaConfig, LlavaForConditionalGeneration

from flexattn_cuda import FlexAttnConfig, FlexAttnLlavaForConditionalGeneration
from flexattn_cuda.checkpoints.quantisation import without_projections
from flexattn_cuda.mechanism.trace import Trace

pytestmark = pytest.mark.usefixtures("codes_in_order")
PROMPTS = 2
SETTINGS = {"flexattn": None, "llava": tiny.settings(), "released": None}  # of the checkpoint, where it has some


def save(form: str, folder: Path) -> Path:
    if form == "released":
        return tiny_checkpoint.save_released(folder)
    model = tiny.flex() if form == "flexattn" else tiny.llava(kv_heads=4)
    model.save_pretrained(folder)
    return folder


def load(folder: Path, form: str, **options) -> FlexAttnLlavaForConditionalGeneration:
    return FlexAttnLlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, flexattn=SETTINGS[form], **options
    )


def save_own(model: FlexAttnLlavaForConditionalGeneration, folder: Path) -> Path:
    """Save the weights that transformers' LLaVA has too, as its own."""
    values = model.config.to_dict()
    kept = {name: values[name] for name in ("vision_config", "text_config", "vision_feature_layer")}
    own = LlavaForConditionalGeneration(LlavaConfig(**kept, image_token_index=model.config.image_token_id))
    own.load_state_dict(model.state_dict(), strict=False)
    if model.config.image_token_id >= model.config.text_config.vocab_size:  # the released format: it has no embedding
        own.resize_token_embeddings(model.config.image_token_id + 1)
    own.save_pretrained(folder)
    return folder


def questions(model: FlexAttnLlavaForConditionalGeneration) -> dict[str, torch.Tensor]:
    settings, generator = model.config.flexattn, torch.Generator().manual_seed(0)
    image = torch.full((PROMPTS, settings.lowres_size**2 // model.config.vision_config.patch_size**2), 1)
    before, after = (torch.randint(3, 90, (PROMPTS, length), generator=generator) for length in (4, 9))
    ids = torch.cat([before, image * model.config.image_token_id, after], 1)
    size = settings.highres_size
    return {"input_ids": ids, "pixel_values_hr": torch.randn(PROMPTS, 3, size, size, generator=generator)}


def low(model: FlexAttnLlavaForConditionalGeneration, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    size = [model.config.flexattn.lowres_size] * 2
    pixels = nn.functional.interpolate(inputs["pixel_values_hr"], size=size, mode="bilinear", antialias=True)
    return {"input_ids": inputs["input_ids"], "pixel_values": pixels}


@kinds
@pytest.mark.parametrize("form", SETTINGS)
@torch.no_grad()
def test_quantised_logits_are_no_further_from_the_full_ones_than_those_of_transformers_llava(tmp_path, form, kind):
    """Where every HR token is seen: a token that only one of two models selects is no error of its weights."""
    folder = save(form, tmp_path / "checkpoint")
    full, model = load(folder, form), load(folder, form, quantization_config=quantised.config(kind))
    for one in (full, model):
        one.config.flexattn_config = one.config.flexattn_config | {"threshold": -1.0}
    inputs, own_folder = questions(full), save_own(full, tmp_path / "own")
    shrunk = low(full, inputs)
    of_full = full(**shrunk).logits
    own = quantised.load(LlavaForConditionalGeneration, own_folder, kind)(**shrunk).logits[..., : of_full.shape[-1]]
    allowed = 1.2 * quantised.distance(own, of_full)
    assert quantised.distance(model(**shrunk).logits, of_full) <= allowed

    trace, hr_of_full = Trace(), full(**inputs).logits
    assert quantised.distance(hr_of_full[:, -1], of_full[:, -1]) > 1e-3, "HR tokens change the answer"
    assert quantised.distance(model(**inputs, flexattn_trace=trace).logits, hr_of_full) <= allowed
    assert trace.steps[0][full.config.hr_layers[0]].of_image(0, -1, 0)[1].all()


@kinds
@pytest.mark.parametrize("form", SETTINGS)
@torch.no_grad()
def test_a_quantised_model_is_saved_and_loaded_with_equal_answers(tmp_path, form, kind):
    folder = save(form, tmp_path / "checkpoint")
    model = load(folder, form, quantization_config=quantised.config(kind))
    module = model.model.language_model.layers[-1].self_attn
    assert type(module.k_proj_hd) is nn.Linear and module.k_proj_hd.weight.dtype == torch.float32
    assert type(module.k_proj.weight) is not nn.Parameter, "all else is quantised"
    inputs = questions(model)
    logits = model(**inputs).logits
    model.save_pretrained(tmp_path / "saved")
    again = FlexAttnLlavaForConditionalGeneration.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(again(**inputs).logits, logits)
    assert type(again.model.language_model.layers[-1].self_attn.k_proj_hd) is nn.Linear


@kinds
@torch.no_grad()
def test_a_llava_that_was_saved_quantised_gets_projections_of_its_numbers(tmp_path, kind):
    """Its own list of what is not quantised knows nothing of them."""
    plain = save("llava", tmp_path / "plain")
    quantised.load(LlavaForConditionalGeneration, plain, kind).save_pretrained(tmp_path / "quantised")
    model = load(tmp_path / "quantised", "llava")
    inputs = questions(model)
    once = load(plain, "llava", quantization_config=quantised.config(kind))
    for module, other in zip(*(one.model.language_model.layers[2:] for one in (model, once))):
        assert torch.equal(module.self_attn.k_proj_hd.weight, other.self_attn.k_proj_hd.weight)
    assert torch.equal(model(**inputs).logits, once(**inputs).logits)


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
@torch.no_grad()
def test_cross_attention_starts_from_the_numbers_too_and_changes_nothing_yet(tmp_path, kind):
    folder = save("llava", tmp_path)
    xattn = FlexAttnConfig.xattn(lowres_size=48, highres_size=144, first_layer=2)
    model = FlexAttnLlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, flexattn=xattn, quantization_config=quantised.config(kind)
    )
    layer = model.model.language_model.layers[xattn.first_layer]
    assert type(layer.cross_attn.q_proj) is nn.Linear and not layer.cross_attn.o_proj.weight.any()
    columns = layer.self_attn.q_proj(torch.eye(32)).T
    assert (layer.cross_attn.q_proj.weight - columns).abs().max() <= 2**-10 * columns.abs().max()


@pytest.mark.parametrize("given", [None, ["lm_head", "linear_1"]])
def test_what_the_user_leaves_out_is_left_out_too(tmp_path, given):
    quantisation = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=given)
    model = load(save("flexattn", tmp_path), "flexattn", quantization_config=quantisation)
    assert quantisation.llm_int8_skip_modules == given, "it is the user's"
    assert type(model.lm_head) is nn.Linear
    assert (type(model.model.multi_modal_projector.linear_1) is nn.Linear) == (given is not None)
    assert type(model.model.language_model.layers[2].self_attn.q_proj) is not nn.Linear


def test_a_dictionary_says_the_same_as_a_configuration():
    quantisation = BitsAndBytesConfig(load_in_4bit=True)
    of_dictionary = without_projections(json.loads(json.dumps(quantisation.to_dict())))
    assert of_dictionary.to_dict() == without_projections(quantisation).to_dict()
    assert without_projections(of_dictionary).to_dict() == of_dictionary.to_dict()
