"""FlexAttention attached to models whose weights are quantised."""

from __future__ import annotations

import functools
from pathlib import Path

import bitsandbytes
import pytest
import quantised
import torch
from eager_definition import definition
from quantised import kinds
from tiny_families import FAMILIES, Family
from torch import nn
from transformers import PreTrainedModel

import flexattn_cuda
from flexattn_cuda.errors import CheckpointError
from flexattn_cuda.mechanism.dequantise import weight_of
from flexattn_cuda.mechanism.keys import empty_projection, own_projection
from flexattn_cuda.mechanism.pool import are_plain
from flexattn_cuda.mechanism.trace import Trace

INTERNVL = FAMILIES["internvl_qwen2"]
FAR = 1e9  # a threshold that nothing crosses
pytestmark = pytest.mark.usefixtures("codes_in_order")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """saved(family) -> the folder of its model."""

    @functools.cache
    def save(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        FAMILIES[name].model().save_pretrained(folder)
        return folder

    return lambda family: save(family.name)


def load(family: Family, folder: Path, kind: str) -> PreTrainedModel:
    return quantised.load(type(family._skeleton), folder, kind)


def projections(family: Family, model: PreTrainedModel) -> list[tuple[nn.Module, nn.Linear]]:
    """Return the model's own projections and those of HR tokens, side by side."""
    layers = family.text_model(model).layers[family.settings().first_layer :]
    names = ("k_proj", "v_proj")
    return [(getattr(one.self_attn, name), getattr(one.self_attn, f"{name}_hd")) for one in layers for name in names]


@kinds
@torch.no_grad()
def test_hr_projections_start_as_the_numbers_that_the_codes_stand_for(saved, kind):
    model = flexattn_cuda.attach(load(INTERNVL, saved(INTERNVL), kind), INTERNVL.settings())
    for own, ours in projections(INTERNVL, model):
        assert type(own.weight) is not nn.Parameter, "the model is quantised"
        assert type(ours) is nn.Linear and type(ours.weight) is nn.Parameter and ours.weight.dtype == torch.float32
        columns = own(torch.eye(own.in_features)) - own.bias
        # 8-bit layers round what they multiply and add to float16.
        tolerance = 2**-10 * (columns.abs().max() + own.bias.abs().max()) if kind == "8bit" else 1e-6
        assert (columns.T - ours.weight).abs().max() <= tolerance
        assert torch.equal(ours.bias, own.bias)


@kinds
@torch.no_grad()
def test_a_model_that_was_called_before_is_attached_to_with_the_same_projections(saved, kind):
    inputs = INTERNVL.plain_inputs()
    fresh, called = (load(INTERNVL, saved(INTERNVL), kind) for _ in range(2))
    called(**inputs)
    made = [projections(INTERNVL, flexattn_cuda.attach(one, INTERNVL.settings())) for one in (fresh, called)]
    for (_, one), (_, other) in zip(*made):
        assert torch.equal(one.weight, other.weight)


@pytest.mark.parametrize("name", ["internvl_qwen3", "llava_siglip", "idefics3", "qwen2_5_vl"])
@torch.no_grad()
def test_hr_on_a_4_bit_model_is_what_the_definition_says(saved, name):
    family = FAMILIES[name]
    inputs, settings = family.inputs((2, 1, 0), ragged=True), family.settings("paper")
    model = load(family, saved(family), "4bit")
    model.set_attn_implementation("eager")
    outcome = definition(model, family, inputs, settings)
    trace, attached = Trace(), flexattn_cuda.attach(load(family, saved(family), "4bit"), settings)
    logits = attached(**inputs, flexattn_trace=trace).logits
    for layer in trace.steps[0]:
        for row, image in ((0, 0), (0, 1), (1, 0)):
            selected = trace.steps[0][layer].of_image(row, -1, image)[1]
            assert torch.equal(selected, outcome.masks[layer][row][image][-1])
    real = inputs["attention_mask"].bool()
    assert (logits - outcome.logits)[real].abs().max() <= 1e-4 * outcome.logits[real].abs().max()


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
@torch.no_grad()
def test_cached_and_uncached_tokens_agree_on_a_quantised_model(saved, kind):
    model = flexattn_cuda.attach(load(INTERNVL, saved(INTERNVL), kind), INTERNVL.settings("paper"))
    inputs = INTERNVL.inputs((2, 1), ragged=True)
    cached, uncached = (
        model.generate(**inputs, max_new_tokens=8, do_sample=False, hr_cache=hr) for hr in (True, False)
    )
    assert torch.equal(cached, uncached)


@kinds
@torch.no_grad()
def test_an_adapter_saved_on_a_quantised_model_gives_the_same_answers_on_another(saved, kind, tmp_path):
    inputs, logits = INTERNVL.inputs((1,)), []
    model = flexattn_cuda.attach(load(INTERNVL, saved(INTERNVL), kind), INTERNVL.settings("paper"))
    for _, ours in projections(INTERNVL, model):
        ours.weight.mul_(1.5)
    flexattn_cuda.save_adapter(model, tmp_path)
    for one in (model, flexattn_cuda.attach(load(INTERNVL, saved(INTERNVL), kind), tmp_path)):
        logits.append(one(**inputs).logits)
    assert torch.equal(*logits)


def test_an_adapter_of_a_full_model_fits_a_quantised_one(saved, tmp_path):
    flexattn_cuda.save_adapter(flexattn_cuda.attach(INTERNVL.model(), INTERNVL.settings()), tmp_path)
    model = flexattn_cuda.attach(load(INTERNVL, saved(INTERNVL), "4bit"), tmp_path)
    full = flexattn_cuda.attach(INTERNVL.model(), INTERNVL.settings())
    for (_, ours), (_, theirs) in zip(projections(INTERNVL, model), projections(INTERNVL, full)):
        assert torch.equal(ours.weight, theirs.weight)


def test_codes_of_an_unknown_kind_are_refused_and_the_model_stays_as_it_was():
    model = INTERNVL.model()
    module = INTERNVL.text_model(model).layers[3].self_attn
    module.v_proj.weight = nn.Parameter(module.v_proj.weight.to(torch.float8_e4m3fn), requires_grad=False)
    before = (type(model), list(model.state_dict()), INTERNVL.text_model(model).config._attn_implementation)
    with pytest.raises(ValueError, match="the weight of Linear holds float8_e4m3fn codes") as error:
        flexattn_cuda.attach(model, INTERNVL.settings())
    assert "\n" not in str(error.value)
    assert before == (type(model), list(model.state_dict()), INTERNVL.text_model(model).config._attn_implementation)


def test_projections_that_were_quantised_after_attaching_are_not_saved_and_not_taken_for_plain(tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = flexattn_cuda.attach(INTERNVL.model(), INTERNVL.settings())
    module = INTERNVL.text_model(model).layers[3].self_attn
    assert are_plain(module, module.q_proj.weight)
    quantize_(module, Int8WeightOnlyConfig(), filter_fn=lambda linear, name: name == "k_proj_hd")
    assert type(module.k_proj_hd) is nn.Linear and not are_plain(module, module.q_proj.weight)
    with pytest.raises(CheckpointError, match="layers.3.self_attn.k_proj_hd is quantised"):
        flexattn_cuda.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    with torch.no_grad():
        assert model(**INTERNVL.inputs((1,))).logits.isfinite().all()


# ------------------------------------------------------------------------------------------------------------ layers


class Fused(nn.Module):
    """Self-attention with one 4-bit layer for queries, keys and values, as Phi-3's."""

    def __init__(self, heads: int = 3, kv_heads: int = 2, head_dim: int = 32):
        super().__init__()
        self.head_dim = head_dim
        self.config = type("Config", (), {"num_key_value_heads": kv_heads})
        self.qkv_proj = bitsandbytes.nn.Linear4bit(64, (heads + 2 * kv_heads) * head_dim, compute_dtype=torch.float32)
        self.to("cpu")  # quantises


@torch.no_grad()
def test_rows_of_a_fused_4_bit_layer_are_told_apart_by_its_sizes():
    module = Fused()
    keys = module.qkv_proj(torch.eye(64)) - module.qkv_proj.bias
    for name, rows in (("k_proj", slice(96, 160)), ("v_proj", slice(160, 224))):
        own, empty = own_projection(module, name), empty_projection(module, name)
        assert (own.weight - keys.T[rows]).abs().max() <= 1e-6
        assert torch.equal(own.bias, module.qkv_proj.bias[rows])
        assert (empty.in_features, empty.out_features, empty.bias is not None) == (64, 64, True)


@torch.no_grad()
@pytest.mark.parametrize("double", [False, True])
def test_4_bit_codes_that_a_cpu_has_ordered_anew_are_read_by_multiplying(monkeypatch, double):
    """What dequantises would give other numbers; the kernel that multiplies is replaced by its definition."""
    linear = bitsandbytes.nn.Linear4bit(
        128, 64, bias=False, compress_statistics=double, quant_type="nf4", compute_dtype=torch.float32
    ).to("cpu")
    expected = weight_of(linear, torch.float32)
    functional = bitsandbytes.functional
    linear.weight.data, state = functional._convert_weight_packed_for_cpu(linear.weight.data, linear.weight.quant_state)
    assert state.packing_format_for_cpu and state is linear.weight.quant_state
    if not functional.has_avx512bf16():
        product = lambda tokens, weight, quant_state: tokens @ expected.T.to(tokens)  # noqa: E731
        monkeypatch.setattr(bitsandbytes, "matmul_4bit", product)
    # Codes, scales of blocks and products are cut to bfloat16.
    assert ((weight_of(linear, torch.float32) - expected).abs() <= 3 * 2**-8 * expected.abs()).all()
    assert weight_of(linear, torch.float32).dtype == torch.float32
