"""Presets are fitted to the model that they are given to, and what is passed to them stays."""

from __future__ import annotations

import dataclasses

import pytest
import tiny
import tiny_checkpoint

from flexattn_cuda import FlexAttnConfig, FlexAttnLlavaConfig, FlexAttnLlavaForConditionalGeneration
from flexattn_cuda.errors import InputError
from flexattn_cuda.mechanism.config import SYSTEMS
from flexattn_cuda.tasks.load import load

SEVEN = FlexAttnLlavaConfig()  # LLaVA-7B's sizes
OPEN = ("first_layer", "lowres_size", "highres_size", "pool")


@pytest.mark.parametrize("preset", ["released", "paper", "hd", "xattn"])
def test_a_preset_holds_the_numbers_of_llava_7b(preset):
    settings = getattr(FlexAttnConfig, preset)()
    assert SEVEN.with_settings(settings).flexattn == settings


@pytest.mark.parametrize(
    "preset, fitted",
    [
        ("released", dict(first_layer=1, lowres_size=48, highres_size=144, pool=2)),
        ("paper", dict(first_layer=1, lowres_size=48, highres_size=144, pool=0)),
        ("hd", dict(lowres_size=48, highres_size=64)),
        ("xattn", dict(lowres_size=48, highres_size=144)),
    ],
)
def test_a_preset_takes_over_the_measures_of_the_model_that_it_is_given_to(preset, fitted, tmp_path):
    tiny.flex().save_pretrained(tmp_path)
    settings = getattr(FlexAttnConfig, preset)()
    model = FlexAttnLlavaForConditionalGeneration.from_pretrained(tmp_path, flexattn=settings)
    got = model.flexattn_settings
    assert {name: getattr(got, name) for name in fitted} == fitted
    assert dataclasses.replace(got, **{name: getattr(settings, name) for name in OPEN}) == settings


def test_what_is_passed_to_a_preset_stays():
    config = tiny.flex().config
    got = config.with_settings(FlexAttnConfig.released(first_layer=3, zoom=2, lowres_size=40)).flexattn
    assert (got.first_layer, got.zoom, got.lowres_size, got.highres_size, got.pool) == (3, 2, 40, 80, 2)
    for wrong, says in ((dict(first_layer=8), "has layers 0 to 4"), (dict(lowres_size=336), "takes 8 to 48")):
        with pytest.raises(ValueError, match=says):
            config.with_settings(FlexAttnConfig.paper(**wrong))
    with pytest.raises(ValueError, match="has layers 0 to 4"):
        config.with_settings(FlexAttnConfig(lowres_size=48, highres_size=144, pool=3))  # no preset: as it is


def test_transformers_llava_of_any_depth_takes_a_fitted_preset(tmp_path):
    tiny_checkpoint.save_llava(tmp_path)
    layers = load(tmp_path, "cpu")[0].config.text_config.num_hidden_layers
    assert layers != 32
    assert load(tmp_path, "cpu")[0].flexattn_settings.first_layer == round(9 * layers / 32)
    assert load(tmp_path, "cpu", system="flexattn-paper")[0].flexattn_settings.first_layer == round(8 * layers / 32)


def test_the_default_model_takes_every_preset_and_system():
    for settings in (FlexAttnConfig.released(), FlexAttnConfig.paper(), FlexAttnConfig.hd(), FlexAttnConfig.xattn()):
        model, _ = load(device="cpu", flexattn=settings)
        assert model.config.system == settings.system
    for system in SYSTEMS:
        load(device="cpu", system=system)


def test_a_device_map_without_accelerate_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(InputError, match="^device_map is 'auto', but accelerate, .* is missing; run pip install"):
        FlexAttnLlavaForConditionalGeneration.from_pretrained(tmp_path / "nowhere", device_map="auto")
