"""The random language model on which every system runs, its twin of transformers, and the inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig

from flexattn_cuda import FlexAttnConfig, FlexAttnLlavaConfig
from flexattn_cuda.tasks.bench import random_model

SIDE, PATCH = 24, 14  # the LR grid, and pixels of a cell
TEXT, HD_TOKENS = 64, 1024  # text tokens of the prompt; LLaVA-HD's extra image tokens


@dataclass(frozen=True)
class Shape:
    width: int
    layers: int
    heads: int
    mlp_width: int
    vocabulary: int
    first_layer: int  # that attends to HR tokens


SHAPES = {
    "default": Shape(1024, layers=16, heads=16, mlp_width=2752, vocabulary=32000, first_layer=9),
    "7b": Shape(4096, layers=32, heads=32, mlp_width=11008, vocabulary=32064, first_layer=9),
    "quick": Shape(64, layers=4, heads=2, mlp_width=96, vocabulary=128, first_layer=2),
}


def model_config(shape: Shape, zoom: int) -> FlexAttnLlavaConfig:
    """Return the configuration; its vision tower is a small one, since no time of it is measured."""
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        patch_size=PATCH,
        image_size=SIDE * PATCH,
        projection_dim=16,
    )
    text = LlamaConfig(
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        intermediate_size=shape.mlp_width,
        vocab_size=shape.vocabulary,
        max_position_embeddings=4096,
    )
    values = LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_index=shape.vocabulary - 1,
        image_seq_length=SIDE**2,
    ).to_dict()
    values.pop("model_type")
    lowres = SIDE * PATCH
    settings = FlexAttnConfig(zoom=zoom, lowres_size=lowres, highres_size=lowres * zoom, first_layer=shape.first_layer)
    return FlexAttnLlavaConfig(**values, flexattn_config=settings.to_dict())


class Backbone:
    """A model with FlexAttention, transformers' own on the same weights, and one prompt with given image features.

    embeds: The prompt's embeddings, of LLaVA ("low") and of LLaVA-HD ("hd").
    """

    def __init__(self, shape: Shape, zoom: int, dtype: torch.dtype, device: str):
        self.device = device
        self.config = model_config(shape, zoom)
        self.model = random_model(self.config, torch.device(device), dtype)
        self.twin = self._make_twin()
        self._make_inputs(dtype)

    def _make_twin(self) -> LlamaForCausalLM:
        text = LlamaConfig(**{**self.config.text_config.to_dict(), "attn_implementation": "sdpa"})
        with torch.device("meta"):
            twin = LlamaForCausalLM(text).eval()
        own = self.model.model.language_model.state_dict().items()
        weights = {f"model.{name}": value for name, value in own if "_hd." not in name}
        twin.load_state_dict(weights | {"lm_head.weight": self.model.lm_head.weight}, assign=True)
        twin.model.rotary_emb = type(twin.model.rotary_emb)(text).to(self.device)
        return twin

    def _make_inputs(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(2)
        width, vocabulary = self.config.text_config.hidden_size, self.config.text_config.vocab_size

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator).to(self.device, dtype)

        begin = TEXT // 2
        words = torch.randint(3, vocabulary - 2, (TEXT,), generator=generator)
        image = torch.full((SIDE**2,), self.config.image_token_id)
        self.ids = torch.cat([words[:begin], image, words[begin:]])[None].to(self.device)
        self.features = normal(1, SIDE**2, width)
        self.hr_features = normal(1, self.hr_tokens, width)
        embedded = self.model.get_input_embeddings()(words.to(self.device)).detach()
        low = torch.cat([embedded[:begin], self.features[0], embedded[begin:]])[None]
        hd = torch.cat([low[:, :begin], normal(1, HD_TOKENS, width), low[:, begin:]], 1)
        self.embeds = {"low": low, "hd": hd}

    @property
    def hr_tokens(self) -> int:
        return self.config.hr_side**2
