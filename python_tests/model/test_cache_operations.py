"""What transformers does to a key/value cache is done to the images beside it, and a failed call is never continued."""

from __future__ import annotations

import copy
import pickle

import pytest
import tiny
import torch
from transformers import DynamicCache

from flexattn_cuda.mechanism.cache import HRCache
from flexattn_cuda.mechanism.tokens import HRTokens

CLOSE = 2e-4  # float32, logits of the order of 10: batches of other sizes give other tile sums
STEPS = 3


@pytest.fixture(params=tiny.PRESETS, ids=str)
def model(request):
    return tiny.flex(tiny.PRESETS[request.param])


def image_question(seed: int = 0) -> dict:
    return {"input_ids": tiny.prompt(4, "image", 9, seed=seed)[None], "pixel_values_hr": tiny.images(1, seed)}


def batch() -> dict:
    """Different questions: two images in one prompt, one in the next, none in the last."""
    rows = [tiny.prompt(2, "image", 5, "image", 3, seed=1), tiny.prompt(4, "image", 9), tiny.prompt(7, seed=2)]
    return tiny.left_padded(*rows) | {"pixel_values_hr": tiny.images(3)}


def started(model, inputs: dict) -> DynamicCache:
    cache = DynamicCache(config=model.config.text_config)
    model(**inputs, past_key_values=cache)
    return cache


def continued(model, cache: DynamicCache, mask: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Feed tokens [B, STEPS] one by one; return the logits [B, STEPS, V]."""
    logits = []
    for column in tokens.split(1, dim=1):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        logits.append(model(input_ids=column, attention_mask=mask, past_key_values=cache).logits)
    return torch.cat(logits, 1)


def next_tokens(rows: int) -> torch.Tensor:
    return torch.randint(3, 90, (rows, STEPS), generator=torch.Generator().manual_seed(7))


OPERATIONS = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, 2, 0])), [1, 2, 0]),
    "reorder, one row twice": (lambda cache: cache.reorder_cache(torch.tensor([1, 0, 1])), [1, 0, 1]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    "select from the end": (lambda cache: cache.batch_select_indices(torch.tensor([-1, -3])), [2, 0]),
    "select by mask": (lambda cache: cache.batch_select_indices(torch.tensor([False, True, True])), [1, 2]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "repeat, then select": (
        lambda cache: (cache.batch_repeat_interleave(2), cache.batch_select_indices(torch.tensor([5, 2, 3, 1]))),
        [2, 1, 1, 0],
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("operation", OPERATIONS)
def test_rows_keep_their_images_when_the_cache_moves_them(model, operation):
    operate, rows = OPERATIONS[operation]
    inputs = batch()
    tokens = next_tokens(len(rows))
    cache = started(model, inputs)
    operate(cache)
    found = continued(model, cache, inputs["attention_mask"][rows], tokens)
    for number, row in enumerate(rows):
        expected = continued(model, started(model, inputs), inputs["attention_mask"], tokens[[number]].expand(3, -1))
        assert (found[number] - expected[row]).abs().max() <= CLOSE


@torch.no_grad()
def test_another_turn_follows_rows_that_were_moved():
    model = tiny.flex()
    first = torch.stack([tiny.prompt(3, "image", 6, seed=seed) for seed in range(2)])
    second = torch.stack([tiny.prompt(2, "image", 4, seed=seed) for seed in (5, 6)])
    pixels = tiny.images(4)
    logits = []
    for order in ([0, 1], [1, 0]):
        cache = started(model, {"input_ids": first, "pixel_values_hr": pixels[:2]})
        cache.batch_select_indices(torch.tensor(order))
        turn = model(input_ids=second[order], pixel_values_hr=pixels[2:][order], past_key_values=cache).logits
        logits.append(turn[order, -1])
    assert (logits[0] - logits[1]).abs().max() <= CLOSE


@torch.no_grad()
@pytest.mark.parametrize("to_length", [False, True], ids=["by a number", "to a length"])
def test_crop_takes_either_sign(to_length):
    """transformers 5.0 crops to a length, too; later versions remove a number of positions only."""
    model, pixels = tiny.flex(), tiny.images(2)
    ids, more = tiny.prompt(3, "image", 6), tiny.prompt(2, "image", 5, seed=3)
    cache = started(model, {"input_ids": ids[None], "pixel_values_hr": pixels[:1]})
    model(input_ids=more[None], pixel_values_hr=pixels[1:], past_key_values=cache)
    try:
        cache.crop(len(ids) if to_length else -len(more))
    except ValueError as error:
        pytest.skip(f"this version of transformers does not: {error}")
    images = HRCache.beside(cache)
    assert images.length == len(ids) and images.layout.present().tolist() == [[True, False]]
    token = torch.tensor([[5]])
    expected = started(model, {"input_ids": ids[None], "pixel_values_hr": pixels[:1]})
    found = [model(input_ids=token, past_key_values=one).logits for one in (cache, expected)]
    assert (found[0] - found[1]).abs().max() <= CLOSE


@torch.no_grad()
def test_a_reset_cache_holds_no_images(model):
    cache = started(model, image_question())
    assert HRCache.beside(cache) is not None
    cache.reset()
    assert HRCache.beside(cache) is None


@torch.no_grad()
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))], ids=["copy", "pickle"]
)
def test_a_copied_cache_still_owns_its_images(model, copied):
    inputs = batch()
    cache = started(model, inputs)
    twin = copied(cache)
    assert isinstance(twin, DynamicCache) and HRCache.beside(twin) is not HRCache.beside(cache)
    tokens, rows = next_tokens(3), torch.tensor([2, 0, 1])
    for one in (cache, twin):
        one.reorder_cache(rows)
    found = [continued(model, one, inputs["attention_mask"][rows], tokens) for one in (cache, twin)]
    assert torch.equal(*found)


@torch.no_grad()
def test_moving_rows_of_a_prompt_copies_nothing(model):
    """Beams of a prompt share its images, whichever of them takes the place of which."""
    inputs = image_question() | {"input_ids": image_question()["input_ids"].expand(3, -1), "rows_per_prompt": 3}
    cache = started(model, inputs)
    features = HRCache.beside(cache).tokens.features.data_ptr()
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    cache.batch_repeat_interleave(2)
    images = HRCache.beside(cache)
    assert (images.rows, images.prompts, images.tokens.features.data_ptr()) == (6, 1, features)


# ------------------------------------------------------------------------------------------- calls that end in an error


class Failing(torch.nn.Module):
    """Stands in for a module and fails when it is called for the `after`-th time and later, until it is mended."""

    def __init__(self, module: torch.nn.Module, error: BaseException, after: int):
        super().__init__()
        self.module, self.error, self.left, self.mended = module, error, after, False

    def forward(self, *args, **kwargs):
        if self.left == 0 and not self.mended:
            raise self.error
        self.left -= 1
        return self.module(*args, **kwargs)


def break_projection(model, error: BaseException, after: int) -> Failing:
    attention = model.model.language_model.layers[3].self_attn
    attention.v_proj_hd = Failing(attention.v_proj_hd, error, after)
    return attention.v_proj_hd


def break_projector(model, error: BaseException, after: int) -> Failing:
    model.model.multi_modal_projector = Failing(model.model.multi_modal_projector, error, after)
    return model.model.multi_modal_projector


FAILURES = {
    "a projection, in the prompt": (break_projection, RuntimeError("out of memory"), 0),
    "a projection, interrupted": (break_projection, KeyboardInterrupt(), 0),
    "the vision tower, for a tile": (break_projector, RuntimeError("out of memory"), 1),
}


@torch.no_grad()
@pytest.mark.parametrize("failure", FAILURES)
def test_a_cache_is_refused_after_a_call_that_failed_in_the_layers(model, failure):
    broken, error, after = FAILURES[failure]
    expected = model(**image_question()).logits
    failing, cache = broken(model, error, after), DynamicCache(config=model.config.text_config)
    with pytest.raises(type(error)):
        model(**image_question(), past_key_values=cache)
    failing.mended = True
    for inputs in (image_question(), {"input_ids": torch.tensor([[5]])}):
        with pytest.raises(ValueError, match="ended in an error .* start again with a new cache"):
            model(**inputs, past_key_values=cache)
    assert torch.equal(model(**image_question(), past_key_values=DynamicCache()).logits, expected)


@torch.no_grad()
def test_a_cache_is_refused_after_a_decoding_step_that_failed(model):
    cache = started(model, image_question())
    attention = model.model.language_model.layers[3].self_attn
    attention.o_proj = failing = Failing(attention.o_proj, RuntimeError("out of memory"), 0)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)
    failing.mended = True
    with pytest.raises(ValueError, match="start again with a new cache"):
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)


@torch.no_grad()
def test_a_cache_is_refused_after_an_interrupt_between_images_and_layers(model, monkeypatch):
    """The images of a second turn are laid out, and their tokens are not there yet."""
    second = {"input_ids": tiny.prompt(3, "image", 6, seed=4)[None], "pixel_values_hr": tiny.images(1, 4)}
    cache = started(model, image_question())
    with monkeypatch.context() as patch:
        patch.setattr(HRTokens, "append", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            model(**second, past_key_values=cache)
    for inputs in (second, {"input_ids": torch.tensor([[5]])}):
        with pytest.raises(ValueError, match="start again with a new cache"):
            model(**inputs, past_key_values=cache)


@torch.no_grad()
def test_a_call_that_fails_before_the_layers_changes_nothing(model):
    """An image that cannot be encoded, and arguments that are refused, in the second turn of a conversation."""
    second = {"input_ids": tiny.prompt(3, "image", 6, seed=4)[None], "pixel_values_hr": tiny.images(1, 4)}
    expected = model(**second, past_key_values=started(model, image_question())).logits
    cache = started(model, image_question())
    failing = break_projector(model, RuntimeError("out of memory"), 0)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(**second, past_key_values=cache)
    failing.mended = True
    with pytest.raises(ValueError, match="valid_rect has shape"):
        model(**second, valid_rect=torch.zeros(1, 3), past_key_values=cache)
    model.model.language_model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attention implementation"):
        model(**second, past_key_values=cache)
    model.model.language_model.set_attn_implementation("flexattn")
    if model.config.flexattn.hr_rows == "all":
        with pytest.raises(ValueError, match="in one call"):
            model(**second, prompt_length=200, past_key_values=cache)
    assert torch.equal(model(**second, past_key_values=cache).logits, expected)
