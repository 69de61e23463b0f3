"""LLaVA-XAttn: CogAgent's operator on LLaVA (section 5.1 of the paper).

Every layer adds cross-attention, from its hidden states to all high-resolution (HR) tokens of the row's images, between
self-attention and the MLP. The rows of a call see every image that came with it or before. So where a conversation
brings an image in a later turn, training on it in one call shows that image to the earlier turns too, which do not see
it when they are generated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from flexattn_cuda import profiling
from flexattn_cuda.mechanism.attach import Attachment, HRCall
from flexattn_cuda.mechanism.cache import HRCache
from flexattn_cuda.mechanism.call import NewImages
from flexattn_cuda.mechanism.layout import ImageLayout
from flexattn_cuda.mechanism.rotary import RotaryTables


class CrossAttention(nn.Module):
    """Cross-attention with the heads and head size of the layer's self-attention.

    Every head has keys of its own, and HR keys have no rotary position.
    """

    def __init__(self, config: LlamaConfig, layer: int) -> None:
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
    def forward(self, hidden: torch.Tensor, context: CrossContext) -> torch.Tensor:
        """Attend from hidden [B, N, D]; return [B, N, D], zero for the rows of a prompt without an image."""
        k, v = context.keys_and_values(self)
        (B, N, _), G = hidden.shape, k.shape[0]
        # The beams of a prompt share its keys.
        q = self.q_proj(self.norm(hidden)).view(G, B // G * N, -1, self.head_dim).transpose(1, 2)
        present = context.present
        if present is None:
            out = functional.scaled_dot_product_attention(q, k, v)
        else:
            present = present.to(hidden.device)
            some = present.any(-1, keepdim=True)
            # A softmax over no keys is NaN: a prompt without an image sees everything, and its output is dropped.
            mask = (present | ~some)[:, None, None]
            out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask) * some[..., None, None]
        projected: torch.Tensor = self.o_proj(out.transpose(1, 2).reshape(B, N, -1))
        return projected


class CrossAttentionLayer(LlamaDecoderLayer):
    """A decoder layer of LLaMA with cross-attention; without HR tokens it is the plain layer."""

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.cross_attn = CrossAttention(config, layer_idx)

    def forward(
        self, hidden_states: torch.Tensor, cross_attention: CrossContext | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """As in transformers; `cross_attention` is the context of this forward call."""
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        if cross_attention is not None:
            hidden_states = hidden_states + self.cross_attn(hidden_states, cross_attention)
        out: torch.Tensor = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return out


class CrossContext:
    """What the layers of one forward call attend to."""

    def __init__(self, images: HRCache, cached: bool) -> None:
        """Start a call; with `cached`, keys and values stay beside the cache, otherwise they are projected again."""
        self.images = images
        self.cached = cached

    @property
    def present(self) -> torch.Tensor | None:
        """[G, I*T] bool, False where a prompt lacks a token that others have; None if all are there."""
        layout = self.images.layout
        if (layout.prompts, layout.images) == (1, 1) and layout.last_end:
            return None  # the only image, and it has not been cropped out of the cache
        tokens = torch.arange(self.images.tokens.room, device=layout.hr_grid.device)
        return (tokens < layout.hr_grid.prod(-1)[..., None]).flatten(1)

    def keys_and_values(self, module: CrossAttention) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values [G, H, I*T, d] for one layer; each token is projected once in a conversation."""
        kept = self.images.crossed.get(module.layer) if self.cached else None
        features = self.images.tokens.features
        if kept is not None and kept[0].shape[2] == features.shape[1]:
            return kept
        new = features[:, 0 if kept is None else kept[0].shape[2] :].to(module.k_proj.weight.device)
        k, v = (p(new).unflatten(-1, (-1, module.head_dim)).transpose(1, 2) for p in (module.k_proj, module.v_proj))
        if kept is not None:
            k, v = torch.cat([kept[0], k], 2), torch.cat([kept[1], v], 2)
        if self.cached:
            self.images.crossed[module.layer] = k, v
        return k, v


class CrossAttachment(Attachment):
    """LLaVA-XAttn attached to a model: layers with cross-attention in place of its own."""

    def add_modules(self, text: PreTrainedModel) -> None:
        """Replace the layers with ones that have cross-attention."""
        for layer in self.family.hr_layers:
            text.layers[layer] = CrossAttentionLayer(text.config, layer)

    def context(self, images: HRCache, call: HRCall) -> dict[str, Any]:
        """Return the keyword argument that carries the context to the layers."""
        return {"cross_attention": CrossContext(images, call.request.cached)}

    def rotary_tables(
        self, new: NewImages, layout: ImageLayout, past: int, sequence: torch.Tensor, position_ids: torch.Tensor | None
    ) -> RotaryTables:
        """Return tables [G, I*T, 0]: cross-attention has no positions."""
        empty = sequence.new_zeros(layout.prompts, layout.images * layout.hr_tokens, 0)
        return RotaryTables(empty, empty)
