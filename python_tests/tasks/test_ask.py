"""Three lines of Python: load, ask, draw."""

from __future__ import annotations

import errno
import math

import numpy as np
import pytest
import torch
from PIL import Image
from question_files import QUESTION, image

from flexattn_cuda.analysis import overlay as viz
from flexattn_cuda.errors import InputError
from flexattn_cuda.tasks import ask as answering
from flexattn_cuda.tasks.ask import ask
from flexattn_cuda.tasks.load import load


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return load(checkpoint, device="cpu")


def test_the_answer_is_what_generate_gives(loaded):
    model, processor = loaded
    answer = ask(model, processor, image(), QUESTION, max_new_tokens=6)
    inputs = processor(images=image(), text=processor.prompt(QUESTION))
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer.tokens == ids.tolist() and len(answer.tokens) == len(answer.pieces) == 6
    assert answer.text == processor.decode(ids, skip_special_tokens=True).strip()
    assert "".join(answer.pieces).strip() == answer.text


def test_the_answer_is_streamed_in_pieces(loaded, tmp_path):
    image().save(tmp_path / "image.png")
    heard: list[str] = []
    answer = ask(*loaded, tmp_path / "image.png", QUESTION, max_new_tokens=12, on_text=heard.append)
    assert "".join(heard).strip() == answer.text and len(heard) > 1


def test_a_character_of_several_tokens_is_streamed_whole(loaded):
    tokenizer = loaded[1].tokenizer
    heard: list[str] = []
    pieces = answering._Streamer(tokenizer, heard.append)
    pieces.put(torch.tensor([[1, 5, 6]]))  # the prompt
    for token in ["a", "<0xC3>", "<0xA9>", "b", "<0xC3>"]:
        pieces.put(torch.tensor([tokenizer.convert_tokens_to_ids(token)]))
    pieces.end()
    assert heard == ["a", "\u00e9", "b", "\ufffd"] and pieces.pieces == ["a", "", "\u00e9", "b", "\ufffd"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("call", [0, 3])
def test_logits_that_are_not_numbers_are_no_answer(checkpoint, value, call):
    """The first logits, and those of a later token: an empty answer before."""
    model, processor = load(checkpoint, device="cpu")
    calls = iter(range(9))

    def spoil(module, arguments, logits):
        if next(calls) == call:
            logits[0, -1, 5] = value

    model.lm_head.register_forward_hook(spoil)
    with pytest.raises(
        InputError, match="the model's logits are NaN or infinite in torch.float32, so it cannot answer"
    ):
        ask(model, processor, image(), QUESTION, max_new_tokens=6)


def test_the_end_of_sequence_token_is_not_part_of_the_answer(loaded):
    model, processor = loaded
    first = ask(model, processor, image(), QUESTION, max_new_tokens=3).tokens
    model.generation_config.eos_token_id = [2, first[0]]
    try:
        ended = ask(model, processor, image(), QUESTION, max_new_tokens=8, trace=True)
        assert ended.tokens == ended.pieces == [] and ended.text == ""
        assert ended.draw(token="all").width >= 160  # what the model looked at before it said nothing
    finally:
        model.generation_config.eos_token_id = None


def test_a_panel_shows_the_map_and_the_selection_of_its_token_and_layer(loaded, tmp_path):
    answer = ask(*loaded, image(), QUESTION, max_new_tokens=3, trace=True)
    sheet = answer.draw(tmp_path / "map.png")
    assert Image.open(tmp_path / "map.png").size == sheet.size
    traced = answer.trace.steps[0][1]  # layer 1 selects for layer 2, the first that attends to HR tokens
    side = 18
    expected = viz.overlay(
        image(), traced.map[0, 0, 0].view(6, 6).numpy(), traced.mask[0, 0, 0].view(side, side).numpy()
    )
    assert np.array_equal(np.asarray(sheet)[:120, :160], np.asarray(expected))
    assert sheet.size == answer.draw(token=2, layer=4).size
    many = answer.draw(token="all", layer="all")
    assert many.width > 3 * 160 and many.height > 3 * 120
    two_by_two = answer.draw(token=[0, 1], layer=[1, 3])
    assert two_by_two.width == sheet.width and two_by_two.height > 2 * 120 and many.size != two_by_two.size


@pytest.mark.parametrize(
    "wanted, says",
    [
        (dict(token=3), "the token to draw is 3; there are tokens 0 to 2"),
        (dict(token=-1), "the token to draw"),
        (dict(token="last"), "the token to draw"),
        (dict(layer=0), "the layer to draw is 0; there are layers 1 to 4"),
        (dict(layer=[]), "the layer to draw"),
        (dict(path="map.txt"), "does not have the extension of an image file"),
        (dict(path="no/such/folder/map.png"), "there is no folder"),
    ],
)
def test_what_cannot_be_drawn_is_refused(loaded, tmp_path, monkeypatch, wanted, says):
    monkeypatch.chdir(tmp_path)
    answer = ask(*loaded, image(), QUESTION, max_new_tokens=3, trace=True)
    with pytest.raises(InputError, match=says):
        answer.draw(**wanted)


def test_a_drawing_that_cannot_be_saved_is_refused(loaded, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    answer = ask(*loaded, image(), QUESTION, max_new_tokens=1, trace=True)
    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(InputError, match=r"m\.png cannot be written: No space left on device"):
        answer.draw(tmp_path / "m.png")


def test_without_a_trace_nothing_can_be_drawn(loaded):
    with pytest.raises(InputError, match="trace=True"):
        ask(*loaded, image(), QUESTION, max_new_tokens=1).draw()


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(image=None), "a question but no image"),
        (dict(image="no.png"), "there is no image"),
        (dict(image=7), "an image is"),
        (dict(question=" "), "the question is empty"),
        (dict(question=7), "the question is 7; it must be text"),
        (dict(question="\ud800"), "half of a surrogate pair"),
        (dict(question="<image>?"), "contains <image>"),
        (dict(question="long " * 300), "the question is too long"),
        (dict(max_new_tokens=0), "max_new_tokens is 0"),
        (dict(max_new_tokens=2.5), "max_new_tokens is 2.5"),
    ],
)
def test_what_cannot_be_asked_is_refused(loaded, change, says):
    with pytest.raises(InputError, match=says):
        ask(*loaded, **(dict(image=image(), question=QUESTION, max_new_tokens=2) | change))


def test_the_answer_ends_where_the_model_ends(loaded):
    model, processor = loaded
    question = "x" * 250
    prompt = processor(images=image(), text=processor.prompt(question))["input_ids"].shape[1]
    model.config.text_config.max_position_embeddings = prompt + 4
    try:
        assert len(ask(model, processor, image(), question).tokens) == 4
    finally:
        model.config.text_config.max_position_embeddings = 512
