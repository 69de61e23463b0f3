"""Count wavefronts of shared memory and sectors of global memory, by running the CUDA kernels on the CPU.

    python benchmarks/wavefronts.py [--json FILE] [--accesses PATTERN]

Builds the executor of csrc/simt (as `make simt` does), calls every operator as a V100 would run it
(benchmarks/operator_calls.py), and counts as csrc/simt/access_counts.h says. Widths are those of the source: where
nvcc merges neighbouring accesses into a wider one (as attention_decode.cu's of its queries), the figure is that of the
narrow ones.

FILE holds the averages of each kernel and kind of access, with the line furthest above the ideal, for
`sm70_report.py --wavefronts`. --accesses lists each access of the matching kernels with its source line.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sass.accesses import UNITS, Access, averages, write_averages
from sass.kernel import short_name
from sass.toolkit import ROOT

try:
    import torch
except ImportError:
    sys.exit("wavefronts: torch is missing; `make test` makes an environment with it.")

# The executor's stand-ins for CUDA's types, and how cu++filt spells bool arguments.
CUDA_NAMES = {"c10::Half": "__half", "c10::BFloat16": "__nv_bfloat16", ", false": ", 0", ", true": ", 1"}


def symbols(module: Path) -> dict[int, str]:
    """Return the demangled names of a library's functions, by address."""
    command = ["nm", "--demangle", "--defined-only", str(module)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {int(at, 16): name for at, name in re.findall(r"^([0-9a-f]+) [tTwW] (.*)$", listed, re.M)}


def source_lines(module: Path, addresses: list[int]) -> dict[int, str]:
    """Return `file:line < file:line it was inlined to` of the calls that return to these addresses."""
    command = ["addr2line", "--exe", str(module), "--addresses", "--inlines", "--basenames"]
    calls = "\n".join(hex(address - 1) for address in addresses)
    said = subprocess.run(command, input=calls, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^0x([0-9a-f]+)\n((?:[^\n]*:[^\n]*\n)+)", said, re.M)
    return {int(at, 16) + 1: " < ".join(line.split(" ")[0] for line in lines.splitlines()) for at, lines in found}


def kernel_name(demangled: str) -> str:
    name = short_name(demangled)
    for ours, theirs in CUDA_NAMES.items():
        name = name.replace(ours, theirs)
    return name


@contextmanager
def counted(module: Path) -> Iterator[list[Access]]:
    """Count the accesses of the kernels that run inside; the list is filled at the end."""
    accesses: list[Access] = []
    torch.ops.flexattn_access_counts.start()
    yield accesses
    entries = json.loads(torch.ops.flexattn_access_counts.json())
    names, lines = symbols(module), source_lines(module, [entry["at"] for entry in entries])
    for entry in entries:
        accesses.append(
            Access(
                kernel=kernel_name(names[entry["kernel"]]),
                kind=entry["kind"],
                source=lines[entry["at"]],
                width=entry["width"],
                instructions=entry["instructions"],
                units=entry[UNITS[entry["kind"]]],
                ideal=entry["ideal"],
            )
        )


def measure() -> list[Access]:
    sys.path[:0] = [str(ROOT), str(ROOT / "python_tests" / "support")]
    from simt_build import load

    module = load("races")
    from operator_calls import call_every_operator  # it imports the package, which must find the executor

    with counted(module) as accesses:
        call_every_operator()
    return accesses


def print_accesses(accesses: list[Access], pattern: str) -> None:
    matching = [access for access in accesses if fnmatch.fnmatchcase(access.kernel, pattern)]
    for access in sorted(matching, key=lambda a: (a.kernel, a.kind, -a.units)):
        n = access.instructions
        print(
            f"{access.kernel}  {access.kind} {8 * access.width:3}  {n:7} instructions  "
            f"{access.units / n:6.2f} {UNITS[access.kind]}, ideal {access.ideal / n:5.2f}  {access.source}"
        )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the averages of each kernel to FILE")
    parser.add_argument("--accesses", metavar="PATTERN", default="",
                        help="list the accesses of matching kernels, e.g. 'prefill_tiles*'")  # fmt: skip
    args = parser.parse_args(arguments)
    accesses = measure()
    print_accesses(accesses, args.accesses)
    if args.json:
        write_averages(args.json, averages(accesses))


if __name__ == "__main__":
    main()
