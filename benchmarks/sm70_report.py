"""What the V100 can make of the kernels: resources, main loops and pipes, from their sm_70 machine code.

    python benchmarks/sm70_report.py [--nvcc NVCC] [--ccbin g++-11] [--csv FILE]     (make sm70)

Compiles every kernel of csrc/sources.txt for sm_70 (nvcc up to 12.9), runs the kernels on the CPU for their wavefronts
(benchmarks/wavefronts.py, which needs torch; --ideal-wavefronts goes without), prints the tables, and compares them with
csrc/kernels/budgets.json. Exit 1: a budget is exceeded, one sentence each. Exit 2: it could not be measured.

The main loop is the loop that holds the most HMMA or, without tensor cores, the most LDS, LDG and FFMA; loops inside it
are left out, and a kernel without a loop counts as one pass. Of its paths the steady one is weighed (full tiles without a
mask): that with the most HMMA, then the most 16-byte LDG and STS (without HMMA: LDS, STS and LDG), then the fewest instructions.

Cycles are a lower bound: every pipe is taken as never waiting. They follow from the widths of the V100's pipes:

    tensor   512 FMA per cycle and SM (1024 FLOP x 80 SM x 1.53 GHz = 125 TFLOP/s): a warp's mma.m8n8k4 has 1024 FMA and
             takes 8 cycles of its sub-partition's quarter of that, 2 for each of the 4 HMMA.884.F32 steps
    LSU      one wavefront (128 bytes) per cycle and SM: the least that their width takes for LDG, STG, local memory, LDS and
             STS, the last two times what was measured over the ideal; SHFL 32 lanes per cycle and SM, one wavefront
    MUFU     4 lanes per cycle and sub-partition: 8 cycles; conversions and bit counts go there too
    FMA      16 lanes per cycle and sub-partition: 2 cycles; float32, half2 and IMAD
    ALU      16 lanes per cycle and sub-partition: 2 cycles; integers, logic, comparisons, minimum and maximum
    FP64     8 lanes per cycle and sub-partition: 4 cycles
    issue    1 instruction per cycle and sub-partition

A budget has a pattern of kernel names (the first that fits counts), the launch (threads, dynamic_shared_bytes at head_dim
128), and any of: registers, spill_bytes, shared_bytes (at most); blocks_per_sm, tensor_fraction (at least); needs_hmma and
no_local_in_loop; wavefronts_over_ideal (at most, for LDS and for STS). `skip` with a reason leaves a kernel out.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

try:
    from rich.console import Console
    from rich.table import Table
except ImportError:
    Console = Table = None  # the tables need it; reading machine code does not

ROOT = Path(__file__).resolve().parent.parent

# ---------------------------------------------------------------------------------------------------------------- V100

REGISTERS, REGISTERS_PER_WARP_UNIT = 65536, 256
SHARED_BYTES, SHARED_UNIT = 96 * 1024, 256
THREADS, BLOCKS = 2048, 32
SUB_PARTITIONS, WARP = 4, 32


def blocks_per_sm(registers: int, shared_bytes: int, threads: int) -> int:
    """Blocks that fit on an SM of the V100 at a time."""
    warps = -(-threads // WARP)
    per_warp = -(-registers * WARP // REGISTERS_PER_WARP_UNIT) * REGISTERS_PER_WARP_UNIT
    # Each sub-partition has its own quarter of the registers.
    warps_by_registers = REGISTERS // SUB_PARTITIONS // per_warp * SUB_PARTITIONS
    shared = -(-shared_bytes // SHARED_UNIT) * SHARED_UNIT
    by_shared = SHARED_BYTES // shared if shared else BLOCKS
    return min(BLOCKS, THREADS // (warps * WARP), warps_by_registers // warps, by_shared)


# ---------------------------------------------------------------------------------------------------------------- SASS


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str  # with its suffixes: LDG.E.128.SYS
    operands: str = ""
    predicate: str = ""  # @P0, @!PT, or nothing

    @property
    def base(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def target(self) -> int | None:
        found = re.findall(r"0x[0-9a-f]+", self.operands) if self.base == "BRA" else []
        return int(found[-1], 16) if found else None

    @property
    def falls_through(self) -> bool:
        if self.base == "BRA":
            return bool(self.predicate) or "," in self.operands
        return self.base not in ("EXIT", "RET", "BRX", "JMX", "KILL") or bool(self.predicate)

    @property
    def words(self) -> int:
        """32-bit words per lane of a memory access."""
        parts = self.opcode.split(".")
        return 4 if "128" in parts else 2 if "64" in parts else 1


_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?P\w+)\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*?)\s*;", re.M)


def parse_sass(text: str) -> dict[str, list[Instruction]]:
    """Instructions of each function in what `cuobjdump --dump-sass` prints, by mangled name."""
    functions = {}
    for part in re.split(r"^\s*Function : ", text, flags=re.M)[1:]:
        name, body = part.split("\n", 1)
        functions[name.strip()] = [
            Instruction(int(address, 16), opcode, operands, predicate)
            for address, predicate, opcode, operands in _LINE.findall(body)
        ]
    return functions


_KINDS = {
    "LDS": "LDS", "LDSM": "LDS", "STS": "STS", "ATOMS": "STS", "LDG": "LDG", "LD": "LDG", "LDGSTS": "LDG", "STG": "STG", "ST": "STG",
    "ATOM": "STG", "ATOMG": "STG", "RED": "STG", "LDL": "LDL", "STL": "STL", "SHFL": "SHFL", "HMMA": "HMMA", "BAR": "BAR",
    **dict.fromkeys(("MUFU", "F2F", "F2I", "I2F", "FRND", "POPC", "FLO", "BREV"), "MUFU"),
    **dict.fromkeys(("FFMA", "FMUL", "FADD", "FFMA32I", "FMUL32I", "FADD32I"), "FP32"),
    **dict.fromkeys(("IMAD", "IMAD32I", "HFMA2", "HADD2", "HMUL2", "HFMA2_32I", "HADD2_32I", "HMUL2_32I"), "IMAD"),
    **dict.fromkeys(("DFMA", "DADD", "DMUL", "DSETP", "DMNMX"), "FP64"),
    **dict.fromkeys(("BRA", "EXIT", "BSSY", "BSYNC", "BREAK", "NOP", "WARPSYNC", "CALL", "RET", "YIELD", "S2R", "CS2R",
                     "DEPBAR", "MEMBAR", "BMOV", "LDC", "ERRBAR", "CCTL", "NANOSLEEP", "BPT"), "other"),
}  # fmt: skip


def kind(instruction: Instruction) -> str:
    """What an instruction counts as; whatever is not listed is integer arithmetic or logic."""
    return "other" if instruction.predicate == "@!PT" else _KINDS.get(instruction.base, "ALU")


# --------------------------------------------------------------------------------------------------------------- loops


@dataclass
class Loop:
    header: int  # number of its first block
    blocks: set[int]
    latches: set[int]  # blocks that jump back to the header


@dataclass
class Flow:
    """Basic blocks of a function, and what follows what."""

    blocks: list[list[Instruction]]
    follows: list[list[int]]

    @classmethod
    def of(cls, instructions: list[Instruction]) -> Flow:
        places = {instruction.address for instruction in instructions}
        starts = {instructions[0].address} | {i.target for i in instructions if i.target in places}
        ends = [i for i in instructions if i.target is not None or not i.falls_through or i.base == "EXIT"]
        following = {a.address: b.address for a, b in zip(instructions, instructions[1:])}
        starts |= {following[i.address] for i in ends if i.address in following}
        blocks: list[list[Instruction]] = []
        for instruction in instructions:
            if instruction.address in starts:
                blocks.append([])
            blocks[-1].append(instruction)
        number = {block[0].address: n for n, block in enumerate(blocks)}
        follows = []
        for n, block in enumerate(blocks):
            last = block[-1]
            after = [n + 1] if last.falls_through and n + 1 < len(blocks) else []
            follows.append(after + ([number[last.target]] if last.target in number else []))
        return cls(blocks, follows)

    def order(self) -> list[int]:
        """Reachable blocks in reverse postorder: but for jumps back, a block comes before what follows it."""
        seen, order, stack = {0}, [], [(0, iter(self.follows[0]))]
        while stack:
            block, rest = stack[-1]
            fresh = next((n for n in rest if n not in seen), None)
            if fresh is None:
                order.append(block)
                stack.pop()
            else:
                seen.add(fresh)
                stack.append((fresh, iter(self.follows[fresh])))
        return order[::-1]

    def loops(self) -> list[Loop]:
        """Natural loops: an edge back to a block through which every way to the edge leads, and all that reaches it."""
        order = self.order()
        before: dict[int, list[int]] = {n: [] for n in order}
        for n in order:
            for after in self.follows[n]:
                before[after].append(n)
        dominators = {n: set(order) for n in order} | {0: {0}}
        changed = True
        while changed:
            changed = False
            for n in order[1:]:
                new = {n} | set.intersection(*(dominators[p] for p in before[n]))
                changed |= new != dominators[n]
                dominators[n] = new
        found: dict[int, Loop] = {}
        for n in order:
            for header in (after for after in self.follows[n] if after in dominators[n]):
                loop = found.setdefault(header, Loop(header, {header}, set()))
                loop.latches.add(n)
                stack = [n]
                while stack:
                    block = stack.pop()
                    if block not in loop.blocks:
                        loop.blocks.add(block)
                        stack += before[block]
        return list(found.values())

    def own_blocks(self, loop: Loop, loops: list[Loop]) -> set[int]:
        """Without the loops inside."""
        inner = [other.blocks for other in loops if other is not loop and other.blocks < loop.blocks]
        return loop.blocks - set().union(*inner)

    def main_loop(self) -> tuple[list[Instruction], list[Instruction]] | None:
        """The main loop's steady path, and all of it with the loops inside; None without a loop."""
        loops = self.loops()
        if not loops:
            return None

        def weight(loop: Loop) -> tuple[int, int]:
            kinds = Counter(kind(i) for n in self.own_blocks(loop, loops) for i in self.blocks[n])
            return kinds["HMMA"], kinds["LDS"] + kinds["LDG"] + kinds["FP32"]

        loop = max(loops, key=weight)
        own = self.own_blocks(loop, loops)
        tensor = (
            weight(loop)[0] > 0
        )  # then tiles are copied 16 bytes at a time; other accesses serve masks and bookkeeping

        def value(n: int) -> tuple[int, ...]:
            block = self.blocks[n] if n in own else []
            copies = sum(
                kind(i) in ("STS", "LDG") and i.words == 4 if tensor else kind(i) in ("LDS", "STS", "LDG")
                for i in block
            )
            return sum(kind(i) == "HMMA" for i in block), copies, -len(block)

        best: dict[int, tuple[tuple[int, ...], list[int]]] = {loop.header: (value(loop.header), [loop.header])}
        order = [n for n in self.order() if n in loop.blocks]
        rank = {n: i for i, n in enumerate(order)}
        for n in order:
            for after in self.follows[n] if n in best else []:
                if rank.get(after, -1) > rank[n]:
                    total = tuple(a + b for a, b in zip(best[n][0], value(after)))
                    if after not in best or total > best[after][0]:
                        best[after] = total, best[n][1] + [after]
        _, path = max((best[n] for n in loop.latches if n in best), key=lambda entry: entry[0])
        steady = [i for n in path if n in own for i in self.blocks[n]]
        return steady, [i for n in sorted(loop.blocks) for i in self.blocks[n]]


# --------------------------------------------------------------------------------------------------------------- pipes

COUNTED = (
    "HMMA",
    "LDS",
    "STS",
    "LDG",
    "STG",
    "SHFL",
    "MUFU",
    "FP32",
    "IMAD",
    "ALU",
    "FP64",
    "LDL",
    "STL",
    "BAR",
    "other",
)
LSU_PARTS = {
    "LDS": ("LDS",),
    "STS": ("STS",),
    "SHFL": ("SHFL",),
    "LDG": ("LDG",),
    "STG": ("STG",),
    "local": ("LDL", "STL"),
}


@dataclass
class Pipe:
    """instructions: Of one warp and iteration. cycles: Of the SM, for one iteration of all warps of a block."""

    name: str
    instructions: int
    cycles: float


def hmma_cycles(instruction: Instruction) -> int:
    """A warp's m8n8k4 takes 8 cycles: 4 steps that accumulate in float32, 2 in float16."""
    return 2 if ".F32" in instruction.opcode else 4


def pipes_of(body: list[Instruction], warps: int, over_ideal: dict[str, float] | None = None) -> list[Pipe]:
    """Cycles of every pipe. `over_ideal`: measured wavefronts of LDS and STS over the ideal of the access width, else 1."""
    kinds = Counter(kind(i) for i in body)
    share = warps / SUB_PARTITIONS  # warps of a sub-partition

    def local(name: str, cycles_each: int, *members: str) -> Pipe:
        count = sum(kinds[k] for k in members)
        return Pipe(name, count, count * cycles_each * share)

    def memory(name: str, *members: str) -> Pipe:
        accesses = [i for i in body if kind(i) in members]
        return Pipe(
            name,
            len(accesses),
            warps * sum(i.words for i in accesses) * (over_ideal or {}).get(name, 1),
        )

    tensor = [hmma_cycles(i) for i in body if kind(i) == "HMMA"]
    shuffles = Pipe("SHFL", kinds["SHFL"], kinds["SHFL"] * warps)
    parts = [shuffles if name == "SHFL" else memory(name, *members) for name, members in LSU_PARTS.items()]
    return [
        Pipe("tensor", len(tensor), sum(tensor) * share),
        Pipe("LSU", sum(p.instructions for p in parts), sum(p.cycles for p in parts)),
        *parts,
        local("MUFU", 8, "MUFU"),
        local("FMA", 2, "FP32", "IMAD"),
        local("ALU", 2, "ALU"),
        local("FP64", 4, "FP64"),
        local("issue", 1, *COUNTED),
    ]


def bounding(pipes: list[Pipe]) -> Pipe:
    """The slowest; the parts of LSU share it and cannot be."""
    return max((p for p in pipes if p.name not in LSU_PARTS), key=lambda p: p.cycles)


# ------------------------------------------------------------------------------------------------------------- kernels


@dataclass
class Kernel:
    name: str
    registers: int
    spill_bytes: int  # stores and loads
    stack_bytes: int
    static_shared_bytes: int
    body: list[Instruction]  # the main loop's steady path, or everything
    loop: list[Instruction]  # the main loop with every branch; empty without a loop
    budget: dict = field(default_factory=dict)
    wavefronts: dict | None = None  # what benchmarks/wavefronts.py has of it; None: the ideal is taken

    @property
    def shared_bytes(self) -> int:
        return self.static_shared_bytes + self.budget["dynamic_shared_bytes"]

    @property
    def blocks_per_sm(self) -> int:
        return blocks_per_sm(self.registers, self.shared_bytes, self.budget["threads"])

    @property
    def counts(self) -> Counter:
        return Counter(kind(i) for i in self.body)

    @property
    def pipes(self) -> list[Pipe]:
        return pipes_of(self.body, -(-self.budget["threads"] // WARP), self.over_ideal)

    @property
    def over_ideal(self) -> dict[str, float]:
        measured = {kind: numbers for kind, numbers in (self.wavefronts or {}).items() if kind in ("LDS", "STS")}
        return {kind: numbers["average"] / numbers["ideal"] for kind, numbers in measured.items()}

    @property
    def tensor_fraction(self) -> float:
        """Share of the tensor cores' peak that the slowest pipe allows."""
        pipes = self.pipes
        slowest = bounding(pipes).cycles
        return pipes[0].cycles / slowest if slowest else 0.0

    def exceeded(self) -> list[str]:
        """What is over budget, a sentence each."""
        b, said = self.budget, []

        def at_most(what: str, value: float, limit: float | None) -> None:
            if limit is not None and value > limit:
                said.append(f"{self.name}: {what} {value:g}, the budget is {limit:g}.")

        def at_least(what: str, value: float, limit: float | None) -> None:
            if limit is not None and value < limit:
                said.append(f"{self.name}: {what} {value:.3g}, the budget asks for {limit:g}.")

        at_most("registers", self.registers, b.get("registers"))
        at_most("bytes of spills", self.spill_bytes, b.get("spill_bytes"))
        at_most("bytes of shared memory", self.shared_bytes, b.get("shared_bytes"))
        at_least("blocks per SM", self.blocks_per_sm, b.get("blocks_per_sm"))
        at_least("fraction of the tensor peak", self.tensor_fraction, b.get("tensor_fraction"))
        if b.get("needs_hmma") and not self.counts["HMMA"]:
            said.append(f"{self.name}: no HMMA in the main loop.")
        local = Counter(kind(i) for i in self.loop if kind(i) in ("LDL", "STL"))
        if b.get("no_local_in_loop") and local:
            said.append(f"{self.name}: {local['LDL']} LDL and {local['STL']} STL in the main loop, there must be none.")
        for access, ratio in self.over_ideal.items():
            where = self.wavefronts[access].get("costliest")
            at_most(
                f"{access} wavefronts over the ideal{f' (most at {where})' if where else ''}",
                ratio,
                b.get("wavefronts_over_ideal"),
            )
        return said


_RESOURCES = re.compile(
    r"Compiling entry function '(\S+)' for 'sm_\d+'.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)",
    re.S,
)


def parse_resources(text: str) -> dict[str, dict[str, int]]:
    """What `ptxas -v` says, by mangled name."""
    found = {}
    for name, stack, stores, loads, registers, rest in _RESOURCES.findall(text):
        shared = re.search(r"(\d+) bytes smem", rest)
        found[name] = {
            "registers": int(registers),
            "spill_bytes": int(stores) + int(loads),
            "stack_bytes": int(stack),
            "static_shared_bytes": int(shared.group(1)) if shared else 0,
        }
    return found


def short_name(demangled: str) -> str:
    """`choose_tokens<float>` of `void flexattn::cuda::(anonymous namespace)::choose_tokens<float>(...)`."""
    name = re.sub(r"\(anonymous namespace\)::|<unnamed>::|flexattn::|cuda::|_GLOBAL__N__\w+::", "", demangled)
    name = re.sub(r"\((?:int|long|bool|unsigned int)\)", "", name)  # of a template's numbers
    return re.sub(r"^void ", "", name).split("(")[0].strip()


def budget_of(name: str, budgets: list[dict]) -> dict | None:
    """The first whose pattern fits."""
    return next((budget for budget in budgets if fnmatch.fnmatchcase(name, budget["kernel"])), None)


# ------------------------------------------------------------------------------------------------------------ compiler


class Unmeasured(SystemExit):
    """Ends with one sentence and exit code 2."""

    def __init__(self, sentence: str):
        print(f"{Path(sys.argv[0]).stem}: {sentence}", file=sys.stderr)
        super().__init__(2)


def find_compiler(nvcc: str, architecture: int = 70) -> Path:
    path, last = shutil.which(nvcc), " up to 12.9" if architecture == 70 else ""
    if path is None:
        raise Unmeasured(f"there is no {nvcc}; NVCC names an nvcc{last}, which can target sm_{architecture}.")
    version = re.search(
        r"release (\d+)\.(\d+)",
        subprocess.run([path, "--version"], capture_output=True, text=True).stdout,
    )
    if version is None or last and int(version.group(1)) >= 13:
        raise Unmeasured(
            f"{path} {version.group(0) if version else 'tells no version'}: sm_{architecture} takes an nvcc{last}."
        )
    for tool in ("cuobjdump", "ptxas"):
        if not (Path(path).parent / tool).exists():
            raise Unmeasured(f"there is no {tool} beside {path}.")
    return Path(path)


def run(command: list[str | Path]) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise Unmeasured(f"`{' '.join(map(str, command))}` failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def demangle(nvcc: Path, names: list[str]) -> list[str]:
    tool = nvcc.parent / "cu++filt"
    command = [tool, *names] if tool.exists() else ["c++filt", *names]
    return run(command).splitlines()


def compile_kernels(
    nvcc: Path, ccbin: str, sources: list[Path], root: Path, out: Path, architecture: int = 70
) -> list[Kernel]:
    out.mkdir(parents=True, exist_ok=True)
    includes = [root / "csrc" / "include", root / "csrc" / "kernels"]
    target = f"arch=compute_{architecture},code=sm_{architecture}"
    kernels = []
    for source in sources:
        cubin = out / f"{source.stem}.cubin"
        said = run([nvcc, "-ccbin", ccbin, "-std=c++17", "-O3", "-gencode", target, "-Xptxas", "-v",
                    *(f"-I{folder}" for folder in includes), "-cubin", "-o", cubin, source])  # fmt: skip
        resources = parse_resources(said)
        code = parse_sass(run([nvcc.parent / "cuobjdump", "--dump-sass", cubin]))
        for mangled, demangled in zip(resources, demangle(nvcc, list(resources))):
            body, loop = Flow.of(code[mangled]).main_loop() or (code[mangled], [])
            kernels.append(Kernel(short_name(demangled), **resources[mangled], body=body, loop=loop))
    return kernels


def kernel_sources(root: Path) -> list[Path]:
    lines = (line.split("#")[0].split() for line in (root / "csrc" / "sources.txt").read_text().splitlines())
    return [root / "csrc" / line[1] for line in lines if line and line[0] == "cuda"]


# -------------------------------------------------------------------------------------------------------------- report


def resources_table(kernels: list[Kernel]) -> Table:
    table = Table(title="Resources on sm_70", title_justify="left")
    table.add_column("kernel", overflow="fold")
    for column in (
        "threads",
        "registers",
        "spill B",
        "stack B",
        "shared B",
        "blocks/SM",
        "main loop",
    ):
        table.add_column(column, justify="right")
    for k in kernels:
        table.add_row(k.name, str(k.budget["threads"]), str(k.registers), str(k.spill_bytes), str(k.stack_bytes), str(k.shared_bytes),
                      str(k.blocks_per_sm), f"{len(k.body)} instr." if k.loop else "none")  # fmt: skip
    return table


def counts_table(kernels: list[Kernel]) -> Table:
    table = Table(title="Instructions of a warp in one iteration of the main loop", title_justify="left")
    table.add_column("kernel", overflow="fold")
    for name in COUNTED:
        table.add_column(name, justify="right")
    for k in kernels:
        table.add_row(k.name, *(str(k.counts[name]) for name in COUNTED))
    return table


def cycles_table(kernels: list[Kernel]) -> Table:
    title = "Cycles of an SM for one iteration of a block, by pipe; LSU is the sum of the six after it"
    table = Table(title=title, title_justify="left")
    table.add_column("kernel", overflow="fold")
    for pipe in kernels[0].pipes if kernels else []:
        table.add_column(pipe.name, justify="right")
    for column in ("bound by", "tensor peak", "wavefronts"):
        table.add_column(column)
    for k in kernels:
        slowest = bounding(k.pipes)
        cells = [f"[bold]{p.cycles:.0f}[/bold]" if p.name == slowest.name else f"{p.cycles:.0f}" for p in k.pipes]
        table.add_row(k.name, *cells, slowest.name, f"{k.tensor_fraction:.1%}" if k.counts["HMMA"] else "-",
                      "measured" if k.wavefronts else "ideal")  # fmt: skip
    table.caption = (
        "wavefronts: measured, or the ideal for the access width; tensor peak: the share that the slowest pipe allows"
    )
    table.caption_justify = "left"
    return table


def accesses_table(kernels: list[Kernel]) -> Table:
    title = "A warp's access on the average, and at best: wavefronts of shared memory, 32-byte sectors of global memory"
    table = Table(title=title, title_justify="left")
    table.add_column("kernel", overflow="fold")
    for column in ("LDS", "STS", "LDG", "STG"):
        table.add_column(column, justify="right")
    for k in kernels:
        found = [(k.wavefronts or {}).get(kind) for kind in ("LDS", "STS", "LDG", "STG")]
        table.add_row(
            k.name,
            *(f"{numbers['average']:.2f} / {numbers['ideal']:.2f}" if numbers else "-" for numbers in found),
        )
    table.caption = "as g++ sees the accesses of the source; nvcc may merge neighbours into wider ones"
    table.caption_justify = "left"
    return table


def write_csv(path: Path, kernels: list[Kernel]) -> None:
    with path.open("w", newline="") as file:
        names = [p.name for p in kernels[0].pipes] if kernels else []
        writer = csv.writer(file)
        writer.writerow(["kernel", "threads", "registers", "spill_bytes", "stack_bytes", "shared_bytes", "blocks_per_sm", *COUNTED,
                         *(f"{name}_cycles" for name in names), "bound", "tensor_fraction", "wavefronts"])  # fmt: skip
        for k in kernels:
            writer.writerow([k.name, k.budget["threads"], k.registers, k.spill_bytes, k.stack_bytes, k.shared_bytes, k.blocks_per_sm,
                             *(k.counts[name] for name in COUNTED), *(p.cycles for p in k.pipes), bounding(k.pipes).name,
                             f"{k.tensor_fraction:.4f}", "measured" if k.wavefronts else "ideal"])  # fmt: skip


def apply_budgets(kernels: list[Kernel], budgets: list[dict]) -> tuple[list[Kernel], list[str]]:
    """The kernels to weigh, and what is wrong with the list of budgets."""
    weighed, said = [], []
    for kernel in kernels:
        budget = budget_of(kernel.name, budgets)
        if budget is None:
            said.append(f"{kernel.name}: no pattern in the budgets fits it.")
        elif "skip" not in budget:
            kernel.budget = budget
            weighed.append(kernel)
    for budget in budgets:
        if all(budget_of(kernel.name, budgets) is not budget for kernel in kernels):
            said.append(f"{budget['kernel']}: the budget fits no kernel.")
    return weighed, said


def measured_wavefronts(out: Path) -> dict:
    file = out / "wavefronts.json"
    run([sys.executable, Path(__file__).with_name("wavefronts.py"), "--json", file])
    return json.loads(file.read_text())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Resources and pipes of the kernels on the V100, from their machine code."
    )
    parser.add_argument("--nvcc", default="nvcc", help="an nvcc up to 12.9, with cuobjdump beside it")
    parser.add_argument("--ccbin", default="g++", help="its host compiler")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository")
    parser.add_argument("--budgets", type=Path, help="default: csrc/kernels/budgets.json")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--wavefronts",
        type=Path,
        metavar="FILE",
        help="what wavefronts.py --json has written; default: runs it",
    )
    source.add_argument(
        "--ideal-wavefronts",
        action="store_true",
        help="measures none, and does not check their budgets",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "sm70", help="where the machine code goes")
    parser.add_argument("--csv", type=Path, metavar="FILE")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="sources whose name fits, e.g. 'gather*'")
    args = parser.parse_args(arguments)

    nvcc = find_compiler(args.nvcc)
    if Table is None:
        raise Unmeasured("rich is missing; `pip install rich`.")
    budgets = json.loads((args.budgets or args.root / "csrc" / "kernels" / "budgets.json").read_text())
    wavefronts = {}
    if not args.ideal_wavefronts:
        wavefronts = json.loads(args.wavefronts.read_text()) if args.wavefronts else measured_wavefronts(args.out)
    sources = [source for source in kernel_sources(args.root) if fnmatch.fnmatchcase(source.name, args.only)]
    compiled = compile_kernels(nvcc, args.ccbin, sources, args.root, args.out)
    kernels, said = apply_budgets(compiled, budgets)
    if args.only != "*":  # the other budgets belong to what was left out
        said = [sentence for sentence in said if "fits no kernel" not in sentence]
    for kernel in kernels:
        kernel.wavefronts = wavefronts.get(kernel.name)
        if not kernel.wavefronts and not args.ideal_wavefronts:
            said.append(f"{kernel.name}: its wavefronts were not measured.")

    console = Console(width=170)
    console.print(resources_table(kernels), counts_table(kernels), cycles_table(kernels))
    if wavefronts:
        console.print(accesses_table(kernels))
    for name in sorted({k.name for k in compiled} - {k.name for k in kernels}):
        budget = budget_of(name, budgets)
        if budget:
            console.print(f"left out: {name}: {budget['skip']}", markup=False)
    if args.csv:
        write_csv(args.csv, kernels)
    said += [sentence for kernel in kernels for sentence in kernel.exceeded()]
    for sentence in said:
        print(sentence, file=sys.stderr)
    print(f"{len(kernels)} kernels, {'every one within its budget' if not said else f'{len(said)} complaints'}.")
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
