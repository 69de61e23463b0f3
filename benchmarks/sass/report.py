"""The tables of the V100 report, and its CSV file."""

from __future__ import annotations

from pathlib import Path

import tables

from sass.accesses import UNITS
from sass.instructions import KINDS
from sass.kernel import Kernel
from sass.pipes import PIPES, bounding


def print_report(kernels: list[Kernel], measured: bool) -> None:
    """Print every table. measured: Whether memory accesses were measured."""
    print_resources(kernels)
    print_counts(kernels)
    print_cycles(kernels)
    if measured:
        print_accesses(kernels)


def print_resources(kernels: list[Kernel]) -> None:
    header = ("kernel", "threads", "registers", "spill B", "stack B", "shared B", "blocks/SM", "main loop")
    rows = [
        (
            k.name,
            str(k.budget.threads),
            str(k.resources.registers),
            str(k.resources.spill_bytes),
            str(k.resources.stack_bytes),
            str(k.shared_bytes),
            str(k.blocks_per_sm),
            f"{len(k.body)} instr." if k.loop else "-",
        )
        for k in kernels
    ]
    tables.print_table("Resources on sm_70", header, rows)


def print_counts(kernels: list[Kernel]) -> None:
    rows = [[k.name, *(str(k.counts[kind]) for kind in KINDS)] for k in kernels]
    tables.print_table("Instructions of a warp in one iteration of the main loop", ("kernel", *KINDS), rows)


def print_cycles(kernels: list[Kernel]) -> None:
    rows = [
        [
            k.name,
            *(f"{pipe.cycles:.0f}" for pipe in k.pipes),
            bounding(k.pipes).name,
            f"{k.tensor_fraction:.1%}" if k.counts["HMMA"] else "-",
            wavefronts_are(k),
        ]
        for k in kernels
    ]
    tables.print_table(
        "Cycles of an SM for one iteration of a block, by pipe; LSU is the sum of the six after it",
        ("kernel", *PIPES, "bound by", "tensor peak", "wavefronts"),
        rows,
        caption="tensor peak: the share that the slowest pipe allows; "
        "wavefronts: measured, or the ideal for the access width",
    )


def print_accesses(kernels: list[Kernel]) -> None:
    rows = []
    for k in kernels:
        costs = [k.accesses.get(kind) for kind in UNITS]
        rows.append([k.name, *(f"{cost.average:.2f} / {cost.ideal:.2f}" if cost else "-" for cost in costs)])
    tables.print_table(
        "A warp's access, average / ideal: wavefronts of shared memory, 32-byte sectors of global memory",
        ("kernel", *UNITS),
        rows,
        caption="as g++ sees the accesses of the source; nvcc may merge neighbours into wider ones",
    )


def wavefronts_are(kernel: Kernel) -> str:
    return "measured" if kernel.accesses else "ideal"


def write_csv(path: Path, kernels: list[Kernel]) -> None:
    rows = [
        {
            "kernel": k.name,
            "threads": k.budget.threads,
            "registers": k.resources.registers,
            "spill_bytes": k.resources.spill_bytes,
            "stack_bytes": k.resources.stack_bytes,
            "shared_bytes": k.shared_bytes,
            "blocks_per_sm": k.blocks_per_sm,
            **{kind: k.counts[kind] for kind in KINDS},
            **{f"{pipe.name}_cycles": pipe.cycles for pipe in k.pipes},
            "bound": bounding(k.pipes).name,
            "tensor_fraction": f"{k.tensor_fraction:.4f}",
            "wavefronts": wavefronts_are(k),
        }
        for k in kernels
    ]
    tables.write_csv(path, rows)
