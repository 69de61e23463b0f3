"""Budgets: what each kernel may take of a V100, and must make of it.

An entry of the file has a pattern of kernel names (the first that matches counts), the launch, and any of the limits.
An entry with `skip` says why its kernels are left out.
"""

from __future__ import annotations

import fnmatch
import json
from dataclasses import dataclass, fields
from pathlib import Path

from sass.errors import UnmeasuredError


@dataclass(frozen=True)
class Budget:
    kernel: str  # a pattern
    threads: int = 0  # of a block
    dynamic_shared_bytes: int = 0  # at head_dim 128
    skip: str = ""
    # At most:
    registers: int | None = None
    spill_bytes: int | None = None
    shared_bytes: int | None = None
    wavefronts_over_ideal: float | None = None  # of LDS and of STS
    beside_hmma: int | None = None  # instructions of the main loop that are not HMMA
    # At least:
    blocks_per_sm: int | None = None
    tensor_fraction: float | None = None
    ffma_fraction: float | None = None  # of the instructions of the main loop
    # Of the main loop:
    needs_hmma: bool = False
    no_local_in_loop: bool = False


UNLIMITED = Budget("")


def read_budgets(path: Path) -> list[Budget]:
    """Raise UnmeasuredError for an entry that has an unknown key, or no launch."""
    known = {field.name for field in fields(Budget)}
    budgets = []
    for entry in json.loads(path.read_text()):
        unknown = sorted(entry.keys() - known)
        if unknown:
            raise UnmeasuredError(f"{path}: {entry['kernel']}: there is no limit called {', '.join(unknown)}.")
        if "skip" not in entry and "threads" not in entry:
            raise UnmeasuredError(f"{path}: {entry['kernel']}: threads are missing.")
        budgets.append(Budget(**entry))
    return budgets


def budget_of(name: str, budgets: list[Budget]) -> Budget | None:
    """Return the first budget whose pattern matches a kernel's name."""
    return next((budget for budget in budgets if fnmatch.fnmatchcase(name, budget.kernel)), None)
