"""Builds flexattn_cuda._C against the torch that is installed in the environment. pyproject.toml holds everything else.

Switches (environment variables):
    FLEXATTN_CUDA         1: with CUDA kernels, or fail; 0: without; auto (default): with them where a CUDA build of torch
                          and a CUDA toolkit are found. Whether a GPU is present plays no part.
    TORCH_CUDA_ARCH_LIST  GPU architectures, e.g. "7.0;8.0+PTX"; by default all of ARCHITECTURES that the compiler can target.
    MAX_JOBS              Compiler processes at a time; by default what cores and free memory allow.
    CUDA_HOME             The CUDA toolkit.
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

ROOT = Path(__file__).resolve().parent
LOWEST_TORCH = (2, 6)
ARCHITECTURES = ("7.0", "7.5", "8.0", "8.6", "8.9", "9.0")
GIB_PER_JOB = {"cpu": 1.5, "cuda": 2.5}  # one compiler process at its largest


class BuildError(SystemExit):
    """Ends the build with one line."""

    def __init__(self, message: str):
        super().__init__(f"flexattn_cuda: {message}")


def say(message: str) -> None:
    print(f"flexattn_cuda: {message}", file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------------------- torch


def environment_paths() -> list[str]:
    """Folders with the packages of the environment that is installed into.

    pip's isolated build hides them, but it runs the environment's own interpreter, which still knows where they are.
    """
    paths = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    if sys.prefix == sys.base_prefix:  # a virtual environment does not see the user's packages
        paths.append(site.getusersitepackages())
    return list(dict.fromkeys(path for path in paths if os.path.isdir(path)))


def find_torch(paths: list[str]):
    """torch and its torch.utils.cpp_extension, from the visible packages or else from `paths`.

    `paths` are searched last and for these imports alone: nothing else of the environment may leak into an isolated build.
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
            " (with --no-build-isolation where another installer than pip hides it)"
        ) from None
    except (ImportError, OSError) as error:
        raise BuildError(f"the installed torch cannot be imported: {error}") from None
    finally:
        for path in hidden:
            if path in sys.path:
                sys.path.remove(path)


def check_torch_version(version: str) -> None:
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < LOWEST_TORCH:
        raise BuildError(f"torch {version} is installed; {LOWEST_TORCH[0]}.{LOWEST_TORCH[1]} or newer is needed")


# ---------------------------------------------------------------------------------------------------------------- CUDA


def find_toolkit(cuda_home: str | None) -> tuple[str, list[str]] | None:
    """Version of the CUDA compiler and the architectures it can target, e.g. ("13.0", ["7.5", ...]); None: no compiler."""
    nvcc = Path(cuda_home or "") / "bin" / "nvcc"
    if not cuda_home or not nvcc.exists():
        return None
    try:
        version = subprocess.check_output([nvcc, "--version"], text=True)
        listed = subprocess.check_output([nvcc, "--list-gpu-arch"], text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        say(f"{nvcc} does not run: {error}")
        return None
    return toolkit_facts(version, listed)


def toolkit_facts(version: str, listed: str) -> tuple[str, list[str]] | None:
    """The same from what `nvcc --version` and `nvcc --list-gpu-arch` print."""
    found = re.search(r"release (\d+\.\d+)", version)
    targets = [f"{arch[:-1]}.{arch[-1]}" for arch in re.findall(r"compute_(\d+)\b", listed)]
    return (found.group(1), targets) if found else None


def why_no_cuda(switch: str, torch_version: str, torch_cuda: str | None, toolkit: str | None) -> str | None:
    """Why CUDA kernels are not built, or None where they are; with the switch at 1, a reason against them ends the build."""
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
        reason = f"torch {torch_version} was built with CUDA {torch_cuda} and the toolkit is {toolkit}: their major versions must agree"
    else:
        return None
    if switch == "1":
        raise BuildError(f"FLEXATTN_CUDA=1, but {reason}")
    return reason


def architectures(targets: list[str], chosen: str | None) -> list[str]:
    """What is compiled for: the user's TORCH_CUDA_ARCH_LIST, or every one of ARCHITECTURES that the compiler can target.

    The last of the default list is also compiled to PTX, which newer GPUs run.
    """
    if chosen and chosen.strip():
        wanted = re.split(r"[;,\s]+", chosen.strip(" ;,"))
        number = re.compile(r"(\d+\.\d)[af]?(\+PTX)?")
        unknown = [arch for arch in wanted if not number.fullmatch(arch)]
        if unknown:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST has {', '.join(unknown)}; it takes numbers such as 7.0;8.0+PTX")
        impossible = [arch for arch in wanted if number.fullmatch(arch).group(1) not in targets]
        if impossible:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST asks for {', '.join(impossible)}, this CUDA compiler targets {', '.join(targets)}"
            )
        return wanted
    if "7.0" not in targets:
        say("this CUDA compiler cannot target the V100 (7.0): that takes a toolkit older than CUDA 13")
    found = [arch for arch in ARCHITECTURES if arch in targets]
    if not found:
        raise BuildError(f"this CUDA compiler targets none of {', '.join(ARCHITECTURES)}; set TORCH_CUDA_ARCH_LIST")
    return [*found[:-1], found[-1] + "+PTX"]


# --------------------------------------------------------------------------------------------------------------- build


def sources(*kinds: str) -> list[str]:
    """Paths in csrc/sources.txt of these kinds (cpu, torch, cuda, bench, simt)."""
    lines = (line.split("#")[0].split() for line in (ROOT / "csrc" / "sources.txt").read_text().splitlines())
    return [f"csrc/{line[1]}" for line in lines if line and line[0] in kinds]


def jobs(chosen: str | None, cores: int, free_gib: float, kind: str) -> int:
    """Compiler processes at a time."""
    if chosen:
        if not chosen.isdigit() or int(chosen) < 1:
            raise BuildError(f"MAX_JOBS is {chosen!r}; it must be a whole number from 1")
        return int(chosen)
    return max(1, min(cores, int(free_gib / GIB_PER_JOB[kind])))


def free_memory_gib() -> float:
    """Memory that new processes can have; without /proc, enough for one of them."""
    try:
        available = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
        return int(available.group(1)) / 2**20
    except (OSError, AttributeError):
        return GIB_PER_JOB["cuda"]


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def text(value: str) -> str:
    """A string literal of C."""
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def main() -> None:
    from setuptools import setup

    torch, cpp_extension = find_torch(environment_paths())
    toolkit = find_toolkit(cpp_extension.CUDA_HOME)
    reason = why_no_cuda(
        os.environ.get("FLEXATTN_CUDA", ""),
        torch.__version__,
        torch.version.cuda,
        toolkit and toolkit[0],
    )
    kind = "cpu" if reason else "cuda"
    os.environ["MAX_JOBS"] = str(jobs(os.environ.get("MAX_JOBS"), cores(), free_memory_gib(), kind))

    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M).group(1)
    facts = {
        "VERSION": version,
        "NO_CUDA_REASON": reason or "",
        "CUDA_TOOLKIT": "",
        "ARCHITECTURES": "",
    }
    macros, extension, files = [], cpp_extension.CppExtension, sources("cpu", "torch")
    if reason:
        say(f"building for the CPU only: {reason}")
    else:
        compiled_for = architectures(toolkit[1], os.environ.get("TORCH_CUDA_ARCH_LIST"))
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(compiled_for)
        facts |= {"CUDA_TOOLKIT": toolkit[0], "ARCHITECTURES": " ".join(compiled_for)}
        macros, extension, files = (
            [("FLEXATTN_WITH_CUDA", None)],
            cpp_extension.CUDAExtension,
            files + sources("cuda"),
        )
        say(f"building with CUDA kernels: toolkit {toolkit[0]}, architectures {' '.join(compiled_for)}")

    setup(
        ext_modules=[
            extension(
                "flexattn_cuda._C",
                files,
                include_dirs=[str(ROOT / "csrc" / "include")],
                define_macros=macros + [(f"FLEXATTN_{name}", text(value)) for name, value in facts.items()],
                # torch adds the C++ standard that it needs. at::parallel_for is a serial loop without OpenMP.
                extra_compile_args={
                    "cxx": ["-O3", "-g0", "-fopenmp", "-Wno-psabi"],
                    "nvcc": ["-O3"],
                },
                extra_link_args=["-fopenmp"],
            )
        ],
        cmdclass={"build_ext": cpp_extension.BuildExtension},
    )


if __name__ == "__main__":
    main()
