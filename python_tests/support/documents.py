"""The code blocks of the documentation: how to find them, run them, and check those that cannot run.

A block below `<!-- gpu -->`, `<!-- download -->` or `<!-- long -->` needs what a test does not have. Its commands are
checked instead: every option must be one that the program knows, every import must succeed.
"""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = {"sh", "python", "json"}
MARKS = {"gpu", "download", "long"}

# Programs of others that start one of ours, and those whose own options are not checked.
LAUNCHERS = {"torchrun", "accelerate", "nsys", "ncu"}
FOREIGN = {"cmake", "nsys"}

_PATH = re.compile(r"`((?:[\w.-]+/)*[\w.-]+/?)`")
_SOURCE = re.compile(r"[\w-]+\.(py|cu|cuh|cpp|h)")
_FENCE = re.compile(r"(?:^<!-- (?P<mark>\S+) -->\n)?^```(?P<language>\S*)\n(?P<text>.*?)^```$", re.M | re.DOTALL)


class Block(NamedTuple):
    """A fenced block; `mark` is None if it is to be run."""

    document: Path
    line: int
    language: str
    mark: str | None
    text: str

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"


def blocks(document: Path) -> list[Block]:
    """Return the fenced blocks of a Markdown file in their order."""
    text = document.read_text()
    return [
        Block(document, text.count("\n", 0, found.start("text")), found["language"], found["mark"], found["text"])
        for found in _FENCE.finditer(text)
    ]


def all_blocks() -> list[Block]:
    """Return the blocks of every document."""
    return [block for document in DOCUMENTS for block in blocks(document)]


def missing_paths(text: str) -> list[str]:
    """Return the paths of the repository in backticks that do not exist.

    They are relative to the repository or to flexattn_cuda/. NAME stands for any name, of which one must exist.
    """
    bases = (ROOT, ROOT / "flexattn_cuda")
    rooms = {entry.name for base in bases for entry in base.iterdir() if entry.is_dir()} - {"build"}
    named = set(_PATH.findall(_FENCE.sub("", text)))
    in_rooms = {path for path in named if "/" in path and path.partition("/")[0] in rooms}
    sources = {path for path in named if _SOURCE.fullmatch(path)}
    return [
        path
        for path in sorted(in_rooms | sources)
        if not any(any(base.glob(path.replace("NAME", "*"))) for base in bases)
    ]


# ---------------------------------------------------------------------------------------------------------------- run


def run(command: list[str], folder: Path, shims: Path) -> str:
    """Run a command as a user would, in a folder without the sources, and return its output; raise if it fails.

    `shims` is a folder for the commands that this interpreter's environment lacks: `flexattn` if the package was built
    in place, `python` if there is only `python3`.
    """
    shims.mkdir(exist_ok=True)
    for name, module in (("python", ""), ("flexattn", "-m flexattn_cuda.cli")):
        (shims / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {module} "$@"\n')
        (shims / name).chmod(0o755)
    path = os.pathsep.join([str(Path(sys.executable).parent), str(shims), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, f"{shlex.join(command)}\n{ended.stdout}\n{ended.stderr}"
    return ended.stdout


def run_page(page: list[Block], folder: Path, shims: Path) -> str:
    """Run the unmarked blocks of a page: its shell blocks in order, then its Python blocks as one script."""
    runnable = [block for block in page if block.mark is None]
    shell = [block.text for block in runnable if block.language == "sh"]
    python = [block.text for block in runnable if block.language == "python"]
    output = [run(["bash", "-euo", "pipefail", "-c", text], folder, shims) for text in shell]
    if python:
        output.append(run([sys.executable, "-c", "\n".join(python)], folder, shims))
    return "".join(output)


# -------------------------------------------------------------------------------------------------------------- check


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of every command of a shell block, without variables before it and without comments."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words:
            yield words


def check_shell(text: str, flexattn) -> None:
    """Raise AssertionError unless every program in a shell block knows its options.

    Args:
        text: The block.
        flexattn: The fixture that runs `flexattn` in this process.
    """
    for words in commands(text):
        check_command(words, flexattn)


def check_command(words: list[str], flexattn) -> None:
    """Raise AssertionError unless the program of one command knows its options."""
    program, rest = Path(words[0]).name, words[1:]
    if program in LAUNCHERS:
        program, rest = _launched(words)
    match program:
        case "flexattn":
            # click rejects unknown options before it obeys --help, and runs nothing.
            code, _, error = flexattn(*rest, "--help")
            assert code == 0, f"flexattn {shlex.join(rest)}: {error}"
        case "python":
            _check_python(rest)
        case "make":
            _check_make(rest)
        case "pip":
            _check_pip(rest)
        case "run":  # .ci/run
            steps = subprocess.run([ROOT / ".ci/run", "--list"], capture_output=True, text=True, check=True).stdout
            assert set(rest) <= {*steps.split(), "--all"}, f".ci/run has no step {rest}; it has {steps}"
        case "flexattn_bench":
            source = "".join(path.read_text() for path in sorted((ROOT / "csrc" / "bench").iterdir()))
            _all_known([word[2:] for word in rest if word.startswith("--")], source, "flexattn_bench")
        case _:
            assert program in FOREIGN, f"no check is known for {shlex.join(words)}"


def _launched(words: list[str]) -> tuple[str, list[str]]:
    """Return the program of ours that a launcher starts; the launcher's own name if it starts none."""
    for position, word in enumerate(words):
        if Path(word).name in ("flexattn", "flexattn_bench"):
            return Path(word).name, words[position + 1 :]
        if word == "flexattn_cuda.cli" and words[position - 1] == "-m":
            return "flexattn", words[position + 1 :]
    if words[-1].endswith(".py"):  # the user's own script
        return "nsys", []
    return words[0], words[1:]


def _check_python(rest: list[str]) -> None:
    if rest[:2] == ["-m", "pytest"]:
        for path in (word for word in rest[2:] if "/" in word):
            assert (ROOT / path).exists(), f"there is no {path}"
        return
    if rest[0] == "-m":
        program, options = ["-m", rest[1]], rest[2:]
    else:
        assert (ROOT / rest[0]).exists(), f"there is no {rest[0]}"
        program, options = [rest[0]], rest[1:]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "COLUMNS": "200",
    }
    shown = subprocess.run(
        [sys.executable, *program, "--help"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    _all_known([word.partition("=")[0] for word in options if word.startswith("-")], shown.stdout, " ".join(program))


def _all_known(options: list[str], text: str, program: str) -> None:
    unknown = [option for option in options if option not in text]
    assert not unknown, f"{program} has no {', '.join(unknown)}"


def _check_make(rest: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY: (.*)$", makefile, re.M).group(1).split())
    variables = set(re.findall(r"^([A-Z_0-9]+) \?=", makefile, re.M))
    for word in rest:
        name, assigned, _ = word.partition("=")
        known = variables if assigned else targets
        assert name in known, f"the Makefile has no {name}; it has {', '.join(sorted(known))}"


def _check_pip(rest: list[str]) -> None:
    assert rest[0] == "install", f"pip {rest[0]}"
    section = (
        (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    )
    extras = re.findall(r"^(\w+) = \[", section, re.M)
    for word in rest[1:]:
        if found := re.fullmatch(r"\.\[(.*)\]", word):
            unknown = set(found.group(1).split(",")) - set(extras)
            assert not unknown, f"there is no extra {unknown}; there are {', '.join(extras)}"


def check_python(text: str) -> None:
    """Raise unless a Python block compiles and what it imports exists."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"
