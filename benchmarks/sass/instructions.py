"""SASS instructions, from what `cuobjdump --dump-sass` prints, and the kind that each counts as."""

from __future__ import annotations

import re
from dataclasses import dataclass


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
        """The address that a branch jumps to; of BRA.DIV none, which leaves the way only if lanes have parted."""
        found = re.findall(r"0x[0-9a-f]+", self.operands) if self.base == "BRA" and not self.if_parted else []
        return int(found[-1], 16) if found else None

    @property
    def if_parted(self) -> bool:
        return self.opcode.startswith("BRA.DIV")

    @property
    def falls_through(self) -> bool:
        if self.base == "BRA":
            return bool(self.predicate) or "," in self.operands or self.if_parted
        return self.base not in ("EXIT", "RET", "BRX", "JMX", "KILL") or bool(self.predicate)

    @property
    def words(self) -> int:
        """32-bit words per lane of a memory access."""
        parts = self.opcode.split(".")
        return 4 if "128" in parts else 2 if "64" in parts else 1

    @property
    def kind(self) -> str:
        """What the instruction counts as; whatever is not listed is integer arithmetic or logic."""
        return "other" if self.predicate == "@!PT" else _KINDS.get(self.base, "ALU")


KINDS = (
    "HMMA", "LDS", "STS", "LDG", "STG", "SHFL", "MUFU", "FP32", "IMAD", "ALU", "FP64", "LDL", "STL", "BAR", "other",
)  # fmt: skip
_KINDS = {
    "LDS": "LDS", "LDSM": "LDS", "STS": "STS", "ATOMS": "STS", "LDG": "LDG", "LD": "LDG", "LDGSTS": "LDG", "STG": "STG",
    "ST": "STG", "ATOM": "STG", "ATOMG": "STG", "RED": "STG", "LDL": "LDL", "STL": "STL", "SHFL": "SHFL",
    "HMMA": "HMMA", "BAR": "BAR",
    **dict.fromkeys(("MUFU", "F2F", "F2I", "I2F", "FRND", "POPC", "FLO", "BREV"), "MUFU"),
    **dict.fromkeys(("FFMA", "FMUL", "FADD", "FFMA32I", "FMUL32I", "FADD32I"), "FP32"),
    **dict.fromkeys(("IMAD", "IMAD32I", "HFMA2", "HADD2", "HMUL2", "HFMA2_32I", "HADD2_32I", "HMUL2_32I"), "IMAD"),
    **dict.fromkeys(("DFMA", "DADD", "DMUL", "DSETP", "DMNMX"), "FP64"),
    **dict.fromkeys(("BRA", "EXIT", "BSSY", "BSYNC", "BREAK", "NOP", "WARPSYNC", "CALL", "RET", "YIELD", "S2R", "CS2R",
                     "DEPBAR", "MEMBAR", "BMOV", "LDC", "ERRBAR", "CCTL", "NANOSLEEP", "BPT"), "other"),
}  # fmt: skip

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?P\w+)\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*?)\s*;", re.M)


def parse_sass(text: str) -> dict[str, list[Instruction]]:
    """Return the instructions of each function in a dump, by mangled name."""
    functions = {}
    for part in re.split(r"^\s*Function : ", text, flags=re.M)[1:]:
        name, body = part.split("\n", 1)
        functions[name.strip()] = [
            Instruction(int(address, 16), opcode, operands, predicate)
            for address, predicate, opcode, operands in _LINE.findall(body)
        ]
    return functions
