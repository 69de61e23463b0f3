"""Keys and values of the high-resolution (HR) tokens: each is projected once per layer, when it is first selected there."""

from __future__ import annotations

import torch

from flexattn_cuda import ops

SPARE = 0.25  # of the slots in use, so that a selection that drifts does not copy a pool at every step
NEW_AT_ONCE = 256  # tokens of a row that a layer may newly select in one step where their number is not read back


class HRPool:
    """One layer's pool, shared by the batch. It grows with the tokens ever selected, never with the image's resolution.

    table: [G, T] int32, the slot of each of the T HR tokens of G prompts; -1 = never selected.
    next_free: [1] int32, on the device.
    k, v: [capacity, Hkv, d]; None before the first token.
    used: How many slots are taken, as far as the host knows: not those that a step took without reading back.
    fixed: Whether it never grows, so that its addresses stay (CUDA graphs).
    overflow: [2] int32, how many tokens found no slot in a fixed pool, and how many were too many at once. The answer is
        wrong from then on.
    """

    def __init__(self, prompts: int, tokens: int, device: torch.device):
        self.table = torch.full((prompts, tokens), -1, dtype=torch.int32, device=device)
        self.next_free = torch.zeros(1, dtype=torch.int32, device=device)
        self.k: torch.Tensor | None = None
        self.v: torch.Tensor | None = None
        self.used = 0
        self.fixed = False
        self.overflow = torch.zeros(2, dtype=torch.int32, device=device)

    def fix(self, capacity: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
        """Takes all its memory now, and never grows."""
        self.k, self.v = (torch.zeros(capacity, heads, head_dim, dtype=dtype, device=self.table.device) for _ in "kv")
        self.fixed = True
        self._keep_addresses()

    @property
    def capacity(self) -> int:
        return 0 if self.k is None else self.k.shape[0]

    @property
    def bytes(self) -> int:
        return 0 if self.k is None else 2 * self.k.nbytes

    def assign(self, selected: ops.SelectedTokens) -> ops.AssignedSlots:
        """Slots of the selected tokens; the new ones are to be handed to `store`."""
        capacity = self.capacity if self.fixed else self.table.numel()
        return ops.assign_slots(selected.index, selected.count, self.table, self.next_free, capacity=capacity)

    def store(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        slots: torch.Tensor,
    ) -> None:
        """Rotates the new tokens' keys and writes both: keys, values [new, Hkv, d], cos, sin [new, d], slots [new]."""
        self._hold(self.used + len(keys), keys)
        ops.write_hr_kv(keys, values, cos, sin, slots, self.k, self.v)
        self.used += len(keys)

    def add_images(self, tokens: int) -> None:
        """Room in the table for so many more tokens of every prompt."""
        self.table = torch.nn.functional.pad(self.table, (0, tokens), value=-1)
        if self.fixed:
            self._keep_addresses()

    def _keep_addresses(self) -> None:
        for tensor in (self.k, self.v, self.table, self.next_free, self.overflow):
            torch._dynamo.mark_static_address(tensor)

    def _hold(self, tokens: int, like: torch.Tensor) -> None:
        if tokens <= self.capacity:
            return
        capacity = min(tokens if self.k is None else int(tokens * (1 + SPARE)), self.table.numel())
        for name in (
            "k",
            "v",
        ):  # one after the other: the old and the new one of both never stand side by side
            grown = like.new_empty(capacity, *like.shape[1:])
            if self.used:
                grown[: self.used] = getattr(self, name)[: self.used]
            setattr(self, name, grown)
