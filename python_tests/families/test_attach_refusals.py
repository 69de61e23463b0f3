"""What cannot be attached, or be asked of an attached model, is refused in one sentence that says what to do."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny_families import FAMILIES

import flexattn_cuda
from flexattn_cuda import FlexAttnConfig
from flexattn_cuda.mechanism.cache_argument import CACHE_ARGUMENT


def attached(name: str):
    """Return a model with FlexAttention, and inputs with one image."""
    family = FAMILIES[name]
    return flexattn_cuda.attach(family.model(), family.settings()), family.inputs()


def test_a_family_that_is_not_known_is_refused_with_what_to_do():
    model = transformers.BertModel(transformers.BertConfig(num_hidden_layers=1))
    for call in (flexattn_cuda.attach, flexattn_cuda.settings_for):
        with pytest.raises(ValueError, match="type 'bert'; it knows .*internvl, .* subclass of .* pass it as family="):
            call(model)


def test_a_model_is_attached_to_once():
    model, _ = attached("internvl_qwen2")
    with pytest.raises(ValueError, match="already; load the model again for other settings"):
        flexattn_cuda.attach(model)


def test_a_preset_or_folder_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="no adapter 'papr': .* the presets are paper and released"):
        flexattn_cuda.attach(FAMILIES["internvl_qwen2"].model(), "papr")


def test_an_argument_that_is_no_option_of_the_hub_is_refused():
    with pytest.raises(TypeError, match="attach takes no revison"):
        flexattn_cuda.attach(FAMILIES["internvl_qwen2"].model(), revison="main")


def test_the_adapter_of_another_base_is_refused(tmp_path):
    flexattn_cuda.save_adapter(attached("internvl_qwen2")[0], tmp_path)
    for name in ("internvl_qwen3", "llava_onevision"):
        with pytest.raises(ValueError, match="the adapter is for internvl .* but this model is .*; load"):
            flexattn_cuda.attach(FAMILIES[name].model(), tmp_path)


def test_a_model_without_flexattention_has_no_adapter_to_save(tmp_path):
    with pytest.raises(ValueError, match="not attached to this InternVL.*; call flexattn_cuda.attach first"):
        flexattn_cuda.save_adapter(FAMILIES["internvl_qwen2"].model(), tmp_path)


def test_tiles_of_the_model_s_own_are_refused():
    model, inputs = attached("llava_next")
    inputs["pixel_values"] = inputs["pixel_values"][:, None].repeat(1, 3, 1, 1, 1)
    with pytest.raises(ValueError, match="3 views of 1 images: .* own; use flexattn_cuda.processor_for"):
        model(**inputs)


def test_a_video_beside_images_is_refused():
    model, inputs = attached("qwen2_5_vl")
    with pytest.raises(ValueError, match="pixel_values_videos came with high-resolution images"):
        model(**inputs, pixel_values_videos=torch.zeros(8, 96))


@pytest.mark.parametrize(
    "name, says",
    [
        ("internvl_qwen2", "with zoom 2 this model takes"),
        ("qwen2_vl", "24 image tokens, but every image takes 54 of them .*; build prompts with the model's processor"),
    ],
)
def test_an_image_of_another_zoom_is_refused(name, says):
    model, inputs = attached(name)
    height, width = FAMILIES[name].views[0]
    inputs["pixel_values_hr"] = [torch.zeros(3, 3 * height, 3 * width)]
    with pytest.raises(ValueError, match=says):
        model(**inputs)


def test_settings_that_do_not_fit_the_model_are_refused():
    for settings, says in ((FlexAttnConfig(), "layers 0 to 4"), (FlexAttnConfig.hd(), "only 'flexattn'")):
        with pytest.raises(ValueError, match=says):
            flexattn_cuda.attach(FAMILIES["internvl_qwen2"].model(), settings)


def test_a_preset_does_not_replace_the_adapter_that_was_saved_with_the_model(tmp_path):
    flexattn_cuda.attach(FAMILIES["internvl_qwen2"].model()).save_pretrained(tmp_path)
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds an adapter of this model; attach.* takes it up"):
        flexattn_cuda.attach(model)
    flexattn_cuda.attach(model, tmp_path)


@pytest.mark.parametrize(
    "model, says",
    [
        ("OpenGVLab/InternVL3-1B-hf", "model is a str; load it by Auto"),
        (FAMILIES["internvl_qwen2"].model().model, "InternVLModel has no language head; load it by Auto"),
    ],
    ids=["name", "no_head"],
)
def test_what_is_no_model_that_answers_is_refused(model, says):
    with pytest.raises(ValueError, match=says):
        flexattn_cuda.attach(model)


def test_an_adapter_that_does_not_fit_leaves_a_model_as_it_was(tmp_path):
    flexattn_cuda.save_adapter(attached("internvl_qwen2")[0], tmp_path)
    settings_file = tmp_path / "flexattn_adapter.json"
    settings_file.write_text(settings_file.read_text().replace('"first_layer": 2', '"first_layer": 1'))
    model = FAMILIES["internvl_qwen2"].model()
    names, implementation = model.state_dict().keys(), model.model.language_model.config._attn_implementation
    with pytest.raises(ValueError, match=r"layers\.1\..* is in the adapter or in the model alone"):
        flexattn_cuda.attach(model, tmp_path)
    assert model.state_dict().keys() == names and not hasattr(model, "attachment")
    assert model.model.language_model.config._attn_implementation == implementation
    flexattn_cuda.attach(model)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma3", "paligemma"])
def test_a_static_cache_that_would_drop_positions_is_refused(name):
    model, inputs = attached(name)
    del inputs["position_ids"]
    with pytest.raises(ValueError, match="keeps a window of 16 positions, .* no cache_implementation"):
        model.generate(**inputs, max_new_tokens=2, cache_implementation="static")


def test_a_prompt_with_images_is_not_read_in_chunks():
    model, inputs = attached("internvl_qwen2")
    with pytest.raises(ValueError, match="prefill_chunk_size would cut a prompt through its images"):
        model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=8)


@pytest.mark.parametrize("name, compiles", [("gemma3", False), ("internvl_qwen2", True)])
def test_decoding_is_not_compiled_where_a_step_could_not_refuse_a_window(name, compiles, monkeypatch):
    monkeypatch.setattr(transformers.GenerationMixin, "_valid_auto_compile_criteria", lambda *_: True)
    model, inputs = attached(name)
    cache = transformers.StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    arguments = inputs | {"hr_capacity": 99, CACHE_ARGUMENT: cache}
    assert model._valid_auto_compile_criteria(arguments, model.generation_config) == compiles


@torch.no_grad()
def test_a_conversation_whose_layers_refit_has_emptied_is_refused():
    model, inputs = attached("internvl_qwen2")
    cache = transformers.DynamicCache()
    model(**inputs, use_cache=True, **{CACHE_ARGUMENT: cache})
    flexattn_cuda.refit(model, FAMILIES["internvl_qwen2"].settings(first_layer=4))
    with pytest.raises(ValueError, match="began with .* from layer 2 on, but refit has moved them to layer 4; start"):
        model(input_ids=torch.tensor([[5]]), use_cache=True, **{CACHE_ARGUMENT: cache})


@pytest.mark.parametrize(
    "changed, says",
    [
        ({"pixel_values_hr": "image.jpg"}, "is a str; it must be a tensor or a list of tensors"),
        ({"pixel_values_hr": [[0.5]]}, "is a list; it must be a tensor or a list of tensors"),
        ({"pixel_values_hr": torch.zeros(0, 3, 64, 64)}, "holds no images"),
        ({"pixel_values_hr": torch.zeros(1, 3, 64, 64, dtype=torch.uint8)}, "torch.uint8; it must be normalised"),
        ({"inputs_embeds": torch.zeros(1, 27, 64)}, "pass input_ids alone"),
        ({"attention_mask": torch.arange(27)[None] < 25}, "padding on the right, .* pad on the left"),
    ],
)
def test_images_that_would_be_misread_are_refused(changed, says):
    model, inputs = attached("internvl_qwen2")
    assert inputs["input_ids"].shape == (1, 27)
    with pytest.raises(ValueError, match=says):
        model(**inputs | changed)
