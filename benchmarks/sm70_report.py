"""What a V100 can make of the kernels: resources, main loops and pipes, from their sm_70 machine code.

    python benchmarks/sm70_report.py [--nvcc NVCC] [--ccbin g++-11] [--csv FILE]     (make sm70)

Compiles every kernel of csrc/sources.txt for sm_70 (nvcc up to 12.9), runs the kernels on the CPU to count their
wavefronts (benchmarks/wavefronts.py, which needs torch; --ideal-wavefronts goes without), prints the tables, and
compares them with csrc/kernels/budgets.json (benchmarks/sass/budgets.py). benchmarks/sass/flow.py says which path of a
kernel counts, benchmarks/sass/pipes.py how its cycles are computed.

Exit 1: a budget is exceeded, one sentence each. Exit 2: it could not be measured.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
from pathlib import Path

from sass.accesses import KernelAccesses, read_averages
from sass.budgets import Budget, budget_of, read_budgets
from sass.kernel import Kernel, apply_budgets, exceeded, without_budget, without_kernel
from sass.report import print_report, write_csv
from sass.toolkit import ROOT, Toolkit, kernel_sources, run


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--nvcc", default="nvcc", help="nvcc up to 12.9, with cuobjdump beside it (default: nvcc)")
    parser.add_argument("--ccbin", default="g++", help="host compiler of nvcc (default: g++)")
    parser.add_argument("--root", type=Path, default=ROOT, help="repository to compile (default: this one)")
    parser.add_argument("--budgets", type=Path, help="budgets (default: ROOT/csrc/kernels/budgets.json)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--wavefronts", type=Path, metavar="FILE",
                        help="read what wavefronts.py --json wrote (default: run it)")  # fmt: skip
    source.add_argument("--ideal-wavefronts", action="store_true",
                        help="assume the ideal wavefronts, and skip their budgets")  # fmt: skip
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "sm70",
                        help="folder for the machine code (default: build/sm70)")  # fmt: skip
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the tables as CSV")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="compile matching sources, e.g. 'gather*'")
    args = parser.parse_args(arguments)
    args.budgets = args.budgets or args.root / "csrc" / "kernels" / "budgets.json"
    return args


def measure_wavefronts(out: Path) -> dict[str, KernelAccesses]:
    """Run wavefronts.py in a process of its own, which must not have loaded the extension."""
    file = out / "wavefronts.json"
    run([sys.executable, Path(__file__).with_name("wavefronts.py"), "--json", file])
    return read_averages(file)


def print_skipped(kernels: list[Kernel], budgets: list[Budget]) -> None:
    for name in sorted(kernel.name for kernel in kernels):
        budget = budget_of(name, budgets)
        if budget and budget.skip:
            print(f"left out: {name}: {budget.skip}")


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    toolkit, budgets = Toolkit.find(args.nvcc, args.ccbin, 70), read_budgets(args.budgets)
    accesses = {}
    if not args.ideal_wavefronts:
        accesses = read_averages(args.wavefronts) if args.wavefronts else measure_wavefronts(args.out)
    sources = [source for source in kernel_sources(args.root) if fnmatch.fnmatchcase(source.name, args.only)]
    compiled = [kernel for source in sources for kernel in toolkit.compile(source, args.root, args.out)]

    kernels = apply_budgets(compiled, budgets)
    complaints = without_budget(compiled, budgets)
    if args.only == "*":
        complaints += without_kernel(compiled, budgets)
    for kernel in kernels:
        kernel.accesses = accesses.get(kernel.name, {})
        if not kernel.accesses and not args.ideal_wavefronts:
            complaints.append(f"{kernel.name}: its wavefronts were not measured.")
        complaints += exceeded(kernel)

    print_report(kernels, measured=bool(accesses))
    print_skipped(compiled, budgets)
    if args.csv:
        write_csv(args.csv, kernels)
    for sentence in complaints:
        print(sentence, file=sys.stderr)
    print(f"{len(kernels)} kernels, {f'{len(complaints)} complaints' if complaints else 'all within their budgets'}.")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
