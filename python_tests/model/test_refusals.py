"""What cannot be right is refused in one sentence, and what makes no difference is accepted."""

from __future__ import annotations

from functools import partial

import pytest
import tiny
import tiny_checkpoint
import torch
import transformers
from PIL import Image
from transformers import Cache, DynamicCache, LlamaConfig, LlamaModel, MistralConfig
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.models.llama.modeling_llama import LlamaAttention

import flexattn_cuda
from flexattn_cuda import FlexAttnLlavaConfig, FlexAttnLlavaForConditionalGeneration
from flexattn_cuda.mechanism import probe
from flexattn_cuda.mechanism.attention import flexattn_attention
from flexattn_cuda.mechanism.cache_argument import CACHE_ARGUMENT, check_cache_argument
from flexattn_cuda.mechanism.grid import Grid, ImageGrids


def image_question() -> dict:
    return {"input_ids": tiny.prompt(4, "image", 9)[None], "pixel_values_hr": tiny.images(1)}


def with_text_model(text_config: transformers.PreTrainedConfig) -> FlexAttnLlavaForConditionalGeneration:
    torch.manual_seed(0)
    values = tiny.flex().config.to_dict() | {"text_config": text_config.to_dict()}
    values.pop("model_type")
    return tiny.sharpen(FlexAttnLlavaForConditionalGeneration(FlexAttnLlavaConfig(**values)))


# ---------------------------------------------------------------------------------------------- which attention is used


@torch.no_grad()
def test_hr_tokens_need_our_attention_on_the_language_model():
    model, cache = tiny.flex(), DynamicCache()
    model(**image_question(), past_key_values=cache)
    model.model.language_model.set_attn_implementation("sdpa")
    message = "need attention implementation 'flexattn' on the language model, but it is 'sdpa'"
    with pytest.raises(ValueError, match=message):
        model(**image_question())
    with pytest.raises(ValueError, match=message):
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)
    model(input_ids=tiny.prompt(7)[None])  # without HR tokens any attention will do


@torch.no_grad()
def test_the_vision_tower_is_not_causal(tmp_path):
    tiny.flex().save_pretrained(tmp_path)
    model = FlexAttnLlavaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="flexattn")
    with pytest.raises(ValueError, match="CLIPAttention is not causal, but flexattn attention is"):
        model(**image_question())
    model.model.vision_tower.set_attn_implementation("sdpa")
    model(**image_question())


QUERIES = 5


def attend(**options) -> torch.Tensor:
    module = LlamaAttention(LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=4), layer_idx=0)
    q, k, v = torch.randn(3, 1, 4, QUERIES, 8, generator=torch.Generator().manual_seed(0))
    return flexattn_attention(module, q, k, v, None, **options)[0]


@pytest.mark.parametrize("option, value", [("s_aux", torch.zeros(4)), ("is_causal", False)])
def test_options_that_change_the_result_are_refused(option, value):
    with pytest.raises(ValueError, match="not causal" if option == "is_causal" else option):
        attend(**{option: value})


@torch.no_grad()
@pytest.mark.parametrize("images", [True, False])
def test_attention_weights_that_nobody_keeps_are_refused(images):
    """An empty tuple before."""
    model, inputs = tiny.flex(), image_question() if images else {"input_ids": tiny.prompt(7)[None]}
    for call in (model, partial(model.generate, max_new_tokens=2, return_dict_in_generate=True)):
        with pytest.raises(ValueError, match="output_attentions is True, but flexattn attention keeps no weights"):
            call(**inputs, output_attentions=True)
        call(**inputs, output_attentions=False)


def test_options_that_change_nothing_are_accepted():
    neutral = attend(softcap=None, s_aux=None, is_causal=True, sliding_window=QUERIES)
    assert torch.equal(neutral, attend())


@torch.no_grad()
def test_a_mask_that_ends_before_the_sequence_is_refused():
    model, question, cache = tiny.flex(), image_question(), DynamicCache()
    mask = torch.ones_like(question["input_ids"])
    model(**question, attention_mask=mask, past_key_values=cache)
    length = mask.shape[1]
    message = f"attention_mask covers {length} positions, but this call ends at position {length + 1}"
    with pytest.raises(ValueError, match=message):
        model(input_ids=torch.tensor([[5]]), attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize(
    "values, says",
    [
        (dict(threshold="48"), "threshold is '48'; it must be a number"),
        (dict(scale=float("nan")), "scale is nan; it must be a number"),
        (dict(ratio=None), "ratio is None; it must be a number"),
        (dict(mask_padding="no"), "mask_padding is 'no'; it must be true or false"),
        (dict(warmup=-1.0), "warmup is -1.0; it must be at least 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(values, says):
    with pytest.raises(ValueError, match=f"^flexattn {says}"):
        flexattn_cuda.FlexAttnConfig(**values)


# -------------------------------------------------------------------------------------------------------------- windows


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_window_that_the_sequence_does_not_exceed_changes_nothing(use_cache):
    sizes = tiny.llava_config().text_config.to_dict() | {"model_type": "mistral"}
    length = image_question()["input_ids"].shape[1]
    logits = []
    for window in (None, length, length - 1):
        model = with_text_model(MistralConfig(**sizes | {"sliding_window": window}))
        logits.append(model(**image_question(), use_cache=use_cache).logits)
    assert torch.equal(*logits[:2]) and not torch.allclose(*logits[1:])


@torch.no_grad()
def test_a_cache_with_a_window_is_refused_before_anything_is_computed(monkeypatch):
    model = tiny.flex()
    monkeypatch.setattr(model.model.vision_tower, "forward", lambda *_, **__: pytest.fail("an image was encoded"))
    cache = Cache(layers=[DynamicSlidingWindowLayer(sliding_window=16) for _ in range(5)])
    with pytest.raises(ValueError, match="keeps a window of 16 positions, but this call ends at position 49"):
        model(**image_question(), past_key_values=cache)


def test_the_check_of_the_keys_draws_no_random_numbers():
    probe._KNOWN.clear()
    checked, known = (tiny.flex(seed=3).model.language_model.layers[2].self_attn.k_proj_hd.weight for _ in range(2))
    assert torch.equal(checked, known)


# ------------------------------------------------------------------------------------------------------------- generate


def test_early_exit_is_refused():
    with pytest.raises(ValueError, match="assistant_early_exit is not supported; use assistant_model"):
        tiny.flex().generate(**image_question(), assistant_early_exit=2, max_new_tokens=3)


def test_stop_strings_need_a_tokenizer_that_spells(tmp_path):
    model, processor = flexattn_cuda.load(device="cpu")  # its tokenizer knows whole words only
    inputs = processor(
        images=Image.new("RGB", (60, 60)), text=processor.prompt("What number is on the sign that is red?")
    )
    with pytest.raises(ValueError, match="stop_strings needs a tokenizer that can spell any text"):
        model.generate(**inputs, stop_strings=["1"], tokenizer=processor.tokenizer, max_new_tokens=2)

    model, processor = flexattn_cuda.load(tiny_checkpoint.save(tmp_path), device="cpu")
    inputs = processor(images=Image.new("RGB", (60, 60)), text=processor.prompt("What?"))
    options = dict(max_new_tokens=12, do_sample=False)
    start = inputs["input_ids"].shape[1]
    answer = model.generate(**inputs, **options)[0, start:]
    stop = processor.tokenizer.decode(answer[2:3])
    stopped = model.generate(**inputs, **options, stop_strings=[stop], tokenizer=processor.tokenizer)[0, start:]
    assert 0 < len(stopped) <= 3 and torch.equal(stopped, answer[: len(stopped)])


# ---------------------------------------------------------------------------------------------------------------- grids


def test_hr_tokens_that_do_not_make_equal_tiles_are_refused():
    assert ImageGrids(Grid(2, 3), Grid(6, 9), Grid(2, 3)).tile == Grid(3, 3)
    for tiles in (Grid(2, 2), Grid(4, 3), Grid(0, 3)):
        with pytest.raises(ValueError, match=f"an HR grid of 6 x 9 tokens cannot be cut into {tiles} equal tiles"):
            ImageGrids(Grid(2, 3), Grid(6, 9), tiles)


def test_a_language_model_whose_cache_has_another_name_is_refused():
    def forward(self, input_ids=None, kv_cache=None): ...

    with pytest.raises(ImportError, match=f"takes no argument '{CACHE_ARGUMENT}'.*pip install 'transformers<5.25'"):
        check_cache_argument(forward)
    check_cache_argument(LlamaModel.forward)


@torch.no_grad()
def test_a_cache_is_taken_under_either_of_its_names_but_only_once():
    model, token = tiny.flex(), torch.tensor([[5]])
    logits = []
    for name in ("cache", "past_key_values"):
        given = {name: DynamicCache()}
        answer = model.generate(**image_question(), **given, max_new_tokens=3, do_sample=False)
        assert answer.shape[1] - image_question()["input_ids"].shape[1] == 3 and given[name].get_seq_length() > 9
        logits.append(model(input_ids=token, **given).logits)
        text = model.model.language_model(inputs_embeds=model.get_input_embeddings()(token), **given)
        assert given[name].get_seq_length() == answer.shape[1] + 1  # the last token of an answer is not in the cache
        logits.append(text.last_hidden_state)
    assert torch.equal(logits[0], logits[2]) and torch.equal(logits[1], logits[3])
    for call in (model, model.model.language_model, model.generate):
        with pytest.raises(ValueError, match="both cache and past_key_values were given"):
            call(input_ids=token, cache=DynamicCache(), past_key_values=DynamicCache())


def test_the_cache_of_continuous_batching_is_refused():
    class PagedAttentionCache: ...

    model, token = tiny.flex(), torch.tensor([[5]])
    for call in (model, model.model.language_model):
        with pytest.raises(ValueError, match="the key/value cache is a PagedAttentionCache; .* not generate_batch"):
            call(input_ids=token, cache=PagedAttentionCache())
