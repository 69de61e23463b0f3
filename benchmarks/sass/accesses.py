"""Memory accesses of the kernels, measured on the CPU: averages per kernel, and the file that holds them."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# What an access of each kind is counted in.
UNITS = {"LDS": "wavefronts", "STS": "wavefronts", "LDG": "sectors", "STG": "sectors"}


@dataclass(frozen=True)
class Access:
    """A line of a kernel that accesses memory."""

    kernel: str
    kind: str
    source: str  # file:line, and where that was inlined to
    width: int  # bytes of a lane
    instructions: int
    units: int  # wavefronts or sectors of all instructions together
    ideal: int


@dataclass(frozen=True)
class AccessCost:
    """Wavefronts or sectors of a warp's access: the average of a kernel, and the ideal for the accesses' widths."""

    average: float
    ideal: float
    costliest: str = ""  # the source line that is furthest above the ideal

    @property
    def over_ideal(self) -> float:
        return self.average / self.ideal


KernelAccesses = dict[str, AccessCost]  # by kind


def averages(accesses: Iterable[Access]) -> dict[str, KernelAccesses]:
    """Return the costs of each kernel, by kind."""
    groups: dict[tuple[str, str], list[Access]] = defaultdict(list)
    for access in accesses:
        groups[access.kernel, access.kind].append(access)
    result: dict[str, KernelAccesses] = defaultdict(dict)
    for (kernel, kind), members in groups.items():
        result[kernel][kind] = average(members)
    return dict(result)


def average(accesses: list[Access]) -> AccessCost:
    instructions = sum(a.instructions for a in accesses)
    units, ideal = sum(a.units for a in accesses), sum(a.ideal for a in accesses)
    costliest = max(accesses, key=lambda a: a.units - a.ideal).source if units > ideal else ""
    return AccessCost(units / instructions, ideal / instructions, costliest)


def write_averages(path: Path, found: dict[str, KernelAccesses]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {name: {kind: dataclasses.asdict(cost) for kind, cost in kinds.items()} for name, kinds in found.items()}
    path.write_text(json.dumps(plain, indent=1) + "\n")


def read_averages(path: Path) -> dict[str, KernelAccesses]:
    found = json.loads(path.read_text())
    return {name: {kind: AccessCost(**cost) for kind, cost in kinds.items()} for name, kinds in found.items()}
