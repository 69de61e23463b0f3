"""Arguments of one small call of each operator, any of which can be replaced by name, and of random calls of attention.

`in_schema_order` makes them the positional arguments of `torch.ops.flexattn_cuda`, so that a test names only those that
it is about.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


def ints(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def in_schema_order(operator: str, /, **arguments: Any) -> tuple[Any, ...]:
    """Return the arguments of `torch.ops.flexattn_cuda` in the order of the schema, None for optional ones left out."""
    schema = getattr(torch.ops.flexattn_cuda, operator).default._schema
    optional = {declared.name: None for declared in schema.arguments if isinstance(declared.type, torch.OptionalType)}
    complete = optional | arguments
    assert complete.keys() == {declared.name for declared in schema.arguments}, f"{operator} takes {schema}"
    return tuple(complete[declared.name] for declared in schema.arguments)


def attention_arguments(**changes: Any) -> dict[str, Any]:
    base = dict(
        q=torch.randn(2, 4, 5, 8),
        k=torch.randn(2, 2, 11, 8),
        v=torch.randn(2, 2, 11, 8),
        k_hr=torch.randn(9, 2, 8),
        v_hr=torch.randn(9, 2, 8),
        hr_slots=ints([[0], [0]]),
        hr_count=ints([1, 1]),
        hr_rows=ints([[4], [4]]),
    )
    return base | changes


def selection_arguments(**changes: Any) -> dict[str, Any]:
    base = dict(
        attention_map=torch.rand(1, 1, 1, 9),
        lr_grid=ints([[[3, 3]]]),
        hr_grid=ints([[[6, 6]]]),
        hr_tokens=36,
        scale=1.0,
        threshold=0.5,
    )
    return base | changes


def assign_arguments(**changes: Any) -> dict[str, Any]:
    base = dict(index=ints([[4, 2]]), count=ints([2]), table=ints([[-1] * 7]), next_free=ints([3]), capacity=9)
    return base | changes


def project_arguments(**changes: Any) -> dict[str, Any]:
    """Two prompts of three tokens with 6 channels; two key heads of 4; the last of three rows is not counted."""
    base = dict(
        features=torch.randn(2, 3, 6),
        cos=torch.randn(2, 3, 4),
        sin=torch.randn(2, 3, 4),
        k_weight=torch.randn(8, 6),
        v_weight=torch.randn(8, 6),
        tokens=ints([4, 0, -1]),
        slots=ints([1, 5, -1]),
        count=ints([2]),
        k_pool=torch.zeros(7, 2, 4),
        v_pool=torch.zeros(7, 2, 4),
    )
    return base | changes


def write_arguments(**changes: Any) -> dict[str, Any]:
    base = dict(
        k=torch.randn(2, 3, 4),
        v=torch.randn(2, 3, 4),
        cos=torch.randn(2, 4),
        sin=torch.randn(2, 4),
        slots=ints([5, 0]),
        k_pool=torch.zeros(6, 3, 4),
        v_pool=torch.zeros(6, 3, 4),
    )
    return base | changes


@dataclass
class AttentionSizes:
    """Sizes of a call of attention, named as in `flexattn_cuda.ops`."""

    B: int
    H: int
    Hkv: int
    N: int
    Nk: int
    d: int
    M: int

    @property
    def slots(self) -> int:
        """More than the samples own, so that some slots are unused."""
        return self.B * self.M + 3

    @property
    def work(self) -> int:
        """Products in the logits, if every query sees every key."""
        return self.B * self.H * self.N * (self.Nk + self.M) * self.d


class RandomTensors:
    """Random tensors for a call of attention with these sizes."""

    def __init__(self, sizes: AttentionSizes, seed: int):
        self.sizes = sizes
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=dtype)

    def chances(self, *shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=self.generator)

    def distinct(self, values: int, count: int) -> torch.Tensor:
        """[B, count] int32 in [0, values), each row without repetition."""
        rows = [torch.randperm(values, generator=self.generator)[:count] for _ in range(self.sizes.B)]
        return torch.stack(rows).int()

    def ranges(self, ends: list[int], count: int) -> torch.Tensor:
        """[B, count, 2] int32 ranges of positions below `ends`, ascending and disjoint; some touch, some are empty."""
        bounds = [torch.randint(0, end + 1, (2 * count,), generator=self.generator).sort().values for end in ends]
        ranges = torch.stack(bounds).int().view(-1, count, 2)
        if count > 1:
            ranges[-1, -1] = 0  # that sample has one image fewer
        return ranges
