"""Builds flexattn_cuda._C against the torch that is installed in the environment. pyproject.toml holds everything else.

Switches (environment variables):
    FLEXATTN_CUDA         1: with CUDA kernels, or fail; 0: without; auto (default): with them where a CUDA toolkit and a
                          CUDA build of torch are found. Whether a GPU is present plays no part.
    TORCH_CUDA_ARCH_LIST  GPU architectures, e.g. "7.0;8.0"; by default all below that the compiler can target.
    MAX_JOBS              Compiler processes at a time; by default what cores and free memory allow.
    CUDA_HOME             The CUDA toolkit.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent
ARCHITECTURES = ("7.0", "7.5", "8.0", "8.6", "9.0")
GIB_PER_JOB = {"cpu": 1.5, "cuda": 3.0}

# Why a build has no CUDA kernels. The number is compiled in; flexattn_cuda/build.py holds the sentences.
WITH_CUDA, SWITCHED_OFF, NO_TOOLKIT, CPU_TORCH, VERSIONS_DIFFER = range(5)


class BuildError(SystemExit):
    """Ends the build with one line."""

    def __init__(self, message: str):
        super().__init__(f"flexattn_cuda: {message}")


def find_torch():
    """The environment's torch, also from inside pip's isolated build, which hides it but runs in the same prefix."""
    for path in {sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]}:
        if path not in sys.path:
            sys.path.append(path)
    try:
        import torch
    except ImportError:
        raise BuildError(
            "no torch in this environment; install one first (`pip install torch`, 2.6 or newer), then install this package"
        ) from None
    if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 6):
        raise BuildError(f"torch {torch.__version__} is installed; 2.6 or newer is needed")
    return torch


def sources(*kinds: str) -> list[str]:
    """Paths of csrc/sources.txt of these kinds (cpu, torch, cuda)."""
    lines = (line.split("#")[0].split() for line in (ROOT / "csrc" / "sources.txt").read_text().splitlines())
    return [f"csrc/{line[1]}" for line in lines if line and line[0] in kinds]


def toolkit(cuda_home: str | None) -> tuple[str, list[str]] | None:
    """Version of the CUDA compiler and the architectures it can target, e.g. ("13.0", ["7.5", ...]); None: no compiler."""
    nvcc = Path(cuda_home or "") / "bin" / "nvcc"
    if not cuda_home or not nvcc.exists():
        return None
    version = re.search(r"release (\d+\.\d+)", subprocess.check_output([nvcc, "--version"], text=True))
    listed = subprocess.check_output([nvcc, "--list-gpu-arch"], text=True)
    targets = [f"{arch[:-1]}.{arch[-1]}" for arch in re.findall(r"compute_(\d+)\b", listed)]
    return (version.group(1), targets) if version else None


def cuda_state(switch: str, torch_cuda: str | None, toolkit_version: str | None) -> int:
    """Decides whether CUDA kernels are built; with the switch at 1, a reason against them ends the build."""
    if switch not in ("0", "1", "auto"):
        raise BuildError(f"FLEXATTN_CUDA is {switch!r}; allowed: 0, 1, auto")
    if switch == "0":
        return SWITCHED_OFF
    if toolkit_version is None:
        state, reason = NO_TOOLKIT, "no CUDA toolkit found (set CUDA_HOME to the folder that holds bin/nvcc)"
    elif torch_cuda is None:
        state, reason = CPU_TORCH, "the installed torch is a CPU build"
    elif torch_cuda.split(".")[0] != toolkit_version.split(".")[0]:
        state = VERSIONS_DIFFER
        reason = f"torch was built with CUDA {torch_cuda}, the toolkit is {toolkit_version}: their major versions must agree"
    else:
        return WITH_CUDA
    if switch == "1":
        raise BuildError(f"FLEXATTN_CUDA=1, but {reason}")
    say(f"building without CUDA kernels: {reason}")
    return state


def architectures(targets: list[str], chosen: str | None) -> str:
    """TORCH_CUDA_ARCH_LIST: the user's, or every one of ARCHITECTURES that the compiler can target, the last also as PTX."""
    if chosen:
        return chosen
    if "7.0" not in targets:
        say("this CUDA compiler cannot target the V100 (sm_70); CUDA 12.9 is the last that can")
    found = [arch for arch in ARCHITECTURES if arch in targets]
    if not found:
        raise BuildError(f"the CUDA compiler targets none of {', '.join(ARCHITECTURES)}; set TORCH_CUDA_ARCH_LIST")
    return ";".join(found) + "+PTX"


def jobs(chosen: str | None, cores: int, free_gib: float, kind: str) -> int:
    """Compiler processes at a time."""
    if chosen:
        if not chosen.isdigit() or int(chosen) < 1:
            raise BuildError(f"MAX_JOBS is {chosen!r}; it must be a whole number from 1")
        return int(chosen)
    return max(1, min(cores, int(free_gib / GIB_PER_JOB[kind])))


def free_memory_gib() -> float:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (ValueError, OSError):
        return GIB_PER_JOB["cuda"]


def say(message: str) -> None:
    print(f"flexattn_cuda: {message}", file=sys.stderr, flush=True)


def main() -> None:
    from setuptools import setup

    torch = find_torch()
    from torch.utils import cpp_extension

    found = toolkit(cpp_extension.CUDA_HOME)
    state = cuda_state(os.environ.get("FLEXATTN_CUDA", "auto"), torch.version.cuda, found and found[0])
    kind = "cuda" if state == WITH_CUDA else "cpu"
    os.environ["MAX_JOBS"] = str(jobs(os.environ.get("MAX_JOBS"), os.cpu_count() or 1, free_memory_gib(), kind))
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M).group(1)
    macros = [("FLEXATTN_VERSION", version), ("FLEXATTN_CUDA_STATE", str(state))]
    flags = {"cxx": ["-O3"]}  # cpp_extension adds the C++ standard that this torch needs
    extension, files = cpp_extension.CppExtension, sources("cpu", "torch")
    if state == WITH_CUDA:
        arch_list = os.environ["TORCH_CUDA_ARCH_LIST"] = architectures(found[1], os.environ.get("TORCH_CUDA_ARCH_LIST"))
        say(f"building with CUDA kernels: toolkit {found[0]}, architectures {arch_list}")
        macros += [
            ("FLEXATTN_WITH_CUDA", None),
            ("FLEXATTN_CUDA_TOOLKIT", found[0]),
            ("FLEXATTN_ARCHITECTURES", re.sub(r"[;\s]+", ",", arch_list)),
        ]
        flags["nvcc"] = ["-O3"]
        extension, files = cpp_extension.CUDAExtension, files + sources("cuda")
    setup(
        ext_modules=[
            extension(
                "flexattn_cuda._C",
                files,
                include_dirs=[str(ROOT / "csrc" / "include")],
                define_macros=macros,
                extra_compile_args=flags,
            )
        ],
        cmdclass={"build_ext": cpp_extension.BuildExtension},
    )


if __name__ == "__main__":
    main()
