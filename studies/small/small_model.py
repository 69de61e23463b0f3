"""A LLaVA with FlexAttention that is small enough to be trained from nothing on a CPU, and its processor."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast

from flexattn_cuda.families.llava.config import FlexAttnLlavaConfig
from flexattn_cuda.families.llava.model import FlexAttnLlavaForConditionalGeneration
from flexattn_cuda.inputs.processor import FlexAttnLlavaImageProcessor, FlexAttnLlavaProcessor
from flexattn_cuda.mechanism.config import FlexAttnConfig

TEMPLATE = (
    "{{ '<image>' }}{% for part in messages[0]['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
)
_SPECIAL = ["<pad>", "<s>", "</s>", "<image>", "<unk>"]


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of the small model.

    Attributes:
        patch, lowres: Sides in pixels of a patch and of the low-resolution image.
        vision_width, vision_layers, vision_heads: Of the vision tower.
        width, layers, heads: Of the language model; `width` also is that of the image tokens.
        first_layer: First layer that attends to high-resolution tokens.
    """

    patch: int = 8
    lowres: int = 96
    vision_width: int = 96
    vision_layers: int = 3
    vision_heads: int = 4
    width: int = 64
    layers: int = 4
    heads: int = 4
    first_layer: int = 2

    @property
    def lr_side(self) -> int:
        return self.lowres // self.patch


def build_processor(
    texts: Iterable[str], flexattn: FlexAttnConfig | None, sizes: ModelSizes = ModelSizes()
) -> FlexAttnLlavaProcessor:
    """A tokenizer of all words of the texts, lower case, digits apart, and the released preprocessing.

    Args:
        flexattn: Settings that the high-resolution images are made for; None makes low-resolution ones only.
    """
    words = sorted({word for text in texts for word in text.lower().replace("?", " ").split() if not word.isdigit()})
    vocabulary = {token: i for i, token in enumerate(_SPECIAL + words + list("0123456789"))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"[^a-z0-9<>/ ]"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(True)])
    tokenizer.add_special_tokens(_SPECIAL)
    tokenizer.decoder = decoders.Fuse()  # the digits of an answer follow each other
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    in_sequence = (flexattn.highres_size // sizes.patch) ** 2 if flexattn is not None and flexattn.system == "hd" else 0
    image_processor = FlexAttnLlavaImageProcessor(
        highres_size=None if flexattn is None else flexattn.highres_size, lowres_size=sizes.lowres, lr_side=sizes.lr_side,
        image_tokens=sizes.lr_side**2 + in_sequence,
    )  # fmt: skip
    return FlexAttnLlavaProcessor(image_processor, fast, chat_template=TEMPLATE)


def build_model(
    processor: FlexAttnLlavaProcessor,
    flexattn: FlexAttnConfig | None,
    sizes: ModelSizes = ModelSizes(),
) -> FlexAttnLlavaForConditionalGeneration:
    """The model before any training, in evaluation mode; what is random comes from torch's generator."""
    tokenizer = processor.tokenizer
    config = FlexAttnLlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=sizes.vision_width, intermediate_size=3 * sizes.vision_width, num_hidden_layers=sizes.vision_layers,
            num_attention_heads=sizes.vision_heads, image_size=sizes.lowres, patch_size=sizes.patch, projection_dim=16,
        ).to_dict(),
        text_config=LlamaConfig(
            hidden_size=sizes.width, intermediate_size=3 * sizes.width, num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.heads, vocab_size=len(tokenizer), max_position_embeddings=512, rms_norm_eps=1e-5,
            pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        ).to_dict(),
        image_token_index=processor.image_token_id,
        image_seq_length=sizes.lr_side**2,
        vision_feature_layer=-1,
        flexattn_config=None if flexattn is None else flexattn.to_dict(),
    )  # fmt: skip
    model = FlexAttnLlavaForConditionalGeneration(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and ("vision" in name or "projector" in name) and "embedding" not in name:
                nn.init.xavier_uniform_(weight)
            elif "patch_embedding" in name:
                nn.init.normal_(weight, std=(3 * sizes.patch**2) ** -0.5)
            elif "position_embedding" in name:
                weight.copy_(sinusoids(sizes.lr_side, sizes.vision_width))
            elif weight.ndim == 2 and "language_model" in name:
                nn.init.normal_(weight, std=0.3 if "embed_tokens" in name else 0.06)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval()


def sinusoids(side: int, width: int) -> torch.Tensor:
    """[1 + side*side, width]: positions to start from, waves over the columns and the rows; zeros for the class token."""
    quarter = width // 4
    angles = torch.arange(side)[:, None] * (math.pi / 2) * side ** -(torch.arange(quarter) / quarter)
    waves = 0.7 * torch.cat([angles.sin(), angles.cos()], 1)
    grid = torch.cat([waves[None].expand(side, side, -1), waves[:, None].expand(side, side, -1)], -1)
    return torch.cat([torch.zeros(1, width), grid.flatten(0, 1)])
