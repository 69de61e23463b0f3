"""Checkpoints in all formats load, and what cannot be loaded is refused in one sentence."""

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

from flexattn_cuda.devices import choose_device, choose_dtype
from flexattn_cuda.errors import CheckpointError, InputError
from flexattn_cuda.tasks.ask import Answer, ask
from flexattn_cuda.tasks.load import load

DATA = Path(__file__).parents[1] / "data"


QUESTION = "Which digits stand on the red sign?"


def image(width: int = 160, height: int = 120) -> Image.Image:
    values = np.random.default_rng(3).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height))


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


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="ids up to 499, but its model embeds ids up to 299"):
        load(released(tmp_path / "released", 300), device="cpu")


def test_a_checkpoint_without_weights_or_with_parts_that_do_not_fit_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load(tmp_path / "nowhere", device="cpu")
    tiny_checkpoint.config(first_layer=77).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="first_layer is 77"):
        load(tmp_path, device="cpu")
    tiny_checkpoint.config().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError):
        load(tmp_path, device="cpu")
