"""What is kept between calls: the answers are those of computing everything again, and nothing is computed twice."""

from __future__ import annotations

import copy
import threading

import pytest
import tiny
import torch
import transformers
from tiny import decode_in_fixed_pools, image_question, mixed_batch
from torch._dynamo.utils import counters
from transformers import DynamicCache, StaticCache

from flexattn_cuda import Trace
from flexattn_cuda.analysis import memory
from flexattn_cuda.errors import PoolOverflow
from flexattn_cuda.mechanism import context as state
from flexattn_cuda.mechanism.cache import HRCache
from flexattn_cuda.mechanism.cache_argument import CACHE_ARGUMENT

STEPS = 64


def run(model, steps=STEPS, **inputs):
    """-> (tokens, logits, trace, the images beside the cache)."""
    trace = Trace()
    output = model.generate(
        **inputs,
        max_new_tokens=steps,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        flexattn_trace=trace,
    )
    return (output.sequences[:, -steps:], torch.stack(output.logits, 1), trace, HRCache.beside(output[CACHE_ARGUMENT]))


def ever_selected(model, trace, prompts=None):
    """By layer that attends to HR tokens: [G, I*h*h] which of them any step, row or beam selected for it."""
    found = {}
    for layer in model.config.hr_layers:
        masks = torch.stack([step[layer - 1].mask.flatten(2).any(1) for step in trace.steps]).any(0)  # [B, I*h*h]
        found[layer] = masks.view(prompts or len(masks), -1, masks.shape[-1]).any(1)
    return found


WAYS = {
    "plain": image_question,
    "batch": mixed_batch,
    "beams": lambda: mixed_batch() | {"num_beams": 3},
    "static cache": lambda: image_question() | {"cache_implementation": "static", "disable_compile": True},
    "drafts": lambda: image_question() | {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_the_answers_are_those_of_projecting_everything_again(model, way):
    model.generation_config.eos_token_id = (
        94 if way == "drafts" else None
    )  # transformers 5.0 looks for one in the drafts
    inputs = WAYS[way]()
    tokens, logits, *_ = run(model, **inputs)
    again, recomputed, *_ = run(model, **inputs, hr_cache=False, tiles_on_demand=False)
    assert torch.equal(tokens, again)
    assert (logits - recomputed).abs().max() <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize("way", ["plain", "batch", "beams"])
def test_every_token_is_projected_once_and_every_tile_encoded_once(model, way):
    inputs = WAYS[way]()
    _, _, trace, images = run(model, 12, **inputs)
    prompts = inputs["input_ids"].shape[0]
    assert images.prompts == prompts
    selected = ever_selected(model, trace, prompts)
    tokens = {layer: int(masks.sum()) for layer, masks in selected.items()}
    assert images.counters.projected == sum(tokens.values()) > 0
    for layer, pool in images.pools.items():
        assert pool.used == int(pool.next_free) == tokens[layer]
        assert torch.equal(pool.table >= 0, selected[layer])
        assert pool.used <= pool.capacity <= 1.25 * pool.used
        assert pool.bytes == 2 * 4 * pool.capacity * 2 * 8  # key and value, float32, 2 heads of 8
    side = tiny.SIDE
    tiles = (
        torch.stack(list(selected.values())).any(0).view(prompts, -1, tiny.ZOOM, side, tiny.ZOOM, side).any(3).any(-1)
    )
    assert images.counters.encoded == int(tiles.sum())


@torch.no_grad()
def test_pools_take_the_memory_that_was_foretold():
    """`flexattn info`'s estimate, for the share of the tokens that was ever selected, and a quarter more at most."""
    model = tiny.flex(tiny.PRESETS["released"])
    _, _, _, images = run(model, 12, **image_question())
    share = images.counters.projected / (len(images.pools) * images.tokens.count)
    foretold = memory.estimate(model.config, torch.float32, selected_share=share).hr_cache_selected
    assert 0.1 < share < 0.9
    assert foretold <= sum(pool.bytes for pool in images.pools.values()) <= 1.25 * foretold


@torch.no_grad()
def test_only_the_tiles_of_the_selection_are_encoded():
    """An image that fills the upper left part of its padding: nothing is selected beyond it."""
    model = tiny.flex(tiny.settings(pool=0))
    inputs = image_question() | {"valid_rect": torch.tensor([[0, 0, 2, 4]])}
    tokens, logits, _, images = run(model, 12, **inputs)
    assert images.counters.encoded == 2 and len(images.tokens.waiting) == 7
    again, all_at_once, _, images = run(model, 12, **inputs, tiles_on_demand=False)
    assert not images.tokens.waiting
    assert torch.equal(tokens, again) and (logits - all_at_once).abs().max() <= 1e-5


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("hr_cache", [True, False])
def test_samples_of_one_prompt_share_its_images(hr_cache):
    model = tiny.flex()
    output = model.generate(
        **mixed_batch(), do_sample=True, num_return_sequences=4, max_new_tokens=8, return_dict_in_generate=True,
        output_logits=True, hr_cache=hr_cache,
    )  # fmt: skip
    ids = output.sequences
    assert ids.shape[0] == 12 and HRCache.beside(output[CACHE_ARGUMENT]).prompts == 3
    for row in range(12):  # each sample, alone, token by token
        length = ids.shape[1] - 8
        prompt = mixed_batch()["attention_mask"][row // 4].bool()
        alone = {"input_ids": ids[row, :length][prompt][None]}
        images = [slice(0, 2), slice(2, 3), slice(0, 0)][row // 4]
        if row < 8:
            alone["pixel_values_hr"] = tiny.images(3)[images]
        cache = DynamicCache(config=model.config.text_config)
        logits = [model(**alone, past_key_values=cache).logits[:, -1]]
        for token in ids[row, length:-1]:
            logits.append(model(input_ids=token[None, None], past_key_values=cache).logits[:, -1])
        theirs = torch.stack(output.logits, 1)[row]
        assert (torch.cat(logits) - theirs).abs().max() <= 2e-4


@pytest.mark.slow
@torch.no_grad()
def test_conversations_go_on_with_what_was_projected(model):
    first, second = tiny.prompt(4, "image", 9), tiny.prompt(3, "image", 6, seed=4)
    pixels, answers = tiny.images(2), []
    for hr_cache in (True, False):
        cache = DynamicCache(config=model.config.text_config)
        keywords = dict(past_key_values=cache, max_new_tokens=STEPS, do_sample=False, hr_cache=hr_cache)
        turn = model.generate(first[None], pixel_values_hr=pixels[:1], **keywords)
        after_one = {layer: pool.used for layer, pool in HRCache.beside(cache).pools.items()}
        ids = torch.cat([turn, second[None]], dim=1)
        answers.append(model.generate(ids, pixel_values_hr=pixels[1:], **keywords))
        pools = HRCache.beside(cache).pools
        assert bool(pools) == hr_cache
        for layer, used in after_one.items():
            assert pools[layer].table.shape == (1, 2 * 18 * 18) and pools[layer].used >= used > 0
    assert torch.equal(*answers)


@torch.no_grad()
def test_a_cropped_cache_forgets_the_images_behind_its_end():
    """A question that is taken back, with its image, and another one asked instead."""
    model, pixels = tiny.flex(), tiny.images(3)
    first, rejected, second = (tiny.prompt(3, "image", 6, seed=seed) for seed in range(3))
    logits = []
    for taken_back in (True, False):
        cache = DynamicCache(config=model.config.text_config)
        model(input_ids=first[None], pixel_values_hr=pixels[:1], past_key_values=cache)
        if taken_back:
            model(input_ids=rejected[None], pixel_values_hr=pixels[1:2], past_key_values=cache)
            cache.crop(-len(rejected))
        logits.append(model(input_ids=second[None], pixel_values_hr=pixels[2:], past_key_values=cache).logits[:, -1])
    assert (logits[0] - logits[1]).abs().max() <= 1e-5


@pytest.mark.slow
@torch.no_grad()
def test_conversations_taken_in_turns_and_in_threads_never_mix(model):
    questions = [image_question(seed, text=6 + seed) for seed in range(3)]
    expected = [run(model, 8, **question)[0][0].tolist() for question in questions]

    caches = [DynamicCache(config=model.config.text_config) for _ in questions]
    answers = [[int(model(**q, past_key_values=c).logits[0, -1].argmax())] for q, c in zip(questions, caches)]
    for _ in range(7):
        for answer, cache in zip(answers, caches):
            logits = model(input_ids=torch.tensor([answer[-1:]]), past_key_values=cache).logits
            answer.append(int(logits[0, -1].argmax()))
    assert answers == expected

    found = [None] * len(questions)

    def answer(number):
        found[number] = run(model, 8, **questions[number])[0][0].tolist()

    threads = [threading.Thread(target=answer, args=(number,)) for number in range(len(questions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


@torch.no_grad()
def test_a_copied_cache_goes_its_own_way(model):
    cache = DynamicCache(config=model.config.text_config)
    model(**image_question(), past_key_values=cache)
    twin = copy.deepcopy(cache)
    one, other = torch.tensor([[5]]), torch.tensor([[71]])
    for token, copied in ((one, cache), (other, twin)):
        fresh = DynamicCache(config=model.config.text_config)
        model(**image_question(), past_key_values=fresh)
        expected = model(input_ids=token, past_key_values=fresh).logits
        assert torch.equal(model(input_ids=token, past_key_values=copied).logits, expected)
    ours, theirs = HRCache.beside(cache), HRCache.beside(twin)
    assert ours.tokens.features.data_ptr() != theirs.tokens.features.data_ptr()
    for layer, pool in ours.pools.items():
        assert pool.k.data_ptr() != theirs.pools[layer].k.data_ptr()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_pools_have_the_dtype_of_the_model(model, dtype):
    _, logits, _, images = run(model.to(dtype), 4, **image_question())
    assert logits.isfinite().all()
    assert {pool.k.dtype for pool in images.pools.values()} == {dtype}


@torch.no_grad()
def test_rows_that_the_cache_does_not_know_are_refused():
    model, cache = tiny.flex(), DynamicCache()
    batch = mixed_batch()
    model(**batch, past_key_values=cache)
    with pytest.raises(ValueError, match="this call has 1 rows, but the cache holds images of 3 prompts"):
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)
    with pytest.raises(ValueError, match="4 rows, which are not prompts of 3 rows each"):
        model(**image_question() | {"input_ids": image_question()["input_ids"].expand(4, -1)}, rows_per_prompt=3)


# -------------------------------------------------------------------------------------------------- pools of fixed size


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_that_reads_nothing_back_gives_the_same_answer(model, compiled):
    """In one graph without a break, captured once for all steps."""
    expected = run(model, 12, **mixed_batch())[0]
    counters.clear()
    step = torch.compile(model.forward, fullgraph=True, backend="aot_eager") if compiled else model.forward
    assert torch.equal(decode_in_fixed_pools(model, step, mixed_batch(), 3 * 18 * 18, 12), expected)
    assert counters["stats"]["unique_graphs"] == compiled and not counters["graph_break"]


@torch.no_grad()
def test_generate_with_pools_of_fixed_size(model, monkeypatch):
    expected = run(model, 12, **mixed_batch())[0]
    static = dict(cache_implementation="static", disable_compile=True)
    assert torch.equal(run(model, 12, **mixed_batch(), **static, hr_capacity=3 * 18 * 18)[0], expected)
    with pytest.raises(
        PoolOverflow, match="layer [0-9] has no room for [0-9]+ selected tokens: hr_capacity=10 is too small"
    ):
        run(model, 12, **mixed_batch(), **static, hr_capacity=10)


class WrappedLinear(torch.nn.Linear):
    """A projection that is not a plain linear layer, like one with an adapter."""


@torch.no_grad()
def test_other_projections_than_plain_ones_in_pools_of_fixed_size(model, monkeypatch):
    expected = run(model, 12, **mixed_batch())[0]
    for name, linear in model.named_modules():
        if name.endswith("_proj_hd"):
            linear.__class__ = WrappedLinear
    static = dict(cache_implementation="static", disable_compile=True, hr_capacity=3 * 18 * 18)
    assert torch.equal(run(model, 12, **mixed_batch())[0], expected)
    assert torch.equal(run(model, 12, **mixed_batch(), **static)[0], expected)
    monkeypatch.setattr(state, "NEW_AT_ONCE", 0)
    with pytest.raises(PoolOverflow, match="[0-9]+ selected tokens did not fit into one step"):
        run(model, 40, **mixed_batch(), **static)


@torch.no_grad()
def test_a_cache_that_is_emptied_holds_no_images(model):
    cache = StaticCache(config=model.config.text_config, max_cache_len=60)
    fresh = StaticCache(config=model.config.text_config, max_cache_len=60)
    model(**image_question(), past_key_values=cache)
    cache.reset()
    text = {"input_ids": tiny.prompt(20, seed=5)[None]}
    assert torch.equal(model(**text, past_key_values=cache).logits, model(**text, past_key_values=fresh).logits)
    assert HRCache.beside(cache) is None


# --------------------------------------------------------------------------------------------- what callers do besides


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
def test_a_capacity_given_once_holds_for_the_next_image(model, seed):
    ids, pixels = tiny.prompt(3, "image", 6, seed=seed)[None], tiny.images(2, seed)
    later = tiny.prompt(3, "image", 4, seed=seed + 9)[None]
    answers = []
    for capacity in ({}, {"hr_capacity": 2 * 18 * 18}):
        cache = StaticCache(config=model.config.text_config, max_cache_len=150)
        model(input_ids=ids, pixel_values_hr=pixels[:1], past_key_values=cache, **capacity)
        token = model(input_ids=later, pixel_values_hr=pixels[1:], past_key_values=cache).logits[:, -1:].argmax(-1)
        found = [token]
        for _ in range(20):
            found.append(model(input_ids=found[-1], past_key_values=cache, hr_alpha=0.7).logits[:, -1:].argmax(-1))
        answers.append(torch.cat(found, 1))
    assert torch.equal(*answers)


@torch.no_grad()
def test_a_conversation_goes_on_with_its_new_tokens_alone(model):
    if transformers.__version__.startswith("5.0."):
        pytest.skip("transformers 5.0 itself fails on it")
    first, second = tiny.prompt(4, "image", 9), tiny.prompt(7, seed=4)
    answers = []
    for alone in (False, True):
        cache = DynamicCache(config=model.config.text_config)
        turn = model.generate(
            first[None], pixel_values_hr=tiny.images(1), past_key_values=cache, max_new_tokens=4, do_sample=False
        )
        whole = torch.cat([turn, second[None]], dim=1)
        ids = whole[:, cache.get_seq_length() :] if alone else whole
        tokens = model.generate(
            ids, attention_mask=torch.ones_like(whole), past_key_values=cache, max_new_tokens=12, do_sample=False
        )
        answers.append(tokens[:, -12:])
    assert torch.equal(*answers)


@torch.no_grad()
def test_the_caller_may_use_the_pixels_again(model):
    question, cache = image_question(), DynamicCache(config=model.config.text_config)
    expected = run(model, 8, **question)[0]
    tokens = [model(**question, past_key_values=cache).logits[:, -1:].argmax(-1)]
    question["pixel_values_hr"].fill_(7.0)
    for _ in range(7):
        tokens.append(model(input_ids=tokens[-1], past_key_values=cache).logits[:, -1:].argmax(-1))
    assert torch.equal(torch.cat(tokens, 1), expected)


@torch.no_grad()
def test_a_question_taken_back_is_asked_anew(model):
    """After the crop one token stands for the whole new question: it sees the image.

    In the paper's form the rows before it keep what they saw with the old question's selection, so they differ there.
    """
    ids = image_question(text=12)
    cache, fresh = (DynamicCache(config=model.config.text_config) for _ in range(2))
    model(**ids, past_key_values=cache)
    cache.crop(-7)
    cut = ids | {"input_ids": torch.cat([ids["input_ids"][:, :-7], torch.tensor([[5]])], 1)}
    expected = model(**cut, past_key_values=fresh).logits[:, -1]
    trace = Trace()
    found = model(input_ids=torch.tensor([[5]]), past_key_values=cache, flexattn_trace=trace).logits[:, -1]
    assert all(layer.mask.any() for layer in trace.steps[0].values())
    if model.config.flexattn.hr_rows == "answer":
        assert (found - expected).abs().max() <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize("static", [{}, {"hr_capacity": 324}], ids=["growing", "fixed"])
def test_autocast(model, static):
    cache = DynamicCache(config=model.config.text_config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(**image_question(), past_key_values=cache, **static).logits
        logits = model(input_ids=logits[:, -1:].argmax(-1), past_key_values=cache).logits
    assert logits.isfinite().all() and HRCache.beside(cache).counters.projected


@pytest.mark.parametrize("static", [{}, {"hr_capacity": 324}], ids=["growing", "fixed"])
def test_a_cache_made_in_inference_mode_is_used_outside(model, static):
    cache = DynamicCache(config=model.config.text_config)
    with torch.inference_mode():
        token = model(**image_question(), past_key_values=cache, **static).logits[:, -1:].argmax(-1).clone()
    with torch.no_grad():
        for _ in range(6):
            token = model(input_ids=token, past_key_values=cache).logits[:, -1:].argmax(-1)


@torch.no_grad()
def test_prompts_of_embeddings(model):
    ids = tiny.prompt(9)[None]
    embeds = model.get_input_embeddings()(ids)
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)[:, -5:]
    assert torch.equal(model.generate(inputs_embeds=embeds, max_new_tokens=5, do_sample=False)[:, -5:], expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["same", "text"])
def test_an_assistant_model_changes_nothing(model, kind):
    model.generation_config.eos_token_id = 94
    question = image_question() if kind == "same" else {"input_ids": tiny.prompt(9)[None]}
    expected = model.generate(**question, max_new_tokens=8, do_sample=False)
    assistant = (
        tiny.flex(seed=3) if kind == "same" else transformers.LlamaForCausalLM(tiny.llava_config().text_config).eval()
    )
    assistant.generation_config.eos_token_id = 94
    found = model.generate(**question, max_new_tokens=8, do_sample=False, assistant_model=assistant)
    assert torch.equal(found, expected)


@torch.no_grad()
def test_images_and_places_must_agree():
    two = {"input_ids": tiny.prompt("image", 3, "image", 2)[None], "pixel_values": torch.zeros(2, 3, 48, 48)}
    for images in (1, 3):
        with pytest.raises(ValueError, match=f"pixel_values_hr holds {images} images; these prompts have 2"):
            tiny.flex()(**two, pixel_values_hr=tiny.images(images))


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
def test_an_image_token_that_the_model_writes_is_no_image(model, use_cache):
    def write_one(ids, scores):
        return (
            scores
            if (ids[0] == tiny.IMAGE).sum() > tiny.SIDE**2
            else scores.index_fill(1, torch.tensor(tiny.IMAGE), 1e9)
        )

    ids = model.generate(
        **image_question(), max_new_tokens=5, do_sample=False, logits_processor=[write_one], use_cache=use_cache
    )
    assert ids.shape[1] == 49 + 5 and ids[0, 49] == tiny.IMAGE
