"""The control flow of a function: basic blocks, natural loops, and the steady path of the main loop.

The main loop is the loop that holds the most HMMA or, without tensor cores, the most LDS, LDG and FFMA; loops inside it
are left out. Of its paths the steady one counts (full tiles without a mask): that with the most HMMA, then the most
16-byte LDG and STS (without HMMA: LDS, STS and LDG), then the fewest instructions.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

from sass.instructions import Instruction


@dataclass
class Loop:
    header: int  # number of its first block
    blocks: set[int]
    latches: set[int]  # blocks that jump back to the header


@dataclass(frozen=True)
class MainLoop:
    steady: list[Instruction]  # along the steady path, without the loops inside
    everything: list[Instruction]  # of all paths, with the loops inside


@dataclass
class Flow:
    """The basic blocks of a function, and the numbers of the blocks that may follow each."""

    blocks: list[list[Instruction]]
    follows: list[list[int]]

    @classmethod
    def of(cls, instructions: list[Instruction]) -> Flow:
        blocks = basic_blocks(end_at_traps(instructions))
        number = {block[0].address: n for n, block in enumerate(blocks)}
        follows = []
        for n, block in enumerate(blocks):
            last = block[-1]
            after = [n + 1] if last.falls_through and n + 1 < len(blocks) else []
            follows.append(after + ([number[last.target]] if last.target in number else []))
        return cls(blocks, follows)

    def order(self) -> list[int]:
        """Return the reachable blocks in reverse postorder: jumps back apart, a block precedes what follows it."""
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

    def predecessors(self, order: list[int]) -> dict[int, list[int]]:
        before: dict[int, list[int]] = {n: [] for n in order}
        for n in order:
            for after in self.follows[n]:
                before[after].append(n)
        return before

    def loops(self) -> list[Loop]:
        """Return the natural loops: an edge back to a block that dominates its start, and all blocks that reach it."""
        order = self.order()
        before = self.predecessors(order)
        dominators = find_dominators(order, before)
        found: dict[int, Loop] = {}
        for n in order:
            for header in (after for after in self.follows[n] if after in dominators[n]):
                loop = found.setdefault(header, Loop(header, {header}, set()))
                loop.latches.add(n)
                add_body(loop, n, before)
        return list(found.values())

    def instructions(self, blocks: Iterable[int]) -> list[Instruction]:
        return [instruction for n in blocks for instruction in self.blocks[n]]

    def main_loop(self) -> MainLoop | None:
        """Return the main loop, or None for code without a loop."""
        loops = self.loops()
        if not loops:
            return None
        loop = max(loops, key=lambda loop: self._weight(own_blocks(loop, loops)))
        own = own_blocks(loop, loops)
        steady = [n for n in self._steady_path(loop, own) if n in own]
        return MainLoop(self.instructions(steady), self.instructions(sorted(loop.blocks)))

    def _weight(self, blocks: set[int]) -> tuple[int, int]:
        instructions = self.instructions(blocks)
        kinds = Counter(i.kind for i in instructions)
        return kinds["HMMA"], kinds["LDS"] + kinds["LDG"] + sum(i.base == "FFMA" for i in instructions)

    def _steady_path(self, loop: Loop, own: set[int]) -> list[int]:
        """Return the blocks of the path of highest value from the loop's header to a latch."""
        # With tensor cores tiles are copied 16 bytes at a time; narrower accesses serve masks and bookkeeping.
        tensor = self._weight(own)[0] > 0
        value = {n: path_value(self.blocks[n] if n in own else [], tensor) for n in loop.blocks}
        best = {loop.header: (value[loop.header], [loop.header])}
        order = [n for n in self.order() if n in loop.blocks]
        rank = {n: i for i, n in enumerate(order)}
        for n in order:
            for after in self.follows[n] if n in best else []:
                if rank.get(after, -1) > rank[n]:
                    total = tuple(a + b for a, b in zip(best[n][0], value[after]))
                    if after not in best or total > best[after][0]:
                        best[after] = total, [*best[n][1], after]
        _, path = max((best[n] for n in loop.latches if n in best), key=lambda entry: entry[0])
        return path


def end_at_traps(instructions: list[Instruction]) -> list[Instruction]:
    """Return the instructions with an EXIT for each call of a function that traps: what follows is not its return."""
    index = {instruction.address: n for n, instruction in enumerate(instructions)}

    def traps(call: Instruction) -> bool:
        called = re.findall(r"0x[0-9a-f]+", call.operands) if call.base == "CALL" else []
        body = instructions[index[int(called[-1], 16)] :] if called and int(called[-1], 16) in index else []
        return next((i.base for i in body if i.base in ("BPT", "RET", "EXIT", "BRA")), "") == "BPT"

    return [replace(i, opcode="EXIT", operands="") if traps(i) else i for i in instructions]


def basic_blocks(instructions: list[Instruction]) -> list[list[Instruction]]:
    """Cut a function where a branch starts or ends."""
    addresses = {instruction.address for instruction in instructions}
    starts = {instructions[0].address} | {i.target for i in instructions if i.target in addresses}
    ends = [i for i in instructions if i.target is not None or not i.falls_through or i.base == "EXIT"]
    following = {a.address: b.address for a, b in pairwise(instructions)}
    starts |= {following[i.address] for i in ends if i.address in following}
    blocks: list[list[Instruction]] = []
    for instruction in instructions:
        if instruction.address in starts:
            blocks.append([])
        blocks[-1].append(instruction)
    return blocks


def find_dominators(order: list[int], before: dict[int, list[int]]) -> dict[int, set[int]]:
    """Return for each block those through which every path to it leads, itself included."""
    dominators = {n: set(order) for n in order} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for n in order[1:]:
            new = {n} | set.intersection(*(dominators[p] for p in before[n]))
            changed |= new != dominators[n]
            dominators[n] = new
    return dominators


def add_body(loop: Loop, latch: int, before: dict[int, list[int]]) -> None:
    """Add every block from which `latch` is reached without passing the header."""
    stack = [latch]
    while stack:
        block = stack.pop()
        if block not in loop.blocks:
            loop.blocks.add(block)
            stack += before[block]


def own_blocks(loop: Loop, loops: list[Loop]) -> set[int]:
    """Return a loop's blocks without those of the loops inside it."""
    inner = [other.blocks for other in loops if other is not loop and other.blocks < loop.blocks]
    return loop.blocks - set().union(*inner)


def path_value(block: list[Instruction], tensor: bool) -> tuple[int, ...]:
    """Return what a block adds to the value of a path: HMMA, copies, and as few instructions as possible."""
    if tensor:
        copies = sum(i.kind in ("STS", "LDG") and i.words == 4 for i in block)
    else:
        copies = sum(i.kind in ("LDS", "STS", "LDG") for i in block)
    return sum(i.kind == "HMMA" for i in block), copies, -len(block)
