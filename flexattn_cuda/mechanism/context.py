"""The state of one forward call on its way through the layers: which rows see high-resolution (HR) tokens, and what
each layer's map selected. Selections are keyed by layer, so that gradient checkpointing may run a layer again.

What outlives the call is in cache.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from flexattn_cuda import ops, profiling
from flexattn_cuda.errors import PoolOverflow
from flexattn_cuda.mechanism.cache import HRCache
from flexattn_cuda.mechanism.config import FlexAttnConfig
from flexattn_cuda.mechanism.counts import CountReader, Counts, ReadBack, read_counts
from flexattn_cuda.mechanism.keys import KeyForm, Rotation
from flexattn_cuda.mechanism.layout import RowLayout
from flexattn_cuda.mechanism.pool import NEW_AT_ONCE, HRPool, are_plain
from flexattn_cuda.mechanism.rotary import RotaryTables, no_rotation, rotate
from flexattn_cuda.mechanism.rows import Rows
from flexattn_cuda.mechanism.selection import select
from flexattn_cuda.mechanism.tokens import EncodeTiles
from flexattn_cuda.mechanism.trace import LayerTrace, Trace


class AttentionModule(Protocol):
    """A self-attention module of transformers, with the projections of HR tokens where its layer attends to them."""

    layer_idx: int
    head_dim: int
    hr_key_form: KeyForm
    k_proj_hd: nn.Linear
    v_proj_hd: nn.Linear


@dataclass
class HRArguments:
    """Arguments of `ops.hierarchical_attention` beside those of plain attention; each is documented there."""

    k_hr: torch.Tensor | None = None
    v_hr: torch.Tensor | None = None
    hr_slots: torch.Tensor | None = None
    hr_count: torch.Tensor | None = None
    hr_from: torch.Tensor | None = None
    hr_rows: torch.Tensor | None = None
    hr_row_bits: torch.Tensor | None = None
    alpha: torch.Tensor | None = None
    map_ranges: torch.Tensor | None = None
    map_size: int = 0
    map_over_all: bool = False

    def cast_keys(self, dtype: torch.dtype) -> None:
        """Convert the HR keys and values, which must have the dtype of the queries."""
        if self.k_hr is not None and self.v_hr is not None:
            self.k_hr, self.v_hr = self.k_hr.to(dtype), self.v_hr.to(dtype)

    def as_keywords(self) -> dict[str, Any]:
        """Return the arguments by name, for the call of the operator."""
        return dict(vars(self))


@dataclass(frozen=True)
class ProjectedTokens:
    """New HR tokens in one layer: keys before rotation and values [n, Hkv, d], rotary tables [n, d]."""

    k: torch.Tensor
    v: torch.Tensor
    tables: RotaryTables


@dataclass(frozen=True)
class ContextOptions:
    """How a call uses the mechanism.

    Attributes:
        alpha: Weight of the attention with HR tokens.
        trace: Records maps and selections.
        cached: Keep projected keys and values beside the cache; otherwise every layer projects what it attends to, with
            gradients.
        read_back: When the host learns how much was selected. Without `cached` it must be before each layer.
        read_counts: Where it learns it then.
    """

    alpha: float = 1.0
    trace: Trace | None = None
    cached: bool = False
    read_back: ReadBack = ReadBack.EACH_LAYER
    read_counts: CountReader = read_counts


class HRContext:
    """One forward call: `before_attention` and `after_attention` are called around every layer's attention, `finish`
    after the last layer.

    Attributes:
        images: What is kept between calls.
        rows: Which rows of the call see HR tokens.
        selected: What each layer's map selected, by that layer.
    """

    def __init__(
        self,
        images: HRCache,
        rows: Rows,
        layers: int,
        encode: EncodeTiles | None = None,
        options: ContextOptions | None = None,
    ) -> None:
        """Start a call of a model with so many layers. `encode` is needed where tiles are waiting to be encoded."""
        self.images = images
        self.rows = rows
        self.options = options or ContextOptions()
        self.selected: dict[int, ops.SelectedTokens] = {}
        self._encode = encode
        self._read_back = self.options.read_back
        self._unread: list[tuple[HRPool, ops.AssignedSlots]] = []  # what `finish` reads
        self._encoded_before = images.counters.encoded
        self._layout_on: dict[torch.device, RowLayout] = {}
        self._map_layers = range(self.config.first_layer - 1, layers - 1)
        self._traced: dict[int, LayerTrace] | None = None
        if self.options.trace is not None:
            self._traced = {}
            self.options.trace.steps.append(self._traced)
            self._map_layers = range(0 if self.options.trace.every_layer else self._map_layers.start, layers)

    @property
    def config(self) -> FlexAttnConfig:
        return self.images.settings

    def before_attention(self, module: AttentionModule, device: torch.device) -> HRArguments:
        """Return what the attention of a layer needs for its HR keys and for its map."""
        layer, arguments = module.layer_idx, HRArguments()
        if self._emits_map(layer):
            arguments.map_ranges = self._layout(device).map_ranges
            arguments.map_size = self.images.layout.cells
            arguments.map_over_all = self.config.map_softmax == "all"
        if layer >= self.config.first_layer:
            self._add_hr_keys(arguments, module, device)
        if (arguments.map_ranges is not None or arguments.k_hr is not None) and self.rows.listed is not None:
            arguments.hr_rows = self.rows.listed.to(device)
        return arguments

    def after_attention(self, module: AttentionModule, attention_map: torch.Tensor) -> None:
        """Turn the layer's map [B, R, I, C] into the selection that the next layer reads."""
        layer = module.layer_idx
        if not self._emits_map(layer):
            return
        layout = self._layout(attention_map.device)
        attention_map = layout.cells_first(attention_map)
        if self.rows.owner is not None:
            owner = self.rows.owner.to(attention_map.device)[:, :, None, None].expand_as(attention_map)
            attention_map = attention_map.gather(1, owner)
        selected = select(self.config, attention_map, layout, self.images.tokens.room)
        self.selected[layer] = selected
        if self._traced is not None:
            mask = selected.mask(self.images.layout.images)
            self._traced[layer] = LayerTrace(attention_map, mask, self.images.layout.grids)

    def finish(self) -> bool:
        """Note what the call took, with one wait for the device where the layers have not read it themselves.

        Returns:
            False if a layer lacked slots or tiles, so that the call must run again, after `start_again`.
        """
        if self._read_back is ReadBack.NEVER:
            return True
        self.images.encoded_lately = self.images.counters.encoded > self._encoded_before
        if not self._unread:
            return True
        pools, assigned = zip(*self._unread)
        device = self.images.tokens.features.device
        parts = [pool.next_free for pool in pools] + [slots.overflow for slots in assigned]
        if self.images.tokens.waiting:
            new_tokens = torch.cat([slots.new_tokens.to(device) for slots in assigned])
            parts.append(self.images.tokens.any_waiting(new_tokens))
        numbers = torch.cat([part.to(device) for part in parts]).tolist()
        used, lacking = numbers[: len(pools)], any(numbers[len(pools) :])
        for pool, slots_in_use in zip(pools, used):
            if lacking:
                pool.take_back()
            else:
                self.images.counters.projected += slots_in_use - pool.used
                pool.note_used(slots_in_use)
        return not lacking

    def start_again(self) -> None:
        """Forget the layers, to run them again with the counts read before each of them."""
        self._read_back = ReadBack.EACH_LAYER
        self._unread.clear()
        self.selected.clear()
        if self._traced is not None:
            self._traced.clear()

    @profiling.in_phase("project_hr_keys")
    def _add_hr_keys(self, arguments: HRArguments, module: AttentionModule, device: torch.device) -> None:
        """Add the keys and values of what the layer before selected; those that this layer lacks are projected."""
        selected = ops.SelectedTokens(*(part.to(device) for part in self.selected[module.layer_idx - 1]))
        pool = self._pool(module, device)
        features = self.images.tokens.features
        in_one_pass = device == features.device and are_plain(module, features)
        if self._read_back is ReadBack.EACH_LAYER or (self._read_back is ReadBack.AFTER_CALL and not in_one_pass):
            self._add_counted_keys(arguments, module, pool, selected)
        else:
            self._add_uncounted_keys(arguments, module, pool, selected, in_one_pass)

    def _add_counted_keys(
        self, arguments: HRArguments, module: AttentionModule, pool: HRPool, selected: ops.SelectedTokens
    ) -> None:
        """Project exactly the new tokens, once the host knows how many there are."""
        assigned = pool.assign(selected)
        counts = self._counts(module, pool, selected, assigned)
        pool.latest = counts.new
        if counts.selected == 0:
            return
        device = selected.count.device
        arguments.k_hr, arguments.v_hr = pool.k, pool.v
        if counts.new:
            new = self._project(module, assigned.new_tokens[: counts.new], device)
            self.images.counters.projected += counts.new
            if self.options.cached:
                pool.store(new.k, new.v, new.tables, assigned.new_slots[: counts.new])
                arguments.k_hr, arguments.v_hr = pool.k, pool.v
            else:
                cos, sin = (table[:, None] for table in new.tables)
                arguments.k_hr, arguments.v_hr = rotate(new.k, cos, sin), new.v
        arguments.hr_slots = assigned.slots[:, : counts.selected].contiguous()
        arguments.hr_count = selected.count
        self._add_rows(arguments, selected)

    def _add_uncounted_keys(
        self,
        arguments: HRArguments,
        module: AttentionModule,
        pool: HRPool,
        selected: ops.SelectedTokens,
        in_one_pass: bool,
    ) -> None:
        """Project the new tokens in the pool as it is, and read nothing back.

        Where a token found no slot no HR key is seen: the answer is lost, and `finish` or `check_overflow` says so.
        """
        assigned = pool.assign_within(selected)
        if self._read_back is ReadBack.AFTER_CALL:
            self._unread.append((pool, assigned))
        else:
            pool.overflow[:1].add_(assigned.overflow)
        if pool.k is None:
            return
        arguments.k_hr, arguments.v_hr, arguments.hr_slots = pool.k, pool.v, assigned.slots
        arguments.hr_count = assigned.usable
        self._add_rows(arguments, selected)
        if in_one_pass:
            pool.project(module, self.images.tokens, assigned)
        else:
            self._project_at_once(arguments, module, pool, assigned)

    def _project_at_once(
        self, arguments: HRArguments, module: AttentionModule, pool: HRPool, assigned: ops.AssignedSlots
    ) -> None:
        """Project NEW_AT_ONCE tokens for each row, however many are new, by any kind of linear layer."""
        at_once = NEW_AT_ONCE * self.rows.batch
        new = self._project(module, assigned.new_tokens[:at_once], assigned.slots.device)
        pool.write(new.k, new.v, new.tables, assigned.new_slots[:at_once])
        missing = (assigned.new_count - at_once).clamp(min=0)
        pool.overflow[1:].add_(missing)
        arguments.hr_count = torch.where(missing > 0, 0, assigned.usable)

    def _add_rows(self, arguments: HRArguments, selected: ops.SelectedTokens) -> None:
        """Say which rows see the HR keys, which of them, and with what weight."""
        assert arguments.hr_slots is not None
        device = arguments.hr_slots.device
        arguments.alpha = self._alpha(device)
        if self.rows.first is not None:
            arguments.hr_from = self.rows.first.to(device)
        elif self.rows.listed is not None and self.rows.listed.shape[1] > 1:
            words = (arguments.hr_slots.shape[1] + 31) // 32
            arguments.hr_row_bits = selected.row_bits[:, :, :words].contiguous()

    def _counts(
        self, module: AttentionModule, pool: HRPool, selected: ops.SelectedTokens, assigned: ops.AssignedSlots
    ) -> Counts:
        """Return how much was selected, with the tiles that it lies in encoded."""
        tokens = self.images.tokens
        counts = self.options.read_counts(selected, assigned, tokens)
        if counts.overflow:
            raise PoolOverflow(
                f"layer {module.layer_idx} has no room for {counts.overflow} selected tokens: "
                f"hr_capacity={pool.capacity} is too small"
            )
        if tokens.waiting and counts.tiles:
            assert self._encode is not None
            self.images.counters.encoded += tokens.encode(counts.tiles, self._encode)
        return counts

    def _pool(self, module: AttentionModule, device: torch.device) -> HRPool:
        """Return the layer's pool: the one beside the cache, or an empty one that lives for this layer alone."""
        layer, images = module.layer_idx, self.images
        if not self.options.cached:
            return HRPool(images.prompts, images.tokens.count, device)
        if layer not in images.pools:
            pool = HRPool(images.prompts, images.tokens.count, device)
            if images.capacity is not None:
                heads = module.k_proj_hd.out_features // module.head_dim
                pool.fix(images.capacity, heads, module.head_dim, images.tokens.features.dtype)
            images.pools[layer] = pool
        return images.pools[layer]

    def _project(self, module: AttentionModule, tokens: torch.Tensor, device: torch.device) -> ProjectedTokens:
        """Project tokens [n], counted over prompts, -1 for none."""
        rows = self.images.tokens.gather(tokens, device)
        form = module.hr_key_form
        tables = form.own_tables(rows.tables)
        k = form.normalise(module, module.k_proj_hd(rows.features), module.head_dim)
        v = module.v_proj_hd(rows.features).unflatten(-1, (-1, module.head_dim))
        if form.rotation is not Rotation.HALF_SPLIT:  # the one form that the operators compute
            k, tables = form.rotate(module, k, tables), no_rotation(k)
        dtype = rows.features.dtype  # that of the queries; under autocast the projections return another one
        return ProjectedTokens(k.to(dtype), v.to(dtype), tables)

    def _alpha(self, device: torch.device) -> torch.Tensor | None:
        """Return alpha for every row of the batch, or None where it is 1."""
        if self.options.alpha == 1.0:
            return None
        return torch.full((self.rows.batch,), self.options.alpha, dtype=torch.float32, device=device)

    def _emits_map(self, layer: int) -> bool:
        return layer in self._map_layers

    def _layout(self, device: torch.device) -> RowLayout:
        """Return where the images stand for every row of the batch, on a layer's device."""
        if device not in self._layout_on:
            layout = self.images.layout
            self._layout_on[device] = layout.on(device, self.rows.batch // layout.prompts, self.config.pool)
        return self._layout_on[device]
