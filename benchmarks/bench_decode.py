"""What a decoding step costs outside of the kernels: dispatched operators, waits for the device, projected rows.

    python benchmarks/bench_decode.py [--seconds 1] [--csv decode.csv]

Nothing of this depends on the machine but the last table. A tiny random model with 8 HR layers decodes with forced
selections of a tenth of the HR tokens: the same ones at every step ("steady"), or a tenth of them new at every step
("churn"). The operators that the mechanism dispatches in a layer are those within its attention function; transformers'
own are not among them. Every call that reads a value of a tensor counts as a wait, since it is one on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import measuring
import tables
import torch
from model_cost.backbone import SHAPES, SIDE, TEXT, Backbone
from model_cost.systems import System
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, DynamicCache, StaticCache

from flexattn_cuda import ops
from flexattn_cuda.analysis.forced import forced
from flexattn_cuda.mechanism import attention
from flexattn_cuda.mechanism.cache import HRCache
from flexattn_cuda.mechanism.cache_argument import CACHE_ARGUMENT

STEPS, ZOOM = 6, 3
SHAPE = dataclasses.replace(SHAPES["quick"], layers=12, first_layer=4)  # 8 layers attend to HR tokens
STEADY, CHURN = System("steady", share=0.1), System("churn", share=0.1, churn=0.1)
READS = {"tolist", "item", "nonzero", "cpu", "numpy", "equal", "__bool__", "__int__", "__float__", "__index__"}


@dataclass
class Step:
    """What one decoding step did. by_layer: Operators that the mechanism dispatched in each HR layer."""

    by_layer: dict[int, list[str]] = field(default_factory=dict)
    others: int = 0  # operators dispatched anywhere else
    waits: list[str] = field(default_factory=list)  # where values were read
    products: list[int] = field(default_factory=list)  # rows of torch's matrix products in the mechanism
    projected: list[int] = field(default_factory=list)  # rows whose keys and values were computed, by HR layer

    @property
    def operators(self) -> float:
        return statistics.mean(map(len, self.by_layer.values()))


class Watch(TorchDispatchMode):
    """Records the operators that are dispatched."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step, self.layer = step, None

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.layer is None:
            self.step.others += 1
        else:
            self.step.by_layer.setdefault(self.layer, []).append(str(operator))
            if operator is torch.ops.aten.mm.default:  # of keys and then of values
                self.step.products.append(len(args[0]))
        return operator(*args, **(kwargs or {}))


class WatchReads(TorchFunctionMode):
    """Records where values of tensors are read."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in READS:
            frame = sys._getframe(1)
            self.step.waits.append(f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno}")
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def watch(first_layer: int) -> Iterator[Step]:
    """Record what the model's calls do inside."""
    step = Step()
    modes = Watch(step), WatchReads(step)

    def watched(module: Any, *args: Any, **kwargs: Any) -> Any:
        modes[0].layer = module.layer_idx if module.layer_idx >= first_layer else None
        try:
            return attention.flexattn_attention(module, *args, **kwargs)
        finally:
            modes[0].layer = None

    AttentionInterface.register(attention.NAME, watched)
    try:
        with modes[0], modes[1]:
            yield step
    finally:
        AttentionInterface.register(attention.NAME, attention.flexattn_attention)


@torch.no_grad()
def decode(backbone: Backbone, system: System, capacity: int | None = None) -> list[Step]:
    """Return what each of `STEPS` decoding steps did, in pools of fixed size if `capacity` is given."""
    config = backbone.config.text_config
    cache = (
        DynamicCache(config=config)
        if capacity is None
        else StaticCache(config=config, max_cache_len=SIDE**2 + TEXT + STEPS)
    )
    given, steps = {"input_ids": backbone.ids, "image_features": backbone.features}, []
    given |= {"hr_features": backbone.hr_features, "hr_capacity": capacity}
    with forced(system.selection(backbone, STEPS)):
        logits = backbone.model(**given, **{CACHE_ARGUMENT: cache}).logits
        for _ in range(STEPS):
            before = slots_in_use(cache)
            with watch(backbone.config.flexattn.first_layer) as step:
                logits = backbone.model(input_ids=logits[:, -1:].argmax(-1), **{CACHE_ARGUMENT: cache}).logits
            step.projected = step.products[::2] or [after - b for after, b in zip(slots_in_use(cache), before)]
            steps.append(step)
    return steps


def slots_in_use(cache: Any) -> list[int]:
    return [int(pool.next_free) for pool in HRCache.beside(cache).pools.values()]


def projection_flops(rows: int) -> int:
    """Return the FLOPs of projecting so many rows in every HR layer of a 7B model."""
    shape = SHAPES["7b"]
    return (shape.layers - shape.first_layer) * rows * 2 * 2 * shape.width**2


def tiny_calls(keys: int = 8) -> dict[str, Callable]:
    """Return calls of the operator and of torch's attention on the same small tensors."""
    q, k, v = (torch.randn(1, 2, n, 16) for n in (1, keys, keys))
    start, length = torch.zeros(1, dtype=torch.int32), torch.full((1,), keys, dtype=torch.int32)
    pool, slots = torch.randn(4, 2, 16), torch.arange(4, dtype=torch.int32)[None]
    count, rows = torch.full((1,), 4, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
    ranges = torch.tensor([[[1, 5]]], dtype=torch.int32)
    hr = dict(k_hr=pool, v_hr=pool, hr_slots=slots, hr_count=count, hr_rows=rows, map_ranges=ranges, map_size=4)
    given = dict(kv_start=start, kv_len=length)
    return {
        "sdpa": lambda: functional.scaled_dot_product_attention(q, k, v),
        "plain": lambda: ops.hierarchical_attention(q, k, v, **given),
        "HR keys and map": lambda: ops.hierarchical_attention(q, k, v, **given, **hr),
    }


@torch.no_grad()
def time_calls(seconds: float) -> dict[str, float]:
    """Return the microseconds of a call on the CPU, medians of calls that take turns."""
    torch.set_num_threads(1)
    return {name: timing.seconds * 1e6 for name, timing in measuring.medians(tiny_calls(), seconds).items()}


def rows_of(name: str, steps: list[Step]) -> dict[str, Any]:
    """Return the row of a table, medians of the steps."""
    return {
        "step": name,
        "operators per HR layer": statistics.median(step.operators for step in steps),
        "other operators": statistics.median(step.others for step in steps),
        "waits": statistics.median(len(step.waits) for step in steps),
        "projected rows per HR layer": statistics.median(statistics.mean(step.projected) for step in steps),
        "7B TFLOPs of projection": statistics.median(
            projection_flops(statistics.mean(step.projected)) / 1e12 for step in steps
        ),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="seconds of timing calls (default: 1)")
    parser.add_argument("--csv", metavar="FILE", help="write the table of steps as CSV")
    parser.add_argument("--list", action="store_true", help="name the operators and the waits of the last step")
    args = parser.parse_args(arguments)

    backbone, rows = Backbone(SHAPE, ZOOM, torch.float32, "cpu"), []
    for system in (STEADY, CHURN):
        for kind, capacity in (("growing pools", None), ("fixed pools", backbone.hr_tokens)):
            steps = decode(backbone, system, capacity)
            rows.append(rows_of(f"{system.name}, {kind}", steps))
            if args.list:
                print(rows[-1]["step"], *list(steps[-1].by_layer.values())[-1], *steps[-1].waits, sep="\n  ")
    cells = [[f"{x:.4g}" if isinstance(x, (int, float)) else x for x in row.values()] for row in rows]
    tables.print_table(f"A decoding step, medians of {STEPS}", list(rows[0]), cells)
    timed = time_calls(args.seconds)
    cells = [[name, f"{us:.1f}", f"{us / timed['sdpa']:.2f}"] for name, us in timed.items()]
    tables.print_table(f"A call on tiny tensors; {measuring.machine('cpu')}", ("call", "us", "over sdpa"), cells)
    if args.csv:
        tables.write_csv(args.csv, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
