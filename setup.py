"""Build flexattn_cuda._C against the torch that is installed in the environment; pyproject.toml holds everything else.

Environment variables:
    FLEXATTN_CUDA         1: with CUDA kernels or fail; 0: without; auto (default): with them if a CUDA build of torch
                          and a CUDA toolkit are found. No GPU is needed to build.
    TORCH_CUDA_ARCH_LIST  GPU architectures, e.g. "7.0;8.0+PTX"; by default what the compiler knows of ARCHITECTURES.
    MAX_JOBS              Number of parallel compiler processes; by default what cores and free memory allow.
    CUDA_HOME             Folder of the CUDA toolkit.
"""

from __future__ import annotations

import importlib
import os
import re
import site
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent
LOWEST_TORCH = (2, 6)
ARCHITECTURES = ("7.0", "7.5", "8.0", "8.6", "8.9", "9.0")
GIB_PER_JOB = {"cpu": 1.5, "cuda": 2.5}  # peak memory of one compiler process


class BuildError(SystemExit):
    """Ends the build with one line instead of a traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(f"flexattn_cuda: {message}")


def say(message: str) -> None:
    print(f"flexattn_cuda: {message}", file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------------------- torch


def environment_paths() -> list[str]:
    """Return the package folders of the environment that the extension is installed into.

    pip's isolated build hides them but runs the environment's own interpreter, which still knows where they are.
    """
    paths = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    if sys.prefix == sys.base_prefix:  # a virtual environment does not see the user's packages
        paths.append(site.getusersitepackages())
    return list(dict.fromkeys(path for path in paths if os.path.isdir(path)))


def find_torch(paths: list[str]) -> tuple[ModuleType, ModuleType]:
    """Return torch and torch.utils.cpp_extension, from the visible packages or else from `paths`.

    `paths` are searched last and for these two only: nothing else of the environment may leak into an isolated build.
    """
    hidden = [path for path in paths if path not in sys.path]
    sys.path += hidden
    try:
        torch = importlib.import_module("torch")
        check_torch_version(torch.__version__)
        return torch, importlib.import_module("torch.utils.cpp_extension")
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise BuildError(f"the installed torch cannot be imported: {error}") from None
        raise BuildError(
            "no torch in this environment: `pip install torch` (2.6 or newer) first, then install flexattn_cuda again"
            " (with --no-build-isolation if an installer other than pip hides it)"
        ) from None
    except (ImportError, OSError) as error:
        raise BuildError(f"the installed torch cannot be imported: {error}") from None
    finally:
        for path in hidden:
            if path in sys.path:
                sys.path.remove(path)


def check_torch_version(version: str) -> None:
    """End the build if torch is older than LOWEST_TORCH."""
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < LOWEST_TORCH:
        raise BuildError(f"torch {version} is installed; {LOWEST_TORCH[0]}.{LOWEST_TORCH[1]} or newer is needed")


# ---------------------------------------------------------------------------------------------------------------- CUDA


class Toolkit(NamedTuple):
    """A CUDA compiler."""

    version: str  # e.g. "13.0"
    targets: list[str]  # architectures that it can target, e.g. ["7.5", ...]


def find_toolkit(cuda_home: str | None) -> Toolkit | None:
    """Return the CUDA toolkit in this folder, or None if there is no compiler that runs."""
    nvcc = Path(cuda_home or "") / "bin" / "nvcc"
    if not cuda_home or not nvcc.exists():
        return None
    try:
        version = subprocess.check_output([nvcc, "--version"], text=True)
        listed = subprocess.check_output([nvcc, "--list-gpu-arch"], text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        say(f"{nvcc} does not run: {error}")
        return None
    return parse_toolkit(version, listed)


def parse_toolkit(version: str, listed: str) -> Toolkit | None:
    """Return the toolkit that `nvcc --version` and `nvcc --list-gpu-arch` describe."""
    found = re.search(r"release (\d+\.\d+)", version)
    targets = [f"{arch[:-1]}.{arch[-1]}" for arch in re.findall(r"compute_(\d+)\b", listed)]
    return Toolkit(found.group(1), targets) if found else None


def why_no_cuda(switch: str, torch_version: str, torch_cuda: str | None, toolkit: str | None) -> str | None:
    """Return why CUDA kernels are not built, or None if they are; with switch "1", a reason ends the build."""
    switch = switch or "auto"
    if switch not in ("0", "1", "auto"):
        raise BuildError(f"FLEXATTN_CUDA is {switch!r}; allowed: 0, 1, auto")
    if switch == "0":
        return "switched off with FLEXATTN_CUDA=0"
    if torch_cuda is None:
        reason = f"torch {torch_version} is a build without CUDA"
    elif toolkit is None:
        reason = "no CUDA toolkit was found (CUDA_HOME names the folder that holds bin/nvcc)"
    elif torch_cuda.split(".")[0] != toolkit.split(".")[0]:
        reason = (
            f"torch {torch_version} was built with CUDA {torch_cuda} and the toolkit is {toolkit}:"
            " their major versions must agree"
        )
    else:
        return None
    if switch == "1":
        raise BuildError(f"FLEXATTN_CUDA=1, but {reason}")
    return reason


def architectures(targets: list[str], chosen: str | None) -> list[str]:
    """Return what to compile for: TORCH_CUDA_ARCH_LIST if set, else all of ARCHITECTURES that the compiler can target.

    The last of the default list is also compiled to PTX, which newer GPUs can run.
    """
    if chosen and chosen.strip():
        return chosen_architectures(targets, chosen)
    if "7.0" not in targets:
        say("this CUDA compiler cannot target the V100 (7.0); that takes a toolkit older than CUDA 13")
    found = [arch for arch in ARCHITECTURES if arch in targets]
    if not found:
        raise BuildError(f"this CUDA compiler targets none of {', '.join(ARCHITECTURES)}; set TORCH_CUDA_ARCH_LIST")
    return [*found[:-1], found[-1] + "+PTX"]


def chosen_architectures(targets: list[str], chosen: str) -> list[str]:
    """Return the entries of TORCH_CUDA_ARCH_LIST; end the build if the compiler does not know one."""
    wanted = re.split(r"[;,\s]+", chosen.strip(" ;,"))
    numbers = {arch: re.fullmatch(r"(\d+\.\d)[af]?(\+PTX)?", arch) for arch in wanted}
    unknown = [arch for arch, number in numbers.items() if not number]
    if unknown:
        raise BuildError(f"TORCH_CUDA_ARCH_LIST has {', '.join(unknown)}; it takes numbers such as 7.0;8.0+PTX")
    impossible = [arch for arch, number in numbers.items() if number.group(1) not in targets]
    if impossible:
        raise BuildError(
            f"TORCH_CUDA_ARCH_LIST asks for {', '.join(impossible)}; this CUDA compiler targets {', '.join(targets)}"
        )
    return wanted


# --------------------------------------------------------------------------------------------------------------- build


def sources(*kinds: str) -> list[str]:
    """Return the paths in csrc/sources.txt of these kinds (cpu, torch, cuda, bench, simt)."""
    lines = (line.split("#")[0].split() for line in (ROOT / "csrc" / "sources.txt").read_text().splitlines())
    return [f"csrc/{line[1]}" for line in lines if line and line[0] in kinds]


def jobs(chosen: str | None, cores: int, free_gib: float, kind: str) -> int:
    """Return how many compiler processes to run in parallel: MAX_JOBS if set, else what cores and memory allow."""
    if chosen:
        if not chosen.isdigit() or int(chosen) < 1:
            raise BuildError(f"MAX_JOBS is {chosen!r}; it must be a whole number of at least 1")
        return int(chosen)
    return max(1, min(cores, int(free_gib / GIB_PER_JOB[kind])))


def free_memory_gib() -> float:
    """Return the memory available to new processes; without /proc, enough for one of them."""
    try:
        available = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
        return int(available.group(1)) / 2**20
    except (OSError, AttributeError):
        return GIB_PER_JOB["cuda"]


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def package_version() -> str:
    """Return `__version__` of the package, read and not imported: importing needs the extension."""
    init = (ROOT / "flexattn_cuda" / "__init__.py").read_text()
    return re.search(r'^__version__ = "(.+)"$', init, re.M).group(1)


def c_literal(value: str) -> str:
    """Return the C string literal of a value."""
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


class Plan(NamedTuple):
    """What is built. The facts are compiled in, for `flexattn_cuda.build.build_info`."""

    cuda: bool
    sources: list[str]
    facts: dict[str, str]


def make_plan(torch: ModuleType, toolkit: Toolkit | None) -> Plan:
    """Decide between a build with CUDA kernels and one without, and say which and why."""
    reason = why_no_cuda(
        os.environ.get("FLEXATTN_CUDA", ""), torch.__version__, torch.version.cuda, toolkit and toolkit.version
    )
    facts = {"VERSION": package_version(), "TORCH": torch.__version__}
    if reason:
        say(f"building for the CPU only: {reason}")
        none = {"CUDA_TOOLKIT": "", "ARCHITECTURES": "", "NO_CUDA_REASON": reason}
        return Plan(False, sources("cpu", "torch"), facts | none)
    compiled_for = " ".join(architectures(toolkit.targets, os.environ.get("TORCH_CUDA_ARCH_LIST")))
    say(f"building with CUDA kernels: toolkit {toolkit.version}, architectures {compiled_for}")
    cuda = {"CUDA_TOOLKIT": toolkit.version, "ARCHITECTURES": compiled_for, "NO_CUDA_REASON": ""}
    return Plan(True, sources("cpu", "torch", "cuda"), facts | cuda)


def main() -> None:
    from setuptools import setup

    torch, cpp_extension = find_torch(environment_paths())
    plan = make_plan(torch, find_toolkit(cpp_extension.CUDA_HOME))
    kind = "cuda" if plan.cuda else "cpu"
    os.environ["MAX_JOBS"] = str(jobs(os.environ.get("MAX_JOBS"), cores(), free_memory_gib(), kind))
    macros: list[tuple[str, str | None]] = [
        (f"FLEXATTN_{name}", c_literal(value)) for name, value in plan.facts.items()
    ]
    if plan.cuda:
        os.environ["TORCH_CUDA_ARCH_LIST"] = plan.facts["ARCHITECTURES"].replace(" ", ";")
        macros.append(("FLEXATTN_WITH_CUDA", None))
    extension = cpp_extension.CUDAExtension if plan.cuda else cpp_extension.CppExtension
    setup(
        ext_modules=[
            extension(
                "flexattn_cuda._C",
                plan.sources,
                include_dirs=[str(ROOT / "csrc" / "include")],
                define_macros=macros,
                # torch adds the C++ standard that it needs. at::parallel_for is a serial loop without OpenMP. ncu shows
                # source lines thanks to -lineinfo.
                extra_compile_args={"cxx": ["-O3", "-g0", "-fopenmp", "-Wno-psabi"], "nvcc": ["-O3", "-lineinfo"]},
                extra_link_args=["-fopenmp"],
            )
        ],
        cmdclass={"build_ext": cpp_extension.BuildExtension},
    )


if __name__ == "__main__":
    main()
