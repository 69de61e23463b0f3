"""A small random model with its processor, saved as a user would have it."""

from __future__ import annotations

from pathlib import Path

import small
import torch
from tokenizers import AddedToken
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast

from flexattn_cuda import FlexAttnLlavaConfig, FlexAttnLlavaForConditionalGeneration
from flexattn_cuda.inputs.processor import FlexAttnLlavaImageProcessor, FlexAttnLlavaProcessor
from flexattn_cuda.inputs.sentencepiece import read_sentencepiece

TOKENIZER = Path(__file__).parents[1] / "data" / "tokenizer" / "tokenizer.model"
WORDS = 259  # before them come three special tokens and 256 bytes
IMAGE_ID = 500  # the first id after the tokenizer's


def small_config(**flexattn) -> FlexAttnLlavaConfig:
    size = small.SIDE * small.PATCH
    return FlexAttnLlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=size,
            patch_size=small.PATCH,
        ).to_dict(),
        text_config=LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=IMAGE_ID + 1,
            max_position_embeddings=512,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ).to_dict(),
        image_token_index=IMAGE_ID,
        image_seq_length=small.SIDE**2,
        flexattn_config=small.settings(**flexattn).to_dict(),
    )


def save(folder: Path) -> Path:
    torch.manual_seed(0)
    # Unpooled and with this threshold every map selects some of the HR tokens, and never all of them.
    model = small.sharpen(FlexAttnLlavaForConditionalGeneration(small_config(pool=0, threshold=128.0)))
    with torch.no_grad():
        model.lm_head.weight[:WORDS] = model.lm_head.weight[IMAGE_ID] = 0  # it answers with letters
    backend = read_sentencepiece(TOKENIZER)
    backend.add_special_tokens([AddedToken("<image>", normalized=False)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        add_bos_token=True,
    )
    images = FlexAttnLlavaImageProcessor(
        lowres_size=small.SIDE * small.PATCH,
        highres_size=small.SIDE * small.PATCH * small.ZOOM,
        lr_side=small.SIDE,
    )
    model.save_pretrained(folder)
    FlexAttnLlavaProcessor(images, tokenizer).save_pretrained(folder)
    return folder
