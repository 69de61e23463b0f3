"""LLaVA-XAttn: CogAgent's operator on LLaVA (section 5.1 of the paper). Every layer adds cross-attention, from its hidden
states to all high-resolution (HR) tokens of the row's images, between self-attention and the MLP.

A call's rows see every image that came with it or before. So where a conversation brings an image in a later turn, training on
it in one call shows that image to the turns before too, which they do not see when they are generated.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from flexattn_cuda import profiling
from flexattn_cuda.mechanism.cache import HRCache


class CrossAttention(nn.Module):
    """Heads and head size of the layer's self-attention; every head has keys of its own. HR keys have no rotary position."""

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        inner = config.num_attention_heads * self.head_dim
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.q_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=False)

    @profiling.in_phase("cross_attention")
    def forward(self, hidden: torch.Tensor, tokens: HRTokens) -> torch.Tensor:
        """hidden [B, N, D] -> [B, N, D], zero for the rows of a prompt without an image."""
        k, v = tokens.keys_and_values(self)
        (B, N, _), G = hidden.shape, k.shape[0]
        q = (
            self.q_proj(self.norm(hidden)).view(G, B // G * N, -1, self.head_dim).transpose(1, 2)
        )  # beams share the keys
        if tokens.present is None:
            out = functional.scaled_dot_product_attention(q, k, v)
        else:
            present = tokens.present.to(hidden.device)
            some = present.any(-1, keepdim=True)
            # A softmax over nothing is not a number: such a row sees everything, and its output is dropped.
            out = (
                functional.scaled_dot_product_attention(q, k, v, attn_mask=(present | ~some)[:, None, None])
                * some[..., None, None]
            )
        return self.o_proj(out.transpose(1, 2).reshape(B, N, -1))


class CrossAttentionLayer(LlamaDecoderLayer):
    """A decoder layer of LLaMA with cross-attention; without HR tokens it is the plain layer."""

    def __init__(self, config: LlamaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.cross_attn = CrossAttention(config, layer_idx)

    def forward(self, hidden_states: torch.Tensor, hr_tokens: HRTokens | None = None, **kwargs) -> torch.Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        if hr_tokens is not None:
            hidden_states = hidden_states + self.cross_attn(hidden_states, hr_tokens)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class HRTokens:
    """What the layers of one forward call attend to.

    present: [G, I*h*h] bool, False where a prompt lacks an image that others have; None where it cannot be.
    cached: Keep keys and values beside the cache; otherwise they are projected anew, with gradients.
    """

    def __init__(self, images: HRCache, cached: bool):
        self.images = images
        self.cached = cached
        self.present: torch.Tensor | None = None
        if (
            images.ranges.shape[:2] != (1, 1) or images.last_end == 0
        ):  # the only one may have been cropped out of the cache
            there = images.ranges[..., 1] > images.ranges[..., 0]
            self.present = there.repeat_interleave(images.hr_side**2, dim=1)

    def keys_and_values(self, module: CrossAttention) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [G, H, I*h*h, d] for one layer; each token is projected once in a conversation."""
        kept = self.images.crossed.get(module.layer) if self.cached else None
        new = self.images.features[:, 0 if kept is None else kept[0].shape[2] :].to(module.k_proj.weight.device)
        if new.shape[1]:
            k, v = (p(new).unflatten(-1, (-1, module.head_dim)).transpose(1, 2) for p in (module.k_proj, module.v_proj))
            kept = (k, v) if kept is None else (torch.cat([kept[0], k], 2), torch.cat([kept[1], v], 2))
            if self.cached:
                self.images.crossed[module.layer] = kept
        return kept
