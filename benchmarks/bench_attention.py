"""hierarchical_attention on a GPU against its peers, as ratios within one run; the other kernels against a plain copy.

    python benchmarks/bench_attention.py [--out build/gpu] [--seconds 90] [--all]

float16, 32 heads of 128 channels. Prefill: 640 query rows, with the preset `released` (the last row sees the M
high-resolution keys, map over the sequence) and `paper` (all rows see them, map over all keys). Decode: one row, with
keys and values of at least 400 MB, of one sample or of as many as that takes. The methods:

    ours            output and map, HR keys read through their slots; on this GPU's path and, for prefill, on the
                    V100's (FLEXATTN_CAPABILITY=70). Arguments that a model makes once are made ahead.
    eager           the same, as a model without these operators does it: matmul, mask, softmax, matmul, sum over heads
    sdpa ...        torch's scaled_dot_product_attention, by backend: the same output, and no map. Keys are in the
                    order HR, sequence, so that `paper` is a causal mask aligned at the lower right: flash and
                    efficient take it as torch's causal bias (half of the products are skipped, as in ours), cudnn and
                    math as a tensor. `released` is a causal call over the sequence and one for the last row over all
                    keys.
    flex_attention  torch.nn.attention.flex_attention, compiled, with that mask as a block mask, made ahead: the same
                    output and no map. Compiling takes seconds: at M = 2240 only, unless --all.

Keys are concatenated for eager, sdpa and flex_attention ahead of the timing, which favours them.

Before a method is timed, its output (and map) is compared with reference.py in float64. A method with an error larger
than the rounding of probabilities, logits and output explains, or with a NaN, is not timed; if it is ours, the exit
code is 1.

Times are medians of calls that take turns, by CUDA events. Before each call a large buffer is read, so that the L2
cache is cold and the GPU is busy until the call is queued: launches are not timed. Decode also takes its samples in
turn. Bytes are those that must move once; they are compared with the measured bandwidth of a large copy, read and
written.

Inputs are random, and new at every run; --seed repeats one. Written to --out: attention.csv, with the machine in every
row, and prefill.png and decode.png if matplotlib is installed. --check calls each kernel once on every input and times
nothing: for compute-sanitizer.

Exit 1: a result of ours is wrong. Exit 2: there is no GPU.
"""

from __future__ import annotations

import argparse
import itertools
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import measuring
import tables
import torch
from attention.check import gradient_complaints
from attention.clock import EventClock
from attention.comparison import About, Planned, check, reason
from attention.methods import OURS
from attention.operators import operators
from attention.plan import QUICK, Plan, Sizes, decode, prefill
from attention.results import Row, complaints, copy_row, measure, notes, plot, print_tables


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder for results (default: build/gpu)")
    parser.add_argument(
        "--seconds", type=float, default=90, help="start no case after this time, compiling included (default: 90)"
    )
    parser.add_argument("--all", action="store_true", help="time flex_attention at every size, without a time limit")
    parser.add_argument("--quick", action="store_true", help="use tiny sizes")
    parser.add_argument("--seed", type=int, help="seed of the inputs (default: a new one)")
    parser.add_argument("--check", action="store_true", help="compare every kernel once and time nothing")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)  # cpu: for tests
    return parser.parse_args(arguments)


def make_plan(args: argparse.Namespace) -> Plan:
    sizes, native = QUICK if args.quick else Sizes(), 0
    if args.device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        native = 10 * major + minor
    flex = sizes.selected if args.all else sizes.selected[:1]
    seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    return Plan(sizes, args.device, native, () if args.check else flex, seed)


def every_comparison(plan: Plan) -> Iterator[Planned]:
    """Yield attention and the other operators in turn, so that a time limit leaves some of each."""
    kinds = prefill(plan), decode(plan), operators(plan)
    return (one for several in itertools.zip_longest(*kinds) for one in several if one is not None)


def measure_all(plan: Plan, deadline: float, limit: float) -> Iterator[Row]:
    """Yield the copy's row and those of every comparison; after `deadline` nothing is measured, and a note says so."""
    clock = EventClock() if plan.device == "cuda" else measuring.wall_clock
    copy = copy_row(plan.sizes.copy_bytes, plan.device, clock, plan.sizes.seconds)
    yield copy
    for planned in every_comparison(plan):
        if time.perf_counter() > deadline:
            yield Row(About(planned.name, ""), "all", f"left out, the limit of {limit:.0f} s was reached")
            continue
        yield from measure_one(planned, plan, clock, copy)
        print(".", end="", flush=True)
    print()


def measure_one(planned: Planned, plan: Plan, clock: Callable, copy: Row) -> list[Row]:
    try:
        return measure(planned.build(), clock, copy, plan.sizes.seconds)
    except torch.OutOfMemoryError:
        return [Row(About(planned.name, ""), "all", "left out, the GPU's memory is too small")]
    except RuntimeError as error:
        return [Row(About(planned.name, ""), "ours", reason(error))]


def run(plan: Plan, limit: float, begin: float, out: Path) -> int:
    """Measure everything, write every row as it comes, plot and print a summary, and return the exit code."""
    out.mkdir(parents=True, exist_ok=True)
    machine, rows = measuring.machine(plan.device), []
    for row in measure_all(plan, begin + limit, limit):
        rows.append(row)
        tables.write_csv(
            out / "attention.csv", [machine.columns() | {"seed": plan.seed} | row.columns() for row in rows]
        )
    try:
        plot(rows, machine, out)
    except ImportError:
        print("matplotlib is not installed: nothing was plotted")
    for sentence in notes(rows):
        print(sentence)
    print(f"{machine}, seed {plan.seed}")
    print_tables(rows, copy=rows[0])
    wrong = complaints(rows)
    print(f"{len(rows)} rows in {out / 'attention.csv'}, {len(wrong)} of ours wrong")
    return 1 if wrong else 0


def check_kernels(plan: Plan) -> int:
    """Call ours once on every input, and prefill also in float32 and backwards; return the exit code."""
    said, count, sizes = [], 0, plan.sizes
    for planned in itertools.chain(prefill(plan), decode(plan), operators(plan)):
        comparison = planned.build()
        comparison.methods = {name: calls for name, calls in comparison.methods.items() if name in OURS}
        said += [f"{planned.name}, {method}: {why}" for method, why in check(comparison).reasons.items()]
        count += len(comparison.methods)
    for dtype in (torch.float32, torch.float16):
        case = plan.case(sizes.queries, sizes.queries, sizes.selected[0], sizes.batches[-1], "paper",
                         dtype=dtype, map_over_all=False, joined=False, backward=True)  # fmt: skip
        said += gradient_complaints(case)
        count += 1
    for sentence in said:
        print(sentence, file=sys.stderr)
    print(f"seed {plan.seed}: {count} calls compared, {len(said)} wrong")
    return 1 if said else 0


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("bench_attention: torch sees no GPU on this machine.", file=sys.stderr)
        return 2
    begin, plan = time.perf_counter(), make_plan(args)
    if args.check:
        return check_kernels(plan)
    limit = float("inf") if args.all else args.seconds
    return run(plan, limit, begin, args.out)


if __name__ == "__main__":
    sys.exit(main())
