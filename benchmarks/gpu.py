"""Everything that a machine with one NVIDIA GPU can tell, in less than eight minutes and without a network.

    python benchmarks/gpu.py [--out build/gpu] [--dry-run]     (make gpu)

Builds the extension in place for this GPU, runs the tests on it, the operators' tests once more with the V100's kernels
(FLEXATTN_CAPABILITY=70), every kernel once under compute-sanitizer, and the benchmarks. Steps of a stage run at the same
time, but nothing runs beside the benchmarks. A step that fails stops no other.

Into --out: summary.csv, gpu.log with the output of every step, and what the benchmarks write.
Exit 1: a step failed; a test file that could not be collected fails its step. Exit 2: there is no GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import measuring
import torch

ROOT = Path(__file__).resolve().parent.parent
# Of the tests, what runs at the same time; the rest is a group, too.
GROUPS = {
    "operators": ["python_tests/ops/test_attention_paths.py", "python_tests/ops/test_ops.py"],
    "reference vectors": ["python_tests/model/test_reference_vectors.py"],
    "answers": [
        "python_tests/tasks/test_ask.py",
        "python_tests/tasks/test_load.py",
        "python_tests/tasks/test_ask_command.py",
        "python_tests/tasks/test_info_command.py",
        "python_tests/tasks/test_demo_command.py",
        "python_tests/tasks/test_command_line.py",
        "python_tests/model/test_default_model.py",
    ],
    "benchmarks": ["python_tests/benchmarks/test_bench_attention.py", "python_tests/benchmarks/test_gpu_run.py"],
}
PASSED, FAILED, LEFT_OUT = "passed", "FAILED", "left out"
FAILED_LINES = 25  # of a failed step's output are printed


@dataclass(frozen=True)
class Step:
    """A command, and how it is run.

    command: The first word is a program's name or path.
    limit: Seconds after which it is ended.
    optional: It is left out where there is no such program.
    shown: Its output is printed even if it succeeds.
    """

    name: str
    command: list[str]
    limit: int
    environment: dict[str, str] = field(default_factory=dict)
    optional: bool = False
    shown: bool = False

    def __str__(self) -> str:
        return shlex.join([*(f"{name}={value}" for name, value in self.environment.items()), *self.command])


@dataclass(frozen=True)
class Result:
    step: str
    result: str
    seconds: float
    detail: str
    output: str = ""


def stages(python: str, architecture: str, out: Path) -> list[list[Step]]:
    """architecture: Of the GPU, as TORCH_CUDA_ARCH_LIST takes it."""
    pytest = [
        python,
        "-m",
        "pytest",
        "--continue-on-collection-errors",
        "-p",
        "no:cacheprovider",
        "-rfEs",
    ]
    others = [f"--ignore={path}" for paths in GROUPS.values() for path in paths]
    volta = {"FLEXATTN_CAPABILITY": "70"}
    small_case = [python, "benchmarks/bench_attention.py", "--quick", "--check"]

    def sanitizer(tool: str, **environment: str) -> Step:
        command = [
            sanitizer_path(),
            "--tool",
            tool,
            "--kernel-regex",
            "kns=flexattn",
            "--error-exitcode",
            "1",
            *small_case,
        ]
        return Step(tool, command, limit=150, environment=environment, optional=True)

    return [
        [Step("build", [python, "setup.py", "build_ext", "--inplace"], limit=180,
              environment={"FLEXATTN_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architecture})],
        [Step("the build runs on this GPU", [python, "-c", RUNS_HERE], limit=20)],
        [
            *(Step(f"tests: {group}", [*pytest, *paths], limit=150) for group, paths in GROUPS.items()),
            Step("tests: the rest", [*pytest, "python_tests", *others], limit=150),
            Step("tests: operators, the V100's kernels", [*pytest, *GROUPS["operators"]], limit=150, environment=volta),
            sanitizer("memcheck", PYTORCH_NO_CUDA_MEMORY_CACHING="1"),  # an allocation of its own for every tensor
            sanitizer("racecheck"),
        ],
        [Step("benchmarks", [python, "benchmarks/bench_attention.py", "--out", str(out), "--seconds", "90"], limit=125,
              shown=True)],
    ]  # fmt: skip


RUNS_HERE = (
    "import sys; from flexattn_cuda import build; print(build.build_info()); sys.exit(build.cuda_unavailable_reason(0))"
)


def sanitizer_path() -> str:
    """A toolkit may have it outside of the folder with nvcc."""
    homes = [Path(home) for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    folders = [home / part for home in homes for part in ("bin", "compute-sanitizer")]
    return (
        shutil.which(
            "compute-sanitizer",
            path=os.pathsep.join([os.environ.get("PATH", ""), *map(str, folders)]),
        )
        or "compute-sanitizer"
    )


# -------------------------------------------------------------------------------------------------------------- a step


def run(step: Step) -> Result:
    if shutil.which(step.command[0]) is None:
        result = LEFT_OUT if step.optional else FAILED
        return Result(step.name, result, 0.0, f"there is no {step.command[0]} on this machine")
    print(f"{step.name}: {step}", flush=True)
    begin = time.perf_counter()
    process = subprocess.Popen(step.command, cwd=ROOT, env=environment() | step.environment, text=True, errors="replace",
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
    try:
        output, _ = process.communicate(timeout=step.limit)
        ended = ""
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the compilers and workers that it started, too
        output, _ = process.communicate()
        ended = f"ended after {step.limit} s; "
    result = PASSED if process.returncode == 0 and not ended else FAILED
    return Result(step.name, result, time.perf_counter() - begin, ended + detail(output), output)


def environment() -> dict[str, str]:
    """The step's own Python first on the path (with its ninja), this repository's package before an installed one."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    packages = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {
        "PATH": path,
        "PYTHONPATH": packages,
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": "200",
    }


def detail(output: str) -> str:
    """The last line, and what pytest could not run for want of a package."""
    lines = [line.strip("= ") for line in output.splitlines() if line.strip("= ")]
    return "; ".join([lines[-1] if lines else "no output", *not_run(output)])


def not_run(output: str) -> list[str]:
    """Test files that could not be collected, and tests that were skipped for want of a package, with the reason."""
    files = re.findall(r"^_+ ERROR collecting (\S+) _+$.*?^E  +(.*?)$", output, re.M | re.S)
    tests = re.findall(r"^SKIPPED \[\d+\] (\S+): (could not import .*)$", output, re.M)
    return [f"not collected: {file} ({why})" for file, why in files] + [f"not run: {at} ({why})" for at, why in tests]


# ------------------------------------------------------------------------------------------------------------ all steps


def run_all(stages: list[list[Step]], log: Path) -> list[Result]:
    results = []
    with log.open("w") as file:
        for steps in stages:
            with ThreadPoolExecutor(len(steps)) as pool:
                for step, result in zip(steps, pool.map(run, steps)):
                    results.append(result)
                    print(
                        f"{result.step}: {result.result} after {result.seconds:.0f} s: {result.detail}",
                        flush=True,
                    )
                    if step.shown or result.result == FAILED:
                        lines = result.output.splitlines()
                        print(
                            "\n".join(f"    {line}" for line in (lines if step.shown else lines[-FAILED_LINES:])),
                            flush=True,
                        )
                    file.write(f"\n===== {result.step}: {result.result} after {result.seconds:.1f} s\n{result.output}")
                    file.flush()
    return results


def exit_code(results: list[Result]) -> int:
    return 1 if any(result.result == FAILED for result in results) else 0


def architecture_here() -> str | None:
    return "{}.{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("build/gpu"),
        help="folder for the results (default: build/gpu)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands, and run none of them")
    args = parser.parse_args(arguments)

    architecture, out = architecture_here(), args.out.resolve()
    if args.dry_run:
        for number, steps in enumerate(stages(sys.executable, architecture or "ARCHITECTURE-OF-THE-GPU", out), start=1):
            for step in steps:
                print(f"stage {number}, at most {step.limit} s: {step}")
        return 0
    if architecture is None:
        print(
            "gpu: torch sees no GPU on this machine; --dry-run prints the commands.",
            file=sys.stderr,
        )
        return 2

    out.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    results = run_all(stages(sys.executable, architecture, out), out / "gpu.log")
    where = measuring.machine("cuda")
    rows = [(result.step, result.result, f"{result.seconds:.0f}", result.detail) for result in results]
    measuring.write_csv(
        out / "summary.csv",
        [where | dict(zip(("step", "result", "seconds", "detail"), row)) for row in rows],
    )
    measuring.print_table(
        f"{', '.join(f'{name} {value}' for name, value in where.items())}",
        ("step", "result", "s", "detail"),
        rows,
    )
    failed = sum(result.result == FAILED for result in results)
    print(f"{len(results)} steps in {time.perf_counter() - begin:.0f} s, {failed} failed; results in {out}")
    return exit_code(results)


if __name__ == "__main__":
    sys.exit(main())
