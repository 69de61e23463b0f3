"""Three formats in, one format out."""

from __future__ import annotations

import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoint import RELEASED, edit_json
from transformers import CLIPVisionModel

from flexattn_cuda import FlexAttnConfig, FlexAttnLlavaForConditionalGeneration
from flexattn_cuda.checkpoints import checkpoint_format, load_config, resolve_folder
from flexattn_cuda.errors import CheckpointError


@pytest.fixture
def released(tmp_path):
    folder = tmp_path / "released"
    shutil.copytree(RELEASED, folder)
    return folder


def same_weights(one, two) -> bool:
    ours, theirs = one.state_dict(), two.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("preset", [FlexAttnConfig.released, FlexAttnConfig.paper])
def test_own_format_round_trips(tmp_path, preset):
    sizes = dict(lowres_size=48, highres_size=144, first_layer=2, pool=3)
    model = tiny.flex(preset(**sizes))
    model.save_pretrained(tmp_path)
    assert checkpoint_format(tmp_path) == "flexattn"
    again = FlexAttnLlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert same_weights(model, again) and again.config.flexattn == model.config.flexattn


def test_llava_format_starts_projections_as_copies(tmp_path):
    plain = tiny.llava()
    plain.save_pretrained(tmp_path)
    model, info = FlexAttnLlavaForConditionalGeneration.from_pretrained(
        tmp_path, flexattn=tiny.settings(), output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for layer in range(5):
        module = model.model.language_model.layers[layer].self_attn
        assert hasattr(module, "k_proj_hd") == hasattr(module, "v_proj_hd") == (layer >= 2)
        if layer >= 2:
            assert torch.equal(module.k_proj_hd.weight, module.k_proj.weight)
            assert torch.equal(module.v_proj_hd.weight, module.v_proj.weight)
    theirs = plain.state_dict()
    assert all(torch.equal(weight, theirs[name]) for name, weight in model.state_dict().items() if "_hd" not in name)

    drawn = FlexAttnLlavaForConditionalGeneration.from_pretrained(tmp_path, flexattn=tiny.settings(hr_init="random"))
    module = drawn.model.language_model.layers[2].self_attn
    assert not torch.equal(module.k_proj_hd.weight, module.k_proj.weight)
    assert module.k_proj_hd.weight.isfinite().all() and module.k_proj_hd.weight.std() > 0


def test_released_format_saves_as_our_own(tmp_path, released):
    model = FlexAttnLlavaForConditionalGeneration.from_pretrained(released)
    assert model.config.flexattn == FlexAttnConfig(threshold=48.0, warmup=10.0)
    model.save_pretrained(tmp_path / "own")
    again = FlexAttnLlavaForConditionalGeneration.from_pretrained(tmp_path / "own")
    assert same_weights(model, again) and again.config.flexattn == model.config.flexattn
    saved = load_file(tmp_path / "own" / "model.safetensors")
    assert not any("mm_projector" in name for name in saved)


def test_released_defaults_of_absent_extra_keys(released):
    edit_json(released / "config.json", extra={"zoom_ratio": "2"})
    settings = load_config(released).flexattn
    assert (settings.threshold, settings.warmup, settings.lowres_size, settings.highres_size) == (64.0, 3.0, 336, 672)


def test_vision_tower_outside_the_checkpoint(tmp_path, released):
    """The public checkpoint names its tower by a hub id and may not hold its weights."""
    whole = FlexAttnLlavaForConditionalGeneration.from_pretrained(released)
    weights = load_file(released / "model.safetensors")
    save_file({name: w for name, w in weights.items() if "vision_tower" not in name}, released / "model.safetensors")
    shutil.move(released / "vision_tower", tmp_path / "clip-vit-large-patch14-336")
    edit_json(released / "config.json", mm_vision_tower="openai/clip-vit-large-patch14-336")
    assert same_weights(FlexAttnLlavaForConditionalGeneration.from_pretrained(released), whole)


def test_smaller_tiles_use_the_corner_of_the_position_table(released):
    """zoom 2 of 448 pixels: tiles of 224 in a tower made for 336, against a tower cut down to 224 by hand."""
    edit_json(released / "config.json", extra={"zoom_ratio": "2", "lowres_size": "224", "highres_size": "448"})
    model = FlexAttnLlavaForConditionalGeneration.from_pretrained(released).eval()
    assert (model.config.lr_side, model.config.hr_side) == (16, 32)
    config = CLIPVisionModel.from_pretrained(released / "vision_tower").config
    config.image_size = 224
    tower = CLIPVisionModel(config).eval()
    weights = CLIPVisionModel.from_pretrained(released / "vision_tower").state_dict()
    table = next(name for name in weights if name.endswith("position_embedding.weight"))
    grid = weights[table][1:].view(24, 24, -1)[:16, :16].flatten(0, 1)
    weights[table] = torch.cat([weights[table][:1], grid])
    tower.load_state_dict(weights)

    from flexattn_cuda.families.llava.vision import encode_images

    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.model.multi_modal_projector(tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:])
        actual = encode_images(model.model, pixels)
    assert (actual - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra": {"threshold": "many"}}, "threshold = 'many'; it must be a number"),
        ({"extra": {"zoom_ratio": "2.5"}}, "zoom_ratio = '2.5'; it must be a whole number"),
        ({"extra": {"zoom": "3"}}, "unknown keys: zoom"),
        ({"extra": "3"}, "must be an object of strings"),
        ({"extra": {"special": "spiral"}}, "special = 'spiral'"),
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'"),
        ({"mm_vision_tower": "owner/nowhere"}, "vision tower 'owner/nowhere'"),
        ({"model_type": "resnet"}, "model of type 'resnet'"),
    ],
)
def test_bad_released_config(released, changes, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    edit_json(released / "config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        FlexAttnLlavaForConditionalGeneration.from_pretrained(released)


def test_missing_and_damaged_weights(released):
    weights = load_file(released / "model.safetensors")
    save_file({k: w for k, w in weights.items() if ".10.self_attn.k_proj_hd" not in k}, released / "model.safetensors")
    with pytest.raises(CheckpointError, match="lacks 1 weights"):
        FlexAttnLlavaForConditionalGeneration.from_pretrained(released)
    (released / "model.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(CheckpointError, match="damaged|readable"):
        FlexAttnLlavaForConditionalGeneration.from_pretrained(released)
    (released / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no readable weights"):
        FlexAttnLlavaForConditionalGeneration.from_pretrained(released)


def test_missing_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        resolve_folder("./nowhere")
    with pytest.raises(CheckpointError, match="no config.json"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_config(tmp_path)
    with pytest.raises(CheckpointError, match="is a file"):
        resolve_folder(tmp_path / "config.json")


def test_parts_that_do_not_fit(tmp_path):
    tiny.llava(layers=1).save_pretrained(tmp_path)  # FlexAttention needs a plain layer before the first with HR
    with pytest.raises(ValueError, match="first_layer is 1, but the language model has layers 0 to 0"):
        FlexAttnLlavaForConditionalGeneration.from_pretrained(tmp_path)
