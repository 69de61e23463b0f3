"""The CUDA toolkit: compile the kernels, and read what ptxas and cuobjdump print."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from sass.errors import UnmeasuredError
from sass.flow import Flow
from sass.instructions import Instruction, parse_sass
from sass.kernel import Kernel, Resources, short_name

ROOT = Path(__file__).resolve().parents[2]
LAST_FOR_SM_70 = 12  # the last major version of nvcc that can target the V100


@dataclass(frozen=True)
class Toolkit:
    """nvcc with the tools beside it, its host compiler, and the GPU architecture to compile for."""

    nvcc: Path
    host_compiler: str
    architecture: int  # 70 for sm_70

    @classmethod
    def find(cls, nvcc: str, host_compiler: str, architecture: int) -> Toolkit:
        """Raise UnmeasuredError if there is no such compiler, if it cannot target the architecture or lacks a tool."""
        path, last = shutil.which(nvcc), " up to 12.9" if architecture == 70 else ""
        if path is None:
            raise UnmeasuredError(f"there is no {nvcc}; set NVCC to an nvcc{last}, which can target sm_{architecture}.")
        version = re.search(r"release (\d+)\.(\d+)", run([path, "--version"]))
        if version is None or (last and int(version.group(1)) > LAST_FOR_SM_70):
            said = version.group(0) if version else "prints no version"
            raise UnmeasuredError(f"{path} {said}: sm_{architecture} takes an nvcc{last}.")
        for tool in ("cuobjdump", "ptxas"):
            if not (Path(path).parent / tool).exists():
                raise UnmeasuredError(f"there is no {tool} beside {path}.")
        return cls(Path(path), host_compiler, architecture)

    def compile(self, source: Path, root: Path, out: Path) -> list[Kernel]:
        """Compile a CUDA source of the repository at `root` into a cubin in `out`; return its kernels."""
        out.mkdir(parents=True, exist_ok=True)
        cubin = out / f"{source.stem}.cubin"
        includes = [f"-I{root / 'csrc' / folder}" for folder in ("include", "kernels")]
        target = f"arch=compute_{self.architecture},code=sm_{self.architecture}"
        said = run([self.nvcc, "-ccbin", self.host_compiler, "-std=c++17", "-O3", "-gencode", target, "-Xptxas", "-v",
                    *includes, "-cubin", "-o", cubin, source])  # fmt: skip
        resources = parse_resources(said)
        code = parse_sass(run([self.nvcc.parent / "cuobjdump", "--dump-sass", cubin]))
        names = zip(resources, self.demangle(list(resources)))
        return [make_kernel(short_name(name), resources[mangled], code[mangled]) for mangled, name in names]

    def demangle(self, names: list[str]) -> list[str]:
        tool = self.nvcc.parent / "cu++filt"
        return run([tool if tool.exists() else "c++filt", *names]).splitlines()


def make_kernel(name: str, resources: Resources, code: list[Instruction]) -> Kernel:
    loop = Flow.of(code).main_loop()
    return Kernel(name, resources, loop.steady, loop.everything) if loop else Kernel(name, resources, code, [])


def run(command: list[str | Path]) -> str:
    """Return what a program prints. Raise UnmeasuredError if it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise UnmeasuredError(f"`{' '.join(map(str, command))}` failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


_RESOURCES = re.compile(
    r"Compiling entry function '(\S+)' for 'sm_\d+'.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)",
    re.S,
)


def parse_resources(text: str) -> dict[str, Resources]:
    """Read the output of `ptxas -v`; return the resources by mangled name."""
    found = {}
    for name, stack, stores, loads, registers, rest in _RESOURCES.findall(text):
        shared = re.search(r"(\d+) bytes smem", rest)
        found[name] = Resources(
            registers=int(registers),
            spill_bytes=int(stores) + int(loads),
            stack_bytes=int(stack),
            static_shared_bytes=int(shared.group(1)) if shared else 0,
        )
    return found


def kernel_sources(root: Path) -> list[Path]:
    """Return the CUDA sources that csrc/sources.txt lists."""
    lines = (line.split("#")[0].split() for line in (root / "csrc" / "sources.txt").read_text().splitlines())
    return [root / "csrc" / line[1] for line in lines if line and line[0] == "cuda"]
