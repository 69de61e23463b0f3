"""Measure the sizes that keep this code readable, and fail above the limits.

    python tools/house.py                 # this checkout
    python tools/house.py --root DIR      # another one, for a comparison; prints the same table

Python functions are counted without signature and docstring, nested functions with the one around them. Parameters are
counted as ruff does: without `self`, `cls`, `*args` and `**kwargs`. A function whose signature an interface dictates
carries `# noqa: PLR0913 - reason` on the line of its name; the reason is printed. Kernel bodies are those of
`__global__` functions.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MAX_LINES = 50
MAX_PARAMETERS = 8
MAX_KERNEL_LINES = 100
MAX_README_LINES = 120
REPEATED_LINES = 6

SKIPPED_FOLDERS = {"build", "dist", "shared", "site", "__pycache__"}
NATIVE = (".cu", ".cuh", ".cpp", ".h")
SUPPRESSIONS = re.compile(r"#\s*(noqa|type:\s*ignore|fmt:\s*(?:off|skip))|//\s*(NOLINT|clang-format off)")


@dataclass(frozen=True)
class Function:
    """One function: where it is, how long its body is, and how many parameters it takes."""

    where: str
    name: str
    lines: int
    parameters: int = 0
    exemption: str | None = None

    def __str__(self) -> str:
        return f"{self.where} {self.name}"


@dataclass(frozen=True)
class House:
    """Everything that is measured of one checkout."""

    functions: list[Function]
    kernels: list[Function]
    python_lines: int
    native_lines: int
    readme_lines: int
    readme_words: int
    suppressions: int
    repeated_lines: int


# ------------------------------------------------------------------------------------------------------------- Python


def python_functions(path: Path, where: str) -> Iterator[Function]:
    """Yield every function and method of a file."""
    source = path.read_text()
    lines = source.splitlines()
    for node, name in _definitions(ast.parse(source), ""):
        reason = re.search(r"noqa: PLR0913\W+(\w.*)", lines[node.lineno - 1])
        yield Function(
            f"{where}:{node.lineno}", name, _body_lines(node), _parameters(node), reason.group(1) if reason else None
        )


def _definitions(node: ast.AST, prefix: str) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child, prefix + child.name
        inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        yield from _definitions(child, f"{prefix}{child.name}." if inside else prefix)


def _body(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.stmt]:
    """Return the statements of a function without its docstring, or the docstring where there is nothing else."""
    return node.body[1:] if ast.get_docstring(node) is not None and len(node.body) > 1 else node.body


def _body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = _body(node)[0]
    start = min([first.lineno, *(decorator.lineno for decorator in getattr(first, "decorator_list", []))])
    return (node.end_lineno or start) - start + 1


def _parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    names = [one.arg for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


# -------------------------------------------------------------------------------------------------------------- CUDA


def kernels(path: Path, where: str) -> Iterator[Function]:
    """Yield every `__global__` function that a file defines."""
    text = _without_comments(path.read_text())
    for match in re.finditer(r"\b__global__\b", text):
        opening = _opening_brace(text, match.end())
        if opening is None:
            continue
        name = re.findall(r"(\w+)\s*\(", text[match.end() : opening].replace("__launch_bounds__", ""))
        body = text[opening : _closing_brace(text, opening)]
        yield Function(f"{where}:{text.count(chr(10), 0, match.start()) + 1}", name[-1], body.count("\n") - 1)


def _without_comments(text: str) -> str:
    """Blank out comments and literals, keeping the line breaks."""
    token = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])+\'', re.DOTALL)
    return token.sub(lambda found: re.sub(r"[^\n]", " ", found.group()), text)


def _opening_brace(text: str, start: int) -> int | None:
    """Return where the body of a function opens; None for a declaration."""
    depth = 0
    for position in range(start, len(text)):
        character = text[position]
        depth += (character == "(") - (character == ")")
        if depth == 0 and character in "{;":
            return position if character == "{" else None
    return None


def _closing_brace(text: str, opening: int) -> int:
    depth = 0
    for position in range(opening, len(text)):
        depth += (text[position] == "{") - (text[position] == "}")
        if depth == 0:
            return position
    return len(text)


# ------------------------------------------------------------------------------------------------------------- house


def files(root: Path, *suffixes: str) -> Iterator[Path]:
    """Yield the source files below a folder, without hidden folders and build outputs."""
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        if path.suffix in suffixes and not any(part.startswith(".") or part in SKIPPED_FOLDERS for part in parts):
            yield path


def repeated_lines(paths: list[Path]) -> int:
    """Count the lines that lie in a block of six or more lines which occurs elsewhere too, blank lines aside."""
    windows: dict[tuple[str, ...], list[tuple[Path, int]]] = defaultdict(list)
    for path in paths:
        lines = [line.strip() for line in path.read_text().splitlines()]
        lines = [line for line in lines if line]
        for start in range(len(lines) - REPEATED_LINES + 1):
            windows[tuple(lines[start : start + REPEATED_LINES])].append((path, start))
    repeated = set()
    for places in windows.values():
        if len(places) > 1:
            repeated |= {(path, start + offset) for path, start in places for offset in range(REPEATED_LINES)}
    return len(repeated)


def measure(root: Path) -> House:
    """Measure a checkout."""
    python, native = list(files(root, ".py")), list(files(root, *NATIVE))
    own = {path: str(path.relative_to(root)) for path in (*python, *native)}
    readme = (root / "README.md").read_text()
    return House(
        functions=[one for path in python for one in python_functions(path, own[path])],
        kernels=[one for path in native if "csrc/kernels" in own[path] for one in kernels(path, own[path])],
        python_lines=sum(len(path.read_text().splitlines()) for path in python),
        native_lines=sum(len(path.read_text().splitlines()) for path in native),
        readme_lines=len(readme.splitlines()),
        readme_words=len(readme.split()),
        suppressions=sum(len(SUPPRESSIONS.findall(path.read_text())) for path in (*python, *native)),
        repeated_lines=repeated_lines([*python, *native]),
    )


def table(house: House) -> list[tuple[str, str]]:
    """Return the rows of the report: what is measured, and its value."""
    longest = max(house.functions, key=lambda one: one.lines)
    widest = max((one for one in house.functions if not one.exemption), key=lambda one: one.parameters)
    kernel = max(house.kernels, key=lambda one: one.lines)
    forwards = [one for one in house.functions if one.name.endswith(".forward")]
    forward = max(forwards, key=lambda one: one.lines)
    return [
        ("longest Python function", f"{longest.lines} lines: {longest}"),
        (f"Python functions over {MAX_LINES} lines", str(sum(one.lines > MAX_LINES for one in house.functions))),
        ("most parameters", f"{widest.parameters}: {widest}"),
        (f"functions over {MAX_PARAMETERS} parameters", str(len(_too_wide(house)))),
        ("longest forward", f"{forward.lines} lines: {forward}"),
        ("longest kernel body", f"{kernel.lines} lines: {kernel}"),
        ("lines in repeated blocks of 6 or more", str(house.repeated_lines)),
        ("suppressed findings (noqa, NOLINT, fmt)", str(house.suppressions)),
        ("README", f"{house.readme_lines} lines, {house.readme_words} words"),
        ("Python", f"{len(house.functions)} functions, {house.python_lines} lines"),
        ("C++ and CUDA", f"{len(house.kernels)} kernels, {house.native_lines} lines"),
    ]


def _too_wide(house: House) -> list[Function]:
    return [one for one in house.functions if one.parameters > MAX_PARAMETERS and not one.exemption]


def excesses(house: House) -> list[str]:
    """Return one sentence for each limit that is exceeded."""
    found = [
        f"{one} has {one.lines} lines; at most {MAX_LINES} are allowed"
        for one in house.functions
        if one.lines > MAX_LINES
    ]
    found += [
        f"{one} takes {one.parameters} parameters; at most {MAX_PARAMETERS} are allowed" for one in _too_wide(house)
    ]
    found += [
        f"the body of the kernel {one} has {one.lines} lines; at most {MAX_KERNEL_LINES} are allowed"
        for one in house.kernels
        if one.lines > MAX_KERNEL_LINES
    ]
    if house.readme_lines > MAX_README_LINES:
        found.append(f"README.md has {house.readme_lines} lines; at most {MAX_README_LINES} are allowed")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1], help="checkout to measure")
    house = measure(parser.parse_args().root.resolve())
    rows = table(house)
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows))
    exempt = [one for one in house.functions if one.exemption]
    if exempt:
        print("\nMore parameters by the rule of an interface:")
        print("\n".join(f"  {one}: {one.parameters} ({one.exemption})" for one in exempt))
    found = excesses(house)
    if found:
        print("\nAbove the limits:\n" + "\n".join(f"  {line}" for line in found))
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
