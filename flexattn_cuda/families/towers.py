"""Families whose vision tower takes square images of one size."""

from __future__ import annotations

import math
import threading
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from flexattn_cuda.families.family import FixedTower, Pixels

# Older transformers replace the tower's forward functions while they record its hidden states.
_ONE_AT_A_TIME = threading.Lock()


class LlavaTower(FixedTower):
    """LLaVA and VipLLaVA as transformers has them: a CLIP or SigLIP tower, a projector, and any language model."""

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        with _ONE_AT_A_TIME:
            features = self.model.model.get_image_features(pixel_values=pixels.to(self.model.dtype), return_dict=True)
        tokens = features.pooler_output
        return tokens if isinstance(tokens, torch.Tensor) else torch.stack(list(tokens))


class InternVL(LlavaTower):
    """InternVL: each token takes a square of patches (pixel shuffle)."""

    @property
    def lr_side(self) -> int:
        vision = self.model.config.vision_config
        return int(_side(vision.image_size) // _side(vision.patch_size) * self.model.config.downsample_ratio)

    @property
    def lr_size(self) -> int:
        return _side(self.model.config.vision_config.image_size)


class PaliGemma(LlavaTower):
    """PaliGemma: the tokens of the prompt see each other in both directions."""

    later_images: ClassVar[bool] = False
    causal_prompts: ClassVar[bool] = False


class Gemma3(LlavaTower):
    """Gemma3: patches are averaged to a fixed number of tokens, and an image's see each other in both directions."""

    later_images: ClassVar[bool] = False

    @property
    def lr_side(self) -> int:
        return math.isqrt(self.model.config.mm_tokens_per_image)


class BaseView(FixedTower):
    """LLaVA-NeXT and LLaVA-OneVision: the base view alone stands in the sequence, without newline tokens and tiles."""

    image_arguments: ClassVar[tuple[str, ...]] = ("pixel_values", "image_sizes", "batch_num_images")

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        inner, config = self.model.model, self.model.config
        with _ONE_AT_A_TIME:
            hidden = inner.vision_tower(pixels.to(self.model.dtype), output_hidden_states=True).hidden_states
        layers = config.vision_feature_layer
        chosen = torch.cat([hidden[layer] for layer in ([layers] if isinstance(layers, int) else layers)], dim=-1)
        if config.vision_feature_select_strategy == "default":
            chosen = chosen[:, 1:]  # without the CLS token
        tokens: torch.Tensor = inner.multi_modal_projector(chosen)
        return tokens


class Idefics3(FixedTower):
    """Idefics3 and SmolVLM: pixel shuffle too; the global view alone stands in the sequence."""

    image_arguments: ClassVar[tuple[str, ...]] = ("pixel_values", "pixel_attention_mask", "image_hidden_states")

    @property
    def text_model(self) -> PreTrainedModel:
        text: PreTrainedModel = self.model.model.text_model
        return text

    @property
    def lr_side(self) -> int:
        return super().lr_side // int(self.model.config.scale_factor)

    def encode_lr(self, pixels_hr: Pixels, arguments: dict[str, Any]) -> list[torch.Tensor]:
        views, mask = arguments.get("pixel_values"), arguments.get("pixel_attention_mask")
        if views is not None and views.ndim == 5 and mask is not None:  # a row with fewer images than others is padded
            arguments = arguments | {"pixel_values": views[mask.flatten(2).any(-1)]}
        return super().encode_lr(pixels_hr, arguments)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        # Not by get_image_features, which takes an image of zeros for padding and drops it.
        inner = self.model.model
        with _ONE_AT_A_TIME:
            hidden = inner.vision_model(pixel_values=pixels.to(self.model.dtype)).last_hidden_state
        tokens: torch.Tensor = inner.connector(hidden)
        return tokens


def _side(size: Any) -> int:
    """Return the side of a square that a configuration gives as one number or two."""
    return int(size if isinstance(size, int) else size[0])
