"""Run everything that a machine with one NVIDIA GPU can tell, in under eight minutes and without a network.

    python benchmarks/gpu.py [--out build/gpu] [--dry-run]     (make gpu)

Builds the extension in place for this GPU; runs the tests that use it: the operators, once more with the V100's kernels
(FLEXATTN_CAPABILITY=70), the model, the command line; runs every kernel once under compute-sanitizer, and the
benchmarks. What tests the CPU alone is left out. Steps of a stage run at the same time, but nothing runs beside the
benchmarks. A failing step stops no other. The dry run needs no torch, and says how long each step should take and why.

Written to --out as it comes: summary.csv, gpu.log with the output of every step, and what the benchmarks write.
Exit 1: a step failed; a test file that could not be collected fails its step. Exit 2: there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import measuring
import tables

ROOT = Path(__file__).resolve().parent.parent
# pytest's arguments for the tests that use the GPU, in groups that run at the same time.
GROUPS = {
    "operators": ["python_tests/ops", "-k", "not cpu and not training_memory"],
    "model": ["python_tests/model/test_devices.py", "python_tests/model/test_profiling.py"],
    "command line": ["python_tests/tasks"],
}
PROCESSES = 4  # of each group of tests, if pytest-xdist is installed
PASSED, FAILED, LEFT_OUT = "passed", "FAILED", "left out"
FAILED_LINES = 25  # of a failed step's output that are printed
TEST_LIMIT = 150  # seconds


class Expected(NamedTuple):
    seconds: int
    why: str


@dataclass(frozen=True)
class Step:
    """A command, and how to run it.

    command: The first word is a program's name or path.
    limit: Seconds after which it is killed.
    expected: Seconds that it should take, and why.
    optional: Leave it out if there is no such program.
    shown: Print its output even if it succeeds.
    """

    name: str
    command: list[str]
    limit: int
    expected: Expected
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
    """Return the steps, stage by stage. architecture: That of the GPU, as TORCH_CUDA_ARCH_LIST takes it."""
    build = Step(
        "build",
        [python, "setup.py", "build_ext", "--inplace"],
        limit=180,
        expected=Expected(75, "the longest file compiles for 42 s, all of them for about 460 s on 8 or more cores"),
        environment={"FLEXATTN_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architecture},
    )
    runs_here = Step(
        "the build runs on this GPU", [python, "-c", RUNS_HERE], limit=20, expected=Expected(10, "imports torch")
    )
    benchmarks = Step(
        "benchmarks",
        [python, "benchmarks/bench_attention.py", "--out", str(out), "--seconds", "90"],
        limit=125,
        expected=Expected(110, "90 s of cases, the one begun last, imports and plots"),
        shown=True,
    )
    return [[build], [runs_here], [*test_steps(python), *sanitizer_steps(python)], [benchmarks]]


# Expected times are those of the CPU, where the same tests run: of processor time, that of all tests over PROCESSES.
def test_steps(python: str) -> list[Step]:
    pytest = [python, "-m", "pytest", "--continue-on-collection-errors", "-p", "no:cacheprovider", "-rfEs"]
    if importlib.util.find_spec("xdist"):
        pytest += ["-n", str(PROCESSES)]
    operators = Expected(50, "123 s of tests in 4 processes, and 20 s of imports and CUDA contexts")
    expected = {
        "operators": operators,
        "model": Expected(70, "the longest is compiled by inductor for 50 s; 20 s of imports and contexts"),
        "command line": Expected(85, "255 s of tests in 4 processes, and 20 s of imports and contexts"),
    }
    steps = [
        Step(f"tests: {group}", [*pytest, *chosen], TEST_LIMIT, expected[group]) for group, chosen in GROUPS.items()
    ]
    volta = Step(
        "tests: operators, the V100's kernels",
        steps[0].command,
        TEST_LIMIT,
        operators,
        environment={"FLEXATTN_CAPABILITY": "70"},
    )
    return [*steps, volta]


def sanitizer_steps(python: str) -> list[Step]:
    """Every kernel once; memcheck with an allocation of its own for every tensor."""
    common = ["--kernel-regex", "kns=flexattn", "--error-exitcode", "1"]
    check = [python, "benchmarks/bench_attention.py", "--quick", "--check"]
    expected = Expected(90, "a guess: what takes 10 s without the tool, and never ran under it")
    # torch asks for peers and libraries that may be absent, and handles the errors of the API itself.
    memcheck = Step(
        "memcheck",
        [sanitizer_path(), "--tool", "memcheck", "--report-api-errors", "no", *common, *check],
        TEST_LIMIT,
        expected,
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        optional=True,
    )
    racecheck = Step(
        "racecheck", [sanitizer_path(), "--tool", "racecheck", *common, *check], TEST_LIMIT, expected, optional=True
    )
    return [memcheck, racecheck]


RUNS_HERE = (
    "import sys; from flexattn_cuda import build; print(build.build_info()); sys.exit(build.cuda_unavailable_reason(0))"
)


def sanitizer_path() -> str:
    """Return where compute-sanitizer is; a toolkit may have it outside of the folder with nvcc."""
    homes = [Path(home) for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    folders = [str(home / part) for home in homes for part in ("bin", "compute-sanitizer")]
    path = os.pathsep.join([os.environ.get("PATH", ""), *folders])
    return shutil.which("compute-sanitizer", path=path) or "compute-sanitizer"


def run(step: Step) -> Result:
    if shutil.which(step.command[0]) is None:
        result = LEFT_OUT if step.optional else FAILED
        return Result(step.name, result, 0.0, f"there is no {step.command[0]} on this machine")
    print(f"{step.name}: {step}", flush=True)
    begin = time.perf_counter()
    process = subprocess.Popen(
        step.command,
        cwd=ROOT,
        env=environment() | step.environment,
        text=True,
        errors="replace",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=step.limit)
        ended = ""
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the compilers and workers that it started
        output, _ = process.communicate()
        ended = f"killed after {step.limit} s; "
    result = PASSED if process.returncode == 0 and not ended else FAILED
    return Result(step.name, result, time.perf_counter() - begin, ended + detail(output), output)


def environment() -> dict[str, str]:
    """Return a step's environment: its Python (with ninja) comes first, and this repository before a package."""
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
    """Return the last line, and the tests that pytest could not run because a package is missing."""
    lines = [line.strip("= ") for line in output.splitlines() if line.strip("= ")]
    return "; ".join([lines[-1] if lines else "no output", *not_run(output)])


def not_run(output: str) -> list[str]:
    """Return the files that could not be collected and the tests that lack a package, with the reasons."""
    files = re.findall(r"^_+ ERROR collecting (\S+) _+$.*?^E  +(.*?)$", output, re.M | re.S)
    tests = re.findall(r"^SKIPPED \[\d+\] (\S+): (could not import .*)$", output, re.M)
    return [f"not collected: {file} ({why})" for file, why in files] + [f"not run: {at} ({why})" for at, why in tests]


def run_all(stages: list[list[Step]], log: Path, keep: Callable[[list[Result]], None]) -> list[Result]:
    """Run every step of each stage at the same time; print the results, log the outputs, and `keep` what is there."""
    results: list[Result] = []
    with log.open("w") as file:
        for steps in stages:
            with ThreadPoolExecutor(len(steps)) as pool:
                for step, result in zip(steps, pool.map(run, steps)):
                    results.append(result)
                    print_result(step, result)
                    file.write(f"\n===== {result.step}: {result.result} after {result.seconds:.1f} s\n{result.output}")
                    file.flush()
                    keep(results)
    return results


def print_result(step: Step, result: Result) -> None:
    print(f"{result.step}: {result.result} after {result.seconds:.0f} s: {result.detail}", flush=True)
    lines = result.output.splitlines()
    if step.shown:
        print("\n".join(f"    {line}" for line in lines), flush=True)
    elif result.result == FAILED:
        print("\n".join(f"    {line}" for line in lines[-FAILED_LINES:]), flush=True)


def exit_code(results: list[Result]) -> int:
    return 1 if any(result.result == FAILED for result in results) else 0


def architecture_here() -> str | None:
    """Return the GPU's architecture, as TORCH_CUDA_ARCH_LIST takes it, or None if torch sees none."""
    import torch

    return "{}.{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else None


def print_plan(plan: list[list[Step]]) -> None:
    for number, steps in enumerate(plan, start=1):
        for step in steps:
            seconds, why = step.expected
            print(f"stage {number}, {step.name}: about {seconds} s ({why}), at most {step.limit} s\n    {step}")
    each = [max(step.expected.seconds for step in steps) for steps in plan]
    print(f"expected in all: {' + '.join(map(str, each))} = {sum(each)} s, the longest step of each stage")


def write_summary(results: list[Result], machine: measuring.Machine, out: Path) -> None:
    columns = ("step", "result", "seconds", "detail")
    rows = [dict(zip(columns, row)) for row in summary_rows(results)]
    tables.write_csv(out / "summary.csv", [machine.columns() | row for row in rows])


def summary_rows(results: list[Result]) -> list[tuple[str, str, str, str]]:
    return [(result.step, result.result, f"{result.seconds:.0f}", result.detail) for result in results]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder for results (default: build/gpu)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run none of them")
    args = parser.parse_args(arguments)

    out = args.out.resolve()
    if args.dry_run:
        print_plan(stages(sys.executable, "ARCHITECTURE-OF-THE-GPU", out))
        return 0
    architecture = architecture_here()
    if architecture is None:
        print("gpu: torch sees no GPU on this machine; --dry-run prints the commands.", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    begin, machine = time.perf_counter(), measuring.machine("cuda")
    plan = stages(sys.executable, architecture, out)
    results = run_all(plan, out / "gpu.log", lambda results: write_summary(results, machine, out))
    tables.print_table(str(machine), ("step", "result", "s", "detail"), summary_rows(results))
    failed = sum(result.result == FAILED for result in results)
    print(f"{len(results)} steps in {time.perf_counter() - begin:.0f} s, {failed} failed; results in {out}")
    return exit_code(results)


if __name__ == "__main__":
    sys.exit(main())
