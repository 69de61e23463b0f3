"""Whether the tensor-core kernels for Ampere and later are what they should be, from their sm_80 machine code.

    python benchmarks/sm80_report.py [--nvcc NVCC] [--ccbin g++-11]     (make sm80)

Compiles csrc/kernels/attention_prefill.cu for sm_80 and looks at every kernel on AmpereMma: the main loop must hold
HMMA.16816 (mma.m16n8k16), LDSM (ldmatrix) and LDGSTS (cp.async), and must not touch local memory. Main loop and steady path as
in sm70_report.py. Exit 1: a kernel lacks something, one sentence each. Exit 2: it could not be measured.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import measuring
from sm70_report import ROOT, Kernel, compile_kernels, find_compiler

NEEDED = {"HMMA.16816": "mma.m16n8k16", "LDSM": "ldmatrix", "LDGSTS": "cp.async"}
FORBIDDEN = ("LDL", "STL")


def count(instructions: list, opcode: str) -> int:
    """Of one warp. HMMA.16816 counts HMMA.16816.F32.BF16 as well."""
    return sum(f"{i.opcode}.".startswith(f"{opcode}.") for i in instructions)


def complaints(kernel: Kernel) -> list[str]:
    if not kernel.loop:
        return [f"{kernel.name}: there is no main loop."]
    said = [
        f"{kernel.name}: no {opcode} ({ptx}) in the main loop."
        for opcode, ptx in NEEDED.items()
        if not count(kernel.body, opcode)
    ]
    local = {opcode: count(kernel.loop, opcode) for opcode in FORBIDDEN}
    if any(local.values()):
        said.append(f"{kernel.name}: {local['LDL']} LDL and {local['STL']} STL in the main loop, there must be none.")
    return said


def row(kernel: Kernel) -> list[str]:
    resources = [kernel.registers, kernel.spill_bytes, kernel.stack_bytes, len(kernel.body)]
    return [kernel.name, *map(str, resources), *(str(count(kernel.body, opcode)) for opcode in NEEDED),
            *(str(count(kernel.loop, opcode)) for opcode in FORBIDDEN)]  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--nvcc", default="nvcc", help="an nvcc with cuobjdump beside it")
    parser.add_argument("--ccbin", default="g++", help="its host compiler")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "sm80", help="where the machine code goes")
    args = parser.parse_args(arguments)

    source = args.root / "csrc" / "kernels" / "attention_prefill.cu"
    compiled = compile_kernels(find_compiler(args.nvcc, 80), args.ccbin, [source], args.root, args.out, 80)
    kernels = [kernel for kernel in compiled if "AmpereMma" in kernel.name]
    header = ("kernel", "registers", "spill B", "stack B", "loop instr.", *NEEDED, *FORBIDDEN)
    measuring.print_table(
        "Ampere kernels on sm_80, a warp's iteration of the main loop",
        header,
        [row(k) for k in kernels],
    )
    said = [sentence for kernel in kernels for sentence in complaints(kernel)]
    if not kernels:
        said = [f"{source}: no kernel on AmpereMma."]
    for sentence in said:
        print(sentence, file=sys.stderr)
    print(f"{len(kernels)} kernels, {'every one as it should be' if not said else f'{len(said)} complaints'}.")
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
