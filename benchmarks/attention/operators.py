"""The operators around attention, each against the reference; what they move is compared with a plain copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from attention.clock import PreparedCall
from attention.comparison import About, Comparison, Errors, Planned, WrongResultError, max_error
from attention.plan import Plan
from flexattn_cuda import ops, reference


def operators(plan: Plan) -> Iterator[Planned]:
    sizes = OperatorSizes.of(plan)
    builders = {"select_tokens": select, "gather_tokens": gather, "assign_slots": assign, "write_hr_kv": write}
    for name, build in builders.items():
        yield Planned(name, partial(build, name, plan, sizes))


@dataclass(frozen=True)
class OperatorSizes:
    batch: int
    tokens: int  # HR tokens of an image
    selected: int
    capacity: int  # of the pool

    @classmethod
    def of(cls, plan: Plan) -> OperatorSizes:
        batch, tokens = plan.sizes.batches[-1], plan.sizes.hr_side**2
        return cls(batch, tokens, plan.sizes.selected[0], batch * tokens)


def compare(
    name: str, sizes: OperatorSizes, call: Callable, check: Callable[[str, Callable], Errors], moved: int
) -> Comparison:
    return Comparison(About(name, name, batch=sizes.batch, selected=sizes.selected), {"ours": [call]}, check, moved)


def equals(expected: Callable[[], Sequence[torch.Tensor]]) -> Callable[[str, Callable], Errors]:
    """Return a check that every result of a call equals the expected one."""

    def check(method: str, call: Callable) -> Errors:
        for found, wanted in zip(call(), expected()):
            if not torch.equal(found.cpu(), wanted.cpu()):
                raise WrongResultError("it differs from the reference")
        return Errors(0.0)

    return check


def bytes_of(*tensors: torch.Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def random_selection(plan: Plan, sizes: OperatorSizes) -> torch.Tensor:
    """Return [batch, selected] int32, ascending in each row."""
    rows = [
        torch.randperm(sizes.tokens, generator=plan.generator, device=plan.device)[: sizes.selected].sort().values
        for _ in range(sizes.batch)
    ]
    return torch.stack(rows).int()


def select(name: str, plan: Plan, sizes: OperatorSizes) -> Comparison:
    side, hr_side, device = plan.sizes.side, plan.sizes.hr_side, plan.device
    maps = torch.rand(sizes.batch, 1, 1, side**2, generator=plan.generator, device=device) ** 27  # few cells stand out
    lr_grid, hr_grid, pool_grid = (
        torch.full((sizes.batch, 1, 2), of, dtype=torch.int32) for of in (side, hr_side, plan.sizes.pool)
    )
    options = dict(hr_tokens=hr_side**2, scale=255.0, threshold=48.0)
    grids = [grid.to(device) for grid in (lr_grid, hr_grid, pool_grid)]

    def call() -> ops.SelectedTokens:
        return ops.select_tokens(maps, *grids[:2], pool_grid=grids[2], **options)

    check = equals(lambda: reference.select_tokens(maps.cpu(), lr_grid, hr_grid, pool_grid=pool_grid, **options))
    return compare(name, sizes, call, check, bytes_of(maps, *grids, *call()))


def gather(name: str, plan: Plan, sizes: OperatorSizes) -> Comparison:
    width = plan.sizes.heads * plan.sizes.head_dim
    tokens = torch.randn(sizes.batch, sizes.tokens, width, generator=plan.generator, device=plan.device).half()
    index = random_selection(plan, sizes)
    rows = sizes.batch * sizes.selected * width * tokens.element_size()
    return compare(
        name,
        sizes,
        lambda: [ops.gather_tokens(tokens, index)],
        equals(lambda: [reference.gather_tokens(tokens, index)]),
        2 * rows + bytes_of(index),
    )


def assign(name: str, plan: Plan, sizes: OperatorSizes) -> Comparison:
    index = random_selection(plan, sizes)
    count = torch.full((sizes.batch,), sizes.selected, dtype=torch.int32, device=plan.device)

    def empty(device: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a table without an entry, and the next free slot."""
        table = torch.full((sizes.batch, sizes.tokens), -1, dtype=torch.int32, device=device)
        return table, torch.zeros(1, dtype=torch.int32, device=device)

    table, free = empty(plan.device)

    def clear() -> None:
        table.fill_(-1)
        free.zero_()

    def call() -> list[torch.Tensor]:
        return [*ops.assign_slots(index, count, table, free, capacity=sizes.capacity), table, free]

    def expected() -> list[torch.Tensor]:
        pool = empty("cpu")
        return [*reference.assign_slots(index.cpu(), count.cpu(), *pool, capacity=sizes.capacity), *pool]

    moved = 6 * bytes_of(index)  # index, table twice, three lists
    return compare(name, sizes, PreparedCall(call, clear), equals(expected), moved)


def write(name: str, plan: Plan, sizes: OperatorSizes) -> Comparison:
    rows, heads, d = sizes.batch * sizes.selected, plan.sizes.heads, plan.sizes.head_dim
    random = dict(generator=plan.generator, device=plan.device)
    k, v = (torch.randn(rows, heads, d, **random).half() for _ in range(2))
    angle = torch.rand(rows, d, **random)
    cos, sin, slots = angle.cos(), angle.sin(), torch.randperm(sizes.capacity, **random)[:rows].int()
    pools = [torch.zeros(sizes.capacity, heads, d, device=plan.device, dtype=torch.float16) for _ in range(2)]

    def call() -> None:
        ops.write_hr_kv(k, v, cos, sin, slots, *pools)

    def check(method: str, call: Callable) -> Errors:
        call()
        exact = [torch.zeros_like(pool, dtype=torch.float64) for pool in pools]
        reference.write_hr_kv(k.double(), v.double(), cos.double(), sin.double(), slots, *exact)
        found = zip(pools, exact)
        return Errors(max(max_error("a pool", pool, wanted, wanted.abs().max().item(), 1) for pool, wanted in found))

    return compare(name, sizes, call, check, 2 * bytes_of(k, v) + bytes_of(cos, sin, slots))
