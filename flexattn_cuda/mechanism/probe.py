"""Whether a language model makes its keys as this package makes those of high-resolution (HR) tokens.

An HR key must be what the layer itself would make of the token: projected and rotated in LLaMA's half-split form.
Models that also normalise their keys, rotate them in another form or only in part, or have layers without positions
would attend to wrong keys without any error. So when a model is built, a small twin of it is run and its keys are
compared with ours.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from flexattn_cuda.mechanism.attention import NAME
from flexattn_cuda.mechanism.cache_argument import CACHE_ARGUMENT
from flexattn_cuda.mechanism.rotary import rotate

_POSITIONS = ((3, 11, 12),)
_TOLERANCE = 1e-4  # of the max key; float32 rounding is 1e-6, another rotation or norm changes the first digit
_SUPPORTED: set[tuple[type, str, range]] = set()  # classes, configurations and layers that were checked
_WIDTH = 16  # of the twin's hidden states, where head_dim does not depend on it


def check_keys(text: PreTrainedModel, layers: range) -> None:
    """Raise unless the layers make keys and values the way this package does.

    The model's weights are not read, so it may still be on the meta device.

    Args:
        text: The language model, with `layers` whose `self_attn` has `k_proj` and `v_proj`, and `rotary_emb`.
        layers: Those that attend to HR tokens.

    Raises:
        ValueError: If its architecture is not supported.
    """
    key = (type(text), text.config.to_json_string(use_diff=False), layers)
    if key in _SUPPORTED:
        return
    kind = text.config.model_type
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
            difference = _max_difference(_twin(type(text), text.config), layers)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"flexattn does not support language models of type {kind!r}: {reason}") from error
    if not difference <= _TOLERANCE:
        raise ValueError(
            f"flexattn does not support language models of type {kind!r}: their keys or values are not plain "
            f"projections rotated as in LLaMA (ours would differ by {difference:.0%})"
        )
    _SUPPORTED.add(key)


def _twin(text_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """Build a model of the same class, layer types and head size, with one narrow head."""
    head_dim = getattr(config, "head_dim", None)
    small = copy.deepcopy(config)
    width = _WIDTH if head_dim else config.hidden_size // config.num_attention_heads
    sizes = dict(
        hidden_size=width, intermediate_size=_WIDTH, num_attention_heads=1, num_key_value_heads=1, vocab_size=8
    )
    for name, size in sizes.items():
        if hasattr(small, name):
            setattr(small, name, size)
    small.pad_token_id = None
    twin = text_class(small).eval()
    twin.set_attn_implementation(NAME)
    return twin


def _max_difference(twin: PreTrainedModel, layers: range) -> float:
    """Run three tokens through the twin and compare our keys and values with its own, as a share of the max."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(weight.shape, generator=generator) / weight.shape[-1] ** 0.5 + (weight.ndim == 1)
        for name, weight in twin.named_parameters()
    }
    positions, cache = torch.tensor(_POSITIONS), DynamicCache()
    tokens = torch.randn(1, positions.shape[1], twin.config.hidden_size, generator=generator)
    entered = _Recorder(twin, layers)
    arguments = {"inputs_embeds": tokens, "position_ids": positions, CACHE_ARGUMENT: cache, "use_cache": True}
    torch.func.functional_call(twin, weights, kwargs=arguments)
    tables = twin.rotary_emb(tokens, position_ids=positions)
    differences = [_relative(entered.first, tokens)]  # a model that scales its embeddings needs scaled HR tokens too
    for layer in layers:
        head_dim, kept = twin.layers[layer].self_attn.head_dim, cache.layers[layer]
        if tables[0].shape[-1] != head_dim:
            raise ValueError(f"their rotary embedding covers {tables[0].shape[-1]} of {head_dim} dimensions")
        projected = [
            entered.attention[layer] @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)
            for name in (f"layers.{layer}.self_attn.k_proj", f"layers.{layer}.self_attn.v_proj")
        ]
        differences.append(_relative(rotate(projected[0], *tables), kept.keys[:, 0]))
        differences.append(_relative(projected[1], kept.values[:, 0]))
    return max(differences)


class _Recorder:
    """What enters the first layer, and the self-attention of each of the layers."""

    def __init__(self, twin: PreTrainedModel, layers: range) -> None:
        self.attention: dict[int, torch.Tensor] = {}
        twin.layers[0].register_forward_pre_hook(self._keep_first, with_kwargs=True)
        for layer in layers:
            twin.layers[layer].self_attn.register_forward_pre_hook(
                functools.partial(self._keep_attention, layer), with_kwargs=True
            )

    def _keep_first(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.first = _hidden_states(args, kwargs)

    def _keep_attention(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.attention[layer] = _hidden_states(args, kwargs)


def _hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    hidden: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def _relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the max difference as a share of the max value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
