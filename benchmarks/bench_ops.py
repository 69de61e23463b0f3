"""The CPU operators against the same thing in eager torch, as ratios within one run.

    python benchmarks/bench_ops.py [--threads 1,2] [--seconds 1] [--csv ops.csv] [--only decode]

Eager attention is what a model without these operators would run: all keys in one tensor (sequence and gathered HR keys
concatenated), a mask, matmul, softmax, matmul, and the map from the probabilities. `sdpa` is torch's fused attention on
the same keys and mask; it has no map. The methods take turns, and the median of each is compared.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import measuring
import tables
import torch
from attention.case import AttentionCase
from torch.nn import functional

from flexattn_cuda import ops

SIDE, HR_SIDE, POOL_SIDE = 24, 72, 9  # of the grids of LR tokens, of HR tokens, and of the pooled map
METHODS = ("ours", "eager", "sdpa")


@dataclass
class Operation:
    """The same computation by some of `METHODS`."""

    name: str
    methods: dict[str, Callable]
    backward: bool = False


def attention(*sizes, **options) -> Operation:
    """Return a call of attention, from the arguments of AttentionCase."""
    case = AttentionCase(*sizes, **options)
    kind = "training" if case.backward else "decode" if case.N == 1 else "prefill"
    rows = "all rows" if case.rows == "all" else "last row"
    name = f"{kind} N={case.N} Nk={case.Nk} M={case.M} {rows} {str(case.dtype).removeprefix('torch.')}"
    if case.kv_heads != case.heads:
        name += f" Hkv={case.kv_heads}"
    return Operation(name, {method: case.run(method) for method in METHODS}, case.backward)


def selection() -> Operation:
    """Map to HR tokens, as released: min-max, threshold, 9 x 9 pool, 72 x 72 tokens."""
    maps = torch.rand(1, 1, 1, SIDE**2, generator=torch.Generator().manual_seed(0)) ** 8
    lr_grid, hr_grid, pool_grid = (
        torch.full((1, 1, 2), side, dtype=torch.int32) for side in (SIDE, HR_SIDE, POOL_SIDE)
    )

    def ours() -> ops.SelectedTokens:
        return ops.select_tokens(
            maps, lr_grid, hr_grid, hr_tokens=HR_SIDE**2, scale=255.0, threshold=48.0, pool_grid=pool_grid
        )

    def eager() -> tuple[torch.Tensor, torch.Tensor]:
        grid = maps.view(1, 1, SIDE, SIDE)
        normalised = (grid - grid.min()) / (grid.max() - grid.min())
        pooled = functional.adaptive_max_pool2d((normalised * 255 > 48).float(), POOL_SIDE)
        mask = functional.interpolate(pooled, size=HR_SIDE, mode="nearest").bool().flatten()
        return mask, mask.nonzero()

    return Operation(f"select_tokens {SIDE} -> {POOL_SIDE} -> {HR_SIDE}", {"ours": ours, "eager": eager})


def gathering() -> Operation:
    tokens = torch.randn(1, HR_SIDE**2, 1024)
    index = torch.randperm(HR_SIDE**2)[:2250].sort().values.int()[None]
    ours, eager = lambda: ops.gather_tokens(tokens, index), lambda: tokens[:, index[0].long()]
    return Operation("gather_tokens M=2250 D=1024", {"ours": ours, "eager": eager})


def operations() -> Iterator[Operation]:
    """Yield what is measured; inputs are made when it is asked for."""
    for rows, M in (("last", 0), ("last", 512), ("last", 2250), ("all", 512), ("all", 2250)):
        yield attention(640, 640, M, rows)
    for M in (0, 512, 2250, 5184):
        yield attention(1, 656, M)
    for dtype in (torch.bfloat16, torch.float16):
        yield attention(640, 640, 512, "last", dtype)
        yield attention(1, 656, 2250, "last", dtype)
    yield attention(640, 640, 2250, "all", torch.bfloat16)
    yield attention(640, 640, 512, "last", kv_heads=4)
    yield attention(1, 656, 2250, "last", kv_heads=4)
    yield attention(640, 640, 512, "last", backward=True)
    yield attention(640, 640, 2250, "all", backward=True)
    yield selection()
    yield gathering()


@dataclass(frozen=True)
class Row:
    operation: str
    threads: int
    timings: dict[str, measuring.Timing]  # by method

    def milliseconds(self, method: str) -> float | None:
        return self.timings[method].seconds * 1e3 if method in self.timings else None

    def over_ours(self, method: str) -> float | None:
        if method not in self.timings:
            return None
        return self.timings[method].seconds / self.timings["ours"].seconds

    def columns(self) -> dict[str, str | float | None]:
        """Return the row of the CSV file."""
        return {
            "case": self.operation,
            "threads": self.threads,
            "runs": self.timings["ours"].runs,
            **{f"{method}_ms": self.milliseconds(method) for method in METHODS},
            **{f"{method}_over_ours": self.over_ours(method) for method in METHODS[1:]},
        }

    def cells(self) -> list[str]:
        """Return the row of the printed table."""
        times, ratios = map(self.milliseconds, METHODS), map(self.over_ours, METHODS[1:])
        return [
            self.operation,
            str(self.threads),
            *("-" if time is None else f"{time:.3f}" for time in times),
            *("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
        ]


def measure(operation: Operation, threads: int, seconds: float) -> Row:
    torch.set_num_threads(threads)
    with torch.set_grad_enabled(operation.backward):
        return Row(operation.name, threads, measuring.medians(operation.methods, seconds))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", default="1,2", help="thread counts, comma-separated (default: 1,2)")
    parser.add_argument("--seconds", type=float, default=1.0, help="seconds of measuring per case (default: 1)")
    parser.add_argument("--only", default="", metavar="TEXT", help="measure cases whose name contains TEXT")
    parser.add_argument("--csv", metavar="FILE", help="write the table as CSV")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    rows = []
    for threads in map(int, args.threads.split(",")):
        for operation in operations():
            if args.only in operation.name:
                rows.append(measure(operation, threads, args.seconds))
                print(".", end="", flush=True)
    print()
    tables.print_table(
        f"Milliseconds, medians of runs that take turns; B=1 H={AttentionCase.heads} d={AttentionCase.head_dim}; "
        f"{measuring.machine('cpu')}",
        ("case", "threads", *METHODS, "eager/ours", "sdpa/ours"),
        [row.cells() for row in rows],
    )
    if args.csv:
        tables.write_csv(args.csv, [row.columns() for row in rows])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
