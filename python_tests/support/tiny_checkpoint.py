"""The tiny model with a tokenizer and its processor, saved in a folder as a user would have it."""

from __future__ import annotations

from pathlib import Path

import tiny
import torch
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from flexattn_cuda import FlexAttnLlavaConfig, FlexAttnLlavaForConditionalGeneration
from flexattn_cuda.inputs.processor import FlexAttnLlavaImageProcessor, FlexAttnLlavaProcessor
from flexattn_cuda.inputs.sentencepiece import read_sentencepiece

TOKENIZER = Path(__file__).parents[1] / "data" / "tokenizer" / "tokenizer.model"
WORDS = 259  # before them come three special tokens and 256 bytes
IMAGE_ID = 500  # the first id after the tokenizer's


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


def image_processor() -> FlexAttnLlavaImageProcessor:
    lowres = tiny.SIDE * tiny.PATCH
    return FlexAttnLlavaImageProcessor(lowres_size=lowres, highres_size=lowres * tiny.ZOOM, lr_side=tiny.SIDE)


def save(folder: Path) -> Path:
    """Save model and processor; the model answers any question with letters."""
    torch.manual_seed(0)
    # Without pooling and with this threshold every map selects some of the HR tokens, and never all of them.
    model = tiny.sharpen(FlexAttnLlavaForConditionalGeneration(config(pool=0, threshold=128.0)))
    with torch.no_grad():
        model.lm_head.weight[:WORDS] = model.lm_head.weight[IMAGE_ID] = 0
    model.save_pretrained(folder)
    FlexAttnLlavaProcessor(image_processor(), tokenizer()).save_pretrained(folder)
    return folder
