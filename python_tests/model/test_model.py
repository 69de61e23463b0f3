"""The model around the operators: who sees high-resolution tokens, however the calls are cut."""

from __future__ import annotations

import pytest
import tiny
import torch
from tiny import image_question
from transformers import DynamicCache

from flexattn_cuda import FlexAttnLlavaForConditionalGeneration, Trace

EXACT = 2e-4  # float32, logits of the order of 10: other cuts give other tile sums


def assert_close(actual, expected, tolerance=EXACT):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max().item() <= tolerance


@torch.no_grad()
def test_high_resolution_changes_the_answer(model):
    inputs = image_question()
    trace = Trace()
    _, with_hr = tiny.generate(model, **inputs, flexattn_trace=trace)
    _, without = tiny.generate(model, **tiny.low_resolution(inputs))
    assert (with_hr - without).abs().max() > 0.1
    first = model.config.flexattn.first_layer
    assert [sorted(step) for step in trace.steps] == [list(range(first - 1, 5))] * 6
    counts = torch.tensor([[int(layer.mask.sum()) for layer in step.values()] for step in trace.steps])
    assert (counts > 0).any() and (counts < tiny.SIDE**2 * tiny.ZOOM**2).any()


@torch.no_grad()
def test_only_the_last_prompt_row_sees_hr_in_the_released_form():
    model, inputs = tiny.flex(), image_question()
    with_hr = model(**inputs).logits[0]
    without = model(**tiny.low_resolution(inputs)).logits[0]
    assert_close(with_hr[:-1], without[:-1], 1e-5)
    assert (with_hr[-1] - without[-1]).abs().max() > 0.1


@torch.no_grad()
def test_every_prompt_row_sees_hr_in_the_paper_form():
    model, inputs = tiny.flex(tiny.PRESETS["paper"]), image_question()
    with_hr = model(**inputs).logits[0]
    without = model(**tiny.low_resolution(inputs)).logits[0]
    assert ((with_hr - without).abs().amax(-1) > 1e-3).float().mean() > 0.9


@torch.no_grad()
def test_teacher_forcing_equals_decoding(model):
    """All answer rows in one call, each with its own selection, against one call per token."""
    inputs, steps = image_question(), 6
    tokens, logits = tiny.generate(model, steps, **inputs)
    full = torch.cat([inputs["input_ids"], tokens], dim=1)
    labels = torch.full_like(full, -100)
    labels[:, -steps:] = tokens
    forced = model(input_ids=full, labels=labels, pixel_values_hr=inputs["pixel_values_hr"], use_cache=False)
    assert_close(forced.logits[:, -steps - 1 : -1], logits)


@torch.no_grad()
def test_prompt_in_chunks_equals_one_call():
    model, inputs = tiny.flex(), image_question()
    expected = model(**inputs).logits[:, -1]
    ids, length = inputs["input_ids"], inputs["input_ids"].shape[1]
    for cut in (tiny.SIDE**2 + 4, length - 1):
        cache = DynamicCache(config=model.config.text_config)
        model(
            input_ids=ids[:, :cut],
            pixel_values_hr=inputs["pixel_values_hr"],
            past_key_values=cache,
            prompt_length=length,
        )
        chunk = model(input_ids=ids[:, cut:], past_key_values=cache, prompt_length=length).logits[:, -1]
        assert_close(chunk, expected)


@torch.no_grad()
def test_paper_form_refuses_a_prompt_in_chunks():
    model, inputs = tiny.flex(tiny.PRESETS["paper"]), image_question()
    with pytest.raises(ValueError, match="in one call"):
        model(input_ids=inputs["input_ids"][:, :-3], pixel_values_hr=inputs["pixel_values_hr"],
              prompt_length=inputs["input_ids"].shape[1])  # fmt: skip


@torch.no_grad()
def test_several_new_tokens_in_one_call_equal_one_by_one(model):
    """What assisted decoding does: drafts are verified together, and each row has its own selection."""
    inputs = image_question()
    tokens, logits = tiny.generate(model, 5, **inputs)
    cache = DynamicCache(config=model.config.text_config)
    length = inputs["input_ids"].shape[1]
    first = model(**inputs, past_key_values=cache).logits[:, -1:]
    rest = model(input_ids=tokens[:, :-1], past_key_values=cache, prompt_length=length).logits
    assert_close(torch.cat([first, rest], 1), logits)


@torch.no_grad()
def test_assisted_generation(model):
    inputs = image_question()
    expected, _ = tiny.generate(model, 8, **inputs)
    output = model.generate(
        **inputs, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3, eos_token_id=94
    )  # transformers 5.0 looks for one in the drafts
    assert torch.equal(output[:, -8:], expected)


@torch.no_grad()
def test_rows_of_a_batch_do_not_depend_on_each_other(model):
    """Image questions of different lengths, two images in one prompt, and a row of text alone."""
    rows = [
        (tiny.prompt(4, "image", 9), tiny.images(1)),
        (tiny.prompt(2, "image", 5, "image", 3, seed=1), tiny.images(2, seed=1)),
        (tiny.prompt(7, seed=2), None),
        (tiny.prompt("image", 2, seed=3), tiny.images(1, seed=3)),
    ]
    pixels = torch.cat([pixels for _, pixels in rows if pixels is not None])
    batch_tokens, batch_logits = tiny.generate(
        model, **tiny.left_padded(*(ids for ids, _ in rows)), pixel_values_hr=pixels
    )
    for row, (ids, pixels) in enumerate(rows):
        tokens, logits = tiny.generate(
            model, input_ids=ids[None], **({} if pixels is None else {"pixel_values_hr": pixels})
        )
        assert_close(batch_logits[row], logits[0])
        assert torch.equal(batch_tokens[row], tokens[0])


@torch.no_grad()
def test_a_margin_is_never_selected(model):
    model.config.flexattn_config = model.config.flexattn_config | {"pool": 0}
    live = torch.tensor([[2, 0, 4, 6]])
    trace = Trace()
    tiny.generate(model, **image_question(), valid_rect=live, flexattn_trace=trace)
    masks = torch.cat([layer.mask.view(-1, 18, 18) for step in trace.steps for layer in step.values()])
    assert masks[:, 6:12].any() and not masks[:, :6].any() and not masks[:, 12:].any()


@torch.no_grad()
def test_text_after_a_image_starts_without_it(model):
    text = {"input_ids": tiny.prompt(11, seed=5)[None]}
    before = tiny.generate(model, **text)[1]
    tiny.generate(model, **image_question())
    assert torch.equal(tiny.generate(model, **text)[1], before)


@torch.no_grad()
def test_beams_hold_their_own_images(model):
    """Two rows, one with two images: every beam of a row must read that row's images."""
    ids = tiny.left_padded(tiny.prompt(2, "image", 5, "image", 3), tiny.prompt(3, "image", 4, seed=1))
    pixels = tiny.images(3)
    together = model.generate(**ids, pixel_values_hr=pixels, num_beams=3, max_new_tokens=5, do_sample=False)
    alone = model.generate(
        tiny.prompt(2, "image", 5, "image", 3)[None], pixel_values_hr=pixels[:2], num_beams=3, max_new_tokens=5,
        do_sample=False,
    )  # fmt: skip
    assert torch.equal(together[0, -5:], alone[0, -5:])


@torch.no_grad()
def test_static_cache(model):
    inputs = image_question()
    expected, _ = tiny.generate(model, 6, **inputs)
    output = model.generate(
        **inputs, max_new_tokens=6, do_sample=False, cache_implementation="static", disable_compile=True
    )
    assert torch.equal(output[:, -6:], expected)


@torch.no_grad()
def test_conversation_goes_on_from_its_cache(model):
    """A second question, about a second image, with the first turn in the cache."""
    first = tiny.prompt(4, "image", 9)
    second = tiny.prompt(3, "image", 6, seed=4)
    pixels = tiny.images(2)
    cache = DynamicCache(config=model.config.text_config)
    turn = model.generate(
        first[None], pixel_values_hr=pixels[:1], past_key_values=cache, max_new_tokens=4, do_sample=False
    )
    ids = torch.cat([turn, second[None]], dim=1)
    tokens = model.generate(ids, pixel_values_hr=pixels[1:], past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert tokens.shape[1] == ids.shape[1] + 4

    past = first.shape[0] + 3  # the last answer token is fed together with the second turn
    labels = torch.full_like(tokens, -100)
    labels[:, first.shape[0] : first.shape[0] + 4] = tokens[:, first.shape[0] : first.shape[0] + 4]
    labels[:, -4:] = tokens[:, -4:]
    assert past < ids.shape[1]
    forced = model(input_ids=tokens, labels=labels, pixel_values_hr=pixels, use_cache=False).logits
    if model.config.flexattn.hr_rows == "answer":
        assert torch.equal(forced[:, -5:-1].argmax(-1), tokens[:, -4:])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(model, dtype):
    inputs = image_question()
    expected = model(**inputs).logits[:, -1]
    logits = model.to(dtype)(**inputs).logits[:, -1]
    assert logits.dtype == dtype and logits.isfinite().all()
    if dtype == torch.float64:
        assert_close(logits, expected.double(), 1e-2)


@pytest.mark.parametrize("strategy", ["random", "center"])
@torch.no_grad()
def test_ablation_strategies_keep_their_share(strategy):
    model = tiny.flex(tiny.settings(strategy=strategy, ratio=0.34))
    trace = Trace()
    tiny.generate(model, 2, **image_question(), flexattn_trace=trace)
    for step in trace.steps:
        for layer in step.values():
            assert layer.mask.sum() == 3 * (18 // 3) ** 2  # 3 of the 9 pool cells
            if strategy == "center":
                assert layer.mask.view(18, 18)[6:12, 6:12].all()


def test_gradient_checkpointing_changes_nothing(model):
    ids = torch.stack([tiny.prompt(4, "image", 9), tiny.prompt(2, "image", 11, seed=1)])
    labels = torch.full_like(ids, -100)
    labels[0, -4:], labels[1, -7:-5], labels[1, -2:] = ids[0, -4:], ids[1, -7:-5], ids[1, -2:]
    inputs = dict(input_ids=ids, labels=labels, pixel_values_hr=tiny.images(2), hr_alpha=0.4, use_cache=False)
    gradients = []
    for enabled in (False, True):
        model.train()
        if enabled:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**inputs).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any("k_proj_hd" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-4, atol=1e-6), name


@torch.no_grad()
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pixel_values_hr": tiny.images(2)}, "room for 1 images, but 2"),
        ({"pixel_values_hr": torch.zeros(1, 3, 40, 40)}, r"pixel_values_hr has shape \[1, 3, 40, 40\]"),
        ({"pixel_values_hr": None}, "no pixel_values"),
        ({"hr_capacity": 0}, "hr_capacity is 0; it must be at least 1"),
        ({"rows_per_prompt": 0}, "the batch has 1 rows, which are not prompts of 0 rows each"),
        ({"valid_rect": torch.zeros(1, 3)}, r"valid_rect has shape \[1, 3\]"),
        ({"valid_rect": torch.tensor([[0.0, 0.0, 1.5, 2.0]])}, "valid_rect is torch.float32; it must hold whole"),
        (
            {"valid_rect": torch.tensor([[2, 0, 1, 2]])},
            r"valid_rect is \[\[2, 0, 1, 2\]\]; every image needs top < bottom",
        ),
        ({"valid_rect": torch.tensor([[0, 0, 6, 7]])}, "left < right, inside its 6 x 6 LR cells"),
        ({"valid_rect": torch.tensor([[-1, 0, 6, 6]])}, "left < right, inside its 6 x 6 LR cells"),
        ({"hr_alpha": float("nan")}, "hr_alpha is nan; it must be a weight from 0 to 1"),
        ({"hr_alpha": -0.5}, "hr_alpha is -0.5"),
        ({"hr_alpha": 1.5}, "hr_alpha is 1.5"),
        ({"input_ids": tiny.prompt(4, "image", 9)[None, 5:]}, "image tokens, but every image takes 36"),
        ({"input_ids": None}, "either input_ids or inputs_embeds"),
        ({"attention_mask": torch.ones(1, 1, 49, 49)}, "padding mask"),
    ],
)
def test_bad_input_is_told_in_one_sentence(model, changes, message):
    with pytest.raises(ValueError, match=message):
        model(**(image_question() | changes))


@torch.no_grad()
def test_device_map(tmp_path):
    pytest.importorskip("accelerate")
    model = tiny.flex()
    model.save_pretrained(tmp_path)
    placed = FlexAttnLlavaForConditionalGeneration.from_pretrained(tmp_path, device_map={"": "cpu"})
    inputs = image_question()
    assert_close(placed(**inputs).logits, model(**inputs).logits, 0)
