"""How a layer makes a key of a token: projected, normalised in some models, rotated in one of several forms.

A key of a high-resolution (HR) token is what the layer itself would make of the token, with projections of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import nn

from flexattn_cuda.mechanism.dequantise import check_readable, weight_of
from flexattn_cuda.mechanism.rotary import RotaryTables, rotate

NORMS = ("k_norm", "k_layernorm", "key_layernorm")  # names that transformers' models give the norm of their keys


class NormOver(Enum):
    """What the norm of a layer's keys spans."""

    NOTHING = "there is no norm"
    HEAD = "each head alone"
    WIDTH = "all heads together"


class Rotation(Enum):
    """How a layer rotates its keys."""

    HALF_SPLIT = "as in LLaMA, over the whole head"
    OWN = "by its model's own function, over the part of the head that the rotary tables cover"
    NONE = "not at all"


@dataclass(frozen=True)
class KeyForm:
    """How a layer makes a key of a projected token. The default is LLaMA's, which the operators compute.

    Attributes:
        norm: What the norm of the keys spans.
        rotation: How they are rotated.
        table: Which of a model's rotary tables the layer takes, where kinds of layers have tables of their own.
        tables: How many of them stand side by side.
    """

    norm: NormOver = NormOver.NOTHING
    rotation: Rotation = Rotation.HALF_SPLIT
    table: int = 0
    tables: int = 1

    @property
    def is_plain(self) -> bool:
        """Whether it is LLaMA's."""
        return self == KeyForm()

    def normalise(self, module: Any, projected: torch.Tensor, head_dim: int) -> torch.Tensor:
        """Normalise keys [n, Hkv*d] by the norm of a self-attention module; return [n, Hkv, d]."""
        if self.norm is NormOver.WIDTH:
            projected = norm_of(module)(projected)
        keys: torch.Tensor = projected.unflatten(-1, (-1, head_dim))
        if self.norm is NormOver.HEAD:
            keys = norm_of(module)(keys)
        return keys

    def own_tables(self, tables: RotaryTables) -> RotaryTables:
        """Return the layer's own [n, r] of a model's tables [n, tables*r]."""
        return RotaryTables(*(table.chunk(self.tables, dim=-1)[self.table] for table in tables))

    def rotate(self, module: Any, keys: torch.Tensor, tables: RotaryTables) -> torch.Tensor:
        """Rotate keys [n, Hkv, d] by the layer's tables [n, r], as the module would; r <= d."""
        if self.rotation is Rotation.NONE:
            return keys
        if self.rotation is Rotation.HALF_SPLIT:
            return rotate(keys, tables.cos[:, None], tables.sin[:, None])
        rotated, rest = keys.split([tables.cos.shape[-1], keys.shape[-1] - tables.cos.shape[-1]], dim=-1)
        heads_first = rotated.transpose(0, 1)[None]  # [1, Hkv, n, r], as transformers has it
        _, heads_first = own_rotation(module)(heads_first, heads_first, *(table[None] for table in tables))
        return torch.cat([heads_first[0].transpose(0, 1), rest], dim=-1)


def norm_of(module: Any) -> nn.Module:
    """Return the norm of a module's keys."""
    norm: nn.Module = next(getattr(module, name) for name in NORMS if hasattr(module, name))
    return norm


def own_rotation(module: Any) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Return the function that rotates queries and keys in the file of transformers that the module comes from."""
    function: Callable[..., tuple[torch.Tensor, torch.Tensor]] = vars(sys.modules[type(module).__module__])[
        "apply_rotary_pos_emb"
    ]
    return function


def forms_of(module: nn.Module, tables: int = 1) -> list[KeyForm]:
    """Return the forms that a module's keys can have in a model with so many rotary tables, the plainest first."""
    norms = [NormOver.HEAD, NormOver.WIDTH] if any(hasattr(module, name) for name in NORMS) else []
    rotations = [Rotation.HALF_SPLIT, Rotation.NONE]
    if "apply_rotary_pos_emb" in vars(sys.modules[type(module).__module__]):
        rotations.append(Rotation.OWN)
    return [
        KeyForm(norm, rotation, table, tables)
        for norm in [NormOver.NOTHING, *norms]
        for rotation in rotations
        for table in range(tables)
    ]


@dataclass(frozen=True)
class Projection:
    """Weights [out, in] and, in some models, bias [out] that make keys or values of hidden states."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(tokens, self.weight, self.bias)


def own_projection(module: Any, name: str, compute_dtype: torch.dtype = torch.float32) -> Projection:
    """Return the projection of a self-attention module that makes its keys ("k_proj") or values ("v_proj").

    Args:
        module: The module.
        name: Of the projection.
        compute_dtype: Of the weights where those of the module are quantised.

    Raises:
        ValueError: If the module has no such projection, or holds its weights in a form that is not known.
    """
    linear, rows = _own_linear(module, name)
    bias = None if linear.bias is None else linear.bias[rows]
    return Projection(weight_of(linear, compute_dtype)[rows], bias)


def empty_projection(module: Any, name: str, device: torch.device | None = None) -> nn.Linear:
    """Return a linear layer of the sizes of `own_projection`, never quantised, with values of its own.

    Raises:
        ValueError: As `own_projection` does.
    """
    linear, rows = _own_linear(module, name)
    check_readable(linear)
    outputs = len(range(linear.out_features)[rows])
    return nn.Linear(linear.in_features, outputs, linear.bias is not None, device)


def _own_linear(module: Any, name: str) -> tuple[Any, slice]:
    """Return a linear layer of a self-attention module, and which of its rows make keys or values.

    Some models have one layer for queries, keys and values, whose rows come in this order.
    """
    if hasattr(module, name):
        return getattr(module, name), slice(None)
    fused = getattr(module, "qkv_proj", None)
    if fused is None:
        raise ValueError(f"{type(module).__name__} has no {name}")
    size = module.config.num_key_value_heads * module.head_dim
    end = fused.out_features if name == "v_proj" else fused.out_features - size
    return fused, slice(end - size, end)
