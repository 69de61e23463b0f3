"""What a forward call carries through the layers, and what stays beside the key/value cache between calls.

`HighResolution` belongs to a conversation: the HR tokens of its pictures and where their LR tokens stand. It is kept as
an attribute of the cache, so that a new cache starts without pictures and two conversations never mix.
`Call` belongs to one forward call: which of its rows see HR tokens, and what each layer's map selected. Selections are
keyed by layer, so that gradient checkpointing may run a layer again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import Cache

from flexattn_cuda import ops, profiling
from flexattn_cuda.configuration import FlexAttnConfig
from flexattn_cuda.rotary import rotate
from flexattn_cuda.selection import select
from flexattn_cuda.trace import LayerTrace, Trace

_ATTRIBUTE = "flexattn"


@dataclass
class HighResolution:
    """The pictures of a batch of conversations. A row with fewer than I pictures is padded with empty ones.

    features: [B, I*h*h, D] HR tokens (the projector's output).
    cos, sin: [B, I*h*h, d] rotary tables of the HR keys.
    ranges: [B, I, 2] int32 first sequence key of each picture's LR tokens and one past the last; (0, 0) when absent.
    live: [B, I, 4] int32 the photo inside its padding, in LR cells; all 0 when absent.
    prompt_length: positions of the sequence up to the end of the latest prompt; the rows from its last one on see HR.
    """

    features: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    ranges: torch.Tensor
    live: torch.Tensor
    prompt_length: int = 0

    @classmethod
    def beside(cls, cache: Cache | None) -> HighResolution | None:
        """The pictures kept beside a cache, if any."""
        return getattr(cache, _ATTRIBUTE, None)

    def keep_beside(self, cache: Cache) -> None:
        setattr(cache, _ATTRIBUTE, self)

    def joined_with(self, later: HighResolution) -> HighResolution:
        """The pictures of this conversation followed by those of its next turn."""
        parts = {
            name: torch.cat([getattr(self, name), getattr(later, name).to(getattr(self, name).device)], dim=1)
            for name in ("features", "cos", "sin", "ranges", "live")
        }
        return replace(later, **parts)

    def on(self, device: torch.device) -> HighResolution:
        """The same tensors on the device of a layer."""
        if self.features.device == device:
            return self
        names = ("features", "cos", "sin", "ranges", "live")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


@dataclass
class Rows:
    """Query rows of one call that see HR keys.

    first: [B] int32, all rows from there on, with the selection of the call's last row; or
    listed: [B, R] int32 (-1 = none), each with the selection of the row `owner` names: [B, R] int64, positions in
        `listed`; None where every row has its own.
    """

    first: torch.Tensor | None = None
    listed: torch.Tensor | None = None
    owner: torch.Tensor | None = None

    @classmethod
    def of_answers(cls, config: FlexAttnConfig, labels: torch.Tensor) -> Rows:
        """Training and scoring: the rows x-1 .. y-1 of every answer at positions x .. y (labels other than -100)."""
        batch, length = labels.shape
        predicts = torch.zeros_like(labels, dtype=torch.bool)
        predicts[:, :-1] = labels[:, 1:] != -100
        order = torch.arange(length, device=labels.device).expand(batch, -1)
        if config.hr_rows == "answer":
            count = int(predicts.sum(-1).max())
            position = predicts.cumsum(-1) - 1
            listed = labels.new_full((batch, count + 1), -1)  # one column more, for the rows that predict nothing
            listed.scatter_(1, torch.where(predicts, position, count), torch.where(predicts, order, -1))
            return cls(listed=listed[:, :count].to(torch.int32))
        # Every row sees HR keys, with the selection of the next row that predicts an answer token (the last one after
        # the last answer): what inference gives, where prompt rows share the last prompt row's selection.
        upcoming = torch.where(predicts, order, length).flip(-1).cummin(-1).values.flip(-1)
        last = torch.where(predicts, order, -1).amax(-1, keepdim=True).expand(-1, length)
        owner = torch.where(upcoming < length, upcoming, torch.where(last >= 0, last, order))
        return cls(listed=order.to(torch.int32).contiguous(), owner=owner)

    @classmethod
    def of_generation(
        cls, config: FlexAttnConfig, batch: int, past: int, queries: int, prompt_length: int, device: torch.device
    ) -> Rows | None:
        """Inference: the last prompt row and every later one; None where the call ends before it."""
        own = prompt_length - 1 - past  # the row of this call that is the last of the prompt; negative after it
        if config.hr_rows == "all" and own >= queries:
            raise ValueError(
                "a prompt whose rows all see high-resolution tokens (hr_rows='all', the paper's form) needs the last "
                f"prompt row's selection: pass its {prompt_length} positions in one call, not the first {past + queries} alone"
            )
        if own >= queries:
            return None
        if config.hr_rows == "all" and own > 0:
            if own == queries - 1:
                return cls(first=torch.zeros(batch, dtype=torch.int32, device=device))
            order = torch.arange(queries, device=device).expand(batch, -1)
            return cls(listed=order.to(torch.int32).contiguous(), owner=order.clamp(min=own))
        listed = torch.arange(max(own, 0), queries, dtype=torch.int32, device=device)
        return cls(listed=listed.expand(batch, -1).contiguous())


class Call:
    """One forward call on its way through the layers: `enter` before a layer's attention, `leave` after it."""

    def __init__(
        self,
        config: FlexAttnConfig,
        layers: int,
        lr_side: int,
        hr_side: int,
        pictures: HighResolution,
        rows: Rows,
        alpha: float = 1.0,
        trace: Trace | None = None,
    ):
        self.config = config
        self.lr_side = lr_side
        self.hr_side = hr_side
        self.rows = rows
        self.alpha = alpha
        self.selected: dict[int, ops.SelectedTokens] = {}  # by the layer whose map selected them
        self._pictures = {pictures.features.device: pictures}
        self._last_map = layers - 1 if trace is not None else layers - 2
        self._traced: dict[int, LayerTrace] | None = None
        if trace is not None:
            self._traced = {}
            trace.steps.append(self._traced)

    def enter(self, module: nn.Module, device: torch.device) -> dict[str, Any] | None:
        """Arguments of the attention operator for this layer beside those of plain attention."""
        layer = module.layer_idx
        arguments: dict[str, Any] = {}
        if self.config.first_layer - 1 <= layer <= self._last_map:
            pictures = self._on(device)
            arguments |= dict(
                map_ranges=pictures.ranges,
                map_size=self.lr_side**2,
                map_over_all=self.config.map_softmax == "all",
            )
        if layer >= self.config.first_layer:
            arguments |= self._hr_keys(module, device)
        if arguments and self.rows.listed is not None:
            arguments["hr_rows"] = self.rows.listed.to(device)
        return arguments

    def leave(self, module: nn.Module, map: torch.Tensor) -> None:
        """Turns the layer's map [B, R, I, S*S] into the selection that the next layer reads."""
        layer = module.layer_idx
        if not self.config.first_layer - 1 <= layer <= self._last_map:
            return
        map = map.detach()
        if self.rows.owner is not None:
            owner = self.rows.owner.to(map.device)[:, :, None, None].expand_as(map)
            map = map.gather(1, owner)
        self.selected[layer] = select(self.config, map, self._on(map.device).live, self.hr_side)
        if self._traced is not None:
            self._traced[layer] = LayerTrace(map, self.selected[layer].mask)

    @profiling.in_phase("project_hr_keys")
    def _hr_keys(self, module: nn.Module, device: torch.device) -> dict[str, Any]:
        """Keys and values of the tokens that the layer before selected, projected for this layer."""
        selected = ops.SelectedTokens(*(part.to(device) for part in self.selected[module.layer_idx - 1]))
        most = int(selected.count.max())
        if most == 0:
            return {}
        pictures = self._on(device)
        index = selected.index[:, :most].contiguous()
        tokens, cos, sin = (ops.gather_tokens(table, index) for table in (pictures.features, pictures.cos, pictures.sin))
        keys = module.k_proj_hd(tokens).unflatten(-1, (-1, module.head_dim))  # [B, M, Hkv, d]
        values = module.v_proj_hd(tokens).unflatten(-1, (-1, module.head_dim))
        keys = rotate(keys, cos.unsqueeze(2), sin.unsqueeze(2))
        batch = index.shape[0]
        arguments: dict[str, Any] = dict(
            k_hr=keys.flatten(0, 1),
            v_hr=values.flatten(0, 1),
            hr_slots=torch.arange(batch * most, dtype=torch.int32, device=device).view(batch, most),
            hr_count=selected.count,
        )
        if self.rows.first is not None:
            arguments["hr_from"] = self.rows.first.to(device)
        elif self.rows.listed.shape[1] > 1:
            words = (most + 31) // 32
            arguments["hr_row_bits"] = selected.row_bits[:, :, :words].contiguous()
        if self.alpha != 1.0:
            arguments["alpha"] = torch.full((batch,), self.alpha, dtype=torch.float32, device=device)
        return arguments

    def _on(self, device: torch.device) -> HighResolution:
        if device not in self._pictures:
            self._pictures[device] = next(iter(self._pictures.values())).on(device)
        return self._pictures[device]
