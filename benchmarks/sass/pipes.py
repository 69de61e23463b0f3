"""Cycles that the pipes of a V100 take for a loop: a lower bound, in which no pipe ever waits.

tensor   512 FMA per cycle and SM (1024 FLOP x 80 SM x 1.53 GHz = 125 TFLOP/s): a warp's mma.m8n8k4 has 1024 FMA and
         takes 8 cycles of its sub-partition's quarter of that, 2 for each of the 4 HMMA.884.F32 steps
LSU      one wavefront (128 bytes) per cycle and SM: the minimum for the width of LDG, STG, local memory, LDS and STS,
         the last two times the measured ratio to the ideal; SHFL 32 lanes per cycle and SM, one wavefront
MUFU     4 lanes per cycle and sub-partition: 8 cycles; conversions and bit counts go there too
FMA      16 lanes per cycle and sub-partition: 2 cycles; float32, half2 and IMAD
ALU      16 lanes per cycle and sub-partition: 2 cycles; integers, logic, comparisons, minimum and maximum
FP64     8 lanes per cycle and sub-partition: 4 cycles
issue    1 instruction per cycle and sub-partition
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from sass.instructions import KINDS, Instruction
from sass.v100 import SUB_PARTITIONS

LSU_PARTS = {
    "LDS": ("LDS",),
    "STS": ("STS",),
    "SHFL": ("SHFL",),
    "LDG": ("LDG",),
    "STG": ("STG",),
    "local": ("LDL", "STL"),
}
# (name, cycles of an instruction, kinds of instructions) of the pipes that each sub-partition has for itself
LOCAL_PIPES = (
    ("MUFU", 8, ("MUFU",)),
    ("FMA", 2, ("FP32", "IMAD")),
    ("ALU", 2, ("ALU",)),
    ("FP64", 4, ("FP64",)),
    ("issue", 1, KINDS),
)
PIPES = ("tensor", "LSU", *LSU_PARTS, *(name for name, _, _ in LOCAL_PIPES))


@dataclass(frozen=True)
class Pipe:
    name: str
    instructions: int  # of one warp and iteration
    cycles: float  # of the SM, for one iteration of all warps of a block


def pipes_of(body: list[Instruction], warps: int, over_ideal: Mapping[str, float] | None = None) -> list[Pipe]:
    """Return every pipe of `PIPES`, in order.

    Args:
        body: One iteration of a loop.
        warps: Warps of a block.
        over_ideal: Measured wavefronts of LDS and STS, as ratios to the ideal of the access width; 1 by default.
    """
    kinds = Counter(i.kind for i in body)
    share = warps / SUB_PARTITIONS
    tensor = [hmma_cycles(i) for i in body if i.kind == "HMMA"]
    parts = lsu_parts(body, warps, over_ideal or {})
    counts = [(name, cycles, sum(kinds[kind] for kind in members)) for name, cycles, members in LOCAL_PIPES]
    return [
        Pipe("tensor", len(tensor), sum(tensor) * share),
        Pipe("LSU", sum(p.instructions for p in parts), sum(p.cycles for p in parts)),
        *parts,
        *(Pipe(name, count, count * cycles * share) for name, cycles, count in counts),
    ]


def hmma_cycles(instruction: Instruction) -> int:
    """Return the cycles of one step; a warp's m8n8k4 takes 8: 4 steps that accumulate in float32, 2 in float16."""
    return 2 if ".F32" in instruction.opcode else 4


def lsu_parts(body: list[Instruction], warps: int, over_ideal: Mapping[str, float]) -> list[Pipe]:
    parts = []
    for name, members in LSU_PARTS.items():
        accesses = [i for i in body if i.kind in members]
        wavefronts = sum(i.words for i in accesses)
        parts.append(Pipe(name, len(accesses), warps * wavefronts * over_ideal.get(name, 1)))
    return parts


def bounding(pipes: list[Pipe]) -> Pipe:
    """Return the slowest pipe; the parts of the LSU share it and cannot be."""
    return max((p for p in pipes if p.name not in LSU_PARTS), key=lambda p: p.cycles)
