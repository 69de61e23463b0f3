"""Check the tensor-core kernels for Ampere and later, from their sm_80 machine code.

    python benchmarks/sm80_report.py [--nvcc NVCC] [--ccbin g++-11]     (make sm80)

Compiles the forward and the backward pass for sm_80 and looks at every kernel on AmpereMma: the main loop must hold
HMMA.16816 (mma.m16n8k16), LDSM (ldmatrix) and LDGSTS (cp.async), and must not touch local memory; that of prefill
has at most MAX_BESIDE other instructions per HMMA. Main loop and steady path are those of benchmarks/sass/flow.py. Exit
1: a kernel lacks something, one sentence each. Exit 2: it could not be measured.
"""

from __future__ import annotations

import argparse
import sys
from fnmatch import fnmatch
from math import inf
from pathlib import Path

import tables
from sass.instructions import Instruction
from sass.kernel import Kernel, local_memory
from sass.toolkit import ROOT, Toolkit

NEEDED = {"HMMA.16816": "mma.m16n8k16", "LDSM": "ldmatrix", "LDGSTS": "cp.async"}
FORBIDDEN = ("LDL", "STL")
MAX_BESIDE = {"prefill_tiles<*, 64>": 5.0, "prefill_tiles<*, 96>": 4.5, "prefill_tiles<*, 128>": 3.25}
SOURCES = ("attention_prefill.cu", "attention_backward_ampere.cu")


def count(instructions: list[Instruction], opcode: str) -> int:
    """Return how often an opcode occurs; HMMA.16816 counts HMMA.16816.F32.BF16 as well."""
    return sum(f"{i.opcode}.".startswith(f"{opcode}.") for i in instructions)


def complaints(kernel: Kernel) -> list[str]:
    """Return one sentence for everything that a kernel lacks."""
    if not kernel.loop:
        return [f"{kernel.name}: there is no main loop."]
    missing = {opcode: ptx for opcode, ptx in NEEDED.items() if not count(kernel.body, opcode)}
    said = [f"{kernel.name}: no {opcode} ({ptx}) in the main loop." for opcode, ptx in missing.items()]
    loads, stores = (count(kernel.loop, opcode) for opcode in FORBIDDEN)
    if loads or stores:
        said.append(f"{kernel.name}: {local_memory(loads, stores)}")
    limit = next((limit for pattern, limit in MAX_BESIDE.items() if fnmatch(kernel.name, pattern)), inf)
    if beside(kernel) > limit:
        said.append(f"{kernel.name}: {beside(kernel):.2f} other instructions per HMMA, at most {limit:g} wanted.")
    return said


def beside(kernel: Kernel) -> float:
    """Return the other instructions of the main loop per HMMA; 0 without HMMA."""
    return kernel.beside_hmma / kernel.counts["HMMA"] if kernel.counts["HMMA"] else 0.0


def row(kernel: Kernel) -> list[str]:
    resources = kernel.resources
    numbers = [resources.registers, resources.spill_bytes, resources.stack_bytes, len(kernel.body)]
    counts = [count(kernel.body, opcode) for opcode in NEEDED] + [count(kernel.loop, opcode) for opcode in FORBIDDEN]
    return [kernel.name, *map(str, numbers), f"{beside(kernel):.2f}", *map(str, counts)]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--nvcc", default="nvcc", help="nvcc with cuobjdump beside it (default: nvcc)")
    parser.add_argument("--ccbin", default="g++", help="host compiler of nvcc (default: g++)")
    parser.add_argument("--root", type=Path, default=ROOT, help="repository to compile (default: this one)")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "sm80",
                        help="folder for the machine code (default: build/sm80)")  # fmt: skip
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    toolkit, folder = Toolkit.find(args.nvcc, args.ccbin, 80), args.root / "csrc" / "kernels"
    kernels, said = [], []
    for source in (folder / name for name in SOURCES):
        found = [kernel for kernel in toolkit.compile(source, args.root, args.out) if "AmpereMma" in kernel.name]
        if not found:
            said.append(f"{source}: there is no kernel on AmpereMma.")
        kernels += found

    title = "Ampere kernels on sm_80: instructions of a warp in one iteration of the main loop"
    header = ("kernel", "registers", "spill B", "stack B", "loop instr.", "beside HMMA", *NEEDED, *FORBIDDEN)
    tables.print_table(title, header, [row(kernel) for kernel in kernels])
    said += [sentence for kernel in kernels for sentence in complaints(kernel)]
    for sentence in said:
        print(sentence, file=sys.stderr)
    print(f"{len(kernels)} kernels, {f'{len(said)} complaints' if said else 'all as they should be'}.")
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
