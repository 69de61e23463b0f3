"""A compiled kernel, and the limits that it exceeds."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

from sass.accesses import KernelAccesses
from sass.budgets import UNLIMITED, Budget, budget_of
from sass.instructions import Instruction
from sass.pipes import Pipe, bounding, pipes_of
from sass.v100 import blocks_per_sm, warps_of


@dataclass(frozen=True)
class Resources:
    """What `ptxas -v` says of a kernel."""

    registers: int
    spill_bytes: int  # stores and loads
    stack_bytes: int
    static_shared_bytes: int


@dataclass
class Kernel:
    name: str
    resources: Resources
    body: list[Instruction]  # the main loop's steady path; all instructions of a kernel without a loop
    loop: list[Instruction]  # the main loop with every branch; empty without a loop
    budget: Budget = UNLIMITED
    accesses: KernelAccesses = field(default_factory=dict)  # measured; without, the ideal is assumed

    @property
    def shared_bytes(self) -> int:
        return self.resources.static_shared_bytes + self.budget.dynamic_shared_bytes

    @property
    def blocks_per_sm(self) -> int:
        return blocks_per_sm(self.resources.registers, self.shared_bytes, self.budget.threads)

    @property
    def counts(self) -> Counter[str]:
        """Instructions of the body, by kind."""
        return Counter(i.kind for i in self.body)

    @property
    def pipes(self) -> list[Pipe]:
        return pipes_of(self.body, warps_of(self.budget.threads), self.over_ideal)

    @property
    def over_ideal(self) -> dict[str, float]:
        """Measured wavefronts of shared memory as ratios to the ideal."""
        return {kind: cost.over_ideal for kind, cost in self.accesses.items() if kind in ("LDS", "STS")}

    @property
    def tensor_fraction(self) -> float:
        """Share of the tensor cores' peak that the slowest pipe allows."""
        pipes = self.pipes
        slowest = bounding(pipes).cycles
        return pipes[0].cycles / slowest if slowest else 0.0

    @property
    def beside_hmma(self) -> int:
        """How many instructions of the body are not HMMA."""
        return len(self.body) - self.counts["HMMA"]

    @property
    def ffma_fraction(self) -> float:
        """Share of FFMA among the instructions of the body."""
        return sum(i.base == "FFMA" for i in self.body) / max(1, len(self.body))


def exceeded(kernel: Kernel) -> list[str]:
    """Return one sentence for every limit that a kernel exceeds."""
    said = [*resource_complaints(kernel), *loop_complaints(kernel), *wavefront_complaints(kernel)]
    return [f"{kernel.name}: {sentence}" for sentence in said]


def resource_complaints(kernel: Kernel) -> list[str]:
    budget = kernel.budget
    at_most = (
        ("registers", kernel.resources.registers, budget.registers),
        ("bytes of spills", kernel.resources.spill_bytes, budget.spill_bytes),
        ("bytes of shared memory", kernel.shared_bytes, budget.shared_bytes),
        ("instructions beside HMMA in the main loop", kernel.beside_hmma, budget.beside_hmma),
    )
    at_least = (
        ("blocks per SM", kernel.blocks_per_sm, budget.blocks_per_sm),
        ("fraction of the tensor peak", kernel.tensor_fraction, budget.tensor_fraction),
        ("fraction of FFMA in the main loop", kernel.ffma_fraction, budget.ffma_fraction),
    )
    return [
        *(over(what, value, limit) for what, value, limit in at_most if limit is not None and value > limit),
        *(f"{what} {value:.3g}, the budget asks for {limit:g}."
          for what, value, limit in at_least if limit is not None and value < limit),
    ]  # fmt: skip


def loop_complaints(kernel: Kernel) -> list[str]:
    said = []
    if kernel.budget.needs_hmma and not kernel.counts["HMMA"]:
        said.append("no HMMA in the main loop.")
    local = Counter(i.kind for i in kernel.loop if i.kind in ("LDL", "STL"))
    if kernel.budget.no_local_in_loop and local:
        said.append(local_memory(local["LDL"], local["STL"]))
    return said


def wavefront_complaints(kernel: Kernel) -> list[str]:
    limit, said = kernel.budget.wavefronts_over_ideal, []
    for access, ratio in kernel.over_ideal.items():
        costliest = kernel.accesses[access].costliest
        where = f" (most at {costliest})" if costliest else ""
        if limit is not None and ratio > limit:
            said.append(over(f"{access} wavefronts over the ideal{where}", ratio, limit))
    return said


def over(what: str, value: float, limit: float) -> str:
    return f"{what} {value:g}, the budget is {limit:g}."


def local_memory(loads: int, stores: int) -> str:
    return f"{loads} LDL and {stores} STL in the main loop, there must be none."


def apply_budgets(kernels: list[Kernel], budgets: list[Budget]) -> list[Kernel]:
    """Give each kernel its budget; return those that are measured, without those that a budget skips."""
    measured = []
    for kernel in kernels:
        budget = budget_of(kernel.name, budgets)
        if budget and not budget.skip:
            kernel.budget = budget
            measured.append(kernel)
    return measured


def without_budget(kernels: list[Kernel], budgets: list[Budget]) -> list[str]:
    """Return one sentence for every kernel that no budget's pattern matches."""
    names = [kernel.name for kernel in kernels if budget_of(kernel.name, budgets) is None]
    return [f"{name}: no pattern in the budgets matches it." for name in names]


def without_kernel(kernels: list[Kernel], budgets: list[Budget]) -> list[str]:
    """Return one sentence for every budget that applies to no kernel."""
    used = [budget_of(kernel.name, budgets) for kernel in kernels]
    return [f"{budget.kernel}: the budget matches no kernel." for budget in budgets if budget not in used]


def short_name(demangled: str) -> str:
    """Return `choose_tokens<float>` of `void flexattn::cuda::(anonymous namespace)::choose_tokens<float>(...)`."""
    name = re.sub(r"\(anonymous namespace\)::|<unnamed>::|flexattn::|cuda::|_GLOBAL__N__\w+::", "", demangled)
    name = re.sub(r"\((?:int|long|bool|unsigned int)\)", "", name)  # of a template's numbers
    return re.sub(r"^void ", "", name).split("(")[0].strip()
