"""Checkpoints in all formats load, and what cannot be loaded is refused in one sentence."""

from __future__ import annotations

import pytest
import tiny
import tiny_checkpoint
import torch
from question_files import QUESTION, image

from flexattn_cuda.devices import choose_device, choose_dtype
from flexattn_cuda.errors import CheckpointError, InputError
from flexattn_cuda.tasks.ask import Answer, ask
from flexattn_cuda.tasks.load import load


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16", "float64"])
def test_a_model_loads_in_every_dtype(checkpoint, name):
    model, processor = load(checkpoint, device="cpu", dtype=name)
    assert model.dtype == getattr(torch, name) == choose_dtype(name)
    assert isinstance(ask(model, processor, image(), QUESTION, max_new_tokens=2), Answer)


@pytest.mark.parametrize("choose, given", [(choose_dtype, "int8"), (choose_device, "tpu"), (choose_device, "meta")])
def test_an_unknown_dtype_or_device_is_refused(choose, given):
    with pytest.raises(InputError, match=f"{given}.*allowed"):
        choose(given)


def test_settings_of_another_type_are_refused():
    with pytest.raises(InputError, match="flexattn is a dict; it must be a FlexAttnConfig"):
        load(flexattn={"zoom": 2})


def test_a_refused_device_says_why(monkeypatch):
    monkeypatch.setattr("flexattn_cuda.build.cuda_unavailable_reason", lambda *_: "no GPU is seen")
    assert choose_device("auto") == choose_device(None) == torch.device("cpu")
    with pytest.raises(InputError, match="'cuda:1' cannot be used: no GPU is seen"):
        choose_device("cuda:1")


@pytest.mark.slow
def test_a_checkpoint_in_the_released_format_answers(tmp_path):
    model, processor = load(tiny_checkpoint.save_released(tmp_path / "released"), device="cpu")
    answer = ask(model, processor, image(), QUESTION, max_new_tokens=2, trace=True)
    assert answer.tokens and sorted(answer.trace.steps[0]) == [8, 9, 10, 11]
    assert answer.draw().width >= 160


def test_a_checkpoint_in_llava_format_answers(tmp_path):
    model, processor = load(tiny_checkpoint.save_llava(tmp_path), device="cpu", flexattn=tiny.settings())
    assert (model.config.lr_side, model.config.hr_side) == (6, 18)
    assert ask(model, processor, image(), QUESTION, max_new_tokens=2).tokens


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="ids up to 499, but its model embeds ids up to 299"):
        load(tiny_checkpoint.save_released(tmp_path / "released", 300), device="cpu")


def test_a_checkpoint_without_weights_or_with_parts_that_do_not_fit_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load(tmp_path / "nowhere", device="cpu")
    tiny_checkpoint.config(first_layer=77).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="first_layer is 77"):
        load(tmp_path, device="cpu")
    tiny_checkpoint.config().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError):
        load(tmp_path, device="cpu")
