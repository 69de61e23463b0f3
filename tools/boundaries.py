"""Check the boundaries of the native code, which no compiler checks.

The kernels and their interface must stay usable without torch and Python, and the torch binding must reach them through
that interface alone. The boundaries between the Python rooms are import-linter's contracts in pyproject.toml.

    python tools/boundaries.py
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Rule(NamedTuple):
    """What the files of a folder must not contain, and why."""

    folder: str
    pattern: re.Pattern[str]
    reason: str


_TORCH = re.compile(r'^\s*#\s*include\s*[<"](torch|ATen|c10|pybind11|Python\.h)')
RULES = (
    Rule("csrc/include", _TORCH, "the interface of the kernels knows neither torch nor Python"),
    Rule("csrc/kernels", _TORCH, "the kernels know neither torch nor Python"),
    Rule("csrc/cpu", re.compile(r'^\s*#\s*include\s*[<"](torch|pybind11|Python\.h)'), "the CPU kernels use ATen alone"),
    Rule("csrc/torch", re.compile(r"<<<"), "the binding launches nothing; a launch function in csrc/kernels does"),
)


def violations(root: Path) -> list[str]:
    """Return one line for each place that crosses a boundary."""
    found = []
    for rule in RULES:
        for path in sorted((root / rule.folder).rglob("*")):
            if not path.is_file():
                continue
            for number, line in enumerate(path.read_text().splitlines(), 1):
                if rule.pattern.search(line):
                    found.append(f"{path.relative_to(root)}:{number}: {line.strip()} ({rule.reason})")
    return found


def main() -> None:
    found = violations(ROOT)
    print("\n".join(found) or "The native boundaries hold.")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
