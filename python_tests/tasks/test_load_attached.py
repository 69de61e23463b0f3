"""Checkpoints of other families load with FlexAttention attached, are described, and keep what was trained."""

from __future__ import annotations

import importlib.util
import shutil

import pytest
import torch
import transformers
from attached_checkpoint import CHECKPOINTS
from question_files import image
from refusals import refused
from safetensors.torch import load_file
from tiny_checkpoint import edit_json
from transformers import AutoModelForImageTextToText

import flexattn_cuda
from flexattn_cuda import FlexAttnConfig
from flexattn_cuda.checkpoints import HubOptions
from flexattn_cuda.errors import CheckpointError, InputError
from flexattn_cuda.families.attached import AttachedModel
from flexattn_cuda.inputs.hr_processor import HRProcessor
from flexattn_cuda.tasks import load as loading
from flexattn_cuda.tasks.ask import ask
from flexattn_cuda.tasks.load import load, quantization

QUESTION = "what is this"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint folder of InternVL, which no test changes."""
    return CHECKPOINTS["internvl_qwen2"].save(tmp_path_factory.mktemp("internvl"))


@pytest.mark.parametrize(
    "file, name, value, says",
    [
        ("generation_config.json", "bos_token_id", [None], "bos_token_id = .None.; it must be a token id"),
        ("tokenizer_config.json", "model_max_length", "", "the chat template or the tokenizer in .* fails"),
        ("preprocessor_config.json", "size", True, "an image of pixel_values_hr has shape"),
        ("preprocessor_config.json", "image_std", [0.5, 0.0, 0.5], "image_std of the image processor is"),
        ("preprocessor_config.json", "image_std", [0.5, [None], 0.5], "image_std of the image processor is"),
        ("config.json", "vision_feature_layer", 10**30, "vision_feature_layer is 1000000000000000000000000000000"),
    ],
)
def test_a_damaged_value_is_refused_in_one_sentence(folder, tmp_path, file, name, value, says):
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    edit_json(damaged / file, **{name: value})
    with pytest.raises((CheckpointError, InputError), match=says) as error:
        ask(*load(damaged, "cpu"), image(), QUESTION, max_new_tokens=1)
    assert "\n" not in str(error.value)


@pytest.fixture
def trained(folder):
    """A model whose HR projections are no copies any more."""
    model, _ = load(folder, "cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "v_proj_hd" in name:
                parameter.neg_()
    return model


def answer(model, processor) -> list[int]:
    return ask(model, processor, image(), QUESTION, max_new_tokens=6).tokens


@pytest.mark.parametrize("name", [name for name in CHECKPOINTS if name not in ("llava", "llava_siglip")])
def test_a_checkpoint_of_a_known_family_loads_with_the_paper_s_settings(tmp_path, name):
    model, processor = load(CHECKPOINTS[name].save(tmp_path), "cpu")
    assert isinstance(model, AttachedModel) and isinstance(processor, HRProcessor)
    assert model.flexattn_settings == flexattn_cuda.settings_for(model, "paper")
    assert not model.training and answer(model, processor)


def test_a_llava_checkpoint_stays_this_package_s_own_model_but_for_an_adapter(tmp_path):
    saved = CHECKPOINTS["llava"].save(tmp_path / "llava")
    own, _ = load(
        saved, "cpu", flexattn=FlexAttnConfig.released(zoom=3, lowres_size=30, highres_size=90, pool=3, first_layer=1)
    )
    assert isinstance(own, flexattn_cuda.FlexAttnLlavaForConditionalGeneration)
    attached = flexattn_cuda.attach(AutoModelForImageTextToText.from_pretrained(saved))
    flexattn_cuda.save_adapter(attached, tmp_path / "adapter")
    model, processor = load(saved, "cpu", adapter=tmp_path / "adapter")
    assert isinstance(model, AttachedModel) and answer(model, processor)


def test_settings_device_and_dtype_are_honoured(folder):
    settings = FlexAttnConfig.paper(zoom=2, first_layer=3)
    model, processor = load(folder, "cpu", "float64", flexattn=settings)
    assert model.dtype == torch.float64 and processor.zoom == 2
    assert model.flexattn_settings.first_layer == 3 and model.flexattn_settings.highres_size == 64


def test_a_saved_model_keeps_its_hr_projections(folder, trained, tmp_path):
    trained.save_pretrained(tmp_path)
    load(folder)[1].save_pretrained(tmp_path)
    expected = answer(trained, load(folder)[1])
    assert answer(*load(tmp_path, "cpu")) == expected != answer(*load(folder, "cpu"))
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path)  # transformers' own class has no place for them
    assert type(plain) is trained.attached_to
    assert answer(flexattn_cuda.attach(plain, tmp_path), load(folder)[1]) == expected


def test_a_state_that_was_gathered_elsewhere_is_what_is_saved(trained, tmp_path):
    state = {name: weight * 2 for name, weight in trained.state_dict().items()}
    trained.save_pretrained(tmp_path, state_dict=state)
    saved = load_file(tmp_path / "flexattn_adapter.safetensors")
    own = dict(trained.model.language_model.named_parameters())
    assert len(saved) == 16 and all(torch.equal(weight, own[name] * 2) for name, weight in saved.items())


def test_what_cannot_be_attached_is_refused(folder, trained, tmp_path):
    with pytest.raises(InputError, match="system is 'hd', but .* is no LLaVA of this package"):
        load(folder, system="hd")
    with pytest.raises(InputError, match="flexattn and adapter exclude each other"):
        load(folder, flexattn=FlexAttnConfig.paper(), adapter=tmp_path)
    with pytest.raises(TypeError, match="load takes no revison"):
        load(folder, revison="main")
    with pytest.raises(CheckpointError, match="cannot be attached to .*first_layer is 9"):
        load(folder, "cpu", flexattn=FlexAttnConfig())
    flexattn_cuda.save_adapter(trained, tmp_path / "adapter")
    other = CHECKPOINTS["llava_next"].save(tmp_path / "other")
    with pytest.raises(CheckpointError, match="the adapter is for internvl .* but this model is llava_next"):
        load(other, "cpu", adapter=tmp_path / "adapter")
    with pytest.raises(ValueError, match="attached to this model already"):
        flexattn_cuda.attach(trained)


def test_an_unknown_family_is_refused(flexattn, tmp_path):
    transformers.BertConfig().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="holds a model of type 'bert'; known: .*internvl, .*qwen2_vl"):
        load(tmp_path)
    assert "type 'bert'" in refused(flexattn("info", "--model", tmp_path))
    with pytest.raises(ValueError, match="does not know models of type 'bert'"):
        flexattn_cuda.attach(transformers.BertModel(transformers.BertConfig(num_hidden_layers=1)))


def test_hub_options_reach_the_hub(monkeypatch):
    asked = []

    def resolve_folder(name, hub):
        asked.append((name, hub))
        raise CheckpointError("enough")

    monkeypatch.setattr(loading.checkpoints, "resolve_folder", resolve_folder)
    options = dict(revision="v1", local_files_only=True, subfolder="part", token="secret", cache_dir="cache")
    with pytest.raises(CheckpointError, match="enough"):
        load("owner/model", **options)
    assert asked == [("owner/model", HubOptions(**options))]


# ------------------------------------------------------------------------------------------------------- quantisation


def test_a_quantised_load_passes_transformers_its_configuration(folder, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    given = {}

    def from_pretrained(name, **options):
        given.update(options)
        raise RuntimeError("enough")

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", from_pretrained)
    with pytest.raises(CheckpointError, match="enough"):
        load(folder, "cpu", "float16", quantize="4bit")
    config = given["quantization_config"]
    assert (
        config.load_in_4bit and config.bnb_4bit_quant_type == "nf4" and config.bnb_4bit_compute_dtype == torch.float16
    )
    assert given["device_map"] == torch.device("cpu")
    assert quantization("8bit").load_in_8bit and not quantization("8bit").load_in_4bit


def test_quantisation_without_bitsandbytes_is_refused(folder, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="quantize is '8bit', but bitsandbytes is missing; run pip install bit"):
        load(folder, "cpu", quantize="8bit")
    with pytest.raises(InputError, match="quantize is '3bit'; allowed: 4bit, 8bit"):
        quantization("3bit")


# --------------------------------------------------------------------------------------------------------------- info


def test_info_describes_what_flexattention_attaches_to(flexattn, folder, trained, tmp_path):
    code, out, _ = flexattn("info", "--model", folder)
    assert code == 0
    for fact in (
        "internvl",
        "5 layers of qwen2, 64 wide",
        "4 x 4",
        "12 x 12",
        "1 to 4",
        "hr_rows=all",
        "adapter",
        "none",
    ):
        assert fact in out
    flexattn_cuda.save_adapter(trained, tmp_path)
    code, out, _ = flexattn("info", "--model", folder, "--adapter", tmp_path)
    assert code == 0 and "none" not in out.partition("family")[2].partition("settings")[0]
    assert "--adapter needs --model" in refused(flexattn("info", "--adapter", tmp_path))


def test_info_refuses_the_adapter_of_another_model(flexattn, trained, tmp_path):
    flexattn_cuda.save_adapter(trained, tmp_path / "adapter")
    other = CHECKPOINTS["qwen2_vl"].save(tmp_path / "other")
    said = refused(flexattn("info", "--model", other, "--adapter", tmp_path / "adapter"))
    assert "the adapter is for internvl" in said and "but this model is qwen2_vl" in said


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_models_are_quantised_on_request_but_for_hr_projections(codes_in_order, folder, checkpoint, kind):
    for saved, model_type in ((folder, "internvl"), (checkpoint, "flexattn_llava")):
        model, processor = load(saved, "cpu", "float32", quantize=kind)
        module = model.model.language_model.layers[-1].self_attn
        assert model.config.model_type == model_type and not model.training
        assert type(module.k_proj_hd) is torch.nn.Linear and type(module.k_proj) is not torch.nn.Linear
        assert answer(model, processor)


def test_commands_for_this_package_s_llava_refuse_other_families(flexattn, folder, files, tmp_path):
    said = refused(flexattn("flops", "--model", folder))
    assert "a model of type 'internvl'; this package loads flexattn_llava, llava, llava_llama" in said
    data, images = files
    train = ("train", "--data", data, "--images", images, "--output", tmp_path / "out", "--device", "cpu")
    said = refused(flexattn(*train, "--model", folder))
    assert "a model of type 'internvl', of which only an adapter can be trained; pass --adapter-only" in said
