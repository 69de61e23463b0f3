"""Forced selections: a share of the HR tokens, whatever the maps say. The selection from the maps still runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from flexattn_cuda import ops
from flexattn_cuda.mechanism import context, selection


class ForcedSelection:
    """Stands in for the selection: `steps[t]` is what every layer's map selects in the t-th call of the model."""

    def __init__(self, steps: list[ops.SelectedTokens], layers: int):
        self.steps, self.layers, self.calls = steps, layers, 0

    def __call__(self, *arguments) -> ops.SelectedTokens:
        selection.select(*arguments)  # its cost belongs to the model's
        step = min(self.calls // self.layers, len(self.steps) - 1)
        self.calls += 1
        return self.steps[step]


@contextlib.contextmanager
def forced(stand_in: ForcedSelection | None) -> Iterator[None]:
    """Let `stand_in` select in every model that is called inside; None changes nothing."""
    real = context.select
    context.select = stand_in or real
    try:
        yield
    finally:
        context.select = real


def selected(tokens: torch.Tensor, total: int, device: str, rows: int = 1) -> ops.SelectedTokens:
    """Return what the operator gives for these of `total` tokens, in each of so many rows of a batch."""
    index = torch.full((rows, total), -1, dtype=torch.int32)
    index[:, : len(tokens)] = tokens.sort().values.int()
    bits = ops.pack_bits((torch.arange(total) < len(tokens)).expand(rows, 1, total))
    count = torch.full((rows,), len(tokens), dtype=torch.int32)
    return ops.SelectedTokens(*(part.to(device) for part in (index, count, bits)))


def in_tiles(count: int, tiles: int, side: int, zoom: int) -> torch.Tensor:
    """Return random tokens [count] of the first of zoom x zoom tiles of a grid of side x side tokens."""
    tile = torch.arange(side) // (side // zoom)
    inside = (tile[:, None] * zoom + tile < tiles).flatten().nonzero().flatten()
    return inside[torch.randperm(len(inside), generator=torch.Generator().manual_seed(1))[:count]]


def random_selections(share: float, churn: float, total: int, steps: int, device: str) -> list[ops.SelectedTokens]:
    """Return a random share of the tokens for every step.

    churn: Share of these that later steps replace by tokens that were not chosen before.
    """
    order = torch.randperm(total, generator=torch.Generator().manual_seed(1))
    count, new = round(share * total), round(churn * share * total)
    found = [order[new * step % (total - count + 1) :][:count] for step in range(steps if new else 1)]
    return [selected(tokens, total, device) for tokens in found]
