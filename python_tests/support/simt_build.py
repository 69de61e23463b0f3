"""Build flexattn_cuda._C with the CUDA kernels on the executor of csrc/simt in place of the CPU kernels.

    python python_tests/support/simt_build.py races|sanitizers|cpu-sanitizers

With "races", memory accesses are watched (csrc/simt/memory_checks.h); "sanitizers" stands for AddressSanitizer and
UndefinedBehaviorSanitizer. "cpu-sanitizers" are the CPU kernels under these two.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils import cpp_extension

import flexattn_cuda

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
SANITIZERS = "-fsanitize=address,undefined"


@dataclass(frozen=True)
class Kind:
    """Compiler flags of all sources, those of the CUDA kernels alone, the linker's, and the sources' kinds."""

    common: str
    kernels: str = ""
    link: str = ""
    parts: tuple[str, ...] = ("torch", "cuda", "simt")

    @property
    def has_executor(self) -> bool:
        return "simt" in self.parts


_SANITIZED = f"-O1 -g1 {SANITIZERS} -fno-sanitize=vptr -fno-sanitize-recover=undefined"
# Aggregates stay whole (-fno-tree-sra), so that a 16-byte access is seen as one.
KINDS = {
    "races": Kind("-O1 -fno-tree-sra", kernels="-fsanitize=thread -g1"),
    "sanitizers": Kind(_SANITIZED, link=SANITIZERS),
    "cpu-sanitizers": Kind(f"{_SANITIZED} -fopenmp", link=f"{SANITIZERS} -fopenmp", parts=("torch", "cpu")),
}
FACTS = {
    "VERSION": flexattn_cuda.__version__,
    "TORCH": torch.__version__,
    "NO_CUDA_REASON": "",
    "CUDA_TOOLKIT": "executor on the CPU",
    "ARCHITECTURES": "",
}


def sources(kind: Kind) -> list[Path]:
    """Return every native source of such a build, with an executor the tests' own kernels too."""
    listed = [line.split() for line in (CSRC / "sources.txt").read_text().splitlines() if line and line[0] != "#"]
    wanted = [CSRC / path for part, path in listed if part in kind.parts]
    return wanted + (sorted((ROOT / "python_tests" / "simt").glob("*.c*")) if kind.has_executor else [])


def is_newer(target: Path, files: Iterable[Path]) -> bool:
    """Return whether the target is newer than the files, and than what decides how it is built."""
    files = [*files, Path(__file__), Path(flexattn_cuda.__file__), Path(torch.__file__)]
    return target.exists() and target.stat().st_mtime > max(path.stat().st_mtime for path in files)


def is_current(module: Path) -> bool:
    """Return whether the module is newer than every native source."""
    folders = (CSRC, ROOT / "python_tests" / "simt")
    return is_newer(module, (path for folder in folders for path in folder.rglob("*") if path.is_file()))


def read_by(target: Path) -> list[Path]:
    """Return the files of this repository that an object was compiled from; nothing if it was not compiled yet."""
    rule = target.with_suffix(".d")
    named = rule.read_text().replace("\\\n", " ").split()[1:] if rule.exists() else []
    return [path for path in map(Path, named) if path.is_relative_to(ROOT)]


def flags(kind: Kind) -> list[str]:
    """Return the compiler flags that every source takes."""
    include = [CSRC / "simt", CSRC / "include", CSRC / "kernels", CSRC / "torch", sysconfig.get_path("include")]
    return [
        *kind.common.split(),
        "-std=c++17",
        "-fPIC",
        "-fvisibility=hidden",
        *(["-DFLEXATTN_SIMT"] if kind.has_executor else []),
        "-DTORCH_EXTENSION_NAME=_C",
        "-Wno-unknown-pragmas",
        *(f'-DFLEXATTN_{name}="{value}"' for name, value in FACTS.items()),
        *(f"-I{path}" for path in (*include, *cpp_extension.include_paths())),
    ]


def build(name: str) -> Path:
    """Return the path of the module; rebuild what is older than a native source that it is made of."""
    kind = KINDS[name]
    folder = ROOT / "build" / "simt" / name
    folder.mkdir(parents=True, exist_ok=True)
    module = folder / "_C.so"
    if is_current(module):
        return module

    def compiled(source: Path) -> Path:
        target = folder / f"{source.parent.name}-{source.name}.o"
        files = read_by(target)
        if files and all(path.exists() for path in files) and is_newer(target, files):
            return target
        special = kind.kernels.split() if source.suffix == ".cu" else ["-O2"] if source.parent.name == "simt" else []
        command = ["g++", "-x", "c++", "-c", str(source), "-o", str(target), "-MMD", *flags(kind), *special]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources(kind)))
    libraries = Path(torch.__file__).parent / "lib"
    found = [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"]
    subprocess.run(["g++", "-shared", "-o", str(module), *map(str, objects), *kind.link.split(), *found], check=True)
    return module


def load(kind: str) -> Path:
    """Make it stand for flexattn_cuda._C, so that CPU tensors go to its kernels; _C must not be imported yet."""
    module, name = build(kind), "flexattn_cuda._C"
    loader = importlib.machinery.ExtensionFileLoader(name, str(module))
    sys.modules[name] = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(sys.modules[name])
    return module


if __name__ == "__main__":
    print(build(sys.argv[1]))
