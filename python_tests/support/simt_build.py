"""Builds flexattn_cuda._C with the CUDA kernels for the executor of csrc/simt, in place of the CPU's kernels.

    python python_tests/simt_build.py races|sanitizers

races: memory accesses are watched (csrc/simt/memory_checks.h). sanitizers: AddressSanitizer and UndefinedBehaviorSanitizer.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
# Aggregates stay whole (-fno-tree-sra), so that a 16-byte access is seen as one.
KINDS = {
    "races": ("-O1 -fno-tree-sra", "-fsanitize=thread -g1", ""),
    "sanitizers": ("-O1 -g1 -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined", "",
                   "-fsanitize=address,undefined"),
}  # fmt: skip
FACTS = {
    "VERSION": "",
    "NO_CUDA_REASON": "",
    "CUDA_TOOLKIT": "executor on the CPU",
    "ARCHITECTURES": "",
}


def sources() -> list[Path]:
    listed = [line.split() for line in (CSRC / "sources.txt").read_text().splitlines() if line and line[0] != "#"]
    wanted = [CSRC / path for kind, path in listed if kind in ("torch", "cuda", "simt")]
    return wanted + sorted((ROOT / "python_tests" / "simt").glob("*.c*"))


def build(kind: str) -> Path:
    """The module's path, built anew when a native source is newer."""
    common, kernels, link = KINDS[kind]
    folder = ROOT / "build" / "simt" / kind
    folder.mkdir(parents=True, exist_ok=True)
    newest = max(
        path.stat().st_mtime
        for part in (CSRC, ROOT / "python_tests" / "simt")
        for path in part.rglob("*")
        if path.is_file()
    )
    module = folder / "_C.so"
    if module.exists() and module.stat().st_mtime > newest:
        return module
    include = [
        CSRC / "simt",
        CSRC / "include",
        CSRC / "kernels",
        CSRC / "torch",
        sysconfig.get_path("include"),
        *cpp_extension.include_paths(),
    ]
    flags = [
        *common.split(),
        "-std=c++17",
        "-fPIC",
        "-fvisibility=hidden",
        "-DFLEXATTN_SIMT",
        "-DTORCH_EXTENSION_NAME=_C",
        "-Wno-unknown-pragmas",
    ]
    flags += [f'-DFLEXATTN_{name}="{value}"' for name, value in FACTS.items()] + [f"-I{path}" for path in include]

    def compiled(source: Path) -> Path:
        target = folder / (source.name + ".o")
        special = kernels.split() if source.suffix == ".cu" else ["-O2"] if source.parent.name == "simt" else []
        command = ["g++", "-x", "c++", "-c", str(source), "-o", str(target), *flags, *special]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources()))
    folder_of_torch = Path(torch.__file__).parent / "lib"
    subprocess.run(
        ["g++", "-shared", "-o", str(module), *map(str, objects), *link.split(), f"-L{folder_of_torch}", f"-Wl,-rpath,{folder_of_torch}",
         "-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"],
        check=True,
    )  # fmt: skip
    return module


def load(kind: str) -> Path:
    """Has it stand for flexattn_cuda._C, which must not be imported yet: CPU tensors then go to the CUDA kernels."""
    module, name = build(kind), "flexattn_cuda._C"
    loader = importlib.machinery.ExtensionFileLoader(name, str(module))
    sys.modules[name] = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(sys.modules[name])
    return module


if __name__ == "__main__":
    print(build(sys.argv[1]))
