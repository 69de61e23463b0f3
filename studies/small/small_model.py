"""A LLaVA with FlexAttention small enough to be trained from scratch on a CPU, and its processor."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
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


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of the small model.

    Attributes:
        backbone: Kind of model, a key of BACKBONES.
        patch: Side of a patch in pixels.
        shuffle: Side of the square of patches that a token takes, 1 without pixel shuffle.
        lowres: Side of the low-resolution image in pixels.
        vision_width: Channels of the vision tower.
        vision_layers: Its layers.
        vision_heads: Its attention heads.
        width: Channels of the language model and of the image tokens.
        layers: Layers of the language model.
        heads: Its attention heads.
        first_layer: First layer that attends to HR tokens.
    """

    backbone: str = "llava"
    patch: int = 8
    shuffle: int = 1
    lowres: int = 96
    vision_width: int = 96
    vision_layers: int = 3
    vision_heads: int = 4
    width: int = 64
    layers: int = 4
    heads: int = 4
    first_layer: int = 2

    @property
    def cell(self) -> int:
        """Side of an LR cell in pixels."""
        return self.patch * self.shuffle

    @property
    def lr_side(self) -> int:
        """Side of the LR grid in tokens."""
        return self.lowres // self.cell


DEFAULT_SIZES = ModelSizes()


def build_processor(
    texts: Iterable[str], flexattn: FlexAttnConfig | None, sizes: ModelSizes = DEFAULT_SIZES
) -> FlexAttnLlavaProcessor:
    """Return a processor with a tokenizer of all words of the texts and the released preprocessing.

    Args:
        texts: Split into lower-case words; digits are tokens of their own.
        flexattn: Settings of the high-resolution images; None for the low resolution alone.
        sizes: Of the model.
    """
    images = build_image_processor(flexattn, sizes)
    return FlexAttnLlavaProcessor(images, build_tokenizer(texts, "<image>"), chat_template=TEMPLATE)


def build_image_processor(flexattn: FlexAttnConfig | None, sizes: ModelSizes) -> FlexAttnLlavaImageProcessor:
    """Return the released preprocessing at these sizes."""
    grid = sizes.lr_side**2
    if flexattn is not None and flexattn.system == "hd":
        grid += (flexattn.highres_size // sizes.patch) ** 2
    return FlexAttnLlavaImageProcessor(
        highres_size=None if flexattn is None else flexattn.highres_size,
        lowres_size=sizes.lowres,
        lr_side=sizes.lr_side,
        image_tokens=grid,
    )


def build_tokenizer(
    texts: Iterable[str], image_token: str, *more: str, answers: Iterable[str] = ()
) -> PreTrainedTokenizerFast:
    """Return a tokenizer of all lower-case words of the texts, whose digits are tokens of their own.

    Args:
        texts: Split into words.
        image_token: Stands for an image token.
        more: Other special tokens.
        answers: Tokens of answers: capital letters, and phrases of several words. With them, text keeps its case.
    """
    special = ["<pad>", "<s>", "</s>", image_token, "<unk>", *more]
    words = sorted({word for text in texts for word in text.lower().replace("?", " ").split() if not word.isdigit()})
    letters = [answer for answer in answers if len(answer) == 1]
    vocabulary = {token: i for i, token in enumerate([*special, *words, *letters, *"0123456789"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    case = [] if letters else [normalizers.Lowercase()]
    tokenizer.normalizer = normalizers.Sequence([*case, normalizers.Replace(Regex(r"[^A-Za-z0-9<>/ ]"), " ")])
    capitals = pre_tokenizers.Split(Regex("[A-Z]"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(True), capitals]
    )
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken(answer, normalized=False) for answer in answers if len(answer) > 1])
    tokenizer.decoder = decoders.Fuse()  # the glyphs of an answer follow each other without spaces
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": image_token},
    )


def build_model(
    processor: FlexAttnLlavaProcessor, flexattn: FlexAttnConfig | None, sizes: ModelSizes = DEFAULT_SIZES
) -> FlexAttnLlavaForConditionalGeneration:
    """Return an untrained model in evaluation mode, drawn from torch's generator.

    Args:
        processor: From `build_processor`.
        flexattn: Settings of the system; None for plain LLaVA.
        sizes: Of the model.
    """
    model = FlexAttnLlavaForConditionalGeneration(_build_config(processor, flexattn, sizes))
    draw_weights(model, sizes)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    return model.eval()


def _build_config(
    processor: FlexAttnLlavaProcessor, flexattn: FlexAttnConfig | None, sizes: ModelSizes
) -> FlexAttnLlavaConfig:
    tokenizer = processor.tokenizer
    vision = CLIPVisionConfig(
        hidden_size=sizes.vision_width,
        intermediate_size=3 * sizes.vision_width,
        num_hidden_layers=sizes.vision_layers,
        num_attention_heads=sizes.vision_heads,
        image_size=sizes.lowres,
        patch_size=sizes.patch,
        projection_dim=16,
    )
    text = LlamaConfig(**text_fields(tokenizer, sizes))
    return FlexAttnLlavaConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_index=processor.image_token_id,
        image_seq_length=sizes.lr_side**2,
        vision_feature_layer=-1,
        flexattn_config=None if flexattn is None else flexattn.to_dict(),
    )


def text_fields(tokenizer: PreTrainedTokenizerFast, sizes: ModelSizes) -> dict[str, Any]:
    """Return the configuration of a language model of the Llama kind."""
    return dict(
        hidden_size=sizes.width,
        intermediate_size=3 * sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


@torch.no_grad()
def draw_weights(model: nn.Module, sizes: ModelSizes) -> None:
    """Draw the weights of a small model from torch's generator."""
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and ("vision" in name or "projector" in name) and "embedding" not in name:
            nn.init.xavier_uniform_(weight)
        elif "patch_embedding" in name and weight.ndim > 1:
            nn.init.normal_(weight, std=(3 * sizes.patch**2) ** -0.5)
        elif "position_embedding" in name:
            weight.copy_(sinusoids(sizes.lowres // sizes.patch, sizes.vision_width))
        elif weight.ndim == 2 and "language_model" in name:
            nn.init.normal_(weight, std=0.3 if "embed_tokens" in name else 0.06)


def sinusoids(side: int, width: int) -> torch.Tensor:
    """Return initial position embeddings, [1 + side*side, width]: waves over columns and rows; zeros for CLS."""
    quarter = width // 4
    angles = torch.arange(side)[:, None] * (math.pi / 2) * side ** -(torch.arange(quarter) / quarter)
    waves = 0.7 * torch.cat([angles.sin(), angles.cos()], 1)
    grid = torch.cat([waves[None].expand(side, side, -1), waves[:, None].expand(side, side, -1)], -1)
    return torch.cat([torch.zeros(1, width), grid.flatten(0, 1)])
