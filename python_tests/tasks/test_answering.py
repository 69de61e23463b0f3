"""Three lines of Python: load, ask, draw."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_checkpoint
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from flexattn_cuda.analysis import overlay as viz
from flexattn_cuda.devices import choose_device, choose_dtype
from flexattn_cuda.errors import CheckpointError, InputError
from flexattn_cuda.tasks import ask as answering
from flexattn_cuda.tasks.ask import Answer, ask
from flexattn_cuda.tasks.load import load

DATA = Path(__file__).parents[1] / "data"
QUESTION = "Which digits stand on the red sign?"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return load(checkpoint, device="cpu")


def image(width: int = 160, height: int = 120) -> Image.Image:
    values = np.random.default_rng(3).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height))


def test_the_answer_is_what_generate_gives(loaded):
    model, processor = loaded
    answer = ask(model, processor, image(), QUESTION, max_new_tokens=6)
    inputs = processor(images=image(), text=processor.prompt(QUESTION))
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer.tokens == ids.tolist() and len(answer.tokens) == len(answer.pieces) == 6
    assert answer.text == processor.decode(ids, skip_special_tokens=True).strip()
    assert "".join(answer.pieces).strip() == answer.text


def test_the_answer_comes_piece_by_piece(loaded, tmp_path):
    image().save(tmp_path / "image.png")
    heard: list[str] = []
    answer = ask(*loaded, tmp_path / "image.png", QUESTION, max_new_tokens=12, on_text=heard.append)
    assert "".join(heard).strip() == answer.text and len(heard) > 1


def test_a_character_of_several_tokens_is_handed_over_whole(loaded):
    tokenizer = loaded[1].tokenizer
    heard: list[str] = []
    pieces = answering._Pieces(tokenizer, heard.append)
    pieces.put(torch.tensor([[1, 5, 6]]))  # the prompt
    for token in ["a", "<0xC3>", "<0xA9>", "b", "<0xC3>"]:
        pieces.put(torch.tensor([tokenizer.convert_tokens_to_ids(token)]))
    pieces.end()
    assert heard == ["a", "\u00e9", "b", "\ufffd"] and pieces.pieces == [
        "a",
        "",
        "\u00e9",
        "b",
        "\ufffd",
    ]


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


def test_drawing(loaded, tmp_path):
    answer = ask(*loaded, image(), QUESTION, max_new_tokens=3, trace=True)
    sheet = answer.draw(tmp_path / "map.png")
    assert Image.open(tmp_path / "map.png").size == sheet.size
    traced = answer.trace.steps[0][1]  # layer 1 selects for layer 2, the first that attends to HR tokens
    side = 18
    expected = viz.overlay(
        image(),
        traced.map[0, 0, 0].view(6, 6).numpy(),
        traced.mask[0, 0, 0].view(side, side).numpy(),
    )
    assert np.array_equal(np.asarray(sheet)[:120, :160], np.asarray(expected))
    assert sheet.size == answer.draw(token=2, layer=4).size
    many = answer.draw(token="all", layer="all")
    assert many.width > 3 * 160 and many.height > 3 * 120
    assert answer.draw(token=[0, 1], layer=[1, 3]).width == 2 * 160 + 8 or answer.draw().width >= 160


@pytest.mark.parametrize(
    "wanted, says",
    [
        (dict(token=3), "the token to draw is 3; there are tokens 0 to 2"),
        (dict(token=-1), "the token to draw"),
        (dict(token="last"), "the token to draw"),
        (dict(layer=0), "the layer to draw is 0; there are layers 1 to 4"),
        (dict(layer=[]), "the layer to draw"),
        (dict(path="map.txt"), "no ending of an image file"),
        (dict(path="no/such/folder/map.png"), "there is no folder"),
    ],
)
def test_things_that_cannot_be_drawn(loaded, tmp_path, monkeypatch, wanted, says):
    monkeypatch.chdir(tmp_path)
    answer = ask(*loaded, image(), QUESTION, max_new_tokens=3, trace=True)
    with pytest.raises(InputError, match=says):
        answer.draw(**wanted)


def test_nothing_recorded_nothing_drawn(loaded):
    with pytest.raises(InputError, match="trace=True"):
        ask(*loaded, image(), QUESTION, max_new_tokens=1).draw()


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(image=None), "a question but no image"),
        (dict(image="no.png"), "there is no image"),
        (dict(image=7), "an image is"),
        (dict(question=" "), "the question is empty"),
        (dict(question="<image>?"), "contains <image>"),
        (dict(question="long " * 300), "the question is too long"),
        (dict(max_new_tokens=0), "max_new_tokens is 0"),
        (dict(max_new_tokens=2.5), "max_new_tokens is 2.5"),
    ],
)
def test_things_that_cannot_be_asked(loaded, change, says):
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_dtypes(checkpoint, name):
    model, processor = load(checkpoint, device="cpu", dtype=name)
    assert model.dtype == getattr(torch, name) == choose_dtype(name)
    assert isinstance(ask(model, processor, image(), QUESTION, max_new_tokens=2), Answer)


@pytest.mark.parametrize("choose, given", [(choose_dtype, "int8"), (choose_device, "tpu"), (choose_device, "meta")])
def test_unknown_dtype_or_device(choose, given):
    with pytest.raises(InputError, match=f"{given}.*allowed"):
        choose(given)


def test_cuda_says_why_it_cannot_be_used(monkeypatch):
    monkeypatch.setattr("flexattn_cuda.build.cuda_unavailable_reason", lambda *_: "no GPU is seen")
    assert choose_device("auto") == choose_device(None) == torch.device("cpu")
    with pytest.raises(InputError, match="'cuda:1' cannot be used: no GPU is seen"):
        choose_device("cuda:1")


def released(folder: Path, vocabulary: int) -> Path:
    """The reference vectors' model, with the tokenizer in small and a vocabulary of another size."""
    shutil.copytree(DATA / "reference_vectors" / "model", folder)
    shutil.copy(tiny_checkpoint.TOKENIZER, folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"vocab_size": vocabulary}))
    weights = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name].repeat(3, 1)[:vocabulary].contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.slow
def test_a_checkpoint_in_the_released_format_answers(tmp_path):
    model, processor = load(released(tmp_path / "released", 500), device="cpu")
    answer = ask(model, processor, image(), QUESTION, max_new_tokens=2, trace=True)
    assert answer.tokens and sorted(answer.trace.steps[0]) == [8, 9, 10, 11]
    assert answer.draw().width >= 160


def test_a_checkpoint_in_llava_format_answers(tmp_path):
    tiny.llava().save_pretrained(tmp_path)
    backend = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "red": 3, "<image>": 95}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    backend.add_special_tokens([AddedToken("<image>", normalized=False)])
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path)
    model, processor = load(tmp_path, device="cpu", flexattn=tiny.settings())
    assert (model.config.lr_side, model.config.hr_side) == (6, 18)
    assert ask(model, processor, image(), QUESTION, max_new_tokens=2).tokens


def test_a_tokenizer_of_another_model(tmp_path):
    with pytest.raises(CheckpointError, match="ids up to 499, but its model embeds ids up to 299"):
        load(released(tmp_path / "released", 300), device="cpu")


def test_a_model_without_weights_or_of_parts_that_do_not_fit(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load(tmp_path / "nowhere", device="cpu")
    tiny_checkpoint.config(first_layer=77).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="first_layer is 77"):
        load(tmp_path, device="cpu")
    tiny_checkpoint.config().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError):
        load(tmp_path, device="cpu")
