"""A processor for each kind of tokenizer and chat template."""

from __future__ import annotations

import tiny
import tiny_checkpoint
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from flexattn_cuda.inputs.processor import FlexAttnLlavaImageProcessor, FlexAttnLlavaProcessor
from flexattn_cuda.inputs.sentencepiece import read_sentencepiece

SIZE = tiny.SIDE * tiny.PATCH


def processor(split_at_images=False, prefix_everywhere=True, chat_template=None) -> FlexAttnLlavaProcessor:
    """Make a processor: <image> is a token (LLaVA's format), or the text is split there (the released one)."""
    backend = read_sentencepiece(tiny_checkpoint.TOKENIZER, prefix_everywhere)
    if not split_at_images:
        backend.add_special_tokens([AddedToken("<image>", normalized=False)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        add_bos_token=True,
    )
    images = FlexAttnLlavaImageProcessor(lowres_size=SIZE, highres_size=SIZE * tiny.ZOOM, lr_side=tiny.SIDE)
    return FlexAttnLlavaProcessor(images, tokenizer, tiny_checkpoint.IMAGE_ID, split_at_images, chat_template)
