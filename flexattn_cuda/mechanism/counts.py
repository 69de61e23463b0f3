"""How many tokens a layer selected: the one thing that the host must know of a selection.

A `CountReader` returns it. `read_counts` waits for the device; `KnownCounts` returns fixed counts, for a model on meta
tensors, where there is nothing to read (analysis/flops.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple, Protocol

import torch

from flexattn_cuda import ops
from flexattn_cuda.mechanism.tokens import HRTokens


class ReadBack(Enum):
    """When the host learns how much the layers of a call selected."""

    EACH_LAYER = "before a layer attends to it"
    AFTER_CALL = "once, after a decoding step, which is repeated where a layer lacked slots or tiles"
    NEVER = "not at all, so that a step can be a CUDA graph; pools of fixed size count what does not fit"


class Counts(NamedTuple):
    """What the host must know of a layer's selection before the layer can attend to it.

    Attributes:
        selected: HR tokens that the row of the batch with the most of them selects.
        new: Tokens whose keys the layer does not have yet.
        overflow: Tokens that found no slot in the layer's pool.
        tiles: Numbers of the tiles that the new tokens lie in, which may have to be encoded first.
    """

    selected: int
    new: int
    overflow: int
    tiles: Sequence[int]


class CountReader(Protocol):
    """Return the counts of a selection, the slots assigned to it, and the HR tokens that it selects from."""

    def __call__(self, selected: ops.SelectedTokens, assigned: ops.AssignedSlots, tokens: HRTokens) -> Counts: ...


def read_counts(selected: ops.SelectedTokens, assigned: ops.AssignedSlots, tokens: HRTokens) -> Counts:
    """Read the counts from the device, in the one wait that a layer takes."""
    numbers = torch.cat([selected.count.amax()[None], assigned.new_count, assigned.overflow])
    if not tokens.waiting:
        count, new, overflow = numbers.tolist()
        return Counts(count, new, overflow, ())
    # The last flag takes the entries without a token.
    flags = numbers.new_zeros(tokens.tile_count + 1)
    new_tokens = assigned.new_tokens
    flags.scatter_(0, torch.where(new_tokens >= 0, tokens.tile_numbers(new_tokens), tokens.tile_count), 1)
    count, new, overflow, *needed = torch.cat([numbers, flags[:-1]]).tolist()
    return Counts(count, new, overflow, [number for number, flag in enumerate(needed) if flag])


class KnownCounts:
    """Reports the same counts for every layer: `selected` tokens, all of them new, in the first `tiles` tiles."""

    def __init__(self, selected: int, tiles: int) -> None:
        self.counts = Counts(selected, selected, 0, range(tiles))

    def __call__(self, selected: ops.SelectedTokens, assigned: ops.AssignedSlots, tokens: HRTokens) -> Counts:
        return self.counts
