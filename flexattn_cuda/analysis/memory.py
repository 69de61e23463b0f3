"""How much memory a model and one photograph need, from the configuration alone: nothing is loaded or allocated."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flexattn_cuda.families.llava.config import FlexAttnLlavaConfig
from flexattn_cuda.families.llava.model import FlexAttnLlavaForConditionalGeneration

GIB = 2**30
V100 = 16 * GIB  # the smaller of the two V100

# Share of the HR tokens that a row selects. Pooling to 9 x 9: what the published FLOPs fit (M = 2250 of 5184);
# without pooling: "about 10 %", section 4.1 of the paper.
POOLED_SHARE, PLAIN_SHARE = 0.43, 0.10


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes. Activations, the CUDA context and the allocator's own losses come on top.

    Attributes:
        weights: By part of the model.
        sequence_cache: Keys and values of `positions` positions in all layers.
        hr_features: The HR tokens of one image and their rotary tables.
        hr_cache_all: Keys and values of every HR token of one image in every layer that attends to them.
        hr_cache_selected: The same for the share of them that is selected.
    """

    weights: dict[str, int]
    positions: int
    selected_share: float
    sequence_cache: int
    hr_features: int
    hr_cache_all: int
    hr_cache_selected: int

    @property
    def all_weights(self) -> int:
        return sum(self.weights.values())

    @property
    def total(self) -> int:
        """Weights and one image, with the HR cache at the selected share."""
        return self.all_weights + self.sequence_cache + self.hr_features + self.hr_cache_selected

    @property
    def total_all(self) -> int:
        """Weights and one image, with every HR token in the HR cache."""
        return self.all_weights + self.sequence_cache + self.hr_features + self.hr_cache_all


def estimate(
    config: FlexAttnLlavaConfig,
    dtype: torch.dtype = torch.float16,
    text_positions: int = 128,
    selected_share: float | None = None,
) -> MemoryEstimate:
    """
    Args:
        config: Of a model with or without FlexAttention.
        dtype: Of weights, caches and features.
        text_positions: Prompt text and answer together; the image tokens of one image are added.
        selected_share: Share of the HR tokens that is selected; None: what the settings lead one to expect.
    """
    config.check()
    with torch.device("meta"):
        model = FlexAttnLlavaForConditionalGeneration(config)
    size = dtype.itemsize
    weights = dict.fromkeys(("vision tower", "projector", "language model", "HR projections"), 0)
    for name, parameter in model.named_parameters():
        weights[_part(name)] += parameter.numel() * size

    text = config.text_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kv_heads = text.num_key_value_heads or text.num_attention_heads
    pair = 2 * head_dim * size  # key and value, one head of one layer
    positions, hr_tokens = (
        config.image_tokens + text_positions,
        config.hr_side**2 if config.hr_layers else 0,
    )
    share = expected_share(config) if selected_share is None else selected_share
    hr_heads = text.num_attention_heads if config.system == "xattn" else kv_heads  # cross-attention does not share keys
    hr_cache = pair * hr_heads * len(config.hr_layers) * hr_tokens
    return MemoryEstimate(
        weights={name: amount for name, amount in weights.items() if amount},
        positions=positions,
        selected_share=share,
        sequence_cache=pair * kv_heads * text.num_hidden_layers * positions,
        hr_features=hr_tokens * (text.hidden_size + (2 * head_dim if config.system == "flexattn" else 0)) * size,
        hr_cache_all=hr_cache,
        hr_cache_selected=round(hr_cache * share),
    )


def expected_share(config: FlexAttnLlavaConfig) -> float:
    """Share of the HR tokens that one row selects, as far as the settings tell it."""
    settings = config.flexattn
    if config.system != "flexattn":
        return float(config.system == "xattn")
    if settings.strategy != "attention":
        return settings.ratio
    return POOLED_SHARE if settings.pool else PLAIN_SHARE


def _part(parameter: str) -> str:
    if "_proj_hd." in parameter or ".cross_attn." in parameter:
        return "HR projections"
    if "vision_tower" in parameter:
        return "vision tower"
    return "projector" if "multi_modal_projector" in parameter else "language model"
