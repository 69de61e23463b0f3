"""HR projections that a checkpoint lacks: copies of numbers, never of the codes of quantised weights."""

from __future__ import annotations

import logging

import pytest
import tiny
import tiny_checkpoint
import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from flexattn_cuda import FlexAttnConfig, FlexAttnLlavaForConditionalGeneration
from flexattn_cuda.checkpoints.projections import start_projections
from flexattn_cuda.errors import CheckpointError

SYSTEMS = {"flexattn": tiny.settings(), "xattn": FlexAttnConfig.xattn(lowres_size=48, highres_size=144)}


class Int8Params(nn.Parameter):
    """As in bitsandbytes: int8 codes, with a scale for each row elsewhere."""

    def __new__(cls, weight):
        scale = weight.abs().amax(1, keepdim=True) / 127
        return super().__new__(cls, (weight / scale).round().to(torch.int8), requires_grad=False)


class Params4bit(nn.Parameter):
    """As in bitsandbytes: two 4-bit codes in a byte, in one column."""

    def __new__(cls, weight):
        return super().__new__(cls, torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)


class Float8(nn.Parameter):
    """As in fp8 checkpoints: floats of eight bits, with a scale elsewhere."""

    def __new__(cls, weight):
        return super().__new__(cls, weight.to(torch.float8_e4m3fn), requires_grad=False)


def quantise(model: nn.Module, kind: type, names: tuple[str, ...]) -> None:
    for module in model.model.language_model.layers:
        for name, linear in module.named_modules():
            if isinstance(linear, nn.Linear) and name.split(".")[-1] in names:
                linear.weight = kind(linear.weight.data)


@pytest.mark.parametrize("kind", [Int8Params, Params4bit, Float8])
@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("names", [("k_proj", "v_proj"), ("k_proj", "v_proj", "k_proj_hd", "v_proj_hd", "o_proj")])
def test_codes_of_quantised_weights_are_not_copied(tmp_path, monkeypatch, kind, system, names):
    tiny.llava(kv_heads=4).save_pretrained(tmp_path)
    parent = LlavaForConditionalGeneration
    real = parent.from_pretrained.__func__

    def quantising(cls, *args, **kwargs):
        model, info = real(cls, *args, **kwargs)
        quantise(model, kind, names)
        return model, info

    monkeypatch.setattr(parent, "from_pretrained", classmethod(quantising))
    with pytest.raises(CheckpointError, match="cannot start from quantised weights.*save_pretrained") as error:
        FlexAttnLlavaForConditionalGeneration.from_pretrained(tmp_path, flexattn=SYSTEMS[system])
    assert "\n" not in str(error.value)


def test_a_quantised_layer_without_a_weight_is_refused():
    """GPTQ and AWQ keep qweight, scales and zeros in place of a weight."""
    model = tiny.flex()
    model.model.language_model.layers[2].self_attn.k_proj = nn.Identity()
    with pytest.raises(CheckpointError, match="k_proj.weight is absent"):
        start_projections(model, {"model.language_model.layers.2.self_attn.k_proj_hd.weight"}, model.config)


def test_quantised_weights_elsewhere_do_not_matter():
    """Only the layers that a projection is copied from are looked at."""
    model = tiny.flex()
    quantise(model, Int8Params, ("q_proj", "o_proj", "gate_proj"))
    module = model.model.language_model.layers[2].self_attn
    start_projections(model, {"model.language_model.layers.2.self_attn.k_proj_hd.weight"}, model.config)
    assert torch.equal(module.k_proj_hd.weight, module.k_proj.weight)
    assert not torch.equal(module.v_proj_hd.weight, module.v_proj.weight)


def test_a_load_says_that_new_projections_are_copies(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    tiny_checkpoint.save_llava(tmp_path)
    with caplog.at_level(logging.WARNING, logger="transformers"):  # a command line that ran before has muted it
        FlexAttnLlavaForConditionalGeneration.from_pretrained(tmp_path)
    said = {record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING}
    assert said == {f"{tmp_path} has no weights for 8 HR projections; they start as copies of self-attention's"}
