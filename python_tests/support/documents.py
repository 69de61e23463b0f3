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
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from flexattn_cuda import native

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = {"sh", "python", "json"}
MARKS = {"gpu", "download", "long"}

# Programs of others that start one of ours, and those whose own options are not checked.
LAUNCHERS = {"torchrun", "accelerate", "nsys", "ncu"}
FOREIGN = {"cmake", "lmms-eval", "nsys"}

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


def copy_of_sources(folder: Path) -> Path:
    """Write the tracked files into a folder, as a fresh clone has them, and return it."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.rstrip("\0").split("\0"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    return folder


# The build is tested elsewhere (.ci/run); here the compiled part that the tests run with stands for it.
_SETUP = """
import shutil
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

class Copy(build_ext):
    def build_extension(self, extension):
        shutil.copyfile({compiled!r}, self.get_ext_fullpath(extension.name))

setup(ext_modules=[Extension("flexattn_cuda._C", [])], cmdclass={{"build_ext": Copy}})
"""


def install(sources: Path, folder: Path) -> Path:
    """Run `pip install .` on a copy of the sources in a new virtual environment, and return its folder of programs.

    The packages that flexattn_cuda needs are those of this interpreter's environment.
    """
    (sources / "setup.py").write_text(_SETUP.format(compiled=native.compiled.__file__))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    [packages] = folder.glob("lib/python*/site-packages")
    (packages / "packages_of_the_tests.pth").write_text(sysconfig.get_path("purelib"))
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install"]
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--ignore-installed"]
    run([*pip, *options, str(sources)], sources, Path(sys.executable).parent)
    return folder / "bin"


def run(command: list[str], folder: Path, programs: Path) -> str:
    """Run a command as a user would, and return its output; raise if it fails.

    Args:
        command: Its words.
        folder: Where.
        programs: The folder of programs of the virtual environment that is active.
    """
    path = os.pathsep.join([str(programs), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1800)
    assert ended.returncode == 0, f"{shlex.join(command)}\n{ended.stdout}\n{ended.stderr}"
    return ended.stdout


_SHELL = """
import subprocess
def shell(text):
    subprocess.run(["bash", "-euo", "pipefail", "-c", text], check=True)
"""


def run_page(page: list[Block], folder: Path, programs: Path) -> str:
    """Run the unmarked blocks of a page in their order, the Python blocks as one script; return what they print."""
    runnable = [block for block in page if block.mark is None and block.language in ("sh", "python")]
    script = [block.text if block.language == "python" else f"shell({block.text!r})" for block in runnable]
    return run(["python", "-u", "-c", "\n".join([_SHELL, *script])], folder, programs)


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
        case "source":
            makefile = (ROOT / "Makefile").read_text()
            [folder] = re.findall(r"^VENV \?= (.*)$", makefile, re.M)
            assert rest == [f"{folder}/bin/activate"], f"the Makefile installs into {folder}"
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
    targets = {name for names in re.findall(r"^\.PHONY: (.*)$", makefile, re.M) for name in names.split()}
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
