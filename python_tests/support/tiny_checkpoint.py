"""Checkpoints in all three formats, as small as can be, in folders as a user would have them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import tiny
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from flexattn_cuda import FlexAttnLlavaConfig, FlexAttnLlavaForConditionalGeneration
from flexattn_cuda.inputs.processor import FlexAttnLlavaImageProcessor, FlexAttnLlavaProcessor
from flexattn_cuda.inputs.sentencepiece import read_sentencepiece

DATA = Path(__file__).parents[1] / "data"
TOKENIZER = DATA / "tokenizer" / "tokenizer.model"
RELEASED = DATA / "reference_vectors" / "model"  # a checkpoint of the released code, without a tokenizer
PIECES = 500  # of the tokenizer
WORDS = 259  # before them come three special tokens and 256 bytes
IMAGE_ID = PIECES  # the first id after the tokenizer's


def edit_json(path: Path, **changes: Any) -> None:
    """Set fields of the object in a JSON file, which is created if it is missing."""
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(values | changes))


def config(**flexattn) -> FlexAttnLlavaConfig:
    """Return the tiny model's configuration with the tokenizer's vocabulary and `flexattn` settings."""
    return tiny.flex_config(tiny.settings(**flexattn), vocabulary=IMAGE_ID + 1)


def tokenizer(
    special: tuple[str, ...] = ("<image>",), prefix_everywhere: bool = False, pad: str = "<unk>"
) -> PreTrainedTokenizerFast:
    """Return a Llama tokenizer of 500 pieces, to which `special` tokens were added."""
    backend = read_sentencepiece(TOKENIZER, prefix_everywhere)
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token=pad,
        add_bos_token=True,
    )


def processor(split_at_images=False, prefix_everywhere=True, chat_template=None) -> FlexAttnLlavaProcessor:
    """Return a processor: <image> is a token (LLaVA's format), or the text is split there (the released one)."""
    lowres = tiny.SIDE * tiny.PATCH
    images = FlexAttnLlavaImageProcessor(lowres_size=lowres, highres_size=lowres * tiny.ZOOM, lr_side=tiny.SIDE)
    special = () if split_at_images else ("<image>",)
    return FlexAttnLlavaProcessor(
        images, tokenizer(special, prefix_everywhere), IMAGE_ID, split_at_images, chat_template
    )


def save(folder: Path) -> Path:
    """Save model and processor; the model answers any question with letters."""
    torch.manual_seed(0)
    # Without pooling and with this threshold every map selects some of the HR tokens, and never all of them.
    model = tiny.sharpen(FlexAttnLlavaForConditionalGeneration(config(pool=0, threshold=128.0)))
    with torch.no_grad():
        model.lm_head.weight[:WORDS] = model.lm_head.weight[IMAGE_ID] = 0
    model.save_pretrained(folder)
    processor(prefix_everywhere=False).save_pretrained(folder)
    return folder


def save_llava(folder: Path) -> Path:
    """Save transformers' LLaVA with a tokenizer of one word."""
    tiny.llava().save_pretrained(folder)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "red": 3, "<image>": tiny.IMAGE}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    backend.add_special_tokens([AddedToken("<image>", normalized=False)])
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


def save_released(folder: Path, vocabulary: int = PIECES) -> Path:
    """Save the checkpoint of the released code with a vocabulary of another size and the tokenizer in small."""
    shutil.copytree(RELEASED, folder)
    shutil.copy(TOKENIZER, folder)
    edit_json(folder / "config.json", vocab_size=vocabulary)
    weights = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name].repeat(3, 1)[:vocabulary].contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
