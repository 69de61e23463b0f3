"""Keys and values of the high-resolution (HR) tokens: each is projected once per layer, when first selected there."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from flexattn_cuda import ops
from flexattn_cuda.mechanism.keys import KeyForm
from flexattn_cuda.mechanism.rotary import RotaryTables
from flexattn_cuda.mechanism.tokens import HRTokens, with_room

SPARE = 0.25  # of the slots in use, so that a selection that drifts does not copy the pool at every step
# Tokens of a row that a layer whose projections are not plain linear layers may newly select in a step that does not
# read their number back.
NEW_AT_ONCE = 256
# New tokens of a layer that are worth no wait for their number. `ops.project_hr_kv` reads the weights once for every
# eight of them.
FEW = 64


class Projections(Protocol):
    """The linear layers that make keys and values of HR tokens, and what becomes of the keys."""

    hr_key_form: KeyForm
    k_proj_hd: nn.Linear
    v_proj_hd: nn.Linear


def are_plain(projections: Projections, like: torch.Tensor) -> bool:
    """Whether keys and values are products with weights of the dtype and on the device of `like`, keys as LLaMA's.

    They are not where a layer has an adapter (LoRA is a layer of another class) or quantised weights (torchao's are
    tensors of another class).
    """
    device = like.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return False
    return projections.hr_key_form.is_plain and all(
        type(linear) is nn.Linear
        and type(linear.weight) in (nn.Parameter, torch.Tensor)
        and (linear.weight.dtype, linear.weight.device) == (like.dtype, like.device)
        and not (linear._forward_hooks or linear._forward_pre_hooks)
        for linear in (projections.k_proj_hd, projections.v_proj_hd)
    )


class HRPool:
    """One layer's pool, shared by the batch. It grows with the tokens ever selected, never with the image's resolution.

    Attributes:
        table: [G, T] int32, the slot of each of the T HR tokens of G prompts; -1 = never selected.
        next_free: [1] int32, on the device.
        k, v: [capacity, Hkv, d]; None before the first token.
        used: Slots in use as far as the host knows; a step that reads nothing back does not count its own.
        latest: How many of them the latest call took.
        max_slots: Slots in use once every token is selected.
        fixed: Whether the pool never grows, so that its addresses stay (CUDA graphs).
        overflow: [2] int32, how many tokens found no slot in a fixed pool, and how many were too many at once. The
            answer is wrong from then on.
    """

    def __init__(self, prompts: int, tokens: int, device: torch.device) -> None:
        with torch.inference_mode(False):  # they may be written outside of inference mode later
            self.table = torch.full((prompts, tokens), -1, dtype=torch.int32, device=device)
            self.next_free = torch.zeros(1, dtype=torch.int32, device=device)
            self.overflow = torch.zeros(2, dtype=torch.int32, device=device)
        self.k: torch.Tensor | None = None
        self.v: torch.Tensor | None = None
        self.used = self.latest = 0
        self.max_slots = self.table.numel()
        self.fixed = False

    def fix(self, capacity: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
        """Allocate all memory now and never grow."""
        shape, device = (capacity, heads, head_dim), self.table.device
        with torch.inference_mode(False):  # it may be written outside of inference mode later
            self.k = torch.zeros(shape, dtype=dtype, device=device)
            self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.fixed = True
        self._keep_addresses()

    @property
    def capacity(self) -> int:
        return 0 if self.k is None else self.k.shape[0]

    @property
    def bytes(self) -> int:
        return 0 if self.k is None else 2 * self.k.nbytes

    @property
    def is_settled(self) -> bool:
        """Whether the latest call brought few tokens, and twice as many would fit, or all that there are."""
        has_room = self.used + 2 * self.latest <= self.capacity or self.capacity == self.max_slots
        return self.latest <= FEW and has_room

    def assign(self, selected: ops.SelectedTokens) -> ops.AssignedSlots:
        """Return the slots of the selected tokens; the new ones among them are to be passed to `store`."""
        capacity = self.capacity if self.fixed else self.max_slots
        return ops.assign_slots(selected.index, selected.count, self.table, self.next_free, capacity=capacity)

    def assign_within(self, selected: ops.SelectedTokens) -> ops.AssignedSlots:
        """Return the slots of the selected tokens in the pool as it is; no row can have more than there are."""
        return ops.assign_slots(
            selected.index, selected.count, self.table, self.next_free, capacity=self.capacity,
            width=min(self.capacity, selected.index.shape[1]),
        )  # fmt: skip

    def project(self, projections: Projections, tokens: HRTokens, assigned: ops.AssignedSlots) -> None:
        """Project the new tokens, whose number the host need not know, and write them; see `are_plain`."""
        assert self.k is not None and self.v is not None
        k, v = projections.k_proj_hd, projections.v_proj_hd
        ops.project_hr_kv(
            tokens.features, *tokens.tables, k.weight, v.weight, assigned.new_tokens, assigned.new_slots,
            assigned.new_count, self.k, self.v, k_bias=k.bias, v_bias=v.bias,
        )  # fmt: skip

    def note_used(self, slots: int) -> None:
        """Note how many slots are in use, and make room for the next call."""
        self.latest = slots - self.used
        self.used = slots
        if self.k is not None:
            self.ensure_capacity(slots, self.k)

    def take_back(self) -> None:
        """Forget the tokens that took a slot since the host last knew how many are in use."""
        self.table.masked_fill_(self.table >= self.used, -1)
        self.next_free.fill_(self.used)

    def store(self, keys: torch.Tensor, values: torch.Tensor, tables: RotaryTables, slots: torch.Tensor) -> None:
        """Write new tokens as `write` does, into a pool that grows as far as it must."""
        self.ensure_capacity(self.used + len(keys), keys)
        self.write(keys, values, tables, slots)
        self.used += len(keys)

    def write(self, keys: torch.Tensor, values: torch.Tensor, tables: RotaryTables, slots: torch.Tensor) -> None:
        """Rotate keys and write both: keys, values [n, Hkv, d], tables [n, d], slots [n] with -1 for rows to skip."""
        assert self.k is not None and self.v is not None
        ops.write_hr_kv(keys, values, tables.cos, tables.sin, slots, self.k, self.v)

    def ensure_capacity(self, slots: int, like: torch.Tensor) -> None:
        """Hold at least this many slots, and some for the next calls; `like` gives a slot's shape, dtype and device."""
        if self.k is not None and slots + 2 * self.latest <= self.capacity:
            return
        capacity = min(slots if self.k is None else int(slots * (1 + SPARE)), self.max_slots)
        if capacity <= self.capacity:
            return
        # One after the other: old and new of both never exist at the same time.
        self.k = self._grown(self.k, capacity, like)
        self.v = self._grown(self.v, capacity, like)

    def add_tokens(self, tokens: int) -> None:
        """Extend the table by this many tokens of every prompt."""
        with torch.inference_mode(False):
            self.table = torch.nn.functional.pad(self.table, (0, tokens), value=-1)
        self.max_slots += self.table.shape[0] * tokens
        if self.fixed:
            self._keep_addresses()

    def make_room(self, images: int, room: int) -> None:
        """Renumber the tokens: every one of `images` has room for `room` of them from now on."""
        with torch.inference_mode(False):
            self.table = with_room(self.table, images, room, fill=-1)
        if self.fixed:
            self._keep_addresses()

    def select_prompts(self, prompts: torch.Tensor) -> None:
        """Keep the prompts of these numbers, in this order; a repeated one shares the slots that it has so far."""
        with torch.inference_mode(False):
            self.table = self.table[prompts.to(self.table.device)]
        self.max_slots = self.used + self.table.numel()
        if self.fixed:
            self._keep_addresses()

    def _grown(self, old: torch.Tensor | None, capacity: int, like: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(False):
            grown = torch.empty(capacity, *like.shape[1:], dtype=like.dtype, device=like.device)
        if old is not None:
            grown[: self.used] = old[: self.used]
        return grown

    def _keep_addresses(self) -> None:
        for tensor in (self.k, self.v, self.table, self.next_free, self.overflow):
            torch._dynamo.mark_static_address(tensor)
