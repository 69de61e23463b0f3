"""Attention maps of single layers that gradients can flow through, and what they lie on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


class LayerMap:
    """The attention map of a layer in its latest call, with a gradient, which the operator's map lacks."""

    def __init__(self, attention: nn.Module):
        self._attention = attention
        self._hidden: torch.Tensor | None = None
        self._rotary: tuple[torch.Tensor, torch.Tensor] | None = None

    def _keep(self, module: nn.Module, args: tuple, keywords: dict[str, Any]) -> None:
        self._hidden, self._rotary = keywords["hidden_states"], keywords["position_embeddings"]

    def map(self, visible: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return the mean of the attention probabilities over the heads in R rows, [R, N].

        Args:
            visible: [n, 1, N, N] bool, row i sees key j.
            rows: [n, N] bool, R of them True.
        """
        a, (n, length) = self._attention, self._hidden.shape[:2]
        q, k = (p(self._hidden).view(n, length, -1, a.head_dim).transpose(1, 2) for p in (a.q_proj, a.k_proj))
        q, k = apply_rotary_pos_emb(q, k, *self._rotary)
        # A sequence has few of the rows: they come first, and none is computed after the most of any sequence.
        order = rows.int().argsort(dim=1, descending=True, stable=True)[:, : int(rows.sum(1).max())]
        q, visible = (part.take_along_dim(order[:, None, :, None], 2) for part in (q, visible))
        maps = (q @ k.transpose(-1, -2) * a.scaling).masked_fill(~visible, -torch.inf).softmax(-1).mean(1)
        return maps[rows.gather(1, order)]


@contextmanager
def record_maps(model, layers: Iterable[int]) -> Iterator[list[LayerMap]]:
    """Record the maps of a LLaVA's language layers in every call inside the block."""
    with ExitStack() as stack:
        maps = []
        for number in layers:
            attention = model.model.language_model.layers[number].self_attn
            maps.append(LayerMap(attention))
            stack.enter_context(attention.register_forward_pre_hook(maps[-1]._keep, with_kwargs=True))
        yield maps


def cross_entropy(maps: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """Return how far maps are from their cells, 1 where a map should lie and 0 elsewhere: [..., S*S] -> [...]."""
    return -((maps + 1e-6).log() * cells).sum(-1).div(cells.sum(-1))


def mass_and_largest(maps: torch.Tensor, cells: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each map's mass on its cells, and 1 where its largest cell is one of them: [..., S*S] -> [...]."""
    largest = cells.expand_as(maps).gather(-1, maps.argmax(-1, keepdim=True))
    return (maps * cells).sum(-1), largest.squeeze(-1)


def causal_visibility(attention_mask: torch.Tensor) -> torch.Tensor:
    """Return what each row sees of a causal sequence, [n, 1, N, N] bool, for a padding mask [n, N]."""
    length = attention_mask.shape[1]
    return torch.ones(length, length, dtype=torch.bool).tril() & (attention_mask == 1)[:, None, None]
