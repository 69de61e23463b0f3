"""What a forward call carries through the layers: which of its rows see high-resolution (HR) tokens, and what each layer's
map selected. Selections are keyed by layer, so that gradient checkpointing may run a layer again.

What stays between calls is in images.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flexattn_cuda import ops, profiling
from flexattn_cuda.errors import PoolOverflow
from flexattn_cuda.mechanism.cache import HRCache
from flexattn_cuda.mechanism.config import FlexAttnConfig
from flexattn_cuda.mechanism.pool import NEW_AT_ONCE, HRPool
from flexattn_cuda.mechanism.rotary import rotate
from flexattn_cuda.mechanism.selection import select
from flexattn_cuda.mechanism.trace import LayerTrace, Trace


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
    def of_a_token(cls, batch: int, device: torch.device) -> Rows:
        """Decoding: the one row of the call."""
        return cls(listed=torch.zeros(batch, 1, dtype=torch.int32, device=device))

    @classmethod
    def of_generation(
        cls,
        config: FlexAttnConfig,
        batch: int,
        past: int,
        queries: int,
        prompt_length: int,
        device: torch.device,
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
    """One forward call on its way through the layers: `enter` before a layer's attention, `leave` after it.

    encode: [n, 3, s, s] -> [n, side*side, D], for HR tiles that the selection reaches first in this call.
    cached: Keep projected keys and values beside the cache; otherwise every layer projects what it attends to, with
        gradients.
    reads_back: Otherwise nothing is, and all shapes stay, for a decode step in a CUDA graph: pools of fixed size take up to
        NEW_AT_ONCE new tokens of a layer for each row, and count what does not fit.
    """

    def __init__(
        self,
        images: HRCache,
        rows: Rows,
        layers: int,
        alpha: float = 1.0,
        trace: Trace | None = None,
        encode: Callable[[torch.Tensor], torch.Tensor] | None = None,
        cached: bool = False,
        reads_back: bool = True,
    ):
        self.config = images.settings
        self.images = images
        self.rows = rows
        self.alpha = alpha
        self.cached = cached
        self.reads_back = reads_back
        self.selected: dict[int, ops.SelectedTokens] = {}  # by the layer whose map selected them
        self._encode = encode
        self._batch = (rows.listed if rows.first is None else rows.first).shape[0]
        self._places_on: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}
        self._last_map = layers - 1 if trace is not None else layers - 2
        self._traced: dict[int, LayerTrace] | None = None
        if trace is not None:
            self._traced = {}
            trace.steps.append(self._traced)

    def enter(self, module: nn.Module, device: torch.device) -> dict[str, Any]:
        """Arguments of the attention operator for this layer beside those of plain attention."""
        layer = module.layer_idx
        arguments: dict[str, Any] = {}
        if self.config.first_layer - 1 <= layer <= self._last_map:
            arguments |= dict(
                map_ranges=self._places(device)[0],
                map_size=self.images.lr_side**2,
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
        self.selected[layer] = select(self.config, map, self._places(map.device)[1], self.images.hr_side)
        if self._traced is not None:
            self._traced[layer] = LayerTrace(map, self.selected[layer].mask)

    @profiling.in_phase("project_hr_keys")
    def _hr_keys(self, module: nn.Module, device: torch.device) -> dict[str, Any]:
        """Keys and values of the tokens that the layer before selected; those that this layer lacks are projected."""
        layer, images = module.layer_idx, self.images
        selected = ops.SelectedTokens(*(part.to(device) for part in self.selected[layer - 1]))
        pool = images.pools.get(layer) if self.cached else None
        if pool is None:
            with torch.inference_mode(False):  # it may be written outside of inference mode later
                pool = HRPool(images.prompts, images.tokens, device)
                if self.cached and images.capacity is not None:
                    heads = module.k_proj_hd.out_features // module.head_dim
                    pool.fix(images.capacity, heads, module.head_dim, images.features.dtype)
            if self.cached:
                images.pools[layer] = pool
        assigned = pool.assign(selected)
        if not self.reads_back:
            return self._without_reading_back(module, selected, pool, assigned)

        numbers = torch.cat([selected.count.amax()[None], assigned.new_count, assigned.overflow])
        most, new, overflow = self._read_back(numbers, assigned.new_tokens)
        if overflow:
            raise PoolOverflow(
                f"layer {layer} has no room for {overflow} selected tokens: hr_capacity={pool.capacity} is too small"
            )
        if most == 0:
            return {}
        k, v = pool.k, pool.v
        if new:
            k, v, cos, sin = self._project(module, assigned.new_tokens[:new], device)
            images.projected += new
            if self.cached:
                pool.store(k, v, cos, sin, assigned.new_slots[:new])
                k, v = pool.k, pool.v
            else:
                k = rotate(k, cos[:, None], sin[:, None])
        arguments: dict[str, Any] = dict(
            k_hr=k, v_hr=v, hr_slots=assigned.slots[:, :most].contiguous(), hr_count=selected.count
        )
        if self.rows.first is not None:
            arguments["hr_from"] = self.rows.first.to(device)
        elif self.rows.listed.shape[1] > 1:
            words = (most + 31) // 32
            arguments["hr_row_bits"] = selected.row_bits[:, :, :words].contiguous()
        return arguments | self._mixing(device)

    def _without_reading_back(
        self,
        module: nn.Module,
        selected: ops.SelectedTokens,
        pool: HRPool,
        assigned: ops.AssignedSlots,
    ) -> dict[str, Any]:
        """The same for one row of each sample, in shapes that do not depend on the selection."""
        at_once = NEW_AT_ONCE * self._batch
        k, v, cos, sin = self._project(module, assigned.new_tokens[:at_once], pool.k.device)
        ops.write_hr_kv(k, v, cos, sin, assigned.new_slots[:at_once], pool.k, pool.v)
        missing = torch.cat([assigned.overflow, (assigned.new_count - at_once).clamp(min=0)])
        pool.overflow.add_(missing)
        # What found no slot may not be read; the answer is lost in that case, and whoever asks is told.
        count = torch.where(missing.sum() > 0, 0, selected.count)
        return dict(k_hr=pool.k, v_hr=pool.v, hr_slots=assigned.slots, hr_count=count) | self._mixing(count.device)

    def _mixing(self, device: torch.device) -> dict[str, Any]:
        """alpha for every row of the batch, where it is not 1."""
        if self.alpha == 1.0:
            return {}
        return dict(alpha=torch.full((self._batch,), self.alpha, dtype=torch.float32, device=device))

    def _project(self, module: nn.Module, tokens: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, ...]:
        """tokens [n], counted over prompts, -1 for none -> keys, values [n, Hkv, d] and rotary tables [n, d]."""
        images = self.images
        index = tokens[None].to(images.features.device)
        rows, cos, sin = (
            ops.gather_tokens(table.flatten(0, 1)[None], index)[0].to(device)
            for table in (images.features, images.cos, images.sin)
        )
        k = module.k_proj_hd(rows).unflatten(-1, (-1, module.head_dim))
        v = module.v_proj_hd(rows).unflatten(-1, (-1, module.head_dim))
        dtype = images.features.dtype  # that of the queries; under autocast the projections give another one
        return k.to(dtype), v.to(dtype), cos, sin

    def _read_back(self, numbers: torch.Tensor, tokens: torch.Tensor) -> list[int]:
        """`numbers` on the host, in the one wait that a layer takes. Tiles that `tokens` lie in are encoded on the way."""
        images = self.images
        if not images.waiting:
            return numbers.tolist()
        flags = numbers.new_zeros(images.tile_count + 1)  # the last one for the places without a token
        flags.scatter_(0, torch.where(tokens >= 0, images.tile_numbers(tokens), images.tile_count), 1)
        found = torch.cat([numbers, flags[:-1]]).tolist()
        images.encode_tiles((tile for tile, needed in enumerate(found[len(numbers) :]) if needed), self._encode)
        return found[: len(numbers)]

    def _places(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """ranges and live of the images, for every row of the batch, on a layer's device."""
        if device not in self._places_on:
            repeats = self._batch // self.images.prompts
            ranges, live = self.images.ranges.to(device), self.images.live.to(device)
            if repeats > 1:
                ranges, live = (
                    ranges.repeat_interleave(repeats, 0),
                    live.repeat_interleave(repeats, 0),
                )
            self._places_on[device] = ranges, live
        return self._places_on[device]
