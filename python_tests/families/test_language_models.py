"""Language models behind a vision tower: whose keys this package can make of high-resolution (HR) tokens.

An HR key must be the layer's own key of the same token, whatever the model does to it: norms, rotary forms, layers
without positions, tables of its own for some layers, one projection for all.
"""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import transformers
from eager_definition import definition, hr_projections
from tiny_families import FAMILIES, Family

import flexattn_cuda
from flexattn_cuda.families.towers import LlavaTower
from flexattn_cuda.mechanism.attach import Attachment
from flexattn_cuda.mechanism.cache_argument import CACHE_ARGUMENT
from flexattn_cuda.mechanism.keys import KeyForm, NormOver, Rotation, own_projection

TEXT = dict(
    hidden_size=64,
    intermediate_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_hidden_layers=5,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
PLAIN, NORMED = KeyForm(), KeyForm(NormOver.HEAD)
OWN, NONE = KeyForm(rotation=Rotation.OWN), KeyForm(rotation=Rotation.NONE)
SLIDING = ["sliding_attention", "full_attention"] * 2 + ["full_attention"]
# By the name of the configuration: how the keys of layers 2 to 4 are made, and changes to it.
WORK = {
    "LlamaConfig": (PLAIN, {}),
    "MistralConfig": (PLAIN, {"sliding_window": 8}),
    "Qwen2Config": (PLAIN, {}),
    "GemmaConfig": (PLAIN, {"head_dim": 16}),
    "Gemma2Config": (PLAIN, {"head_dim": 16, "sliding_window": 8}),
    "GraniteConfig": (PLAIN, {"embedding_multiplier": 12.0, "attention_multiplier": 0.3}),
    "OlmoConfig": (PLAIN, {}),
    "Starcoder2Config": (PLAIN, {}),
    "Phi3Config": (PLAIN, {}),  # one projection for queries, keys and values
    "Qwen3Config": (NORMED, {"head_dim": 16}),
    "Olmo2Config": (KeyForm(NormOver.WIDTH), {}),
    "CohereConfig": (OWN, {}),  # interleaved
    "GlmConfig": (OWN, {"head_dim": 16}),  # interleaved, a part of the head
    "Glm4Config": (OWN, {"head_dim": 16}),
    "PhiConfig": (OWN, {}),  # a part of the head
    "SmolLM3Config": ((PLAIN, NONE, PLAIN), {}),  # every fourth layer without positions
    "Gemma3TextConfig": (None, {"head_dim": 16, "layer_types": SLIDING}),  # two tables
}


def with_language_model(name: str) -> Family:
    """Return the tiny LLaVA with such a language model."""

    def build() -> transformers.PreTrainedModel:
        config = FAMILIES["llava"].build().config
        values = TEXT | {"vocab_size": config.text_config.vocab_size} | WORK[name][1]
        config.text_config = getattr(transformers, name)(**values)
        return transformers.LlavaForConditionalGeneration(config)

    return dataclasses.replace(FAMILIES["llava"], name=name, build=build)


REFUSED = {
    "DeepseekV3Config": "v has shape",  # keys and values of different sizes
    "GptOssConfig": "attention sinks",
    "GPTNeoXConfig": "no attribute 'self_attn'",
    "StableLmConfig": "(does not hand keyword arguments on|takes a padding mask)",  # by version of transformers
}
FEW_EXPERTS = dict(n_routed_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1, first_k_dense_replace=5)

names = pytest.mark.parametrize("name", WORK)


@torch.no_grad()
@names
def test_an_hr_key_is_the_layers_own_key_of_the_token(name):
    """The tokens that enter a layer's attention, projected as HR tokens at their own positions."""
    tiny = with_language_model(name)
    family = LlavaTower(tiny.model(dtype=torch.float64), tiny.settings())
    text = family.text_model
    text.set_attn_implementation("flexattn")
    attachment = Attachment(family)
    attachment.add_modules(text)
    entered: dict[int, torch.Tensor] = {}
    for layer in text.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: entered.update({module.layer_idx: kwargs["hidden_states"][0]}),
            with_kwargs=True,
        )
    tokens, cache = torch.randn(1, 7, 64, dtype=torch.float64), transformers.DynamicCache()
    text(inputs_embeds=tokens, use_cache=True, **{CACHE_ARGUMENT: cache})
    tables = family.rotary(text, tokens, torch.arange(7)[None])
    for layer in family.hr_layers:
        module = text.layers[layer].self_attn
        form, own = module.hr_key_form, own_projection(module, "k_proj")
        keys = form.normalise(module, own(entered[layer]), module.head_dim)
        keys = form.rotate(module, keys, form.own_tables(tables)).transpose(0, 1)
        kept = cache.layers[layer].keys[0]
        assert (keys[:, -kept.shape[1] :] - kept).abs().max() <= 1e-6 * kept.abs().max()


@names
def test_its_form_is_found(name):
    form = WORK[name][0]
    tiny = with_language_model(name)
    attached = flexattn_cuda.attach(tiny.model(), tiny.settings())
    found = [attached.model.language_model.layers[layer].self_attn.hr_key_form for layer in (2, 3, 4)]
    if form is not None:
        assert found == list(form if isinstance(form, tuple) else (form,) * 3)
    else:
        kinds = [kind == "sliding_attention" for kind in SLIDING[2:]]
        assert [one.table for one in found] == [int(kind) for kind in kinds]
        assert {one.tables for one in found} == {2} and {one.norm for one in found} == {NormOver.HEAD}


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in WORK if name != "Phi3Config"])  # whose projections are in one
@pytest.mark.parametrize("preset", ["released", "paper"])
def test_a_model_with_it_computes_what_is_defined(name, preset):
    family = with_language_model(name)
    plain, settings = family.model(dtype=torch.float64), family.settings(preset)
    attached = flexattn_cuda.attach(copy.deepcopy(plain), settings)
    inputs = family.inputs((1, 2), ragged=True, dtype=torch.float64)
    projections = hr_projections(attached.model.language_model, settings)
    wanted = definition(plain, family, inputs, settings, projections)
    seen = inputs["attention_mask"].bool()
    found = attached(**inputs).logits
    assert (found - wanted.logits)[seen].abs().max() <= 1e-9 * wanted.logits[seen].abs().max()


@pytest.mark.parametrize("name", REFUSED)
def test_other_language_models_are_refused_by_name_and_reason(name):
    config = FAMILIES["llava"].build().config
    config.text_config = getattr(transformers, name)(**TEXT | FEW_EXPERTS)
    model = transformers.LlavaForConditionalGeneration(config)  # transformers itself builds it
    kind = config.text_config.model_type
    with pytest.raises(ValueError, match=f"does not support language models of type '{kind}': .*{REFUSED[name]}"):
        flexattn_cuda.attach(model)
    assert type(model) is transformers.LlavaForConditionalGeneration and not hasattr(model, "attachment")
