"""Wavefronts of shared memory and sectors of global memory, per kernel and access, from runs of the CUDA kernels on the CPU.

    python benchmarks/wavefronts.py [--json FILE] [--accesses PATTERN]

Builds the executor of csrc/simt (as `make simt` does), calls every operator as a V100 would run it, and counts as
csrc/simt/access_counts.h says. Widths are those of the source: where nvcc merges neighbouring accesses into a wider one (as
attention_decode.cu's of its queries), the figure is that of the narrow ones.

FILE: {kernel: {LDS, STS, LDG or STG: {average and ideal of a warp's access, costliest: the line most above the ideal}}}, which
`sm70_report.py --wavefronts` reads. --accesses lists each access of the kernels whose name fits, with its line.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sm70_report import short_name

try:
    import torch
except ImportError:
    sys.exit("wavefronts: torch is missing; `make test` makes an environment with it.")

ROOT = Path(__file__).resolve().parent.parent
KINDS = {"LDS": "wavefronts", "STS": "wavefronts", "LDG": "sectors", "STG": "sectors"}
NAMES = {
    "c10::Half": "__half",
    "c10::BFloat16": "__nv_bfloat16",
}  # that the executor has in place of CUDA's types


@dataclass
class Access:
    """A place in a kernel that accesses memory. units: wavefronts or sectors, of all its instructions together."""

    kernel: str
    kind: str
    source: str  # file:line, and where that was inlined to
    width: int  # bytes of a lane
    instructions: int
    units: int
    ideal: int


# ---------------------------------------------------------------------------------------------------------------- runs


def run_operators() -> None:
    """Every kernel of the operators, but those for newer GPUs, with sizes large enough that main loops outweigh the rest."""
    from flexattn_cuda import ops

    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    def ints(*values) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    def attend(capability: int, dtype: torch.dtype, d: int, queries: int, keys: int, heads: int, selected: int, side: int,
               grad: bool = False, **rows: torch.Tensor) -> None:  # fmt: skip
        """A sample whose image has side * side keys, `selected` HR tokens of a larger pool, and one key head."""
        os.environ["FLEXATTN_CAPABILITY"] = str(capability)
        tensors = {
            "q": normal(1, queries, heads, d, dtype=dtype).transpose(1, 2), "k": normal(1, keys, 1, d, dtype=dtype).transpose(1, 2),
            "v": normal(1, keys, 1, d, dtype=dtype).transpose(1, 2), "k_hr": normal(selected + 7, 1, d, dtype=dtype),
            "v_hr": normal(selected + 7, 1, d, dtype=dtype),
        }  # fmt: skip
        tensors = {name: tensor.requires_grad_(grad) for name, tensor in tensors.items()}
        result = ops.hierarchical_attention(
            **tensors, **rows, hr_slots=torch.randperm(selected + 7, generator=generator)[None, :selected].int(), hr_count=ints(selected),
            map_ranges=ints([[5, 5 + side**2]]), map_size=side**2,
        )  # fmt: skip
        if grad:
            result.out.sum().backward()

    half, every_dtype = torch.float16, (torch.float16, torch.bfloat16, torch.float32)
    for d in (64, 96, 128):
        attend(
            70, half, d, 320, 320, 2, 130, 16, hr_from=ints(261)
        )  # the paper's form: the text after the image sees HR keys
    attend(70, half, 128, 320, 320, 2, 130, 16, hr_rows=ints([319]))  # the released form: the last row does
    for dtype in every_dtype:
        for d in (64, 80, 96, 128):
            for heads in (1, 4):
                attend(70, dtype, d, 1, 700, heads, 130, 24, hr_rows=ints([0]))
    for dtype in (*every_dtype, torch.float64):
        attend(60, dtype, 128, 20, 40, 2, 33, 4, grad=True, hr_from=ints(10))

    for dtype in (torch.float32, torch.float64):
        chosen = ops.select_tokens(torch.rand(1, 1, 1, 576, generator=generator, dtype=dtype), ints([[0, 0, 24, 24]]), hr_side=72,
                                   scale=1, threshold=0.6)  # fmt: skip
    tokens, index = 72 * 72, chosen.index[:, :600]
    for dtype, channels in (
        (half, 1024),
        (half, 129),
        (torch.float32, 129),
        (torch.float64, 129),
    ):  # whole vectors, and not
        table = normal(1, tokens, channels, dtype=dtype).requires_grad_()
        ops.gather_tokens(table, index).sum().backward()
    slots = ops.assign_slots(
        index,
        chosen.count.clamp(max=600),
        torch.full((1, tokens), -1, dtype=torch.int32),
        ints(0),
        capacity=600,
    )
    for dtype in (*every_dtype, torch.float64):
        for table_dtype in {dtype, torch.float32}:
            for d in (128, 6):  # whole vectors, and not
                tables = [normal(64, d, dtype=table_dtype) for _ in range(2)]
                ops.write_hr_kv(*(normal(64, 2, d, dtype=dtype) for _ in range(2)), *tables, slots.new_slots[:64],
                                *(normal(600, 2, d, dtype=dtype) for _ in range(2)))  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- counts


def symbols(module: Path) -> dict[int, str]:
    """Functions of a library, demangled, by their place."""
    listed = subprocess.run(
        ["nm", "--demangle", "--defined-only", str(module)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return {int(place, 16): name for place, name in re.findall(r"^([0-9a-f]+) [tTwW] (.*)$", listed, re.M)}


def source_lines(module: Path, places: list[int]) -> dict[int, str]:
    """`file:line < file:line it was inlined to` of the calls that return to these places."""
    command = ["addr2line", "--exe", str(module), "--addresses", "--inlines", "--basenames"]
    said = subprocess.run(
        command,
        input="\n".join(hex(place - 1) for place in places),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = re.findall(r"^0x([0-9a-f]+)\n((?:[^\n]*:[^\n]*\n)+)", said, re.M)
    return {int(place, 16) + 1: " < ".join(line.split(" ")[0] for line in lines.splitlines()) for place, lines in found}


@contextmanager
def counted(module: Path) -> Iterator[list[Access]]:
    """The accesses of the kernels that run meanwhile, in a list that is filled at the end."""
    accesses: list[Access] = []
    torch.ops.flexattn_access_counts.start()
    yield accesses
    entries = json.loads(torch.ops.flexattn_access_counts.json())
    names, lines = symbols(module), source_lines(module, [entry["at"] for entry in entries])
    for entry in entries:
        name = short_name(names[entry["kernel"]])
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        kind = entry["kind"]
        accesses.append(
            Access(
                name,
                kind,
                lines[entry["at"]],
                entry["width"],
                entry["instructions"],
                entry[KINDS[kind]],
                entry["ideal"],
            )
        )


def measure() -> list[Access]:
    sys.path[:0] = [str(ROOT), str(ROOT / "python_tests" / "support")]
    from simt_build import load

    with counted(load("races")) as accesses:
        run_operators()
    return accesses


def averages(accesses: list[Access]) -> dict[str, dict[str, dict]]:
    """What --json writes."""
    groups: dict[tuple[str, str], list[Access]] = defaultdict(list)
    for access in accesses:
        groups[access.kernel, access.kind].append(access)
    result: dict[str, dict[str, dict]] = defaultdict(dict)
    for (kernel, kind), members in groups.items():
        instructions = sum(a.instructions for a in members)
        units, ideal = sum(a.units for a in members), sum(a.ideal for a in members)
        result[kernel][kind] = {"average": units / instructions, "ideal": ideal / instructions}
        if units > ideal:
            result[kernel][kind]["costliest"] = max(members, key=lambda a: a.units - a.ideal).source
    return result


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Wavefronts and sectors of the CUDA kernels, run on the CPU.")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="averages per kernel, for sm70_report.py --wavefronts",
    )
    parser.add_argument(
        "--accesses",
        metavar="PATTERN",
        default="",
        help="lists the accesses of these kernels, e.g. 'prefill_tiles*'",
    )
    args = parser.parse_args(arguments)
    accesses = measure()
    for access in sorted(accesses, key=lambda a: (a.kernel, a.kind, -a.units)):
        if fnmatch.fnmatchcase(access.kernel, args.accesses):
            n = access.instructions
            print(f"{access.kernel}  {access.kind} {8 * access.width:3}  {n:7} instructions  {access.units / n:6.2f} {KINDS[access.kind]}, "
                  f"ideal {access.ideal / n:5.2f}  {access.source}")  # fmt: skip
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(averages(accesses), indent=1))


if __name__ == "__main__":
    main()
