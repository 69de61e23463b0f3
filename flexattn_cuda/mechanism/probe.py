"""How a language model makes its keys, found out by running a small twin of it.

An HR key must be what the layer itself would make of the token. A model that normalises its keys, rotates them in
another form or only in part, or has layers without positions would otherwise attend to wrong keys without any error. So
when a model is built, its keys are compared with those of every form that this package knows.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from flexattn_cuda.mechanism.attention import NAME
from flexattn_cuda.mechanism.cache_argument import CACHE_ARGUMENT
from flexattn_cuda.mechanism.context import HRArguments
from flexattn_cuda.mechanism.keys import KeyForm, forms_of, own_projection
from flexattn_cuda.mechanism.rotary import RotaryTables, table_kinds

Rotary = Callable[[PreTrainedModel, torch.Tensor, torch.Tensor], RotaryTables]
"""A language model, hidden states, and positions [axes, n]: the rotary tables [n, tables*r]."""

_POSITIONS = (3, 11, 12)
_TOLERANCE = 1e-4  # of the max key; float32 rounding is 1e-6, another rotation or norm changes the first digit
_WIDTH = 16  # of the twin's hidden states, where head_dim does not depend on it
_HEADS = 2  # of the twin: a norm over one head alone would look like one over all


@dataclass(frozen=True)
class TokenForms:
    """What a language model makes of a token before attention.

    Attributes:
        scale: Factor that it multiplies embeddings by.
        keys: By layer, how its keys are made.
    """

    scale: float
    keys: dict[int, KeyForm]


_KNOWN: dict[tuple[type, str, range, int], TokenForms] = {}  # by class, configuration, layers and position axes


def token_forms(text: PreTrainedModel, layers: range, rotary: Rotary, axes: int = 1) -> TokenForms:
    """Return how the layers make their keys.

    The model's weights are not read, so it may still be on the meta device.

    Args:
        text: The language model: `layers` with a `self_attn` each, and `rotary_emb`.
        layers: Those that attend to HR tokens.
        rotary: Makes rotary tables of positions.
        axes: Coordinates that a position has.

    Raises:
        ValueError: If keys or values are made in a way that this package does not know.
    """
    key = (type(text), text.config.to_json_string(use_diff=False), layers, axes)
    if key in _KNOWN:
        return _KNOWN[key]
    kind = text.config.model_type
    try:
        with torch.random.fork_rng(devices=[]), _on_cpu(), torch.no_grad():
            forms = _forms(text, layers, rotary, axes)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"flexattn does not support language models of type {kind!r}: {reason}") from error
    _KNOWN[key] = forms
    return forms


def _on_cpu() -> AbstractContextManager[Any]:
    """Create tensors on the CPU, also for a model that is made on the meta device."""
    return nullcontext() if torch.empty(0).device.type == "cpu" else torch.device("cpu")


def _twin(text_class: type[PreTrainedModel], config: PreTrainedConfig, **sizes: int) -> PreTrainedModel:
    """Build a model of the same class and head size, with few heads, and random weights that are all of size 1."""
    small = copy.deepcopy(config)
    sizes = dict(intermediate_size=_WIDTH, num_attention_heads=_HEADS, num_key_value_heads=_HEADS, vocab_size=8) | sizes
    for name, size in sizes.items():
        if hasattr(small, name):
            setattr(small, name, size)
    small.pad_token_id = None
    with no_init_weights():
        twin = text_class(small).eval()
    if twin.dtype != torch.float32:
        twin.float()
    twin.set_attn_implementation(NAME)
    weights = list(twin.parameters())
    drawn = torch.randn(
        len(weights) + max(weight.numel() for weight in weights),
        generator=torch.Generator().manual_seed(0),
        dtype=torch.float32,
    )
    for number, weight in enumerate(weights):  # each begins one value later, so that no two are alike
        weight.copy_(drawn[number : number + weight.numel()].view_as(weight)).div_(weight.shape[-1] ** 0.5)
        if weight.ndim == 1:
            weight.add_(1.0)
    return twin


def _forms(text: PreTrainedModel, layers: range, rotary: Rotary, axes: int) -> TokenForms:
    """Run three tokens through a twin, and find the form that gives its keys, layer by layer."""
    config = text.config
    head_dim = getattr(config, "head_dim", None)
    width = _WIDTH if head_dim else _HEADS * (config.hidden_size // config.num_attention_heads)
    twin = _twin(type(text), config, hidden_size=width)
    record, cache = _Recorder(twin), DynamicCache()
    tokens = torch.randn(1, len(_POSITIONS), width, dtype=torch.float32)
    positions = torch.tensor(_POSITIONS).expand(axes, -1)
    position_ids = positions if axes == 1 else positions[:, None]
    witness = _Witness()
    twin(inputs_embeds=tokens, position_ids=position_ids, use_cache=True, flexattn=witness, **{CACHE_ARGUMENT: cache})
    if missing := set(layers) - witness.layers:
        raise ValueError(f"layer {min(missing)} does not hand keyword arguments on to its attention")
    tables, forms = rotary(twin, tokens, positions), {}
    for layer in layers:
        module, kept, hidden = twin.layers[layer].self_attn, cache.layers[layer], record.attention[layer][0]
        keys, values = (rows[0].transpose(0, 1) for rows in (kept.keys, kept.values))  # [n, Hkv, d]
        if not _relative(own_projection(module, "v_proj")(hidden), values.flatten(1)) <= _TOLERANCE:
            raise ValueError(f"the values of layer {layer} are not plain projections")
        projected = own_projection(module, "k_proj")(hidden)
        forms[layer] = _key_form(module, projected, tables, len(table_kinds(twin)), keys)
    unscaled = _relative(record.first, tokens) <= _TOLERANCE
    return TokenForms(1.0 if unscaled else _embedding_scale(type(text), config), forms)


def _key_form(module: Any, projected: torch.Tensor, tables: RotaryTables, kinds: int, keys: torch.Tensor) -> KeyForm:
    """Return the form in which projected tokens [n, Hkv*d] become the keys [n, Hkv, d] of a module."""
    for form in forms_of(module, kinds):
        try:
            ours = form.rotate(module, form.normalise(module, projected, module.head_dim), form.own_tables(tables))
        except RuntimeError:  # shapes that do not fit
            continue
        if ours.shape == keys.shape and _relative(ours, keys) <= _TOLERANCE:
            return form
    raise ValueError(
        f"the keys of layer {module.layer_idx} are normalised or rotated in a form that flexattn does not know"
    )


def _embedding_scale(text_class: type[PreTrainedModel], config: PreTrainedConfig) -> float:
    """Return the factor between the embeddings of a model of this width and what enters its first layer."""
    one_layer = copy.deepcopy(config)
    one_layer.num_hidden_layers = 1
    for name in ("layer_types", "no_rope_layers", "mlp_layer_types"):
        if getattr(one_layer, name, None):
            setattr(one_layer, name, getattr(one_layer, name)[:1])
    head_dim = getattr(config, "head_dim", None)
    kept = {} if head_dim else {"num_attention_heads": config.num_attention_heads}
    twin = _twin(text_class, one_layer, **kept)
    record = _Recorder(twin)
    tokens = torch.randn(1, 2, config.hidden_size, dtype=torch.float32)
    twin(inputs_embeds=tokens, use_cache=False)
    scale = (record.first / tokens).median().item()
    if not torch.allclose(record.first, tokens * scale, rtol=_TOLERANCE, atol=0.0):
        raise ValueError("what enters their first layer is not a multiple of the embeddings")
    return scale


class _Witness:
    """In place of a context: the layers whose attention it reaches."""

    def __init__(self) -> None:
        self.layers: set[int] = set()

    def before_attention(self, module: Any, device: torch.device) -> HRArguments:
        self.layers.add(module.layer_idx)
        return HRArguments()

    def after_attention(self, module: Any, attention_map: torch.Tensor) -> None:
        """Take no map."""


class _Recorder:
    """What enters the first layer, and the self-attention of every layer."""

    def __init__(self, twin: PreTrainedModel) -> None:
        self.attention: dict[int, torch.Tensor] = {}
        twin.layers[0].register_forward_pre_hook(self._keep_first, with_kwargs=True)
        for number, layer in enumerate(twin.layers):
            keep = functools.partial(self._keep_attention, number)
            layer.self_attn.register_forward_pre_hook(keep, with_kwargs=True)

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
