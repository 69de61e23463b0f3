"""Memory of a model and one image, from the configuration alone: nothing is loaded or allocated."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass

import torch

from flexattn_cuda.checkpoints.projections import is_projection
from flexattn_cuda.families.llava.config import FlexAttnLlavaConfig
from flexattn_cuda.families.llava.model import FlexAttnLlavaForConditionalGeneration

# Share of the HR tokens that a row selects: with pooling to 9 x 9, the share that fits the published FLOPs (M = 2250 of
# 5184); without pooling, "about 10 %" (section 4.1 of the paper).
POOLED_SHARE, PLAIN_SHARE = 0.43, 0.10


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory in bytes, without activations, the CUDA context and the allocator's overhead.

    Attributes:
        weights: By part of the model.
        positions: Positions in the sequence cache.
        selected_share: Share of the HR tokens that is selected.
        sequence_cache: Keys and values of `positions` positions in all layers.
        hr_features: The HR tokens of one image and their rotary tables.
        hr_cache_all: Keys and values of every HR token of one image in every layer that attends to them.
        hr_cache_selected: The same for the selected share.
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
        """Weights of all parts."""
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
    """Estimate the memory of a model and one image.

    Args:
        config: Of a model with or without FlexAttention.
        dtype: Of weights, caches and features.
        text_positions: Length of prompt text and answer in tokens; one image's tokens are added.
        selected_share: Share of the HR tokens that is selected; `expected_share` if None.

    Raises:
        ValueError: If the configuration is inconsistent.
    """
    config.check()
    text = config.text_config
    positions = config.image_tokens + text_positions
    hr_tokens = config.hr_side**2 if config.hr_layers else 0
    share = expected_share(config) if selected_share is None else selected_share
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kv_heads = text.num_key_value_heads or text.num_attention_heads
    hr_heads = text.num_attention_heads if config.system == "xattn" else kv_heads  # cross-attention does not share keys
    rotary = 2 * head_dim if config.system == "flexattn" else 0
    key_and_value = 2 * head_dim * dtype.itemsize  # of one head in one layer
    hr_cache = key_and_value * hr_heads * len(config.hr_layers) * hr_tokens
    return MemoryEstimate(
        weights=_weights(config, dtype),
        positions=positions,
        selected_share=share,
        sequence_cache=key_and_value * kv_heads * text.num_hidden_layers * positions,
        hr_features=hr_tokens * (text.hidden_size + rotary) * dtype.itemsize,
        hr_cache_all=hr_cache,
        hr_cache_selected=round(hr_cache * share),
    )


def expected_share(config: FlexAttnLlavaConfig) -> float:
    """Return the share of the HR tokens that one row selects, as far as the settings determine it."""
    settings = config.flexattn
    if config.system != "flexattn":
        return float(config.system == "xattn")
    if settings.strategy != "attention":
        return settings.ratio
    return POOLED_SHARE if settings.pool else PLAIN_SHARE


def expected_tokens(config: FlexAttnLlavaConfig) -> int:
    """Return the number of HR tokens that one row selects: `expected_share` of an image's."""
    return round(expected_share(config) * config.hr_side**2)


def _weights(config: FlexAttnLlavaConfig, dtype: torch.dtype) -> dict[str, int]:
    """Return the bytes of the model's parameters by part, for the parts that it has."""
    counts = _parameters(json.dumps(config.to_dict(), sort_keys=True))
    return {part: count * dtype.itemsize for part, count in counts.items()}


@functools.lru_cache(maxsize=32)
def _parameters(config: str) -> dict[str, int]:
    """Return the number of parameters by part, of a configuration in JSON."""
    with torch.device("meta"):
        model = FlexAttnLlavaForConditionalGeneration(FlexAttnLlavaConfig.from_dict(json.loads(config)))
    counts = dict.fromkeys(("vision tower", "projector", "language model", "HR projections"), 0)
    for name, parameter in model.named_parameters():
        counts[_part(name)] += parameter.numel()
    return {part: count for part, count in counts.items() if count}


def _part(parameter: str) -> str:
    if is_projection(parameter):
        return "HR projections"
    if "vision_tower" in parameter:
        return "vision tower"
    return "projector" if "multi_modal_projector" in parameter else "language model"
